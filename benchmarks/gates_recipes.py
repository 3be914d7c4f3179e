"""Which departures from the paper's recipe help: gates trained in different ways, at equal steps, on the same rows.

    python benchmarks/gates_recipes.py --data train/docs.jsonl train/conversations.jsonl --text heldout/*.txt \
        --output FOLDER [--steps 80] [--seq-len 512] [--recipes 0 7 8]

Every recipe is one `trimkv-train` of its own, from fresh gates and the same seed, and one `trimkv-eval` of what came
out, with true eviction on texts that nobody trained on. What is compared is the perplexity against the full cache's;
the training loss is not comparable, each recipe has its own. Runs that are complete in FOLDER are not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TRAIN = [sys.executable, "-m", "trimkv_core.training.cli"]
EVALUATE = [sys.executable, "-m", "trimkv_core.evaluation.cli"]

# What every recipe shares where it differs from the paper's: a narrow gate, as the model is small, and a learning rate
# for tens of steps instead of thousands.
SHARED = ["--model", "embedded", "--retention-gate-intermediate-size", "128", "--learning-rate", "2e-3"]
START = ["--bias-init", "6"]
SCALED = [*START, "--scale-inputs"]
SINKS = [*SCALED, "--num-sink-tokens", "4"]
EVICTIONS = ["--act-evictions", "--eviction-spread", "2", "--eviction-softness", "0.1"]
EVICTIONS += ["--eviction-sharpness", "4", "--eviction-sharpness-end", "16"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """One way to train.

    Attributes:
        name: in the table.
        flags: of `trimkv-train`; MEMORY and QUARTER stand for the budget and a fourth of it.
    """

    name: str
    flags: list[str]


RECIPES = (
    Recipe("paper", []),
    Recipe("bias 6", START),
    Recipe("bias 6, scaled inputs", SCALED),
    Recipe("…, sinks pinned", SINKS),
    Recipe("…, target M/4", [*SINKS, "--capacity-target", "QUARTER"]),
    Recipe("…, sharper shape", [*SINKS, "--epsilon", "0.15", "--kappa", "2", "--kappa-end", "10"]),
    Recipe(
        "…, target M/4, sharper shape",
        [*SINKS, "--capacity-target", "QUARTER", "--epsilon", "0.15", "--kappa", "2", "--kappa-end", "10"],
    ),
    Recipe("…, evictions acted out", [*SINKS, *EVICTIONS]),
    Recipe("…, evictions acted out, forward KL only", [*SINKS, *EVICTIONS, "--loss", "fwkl"]),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a recipe came to.

    Attributes:
        recipe: its name.
        ratio: perplexity ÷ the full cache's.
        seconds: of training.
    """

    recipe: str
    ratio: float
    seconds: float


def train(recipe: Recipe, folder: Path, options: argparse.Namespace) -> None:
    """Train unless a complete run is there."""
    sizes = {"MEMORY": str(options.memory_size), "QUARTER": str(max(options.memory_size // 4, 1))}
    flags = [sizes.get(flag, flag) for flag in recipe.flags]
    command = [*TRAIN, *SHARED, *flags, "--data", *map(str, options.data), "--output", str(folder), "--resume"]
    command += ["--memory-size", str(options.memory_size), "--seq-len", str(options.seq_len)]
    command += ["--steps", str(options.steps), "--num-threads", str(options.threads)]
    subprocess.run(command, check=True)


def evaluate(gates: Path, options: argparse.Namespace, *, dense: bool) -> tuple[float, str]:
    """Mean loss over the texts, nats a token, and on what; sinks are pinned for all recipes alike."""
    output = options.output / ("dense" if dense else f"{gates.name}-results")
    what = ["--budgets", "dense" if dense else str(options.memory_size)]
    what += ["--methods", "dense" if dense else "gates-global", "--gate-sinks", "4", "--tasks", "text"]
    size = ["--text-tokens", str(options.text_tokens), "--excerpts", "1", "--threads", str(options.threads)]
    files = ["--gates", str(gates), "--text", *map(str, options.text), "--output", str(output), "--resume"]
    subprocess.run([*EVALUATE, "--model", "embedded", *what, *size, *files], check=True)
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    (row,) = results["rows"]
    losses = [measure for measure in row["measures"] if measure["metric"] == "nll"]
    total = sum(sum(measure["sums"]) for measure in losses)
    machine, torch = results["machine"], results["versions"]["torch"]
    where = f"{results['date']}, {machine['device']}, {machine['threads']} threads, torch {torch}"
    return float(total / sum(sum(measure["counts"]) for measure in losses)), where


def seconds_of(folder: Path) -> float:
    """How long a run's steps took together."""
    lines = (folder / "loss.csv").read_text(encoding="utf-8").splitlines()
    column = lines[0].split(",").index("seconds")
    return sum(float(line.split(",")[column]) for line in lines[1:])


def render(outcomes: list[Outcome], options: argparse.Namespace, where: str) -> str:
    """The table, in the order of the recipes."""
    lines = [
        f"{where}.",
        f"{options.steps} steps of {options.seq_len} tokens each, evaluated at M = {options.memory_size} on "
        f"{len(options.text)} texts of {options.text_tokens:,} tokens, 4 sinks pinned.",
        "",
        "| recipe | perplexity ÷ full cache | seconds of training |",
        "|---|---|---|",
    ]
    return "\n".join(lines + [f"| {o.recipe} | {o.ratio:.3f} | {o.seconds:,.0f} |" for o in outcomes])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--memory-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--text-tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    numbers = range(len(RECIPES))
    parser.add_argument("--recipes", type=int, nargs="+", choices=numbers, default=numbers, help="which, in this order")
    return parser.parse_args()


def main() -> None:
    options = parse()
    dense: float | None = None
    outcomes: list[Outcome] = []
    for number in options.recipes:
        recipe = RECIPES[number]
        folder = options.output / f"recipe-{number}"
        train(recipe, folder, options)
        if dense is None:
            dense, _ = evaluate(folder, options, dense=True)
        loss, where = evaluate(folder, options, dense=False)
        outcomes.append(Outcome(recipe.name, math.exp(loss - dense), seconds_of(folder)))
        table = render(outcomes, options, where)
        (options.output / "recipes.md").write_text(table + "\n", encoding="utf-8")
        print(table, flush=True)


if __name__ == "__main__":
    main()
