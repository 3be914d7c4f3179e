from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.training.tiny_text import chat, make_text, save_model, tiny_settings, write_lines
from trimkv_core import TrimKVForCausalLM
from trimkv_core.checkpoint import CheckpointError, read_config, read_weights
from trimkv_core.options import SettingsError
from trimkv_core.training import stepping
from trimkv_core.training.curve import CurvePoint, read_curve
from trimkv_core.training.documents import DataError
from trimkv_core.training.run import Outcome, TrainingError, train
from trimkv_core.training.saving import OutputFolder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [{"text": make_text(120, seed)} for seed in range(6)]
    return write_lines(tmp_path_factory.mktemp("data") / "data.jsonl", *texts, chat("what is kept?", "the sinks"))


@pytest.fixture(scope="module")
def folder(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run of four steps with two sinks."""
    folder = tmp_path_factory.mktemp("run") / "gates"
    settings = tiny_settings(model, data, folder, num_sink_tokens=2, steps=4, save_every=4)
    assert train(settings) == Outcome(4, True)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "gates"
    train(tiny_settings(model, data, folder))
    return folder


def curve_of(folder: Path) -> list[CurvePoint]:
    """Everything that must be the same in the same run: all but how long it took."""
    return [replace(point, seconds=0.0) for point in read_curve(folder)]


@pytest.fixture(autouse=True)
def another_process() -> None:
    """As if each test were a process of its own: `accelerate` settles on a precision once in a process."""
    AcceleratorState._reset_state(True)


class Killed(BaseException):
    """Stands for SIGKILL: nobody catches it, nothing is saved."""


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Die in the middle of `step` once."""
    make = stepping.Stepper.make
    calls = iter(range(1, step + 1))

    def make_until(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(calls) == step:
            monkeypatch.setattr(stepping.Stepper, "make", make)
            raise Killed
        return make(self, *args, **kwargs)

    monkeypatch.setattr(stepping.Stepper, "make", make_until)


def spoil(monkeypatch: pytest.MonkeyPatch, step: int, spoiler: Callable[[Any], Any]) -> None:
    """Change the loss of `step`."""
    step_loss = stepping.step_loss
    calls = iter(range(1, 1000))

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        loss = step_loss(*args, **kwargs)
        return spoiler(loss) if next(calls) == step else loss

    monkeypatch.setattr(stepping, "step_loss", spoiled)


class TestCheckpoint:
    def test_the_folder_is_a_gate_checkpoint_over_its_base(self, folder: Path, model: Path) -> None:
        config = read_config(folder)
        assert Path(config.base_model) == model.resolve()
        assert (config.kind, config.memory_size, config.num_sink_tokens) == ("rg10", 8, 2)
        assert (config.is_tied, config.is_global, config.raw["base_loss"]) == (True, True, "fwkl_ntp")
        assert TrimKVForCausalLM.from_pretrained(str(folder)).gate_config == config

    def test_its_layers_are_bfloat16_and_what_ranks_is_float32(self, folder: Path) -> None:
        dtypes = {name.split("retention_gate.")[1]: value.dtype for name, value in read_weights(folder).items()}
        assert dtypes["linear1.weight"] == dtypes["linear2.bias"] == torch.bfloat16
        assert dtypes["linear3.weight"] == dtypes["bias"] == torch.float32

    def test_it_holds_the_exact_settings_the_curve_and_its_picture(self, folder: Path, data: Path) -> None:
        saved = json.loads((folder / "settings.json").read_text())
        assert saved["settings"]["learning_rate"] == 1e-2
        assert saved["settings"]["weight_decay"] == 0.0
        assert [(record["name"], len(record["sha256"])) for record in saved["data"]] == [(str(data), 64)]
        assert saved["versions"]["torch"]
        points = read_curve(folder)
        assert [point.step for point in points] == [1, 2, 3, 4]
        assert all(math.isfinite(value) for point in points for value in asdict(point).values())
        assert points[-1].tokens == 4 * 48
        assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")

    def test_nothing_is_left_over_beside_it(self, folder: Path) -> None:
        assert [path.name for path in folder.parent.iterdir()] == ["gates"]
        assert [path.name for path in (folder / "state").iterdir()] == ["step-00000004.pt"]

    def test_its_base_is_found_from_a_folder_that_was_given_as_here(
        self, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "real" / "deeper").mkdir(parents=True)
        (tmp_path / "link").symlink_to(tmp_path / "real" / "deeper")
        for output, folder in ((Path(), tmp_path / "here"), (tmp_path / "link", tmp_path / "real" / "deeper")):
            folder.mkdir(exist_ok=True)
            monkeypatch.chdir(folder)
            train(tiny_settings(model, data, output, steps=1))
            assert Path(read_config(folder).base_model) == model.resolve()
            assert not [path.name for path in folder.iterdir() if path.is_dir() and path.name != "state"]

    def test_other_gates_can_start_from_it(self, folder: Path, model: Path, data: Path, tmp_path: Path) -> None:
        settings = tiny_settings(model, data, tmp_path / "more", gates=str(folder), steps=1, learning_rate=1e-30)
        train(settings)
        before, after = read_weights(folder), read_weights(tmp_path / "more")
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_a_gate_checkpoint_is_no_model_to_train(self, folder: Path, data: Path, tmp_path: Path) -> None:
        # It has no tokenizer either: what it is must be said first.
        with pytest.raises(SettingsError, match="is a gate checkpoint: name its base model"):
            train(tiny_settings(folder, data, tmp_path / "out"))


class TestTraining:
    def test_gates_learn_to_forget_and_the_model_stays(self, model: Path, data: Path, tmp_path: Path) -> None:
        settings = tiny_settings(
            model, data, tmp_path / "out", steps=40, memory_size=2, save_every=40, learning_rate=3e-2
        )
        before = (model / "model.safetensors").read_bytes()
        train(settings)
        points = read_curve(settings.output)
        assert points[-1].soft_size < 0.5 * points[0].soft_size
        assert (model / "model.safetensors").read_bytes() == before

    @pytest.mark.parametrize(
        "changes",
        [
            {"retention_gate": "rg", "loss": "rvkl"},
            {"mixed_precision": "bf16"},
            {"dtype": "bfloat16"},
            {"gradient_checkpointing": True, "batch_size": 2},
            {"scale_inputs": True, "epsilon": 0.15, "kappa": 2.0, "kappa_end": 8.0},
            {"act_evictions": True, "eviction_interval": 8, "loss": "rvkl_ntp"},
            {"chat_loss": "assistant", "long_seq_len": 96, "long_every": 2},
        ],
        ids="-".join,
    )
    def test_it_trains_with(self, changes: dict[str, Any], model: Path, data: Path, tmp_path: Path) -> None:
        settings = tiny_settings(model, data, tmp_path / "out", steps=2, **changes)
        assert train(settings).is_complete
        assert all(point.gradient_norm > 0 for point in read_curve(settings.output))

    def test_accumulating_is_as_one_batch_of_as_many_rows(self, model: Path, tmp_path: Path) -> None:
        # Rows of one text each: means over batches are then means over tokens.
        data = write_lines(tmp_path / "data.jsonl", *({"text": make_text(48, seed)} for seed in range(6)))
        train(tiny_settings(model, data, tmp_path / "one", batch_size=2, steps=3))
        train(tiny_settings(model, data, tmp_path / "two", gradient_accumulation_steps=2, steps=3))
        for left, right in zip(curve_of(tmp_path / "one"), curve_of(tmp_path / "two"), strict=True):
            assert asdict(left) == pytest.approx(asdict(right), rel=1e-4)


class TestResume:
    def assert_same(self, folder: Path, uninterrupted: Path) -> None:
        assert curve_of(folder) == curve_of(uninterrupted)
        left, right = read_weights(folder), read_weights(uninterrupted)
        assert all(torch.equal(left[name], right[name]) for name in right)

    @pytest.mark.parametrize("step", [1, 2, 4, 6])
    def test_a_killed_run_goes_on_with_the_same_curve(
        self, step: int, uninterrupted: Path, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        settings = tiny_settings(model, data, tmp_path / "gates")
        kill_at(monkeypatch, step)
        with pytest.raises(Killed):
            train(settings)
        assert len(read_curve(settings.output)) == step - 1
        assert train(settings.model_copy(update={"resume": True})).is_complete
        self.assert_same(settings.output, uninterrupted)

    def test_a_kill_while_writing_leaves_the_last_save(
        self, uninterrupted: Path, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        settings = tiny_settings(model, data, tmp_path / "gates")
        save, saves = torch.save, iter(range(1, 100))

        def half(contents: Any, file: Any) -> None:
            if next(saves) == 2:
                file.write(b"half")
                raise Killed
            save(contents, file)

        monkeypatch.setattr(torch, "save", half)
        with pytest.raises(Killed):
            train(settings)
        latest = OutputFolder(settings.output).load()
        assert latest is not None
        assert latest.step == 2
        train(settings.model_copy(update={"resume": True}))
        self.assert_same(settings.output, uninterrupted)

    def test_asked_to_stop_it_saves_where_it_stands(
        self, uninterrupted: Path, model: Path, data: Path, tmp_path: Path
    ) -> None:
        settings = tiny_settings(model, data, tmp_path / "gates", save_every=100)
        answers = iter([False] * 3 + [True])
        assert train(settings, should_stop=lambda: next(answers)) == Outcome(3, False)
        assert read_config(settings.output).memory_size == 8
        assert train(settings.model_copy(update={"resume": True, "save_every": 2})).is_complete
        self.assert_same(settings.output, uninterrupted)

    def test_a_complete_run_is_left_as_it_is(self, uninterrupted: Path, model: Path, data: Path) -> None:
        before = curve_of(uninterrupted)
        assert train(tiny_settings(model, data, uninterrupted, resume=True)).is_complete
        assert curve_of(uninterrupted) == before

    def test_a_run_that_would_be_another_is_refused_and_every_difference_named(
        self, uninterrupted: Path, model: Path, tmp_path: Path
    ) -> None:
        other = write_lines(tmp_path / "other.jsonl", {"text": make_text(500)})
        settings = tiny_settings(model, other, uninterrupted, resume=True, seed=1, steps=9, log_every=3)
        with pytest.raises(SettingsError) as caught:
            train(settings)
        message = str(caught.value)
        assert "steps: 9, was 6" in message
        assert "seed: 1, was 0" in message
        assert "other.jsonl" in message
        assert "log_every" not in message

    def test_data_that_only_moved_are_the_same(
        self, uninterrupted: Path, model: Path, data: Path, tmp_path: Path
    ) -> None:
        moved = tmp_path / "moved.jsonl"
        moved.write_bytes(data.read_bytes())
        assert train(tiny_settings(model, moved, uninterrupted, resume=True)).is_complete


class TestFolders:
    def test_a_run_is_not_written_over(self, model: Path, data: Path, tmp_path: Path) -> None:
        settings = tiny_settings(model, data, tmp_path / "out", steps=1)
        train(settings)
        with pytest.raises(SettingsError, match="already holds a run: go on with it with --resume"):
            train(settings)

    @pytest.mark.parametrize("resume", [False, True])
    def test_a_folder_of_something_else_is_left_alone(
        self, resume: bool, model: Path, data: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(SettingsError, match="is not empty and holds no run"):
            train(tiny_settings(model, data, model, resume=resume))

    def test_resuming_nothing_starts(self, model: Path, data: Path, tmp_path: Path) -> None:
        assert train(tiny_settings(model, data, tmp_path / "out", steps=1, resume=True)).is_complete

    def test_two_runs_do_not_write_one_folder(self, model: Path, data: Path, tmp_path: Path) -> None:
        settings = tiny_settings(model, data, tmp_path / "out", steps=1)
        with OutputFolder(settings.output).lock(), pytest.raises(SettingsError, match="written by another run"):
            train(settings)


class TestTrouble:
    @pytest.mark.parametrize("part", ["total", "capacity"])
    def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(
        self, part: str, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        settings = tiny_settings(model, data, tmp_path / "out")
        spoil(monkeypatch, 4, lambda loss: replace(loss, **{part: getattr(loss, part) * math.nan}))
        name = "loss" if part == "total" else part
        with pytest.raises(TrainingError, match=rf"step 4: {name} not finite .* of step 2, is kept in .*out"):
            train(settings)
        saved = OutputFolder(settings.output).load()
        assert saved is not None
        assert saved.step == 2
        assert all(bool(value.isfinite().all()) for value in read_weights(settings.output).values())

    def test_a_gradient_that_is_no_number_names_its_layers(
        self, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def bend(loss: Any) -> Any:
            bent = loss.total.clone()
            bent.register_hook(lambda gradient: gradient * math.inf)
            return replace(loss, total=bent)

        spoil(monkeypatch, 1, bend)
        with pytest.raises(
            TrainingError, match=r"step 1: the gradient is not finite .* layers 0, 1, 2\). No checkpoint"
        ):
            train(tiny_settings(model, data, tmp_path / "out"))

    def test_data_that_turn_out_bad_on_the_way_are_named(self, model: Path, tmp_path: Path) -> None:
        texts = [{"text": make_text(60, seed)} for seed in range(3)]
        data = write_lines(tmp_path / "data.jsonl", *texts, chat("a", "b"))
        settings = tiny_settings(model, data, tmp_path / "out", chat_loss="assistant")
        # A template that forgets is only met when the conversation's turn comes.
        from tests.training.tiny_text import FORGETFUL_TEMPLATE, make_tokenizer

        other = save_model(tmp_path / "model")
        make_tokenizer(template=FORGETFUL_TEMPLATE).save_pretrained(other)
        write_lines(data, *texts, {"messages": [{"role": r, "content": "x"} for r in ("user", "assistant", "user")]})
        with pytest.raises(TrainingError, match=r"data.jsonl, line 4: the chat template .* No checkpoint was saved"):
            train(settings.model_copy(update={"model": str(other)}))

    def test_too_little_data_is_said_before_anything_is_written(self, model: Path, tmp_path: Path) -> None:
        data = write_lines(tmp_path / "data.jsonl", {"text": "short"})
        with pytest.raises(DataError, match="5 tokens in 1 documents"):
            train(tiny_settings(model, data, tmp_path / "out"))
        assert not (tmp_path / "out").exists()

    def test_gates_that_do_not_fit_are_refused(self, data: Path, model: Path, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="neither a folder nor a hub repo"):
            train(tiny_settings(model, data, tmp_path / "out", gates="none/such"))
