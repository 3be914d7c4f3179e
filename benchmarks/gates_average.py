"""Gates whose weights are the mean of several checkpoints' of one run or of runs that go on from each other.

    python benchmarks/gates_average.py --output FOLDER CHECKPOINT CHECKPOINT…

The mean is taken in float64 and stored as the first checkpoint stores its weights; `config.json` is the last one's.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save

from trimkv_core.checkpoint import WEIGHT_NAMES, read_config, read_weights


def average(folders: list[Path]) -> dict[str, torch.Tensor]:
    """The mean of every weight.

    Raises:
        SystemExit: the checkpoints do not hold the same weights.
    """
    checkpoints = [read_weights(folder) for folder in folders]
    first = checkpoints[0]
    for folder, weights in zip(folders, checkpoints, strict=True):
        if {name: tensor.shape for name, tensor in weights.items()} != {name: t.shape for name, t in first.items()}:
            sys.exit(f"{folder} holds other weights than {folders[0]}: only checkpoints of one shape have a mean")
    return {
        name: torch.stack([weights[name].double() for weights in checkpoints]).mean(0).to(tensor.dtype)
        for name, tensor in first.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    options = parser.parse_args()
    for folder in options.checkpoints:
        read_config(folder)  # says what is wrong with a folder that is none of ours
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / WEIGHT_NAMES[0]).write_bytes(save(average(options.checkpoints)))
    shutil.copyfile(options.checkpoints[-1] / "config.json", options.output / "config.json")


if __name__ == "__main__":
    main()
