"""`benchmarks/gates_average.py`: the mean of checkpoints is a checkpoint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.fixtures import UPSTREAM
from trimkv_core.checkpoint import read_config, read_weights

REPOSITORY = Path(__file__).parents[2]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/gates_average.py", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def variant(folder: Path, scale: float) -> Path:
    """The fixture's gates, all weights times `scale`."""
    folder.mkdir()
    weights = {name: tensor * scale for name, tensor in read_weights(UPSTREAM / "gates_rg10").items()}
    save_file(weights, folder / "trimkv_weights.safetensors")
    (folder / "config.json").write_text((UPSTREAM / "gates_rg10" / "config.json").read_text())
    return folder


def test_weights_are_the_mean_and_the_folder_a_checkpoint(tmp_path: Path) -> None:
    one, three = variant(tmp_path / "one", 1.0), variant(tmp_path / "three", 3.0)
    done = run("--output", tmp_path / "mean", one, three)
    assert done.returncode == 0, done.stderr
    mean, before = load_file(tmp_path / "mean" / "trimkv_weights.safetensors"), read_weights(one)
    assert mean.keys() == before.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(mean[name], 2 * tensor)
    assert read_config(tmp_path / "mean") == read_config(three)


def test_other_shapes_and_other_folders_are_refused(tmp_path: Path) -> None:
    done = run("--output", tmp_path / "mean", UPSTREAM / "gates_rg10", UPSTREAM / "gates_rg")
    assert "holds other weights than" in done.stderr
    (tmp_path / "empty").mkdir()
    assert run("--output", tmp_path / "mean", UPSTREAM / "gates_rg10", tmp_path / "empty").returncode != 0
    assert not (tmp_path / "mean" / "config.json").exists()
