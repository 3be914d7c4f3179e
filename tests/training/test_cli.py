from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.training.tiny_text import make_text, save_model, write_lines
from trimkv_core.checkpoint import read_config
from trimkv_core.training import progress, stepping
from trimkv_core.training.cli import main
from trimkv_core.training.curve import read_curve


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "text.txt").write_text(make_text(700))
    save_model(folder / "model")
    return ["--model", str(folder / "model"), "--data", str(folder / "text.txt")]


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    import logging

    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def flags(inputs: list[str], output: Path, *more: str, steps: int = 3) -> list[str]:
    sizes = ["--memory-size", "8", "--seq-len", "48", "--retention-gate-intermediate-size", "8", "--bias-init", "3"]
    return [*inputs, *sizes, "--steps", str(steps), "--output", str(output), "--log-every", "1", *more]


def test_one_command_makes_a_checkpoint(inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags(inputs, tmp_path / "out")) == 0
    assert read_config(tmp_path / "out").memory_size == 8
    logged = capsys.readouterr().err
    assert "step=2/3 loss=" in logged
    assert "complete:" in logged


def test_help_says_every_flag_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "--memory-size ENTRIES" in text
    assert "optimiser:" in text


def test_help_and_bad_flags_do_not_wait_for_torch() -> None:
    code = (
        "import sys; from trimkv_core.training.cli import main; main(['--steps', 'x']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("more", "status", "expected"),
    [
        (["--steps", "none"], 2, "--steps=none is not possible"),
        (["--data", "nowhere.txt"], 1, "no file or folder 'nowhere.txt'"),
        (["--gates", "nowhere"], 2, "say nothing"),
        (["--model", "/nowhere/at/all"], 1, "/nowhere/at/all"),
        (["--mixed-precision", "fp16"], 2, "not possible without a GPU"),
        (["--attention", "flex"], 2, "--attention=flex is not possible on cpu: PyTorch has no backward pass"),
    ],
)
def test_what_is_wrong_is_one_line_and_a_status(
    more: list[str], status: int, expected: str, inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if more[0] in {"--mixed-precision", "--attention"}:
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is one")
    assert main(flags(inputs, tmp_path / "out", *more)) == status
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("trimkv-train: ")
    assert expected in last


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_at_the_end_of_the_step(
    number: signal.Signals,
    status: int,
    inputs: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make, steps = stepping.Stepper.make, iter(range(1, 100))

    def signalled(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(steps) == 2:
            os.kill(os.getpid(), number)
        return make(self, *args, **kwargs)

    before = signal.getsignal(number)
    monkeypatch.setattr(stepping.Stepper, "make", signalled)
    assert main(flags(inputs, tmp_path / "out", steps=5)) == status
    assert signal.getsignal(number) is before
    assert "stopped after step 2 and saved" in capsys.readouterr().err
    assert [point.step for point in read_curve(tmp_path / "out")] == [1, 2]
    # What it said to type.
    assert main(["--output", str(tmp_path / "out"), "--resume"]) == 0
    assert [point.step for point in read_curve(tmp_path / "out")] == [1, 2, 3, 4, 5]


def test_a_process_that_is_killed_is_resumed_with_the_same_curve(inputs: list[str], tmp_path: Path) -> None:
    assert main(flags(inputs, tmp_path / "whole", "--save-every", "2", "--num-threads", "1", steps=9)) == 0
    arguments = flags(inputs, tmp_path / "killed", "--save-every", "2", "--num-threads", "1", steps=9)
    # Slow enough to be met between two saves.
    code = (
        "import sys, time\n"
        "from trimkv_core.training import stepping\n"
        "from trimkv_core.training.cli import main\n"
        "make = stepping.Stepper.make\n"
        "def slow(*args, **kwargs):\n"
        "    time.sleep(0.2)\n"
        "    return make(*args, **kwargs)\n"
        "stepping.Stepper.make = slow\n"
        "main(sys.argv[1:])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.DEVNULL)
    try:
        ends = time.monotonic() + 120
        while len(read_curve(tmp_path / "killed")) < 5:
            assert process.poll() is None
            assert time.monotonic() < ends
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert main([*arguments, "--resume"]) == 0
    whole, killed = (
        [replace(point, seconds=0.0) for point in read_curve(tmp_path / name)] for name in ("whole", "killed")
    )
    assert killed == whole


def test_a_terminal_gets_a_bar(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[str] = []

    class Bar:
        def __init__(self, **options: Any) -> None:
            shown.append(f"{options['initial']}/{options['total']}")

        def set_postfix_str(self, text: str, refresh: bool) -> None:
            shown.append(text.split(maxsplit=1)[0])

        def update(self, steps: int) -> None:
            shown.append(str(steps))

        def close(self) -> None:
            shown.append("closed")

    monkeypatch.setattr(progress, "_open_bar", lambda first, steps: Bar(initial=first, total=steps))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main(flags(inputs, tmp_path / "out", steps=2)) == 0
    assert shown == ["0/2", "loss", "1", "loss", "1", "closed"]
    assert "step=1/2" not in capsys.readouterr().err


def test_two_processes_train_as_one_with_all_their_rows(inputs: list[str], tmp_path: Path) -> None:
    # Rows of one text each: means over rows are then means over tokens.
    texts = write_lines(tmp_path / "texts.jsonl", *({"text": make_text(48, seed)} for seed in range(12)))
    inputs = [*inputs[:2], "--data", str(texts), "--num-threads", "1"]
    assert main(flags(inputs, tmp_path / "one", "--batch-size", "2")) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "trimkv_core.training.cli", *flags(inputs, tmp_path / "two")]
    # What `accelerate launch` does on a machine with two GPUs, without any.
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "processes=2" in done.stderr
    one, two = read_curve(tmp_path / "one"), read_curve(tmp_path / "two")
    for left, right in zip(one, two, strict=True):
        assert (left.step, left.tokens) == (right.step, right.tokens)
        for name in ("loss", "kl", "ntp", "capacity", "soft_size", "gradient_norm"):
            assert getattr(left, name) == pytest.approx(getattr(right, name), rel=1e-3), name
