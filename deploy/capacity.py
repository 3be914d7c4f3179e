"""Writes what `trimkv-serve plan` says of four card sizes into deploy/capacity.md: `python -m deploy.capacity`."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from service.plan import run_plan

PAGE = Path(__file__).with_name("capacity.md")
MARK = "<!-- Written by `python -m deploy.capacity`; tests/deploy/test_capacity.py repeats it. -->"
MODEL = "Qwen/Qwen3-4B-Instruct-2507"
# Of its config: a plan needs no more, so the page can be written where no model hub is.
SHAPE = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 262_144,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
# One card of each size.
CARDS = {24: "RTX-4090", 48: "L40S", 80: "H100", 141: "H200"}
BUDGET = 512


def plan_of(card: str) -> str:
    """What the plan says of Qwen3-4B on `card`, under the model's name."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(SHAPE))
        said = run_plan(["--model", folder, "--card", card, "--kv-budget", str(BUDGET)])
        return said.replace(folder, MODEL)


def with_plans(page: str) -> str:
    """`page` with the plans of all cards between its marks."""
    before, _, after = (part.strip("\n") for part in page.split(MARK))
    sections = [
        f"### {size} GB\n\n```text\n$ trimkv-serve plan --model {MODEL} --card {card} --kv-budget {BUDGET}\n"
        f"{plan_of(card)}\n```"
        for size, card in CARDS.items()
    ]
    return "\n\n".join([before, MARK, *sections, MARK, after]) + "\n"


def main() -> int:
    """Write the page; 1 if that changed it."""
    page = PAGE.read_text()
    written = with_plans(page)
    PAGE.write_text(written)
    return int(written != page)


if __name__ == "__main__":
    sys.exit(main())
