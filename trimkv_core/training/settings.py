"""Every setting of `trimkv-train`: its one home, its unit, its range.

Owns what there is to set and which settings belong together; how they are read is `loading`'s business. Knows no model
and imports no PyTorch, so that `--help` does not wait.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trimkv_core.options import Option, contradiction, option_of

_RUN, _DATA, _GATES, _OBJECTIVE, _OPTIMISER, _COMPUTE, _OUTPUT = (
    "what is trained",
    "data",
    "gates",
    "what they are trained for",
    "optimiser",
    "computation",
    "running and saving",
)
_COUNT = "an integer of 1 or more"
_ENTRIES = "a number above 0"
_WEIGHT = "a number of 0 or more"
_TRUTH = "true or false"

_Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class TrainSettings(BaseModel):
    """All settings of one training run, checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())

    model: Annotated[
        str,
        Field(min_length=1, description="base model: embedded, a hub repo id, or a folder; it stays as it is"),
        Option(_RUN, "NAME", "embedded, a hub repo id or a folder"),
    ]
    data: Annotated[
        tuple[str, ...],
        Field(
            min_length=1,
            description="texts: .txt and .md files (a document each), .jsonl and .json files of {'text': ...} or "
            "{'messages': [...]}, folders of these, or datasets:NAME[:SPLIT[:COLUMN]]",
        ),
        Option(_RUN, "FILE", "one or more files, folders or datasets:NAME[:SPLIT[:COLUMN]]"),
    ]
    output: Annotated[
        Path,
        Field(description="folder that becomes the gate checkpoint, with loss.csv, loss.png and settings.json"),
        Option(_RUN, "FOLDER", "a folder that is empty, or does not exist yet", alters_run=False),
    ]
    memory_size: Annotated[
        _Count,
        Field(description="M, the budget the gates are meant for: entries a stream (layer and KV head) on average"),
        Option(_RUN, "ENTRIES", _COUNT),
    ]
    seq_len: Annotated[
        int,
        Field(ge=2, le=2**24, description="tokens a row; documents are packed into rows and never see each other"),
        Option(_RUN, "TOKENS", "an integer from 2 to 16777216"),
    ]
    steps: Annotated[_Count, Field(description="optimiser steps of the whole run"), Option(_RUN, "N", _COUNT)]

    data_weights: Annotated[
        tuple[_Positive, ...] | None,
        Field(description="share of rows from each --data, in its order and any unit; none: in proportion to tokens"),
        Option(_DATA, "WEIGHT", "one number above 0 for each --data, or none"),
    ] = None
    chat_loss: Annotated[
        Literal["all", "assistant"],
        Field(description="which tokens of a chat are learnt from: all, or the assistant's turns"),
        Option(_DATA, "WHICH", "all or assistant"),
    ] = "all"
    long_seq_len: Annotated[
        int | None,
        Field(ge=2, le=2**24, description="tokens of the one row that every --long-every-th step uses instead"),
        Option(_DATA, "TOKENS", "an integer from 2 to 16777216, or none"),
    ] = None
    long_every: Annotated[
        _Count,
        Field(description="with --long-seq-len, every how many steps a long row comes"),
        Option(_DATA, "STEPS", _COUNT),
    ] = 8

    gates: Annotated[
        str | None,
        Field(min_length=1, description="gate checkpoint to start from (embedded, repo id or folder); none: fresh"),
        Option(_GATES, "NAME", "embedded, a hub repo id, a folder, or none"),
    ] = None
    retention_gate: Annotated[
        Literal["rg10", "rg"],
        Field(description="architecture of fresh gates: rg10 (DBTrimKV) or rg (TrimKV)"),
        Option(_GATES, "KIND", "rg10 or rg"),
    ] = "rg10"
    retention_gate_intermediate_size: Annotated[
        int, Field(ge=1, le=65536, description="width of fresh gates"), Option(_GATES, "WIDTH", "an integer to 65536")
    ] = 512
    tie_retention_gate_layers: Annotated[
        bool | None,
        Field(description="whether fresh gates share the last projection and the bias over all layers"),
        Option(_GATES, "BOOL", _TRUTH, "true for rg10"),
    ] = None
    bias_init: Annotated[
        float,
        Field(
            ge=-50,
            le=50,
            description="start of a fresh gate's bias; at 18 (the paper) gradients start at 1e-8, 6 learns faster",
        ),
        Option(_GATES, "BIAS", "a number from -50 to 50"),
    ] = 18.0
    scale_inputs: Annotated[
        bool,
        Field(description="divide a fresh gate's first weights by the rms of its layer's input, measured on one row"),
        Option(_GATES, "BOOL", _TRUTH),
    ] = False

    loss: Annotated[
        Literal["fwkl", "ntp", "fwkl_ntp", "rvkl", "rvkl_ntp"],
        Field(description="forward KL to the ungated model, next token, their mean, reverse KL, or its mean with that"),
        Option(_OBJECTIVE, "LOSS", "fwkl, ntp, fwkl_ntp, rvkl or rvkl_ntp"),
    ] = "fwkl_ntp"
    global_capacity: Annotated[
        bool | None,
        Field(description="one budget for all streams of a sequence (DBTrimKV), not one for each (TrimKV)"),
        Option(_OBJECTIVE, "BOOL", _TRUTH, "true for rg10"),
    ] = None
    capacity_weight: Annotated[
        _NotNegative, Field(description="weight of the capacity hinge"), Option(_OBJECTIVE, "WEIGHT", _WEIGHT)
    ] = 1.0
    capacity_target: Annotated[
        _Positive | None,
        Field(description="entries a stream that the hinge asks for; a quarter of the budget served evicts better"),
        Option(_OBJECTIVE, "ENTRIES", f"{_ENTRIES}, or none", "--memory-size"),
    ] = None
    capacity_target_start: Annotated[
        _Positive | None,
        Field(description="the target at the first step; falls to the target in a line over half the run"),
        Option(_OBJECTIVE, "ENTRIES", f"{_ENTRIES}, or none", "the target"),
    ] = None
    epsilon: Annotated[
        _NotNegative,
        Field(description="decay near an entry: f(s) = epsilon s + (kappa - epsilon) min(s + 1, 0); 1 is the paper's"),
        Option(_OBJECTIVE, "SLOPE", _WEIGHT),
    ] = 1.0
    kappa: Annotated[
        _Positive,
        Field(description="decay far from an entry, see --epsilon; 1 is the paper's"),
        Option(_OBJECTIVE, "SLOPE", _ENTRIES),
    ] = 1.0
    kappa_end: Annotated[
        _Positive | None,
        Field(description="kappa at the last step, reached in a line"),
        Option(_OBJECTIVE, "SLOPE", f"{_ENTRIES}, or none", "--kappa"),
    ] = None
    act_evictions: Annotated[
        bool,
        Field(description="act out evictions down to the capacity target in place of decay and hinge"),
        Option(_OBJECTIVE, "BOOL", _TRUTH),
    ] = False
    eviction_interval: Annotated[
        _Count,
        Field(description="with --act-evictions, tokens between evictions"),
        Option(_OBJECTIVE, "TOKENS", _COUNT),
    ] = 64
    eviction_sharpness: Annotated[
        _Positive,
        Field(description="with --act-evictions, nats of bias for a score e times too far from the line"),
        Option(_OBJECTIVE, "NATS", _ENTRIES),
    ] = 4.0
    eviction_sharpness_end: Annotated[
        _Positive | None,
        Field(description="that sharpness at the last step, reached in a line"),
        Option(_OBJECTIVE, "NATS", f"{_ENTRIES}, or none", "--eviction-sharpness"),
    ] = None
    eviction_spread: Annotated[
        float,
        Field(
            ge=1.0,
            le=64.0,
            description="with --act-evictions, each step's budget is drawn between target / spread and target x spread",
        ),
        Option(_OBJECTIVE, "FACTOR", "a number from 1 to 64"),
    ] = 1.0
    eviction_softness: Annotated[
        _Positive,
        Field(description="with --act-evictions, width of the passage from kept to dropped, in log score"),
        Option(_OBJECTIVE, "WIDTH", _ENTRIES),
    ] = 0.2
    num_sink_tokens: Annotated[
        int,
        Field(ge=0, le=4096, description="first positions that never decay, and that the checkpoint asks to pin"),
        Option(_OBJECTIVE, "TOKENS", "an integer from 0 to 4096"),
    ] = 0

    learning_rate: Annotated[
        _Positive, Field(description="of AdamW, at its highest"), Option(_OPTIMISER, "RATE", "a number above 0")
    ] = 2e-4
    warmup_steps: Annotated[
        int | None,
        Field(ge=0, description="steps over which the rate rises in a line; it then falls to 0 as a cosine"),
        Option(_OPTIMISER, "STEPS", "an integer of 0 or more", "3 % of --steps"),
    ] = None
    weight_decay: Annotated[_NotNegative, Field(description="of AdamW"), Option(_OPTIMISER, "DECAY", _WEIGHT)] = 0.0
    max_grad_norm: Annotated[
        _Positive, Field(description="norm gradients are cut to"), Option(_OPTIMISER, "NORM", "a number above 0")
    ] = 1.0
    batch_size: Annotated[
        _Count, Field(description="rows a process computes at once"), Option(_OPTIMISER, "ROWS", _COUNT)
    ] = 1
    gradient_accumulation_steps: Annotated[
        _Count,
        Field(description="batches a process sums up before a step; their means count alike"),
        Option(_OPTIMISER, "N", _COUNT),
    ] = 1
    seed: Annotated[
        int,
        Field(ge=0, le=2**32 - 1, description="of fresh weights and of the order of documents"),
        Option(_OPTIMISER, "SEED", "an integer from 0 to 4294967295"),
    ] = 0

    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Field(description="number format of the frozen model; auto: float32 on a CPU, as stored elsewhere"),
        Option(_COMPUTE, "DTYPE", "auto, float32, bfloat16 or float16"),
    ] = "auto"
    mixed_precision: Annotated[
        Literal["no", "bf16", "fp16"],
        Field(description="autocast of the forward; gates and their optimiser are float32 always"),
        Option(_COMPUTE, "MODE", "no, bf16 or fp16"),
    ] = "no"
    attention: Annotated[
        Literal["auto", "eager", "blocked", "flex"],
        Field(description="retention-gated attention: auto picks the fastest that runs here"),
        Option(_COMPUTE, "NAME", "auto, eager, blocked or flex"),
    ] = "auto"
    gradient_checkpointing: Annotated[
        bool,
        Field(description="compute each layer again in the backward pass: slower, less memory"),
        Option(_COMPUTE, "BOOL", _TRUTH, alters_run=False),
    ] = False
    logit_block: Annotated[
        _Count,
        Field(description="tokens whose logits are held at once"),
        Option(_COMPUTE, "TOKENS", _COUNT, alters_run=False),
    ] = 512
    num_threads: Annotated[
        _Count | None,
        Field(description="CPU threads"),
        Option(_COMPUTE, "N", f"{_COUNT}, or none", "PyTorch's choice", alters_run=False),
    ] = None

    resume: Annotated[
        bool,
        Field(
            description="go on with the run in --output from its last save, with its settings; start it if there is "
            "none"
        ),
        Option(_OUTPUT, "BOOL", _TRUTH, alters_run=False),
    ] = False
    save_every: Annotated[
        _Count, Field(description="steps between saves"), Option(_OUTPUT, "STEPS", _COUNT, alters_run=False)
    ] = 100
    log_every: Annotated[
        _Count,
        Field(description="steps between log lines, where stderr is no terminal"),
        Option(_OUTPUT, "STEPS", _COUNT, alters_run=False),
    ] = 10
    save_dtype: Annotated[
        Literal["bfloat16", "float32"],
        Field(description="number format of the saved gates' layers; the last projection and the bias stay float32"),
        Option(_OUTPUT, "DTYPE", "bfloat16 or float32", alters_run=False),
    ] = "bfloat16"
    config: Annotated[
        Path | None,
        Field(description="YAML or JSON file with settings by their names, such as 'seq-len: 1024'"),
        Option(_OUTPUT, "FILE", "a readable YAML or JSON file", alters_run=False),
    ] = None

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.data_weights is not None and len(self.data_weights) != len(self.data):
            raise contradiction(
                "data_weights", len(self.data_weights), f"one weight for each of the {len(self.data)} --data"
            )
        if self.long_seq_len is not None and self.long_seq_len < self.seq_len:
            raise contradiction("long_seq_len", self.long_seq_len, f"at least --seq-len={self.seq_len}")
        if self.epsilon > min(self.kappa, self.kappa_end or self.kappa):
            raise contradiction("epsilon", self.epsilon, "at most --kappa and --kappa-end")
        if self.num_sink_tokens >= self.memory_size:
            raise contradiction("num_sink_tokens", self.num_sink_tokens, f"less than --memory-size={self.memory_size}")
        least = (self.capacity_target or self.memory_size) / self.eviction_spread
        if self.act_evictions and least < self.num_sink_tokens:
            raise contradiction(
                "eviction_spread",
                self.eviction_spread,
                f"one that leaves every budget room for --num-sink-tokens={self.num_sink_tokens}",
            )
        if self.warmup_steps is not None and self.warmup_steps >= self.steps:
            raise contradiction("warmup_steps", self.warmup_steps, f"less than --steps={self.steps}")
        if self.mixed_precision == "fp16" and self.dtype == "bfloat16":
            raise contradiction("mixed_precision", "fp16", "bf16 or no with --dtype=bfloat16")
        fresh = ("retention_gate", "retention_gate_intermediate_size", "tie_retention_gate_layers", "bias_init")
        said = [name for name in (*fresh, "scale_inputs") if name in self.model_fields_set]
        if self.gates is not None and said and any(getattr(self, name) != _default(name) for name in said):
            raise contradiction("gates", self.gates, f"its gates keep their shape, so {', '.join(said)} say nothing")
        return self

    def changes_from(self, earlier: TrainSettings) -> list[str]:
        """What differs from the settings a run began with and would make another run of it, one `name: a, was b` each.

        The data are compared by their contents elsewhere.
        """
        names = [name for name in type(self).model_fields if option_of(type(self), name).alters_run and name != "data"]
        return [
            f"{name}: {getattr(self, name)}, was {getattr(earlier, name)}"
            for name in names
            if getattr(self, name) != getattr(earlier, name)
        ]


def _default(name: str) -> object:
    return TrainSettings.model_fields[name].default
