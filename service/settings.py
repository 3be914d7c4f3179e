"""Every setting of the service: its one home, its unit, its range.

Owns what there is to set, and that flags go before the environment, the environment before a YAML file and the file
before defaults; how these are read is `settings_sources`' business. Knows no engine beyond the plain `EngineConfig` it
fills in.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from service.engine.config import EngineConfig
from service.settings_sources import (
    ENV_PREFIX,
    PROGRAM,
    find_variable,
    make_parser,
    one_line,
)
from trimkv_core.budget import MAX_BLOCK_SIZE, MAX_BUFFER_SIZE
from trimkv_core.options import Option, SettingsError, contradiction, read_settings_file

# What the command line needs of settings is found here, wherever it is defined.
__all__ = ["PROGRAM", "Settings", "SettingsError", "build_parser", "load_settings", "parse_size"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(|[kmgt]i?)b?", re.IGNORECASE)


def parse_size(value: object) -> object:
    """Bytes out of `2GiB`, `80GB`, `512M` or a plain number; whatever is no text passes through.

    Raises:
        ValueError: text that is no size.
    """
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError(f"{value!r} is not a size such as 2GiB, 80GB or 1500000000")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def _parse_memory(value: object) -> object:
    """As `parse_size`; `auto` is None."""
    is_auto = isinstance(value, str) and value.strip().lower() == "auto"
    return None if is_auto else parse_size(value)


def _split_names(value: object) -> object:
    """`a,b` as two names, alone or in a list of flags or YAML; text without any stays as it is, to be refused."""
    if not isinstance(value, str | list):
        return value
    names: list[object] = []
    for item in [value] if isinstance(value, str) else value:
        parts = [part.strip() for part in item.split(",")] if isinstance(item, str) else [item]
        names += [part for part in parts if part != ""] or [item]
    return tuple(names)


_SERVER, _MODEL, _MEMORY, _REQUESTS, _OPERATION = (
    "where it listens",
    "what it serves",
    "memory and batching",
    "what a request may ask for",
    "operation",
)


class Settings(BaseSettings):
    """All settings of one service, checked."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True, env_ignore_empty=True)

    config: Annotated[
        Path | None,
        Field(description="YAML file with settings by their names, such as 'kv-memory: 8GiB'"),
        Option(_OPERATION, "FILE", "a readable YAML or JSON file"),
    ] = None

    host: Annotated[
        str,
        Field(min_length=1, description="address to listen on; 0.0.0.0 for all"),
        Option(_SERVER, "ADDRESS", "an address or host name"),
    ] = "127.0.0.1"
    port: Annotated[
        int,
        Field(ge=0, le=65535, description="TCP port; 0 picks a free one"),
        Option(_SERVER, "PORT", "an integer from 0 to 65535"),
    ] = 8000

    model: Annotated[
        str,
        Field(min_length=1, description="Hugging Face repo id, local folder, GGUF file, or 'embedded'"),
        Option(_MODEL, "MODEL", "a repo id, a folder, a GGUF file or 'embedded'"),
    ] = "embedded"
    gates: Annotated[
        str | None,
        Field(
            min_length=1, description="retention gates: repo id or local folder; without any, a model is served dense"
        ),
        Option(_MODEL, "GATES", "a repo id or a folder", "what comes with the embedded model"),
    ] = None
    served_model_name: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...],
        NoDecode,
        BeforeValidator(_split_names),
        Field(description="names that requests call the model by: a,b or the flag more than once"),
        Option(_MODEL, "NAME", "one or more names", "the model as given"),
    ] = ()
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Field(description="number format of weights and cache: auto, float32, bfloat16 or float16"),
        Option(_MODEL, "DTYPE", "auto, float32, bfloat16 or float16"),
    ] = "auto"
    device: Annotated[
        str,
        Field(pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$", description="where it runs: auto, cpu, cuda, cuda:N or mps"),
        Option(_MODEL, "DEVICE", "auto, cpu, cuda, cuda:N or mps"),
    ] = "auto"
    backend: Annotated[
        str,
        Field(min_length=1, description="attention backend; auto picks the best there is"),
        Option(_MODEL, "BACKEND", "auto, or a backend that is installed"),
    ] = "auto"
    enforce_eager: Annotated[
        bool,
        Field(description="no captured decode steps on a GPU: slower, starts sooner, takes less memory"),
        Option(_MODEL, "BOOL", "true or false"),
    ] = False
    max_model_len: Annotated[
        int | None,
        Field(ge=2, le=2**31 - 1, description="tokens of prompt and answer together"),
        Option(_MODEL, "TOKENS", "an integer of 2 or more", "what the base model allows"),
    ] = None

    kv_memory: Annotated[
        Annotated[int, Field(ge=1 << 20, le=1 << 50)] | None,
        BeforeValidator(_parse_memory),
        Field(description="memory of the page pool; auto: what a GPU has left, 2GiB on a CPU"),
        Option(_MEMORY, "SIZE", "auto, or a size from 1MiB to 1024TiB, such as 2GiB or 80GB", "auto"),
    ] = None
    gpu_memory_utilization: Annotated[
        float,
        Field(gt=0, le=1, description="share of a GPU's memory that --kv-memory auto fills, weights included"),
        Option(_MEMORY, "SHARE", "a number above 0 and up to 1"),
    ] = 0.9
    kv_dtype: Annotated[
        Literal["auto", "fp8_e4m3"],
        Field(description="number format of stored keys and values: auto (the model's) or fp8_e4m3 (8 bits, scaled)"),
        Option(_MEMORY, "DTYPE", "auto or fp8_e4m3"),
    ] = "auto"
    block_size: Annotated[
        int,
        Field(ge=1, le=MAX_BLOCK_SIZE, description="cache entries a page"),
        Option(_MEMORY, "ENTRIES", f"an integer from 1 to {MAX_BLOCK_SIZE}"),
    ] = 16
    max_num_seqs: Annotated[
        int,
        Field(ge=1, le=4096, description="sequences computed at once"),
        Option(_MEMORY, "N", "an integer from 1 to 4096"),
    ] = 64
    prefill_chunk: Annotated[
        int,
        Field(ge=1, le=65536, description="prompt tokens one step computes at most, and between evictions"),
        Option(_MEMORY, "TOKENS", "an integer from 1 to 65536"),
    ] = 512
    max_queue_requests: Annotated[
        int,
        Field(ge=1, le=1_000_000, description="requests that may wait"),
        Option(_MEMORY, "N", "an integer from 1 to 1000000"),
    ] = 256
    max_queue_tokens: Annotated[
        int,
        Field(ge=1, le=2**40, description="prompt tokens that may wait"),
        Option(_MEMORY, "TOKENS", "an integer from 1 to 2^40"),
    ] = 1_000_000

    kv_budget: Annotated[
        int | None,
        Field(ge=0, le=2**31 - 1, description="default kv_budget, entries a (layer, head) on average; 0 for dense"),
        Option(_REQUESTS, "ENTRIES", "an integer of 0 or more", "what the gates were trained with"),
    ] = None
    kv_buffer: Annotated[
        int,
        Field(ge=1, le=MAX_BUFFER_SIZE, description="default kv_buffer, slack in entries before an eviction"),
        Option(_REQUESTS, "ENTRIES", f"an integer from 1 to {MAX_BUFFER_SIZE}"),
    ] = 32
    max_kv_budget: Annotated[
        int | None,
        Field(ge=1, le=2**31 - 1, description="largest kv_budget a request may ask for"),
        Option(_REQUESTS, "ENTRIES", "an integer of 1 or more", "as long as the context"),
    ] = None
    allow_dense: Annotated[
        bool,
        Field(description="whether a request may keep everything; --no-allow-dense forbids it"),
        Option(_REQUESTS, "BOOL", "true or false"),
    ] = True
    max_output_tokens: Annotated[
        int | None,
        Field(ge=1, le=2**31 - 1, description="longest answer"),
        Option(_REQUESTS, "TOKENS", "an integer of 1 or more", "until the context is full"),
    ] = None
    default_max_tokens: Annotated[
        int,
        Field(ge=1, le=2**31 - 1, description="answer length of a dense request that names none"),
        Option(_REQUESTS, "TOKENS", "an integer of 1 or more"),
    ] = 1024
    max_body_bytes: Annotated[
        int,
        BeforeValidator(parse_size),
        Field(ge=1024, le=1 << 32, description="largest request body"),
        Option(_REQUESTS, "SIZE", "a size from 1KiB to 4GiB", "16MiB"),
    ] = 16 << 20

    keepalive_seconds: Annotated[
        float,
        Field(ge=0, le=3600, description="seconds between the keep-alive comments of a stream; 0 for none"),
        Option(_OPERATION, "SECONDS", "a number from 0 to 3600"),
    ] = 15.0
    drain_timeout: Annotated[
        float,
        Field(ge=0, le=86400, description="seconds that running requests get to end after SIGTERM"),
        Option(_OPERATION, "SECONDS", "a number from 0 to 86400"),
    ] = 30.0
    watchdog_seconds: Annotated[
        float,
        Field(ge=1, le=86400, description="age of a step in seconds at which /health/live reports failure"),
        Option(_OPERATION, "SECONDS", "a number from 1 to 86400"),
    ] = 300.0
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Field(
            description="least important lines that are logged: debug, info (one at the end of every request), "
            "warning or error"
        ),
        Option(_OPERATION, "LEVEL", "debug, info, warning or error"),
    ] = "info"
    log_format: Annotated[
        Literal["text", "json"],
        Field(description="log lines for a person (text), or one JSON object a line (json)"),
        Option(_OPERATION, "FORMAT", "text or json"),
    ] = "text"
    log_content: Annotated[
        bool,
        Field(description="log prompts and answers too; without it they are in no line and no trace"),
        Option(_OPERATION, "BOOL", "true or false"),
    ] = False

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        flags = init_settings.init_kwargs if isinstance(init_settings, InitSettingsSource) else {}
        path = flags.get("config") or os.environ.get(find_variable("config") or "")
        file_settings = InitSettingsSource(settings_cls, read_settings_file(path, example="port: 8000") if path else {})
        return init_settings, env_settings, file_settings

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_as_number(cls, value: object, info: ValidationInfo) -> object:
        # YAML's `true` and `on`, which pydantic reads as the number 1.
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise ValueError("true and false are no value of this setting")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.kv_budget == 0 and not self.allow_dense:
            raise contradiction("kv_budget", 0, "--no-allow-dense forbids requests without a budget")
        if self.kv_budget and self.max_kv_budget is not None and self.kv_budget > self.max_kv_budget:
            raise contradiction("kv_budget", self.kv_budget, f"at most --max-kv-budget={self.max_kv_budget}")
        if self.kv_budget and self.max_model_len is not None and self.kv_budget > self.max_model_len:
            raise contradiction("kv_budget", self.kv_budget, f"at most --max-model-len={self.max_model_len}")
        return self

    def engine_config(self) -> EngineConfig:
        """The part of these settings that the engine lives by."""
        return EngineConfig(
            model=self.model,
            gates=self.gates,
            dtype=self.dtype,
            device=self.device,
            backend=self.backend,
            enforce_eager=self.enforce_eager,
            kv_memory_bytes=self.kv_memory,
            gpu_memory_utilization=self.gpu_memory_utilization,
            kv_dtype=self.kv_dtype,
            block_size=self.block_size,
            max_num_seqs=self.max_num_seqs,
            max_model_len=self.max_model_len,
            prefill_chunk=self.prefill_chunk,
            max_queue_requests=self.max_queue_requests,
            max_queue_tokens=self.max_queue_tokens,
            kv_budget=self.kv_budget,
            kv_buffer=self.kv_buffer,
            max_kv_budget=self.max_kv_budget,
        )


def load_settings(argv: Sequence[str]) -> Settings:
    """Settings out of flags, environment and file.

    Raises:
        SettingsError: a value that is not possible; one line that names where it came from and what is allowed.
        SystemExit: `--help`, or flags that do not exist (status 2).
    """
    flags = vars(build_parser().parse_args(argv))
    try:
        return Settings(**flags)
    except ValidationError as error:
        raise SettingsError(one_line(error.errors(include_url=False)[0], Settings, flags)) from None


def build_parser() -> argparse.ArgumentParser:
    """Flags of all settings, grouped."""
    return make_parser(Settings, (_SERVER, _MODEL, _MEMORY, _REQUESTS, _OPERATION))
