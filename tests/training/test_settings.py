from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trimkv_core.options import SettingsError, option_of
from trimkv_core.training.loading import build_parser, load_settings
from trimkv_core.training.schedule import capacity_target_at, kappa_at, learning_rate_at, objective_at
from trimkv_core.training.settings import TrainSettings

NEEDED = {
    "--model": "embedded",
    "--data": "a.txt",
    "--output": "out",
    "--memory-size": "64",
    "--seq-len": "128",
    "--steps": "10",
}


def load(*flags: str, **without: bool) -> TrainSettings:
    needed = [
        word for name, value in NEEDED.items() if name[2:].replace("-", "_") not in without for word in (name, value)
    ]
    return load_settings([*needed, *flags])


def complaint(*flags: str, **without: bool) -> str:
    with pytest.raises(SettingsError) as caught:
        load(*flags, **without)
    return str(caught.value)


def write_config(folder: Path, text: str) -> str:
    (folder / "config.yaml").write_text(text)
    return str(folder / "config.yaml")


class TestFlags:
    def test_the_defaults_are_the_papers_recipe(self) -> None:
        settings = load()
        assert (settings.loss, settings.retention_gate, settings.bias_init) == ("fwkl_ntp", "rg10", 18.0)
        assert (settings.epsilon, settings.kappa, settings.num_sink_tokens) == (1.0, 1.0, 0)
        assert capacity_target_at(settings, 1) == capacity_target_at(settings, 10) == 64.0

    def test_every_setting_has_a_flag_and_its_help_says_what_it_is(self) -> None:
        text = build_parser().format_help()
        for name, field in TrainSettings.model_fields.items():
            assert f"--{name.replace('_', '-')} " in text
            assert field.description
            assert option_of(TrainSettings, name).allowed

    def test_text_becomes_values(self) -> None:
        settings = load("--learning-rate", "2e-3", "--scale-inputs", "--data-weights", "1", "--long-seq-len", "none")
        assert (settings.learning_rate, settings.scale_inputs) == (2e-3, True)
        assert (settings.data_weights, settings.long_seq_len) == ((1.0,), None)
        assert load("--global-capacity", "false").global_capacity is False
        assert load("--no-global-capacity").global_capacity is False

    def test_data_can_be_several_files_and_the_flag_repeated(self) -> None:
        assert load("--data", "a", "b", "--data", "c", data=True).data == ("a", "b", "c")

    def test_an_unknown_flag_is_one_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            load("--sequence-length", "5")
        assert caught.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1

    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            (("--steps", "0"), "--steps=0 is not possible: must be an integer of 1 or more"),
            (("--steps", "1.5"), "--steps=1.5 is not possible"),
            (("--steps", "many"), "--steps=many is not possible"),
            (("--learning-rate", "nan"), "--learning-rate=nan is not possible: must be a number above 0"),
            (("--loss", "mse"), "--loss=mse is not possible: must be fwkl, ntp"),
            (("--data-weights", "1", "2"), "one weight for each of the 1 --data"),
            (("--data-weights", "0"), "--data-weights"),
            (("--long-seq-len", "64"), "at least --seq-len=128"),
            (("--num-sink-tokens", "64"), "less than --memory-size=64"),
            (("--warmup-steps", "10"), "less than --steps=10"),
            (("--epsilon", "2"), "at most --kappa"),
            (("--gates", "x", "--bias-init", "6"), "bias_init say nothing"),
        ],
    )
    def test_what_is_not_possible_is_said_with_what_is(self, flags: tuple[str, ...], expected: str) -> None:
        assert expected in complaint(*flags)

    def test_all_that_is_missing_is_named_at_once(self) -> None:
        assert "--model, --steps must be given" in complaint(model=True, steps=True)


class TestFile:
    def test_flags_go_before_the_file_and_the_file_before_defaults(self, tmp_path: Path) -> None:
        path = write_config(tmp_path, "seq-len: 256\nlearning_rate: 2e-3\ndata: [x.txt, y.txt]\nsteps: 7\n")
        settings = load("--config", path, seq_len=True, data=True)
        assert (settings.seq_len, settings.learning_rate, settings.data) == (256, 2e-3, ("x.txt", "y.txt"))
        assert settings.steps == 10

    def test_json_does_as_well(self, tmp_path: Path) -> None:
        path = write_config(tmp_path, json.dumps({"seq_len": 256, "scale_inputs": True}))
        assert load("--config", path, seq_len=True).scale_inputs

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("sequence_len: 3", "no setting is called 'sequence_len'"),
            ("batch_size: true", "batch_size in the file of --config=True is not possible: must be an integer"),
            ("batch_size: 1.5", "batch_size in the file of --config=1.5 is not possible"),
            ("scale_inputs: 1", "scale_inputs in the file of --config=1 is not possible: must be true or false"),
            ("[1]", "must hold settings by name"),
            ("seed: 1\nseed: 2", "must say seed once"),
            ("seed: [", "must be a readable YAML or JSON file"),
        ],
    )
    def test_what_is_wrong_in_it_is_named(self, tmp_path: Path, text: str, expected: str) -> None:
        assert expected in complaint("--config", write_config(tmp_path, text))

    def test_a_missing_file_is_said(self, tmp_path: Path) -> None:
        assert "readable" in complaint("--config", str(tmp_path / "none.yaml"))


class TestSchedule:
    def settings(self, **changes: Any) -> TrainSettings:
        needed = {"model": "m", "data": ("a",), "output": Path("o"), "memory_size": 64, "seq_len": 128, "steps": 101}
        return TrainSettings(**(needed | changes))

    def test_the_rate_rises_in_a_line_and_falls_as_a_cosine(self) -> None:
        settings = self.settings(steps=110, warmup_steps=10, learning_rate=1.0)
        rates = [learning_rate_at(settings, step) for step in range(1, 111)]
        assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
        assert rates[10] == 1.0
        assert rates[60] == pytest.approx(0.5)
        assert 0 < rates[-1] < 1e-3
        assert rates[10:] == sorted(rates[10:], reverse=True)

    def test_the_target_falls_over_the_first_half(self) -> None:
        settings = self.settings(steps=100, capacity_target=16.0, capacity_target_start=64.0)
        targets = [capacity_target_at(settings, step) for step in (1, 26, 51, 100)]
        assert targets == pytest.approx([64.0, 40.0, 16.0, 16.0])

    def test_kappa_goes_from_its_start_to_its_end(self) -> None:
        settings = self.settings(epsilon=0.15, kappa=2.0, kappa_end=10.0)
        assert [kappa_at(settings, step) for step in (1, 51, 101)] == pytest.approx([2.0, 6.0, 10.0])

    def test_a_steps_objective_holds_what_the_settings_say(self) -> None:
        settings = self.settings(epsilon=0.15, kappa=2.0, loss="rvkl", capacity_weight=0.5, num_sink_tokens=4)
        objective = objective_at(settings, 1, is_global=False)
        assert (objective.loss, objective.capacity_weight, objective.memory_size) == ("rvkl", 0.5, 64.0)
        assert (objective.shape.epsilon, objective.shape.kappa) == (0.15, 2.0)
        assert (objective.num_sink_tokens, objective.is_global, objective.evictions) == (4, False, None)

    def test_evictions_are_acted_out_down_to_the_target(self) -> None:
        settings = self.settings(act_evictions=True, capacity_target=16.0, eviction_interval=32, num_sink_tokens=4)
        rule = objective_at(settings, 1, is_global=True).evictions
        assert rule is not None
        assert (rule.memory_size, rule.interval, rule.num_sink_tokens, rule.is_global) == (16.0, 32, 4, True)

    def test_acted_out_budgets_spread_around_the_target_and_sharpen_in_a_line(self) -> None:
        settings = self.settings(
            act_evictions=True, eviction_spread=2.0, eviction_sharpness=4.0, eviction_sharpness_end=8.0
        )
        rules = [objective_at(settings, step, is_global=True).evictions for step in range(1, settings.steps + 1)]
        assert all(rule is not None and 32.0 <= rule.memory_size <= 128.0 for rule in rules)
        assert len({rule.memory_size for rule in rules if rule is not None}) == len(rules)
        sharpness = [rule.sharpness for rule in rules if rule is not None]
        assert (sharpness[0], sharpness[-1]) == (4.0, 8.0)
        assert sharpness == sorted(sharpness)

    def test_a_spread_that_leaves_pins_no_room_is_refused(self) -> None:
        flags = ("--act-evictions", "--eviction-spread", "32", "--num-sink-tokens", "4")
        assert "--eviction-spread=32.0 is not possible" in complaint(*flags)
