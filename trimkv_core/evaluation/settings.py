"""The flags of `trimkv-eval`, and what they mean. Owns their ranges and every complaint about them; loads nothing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trimkv_core.evaluation.feeding import LANES, Regime
from trimkv_core.evaluation.methods import DEFAULT_METHODS, DENSE, check_names
from trimkv_core.options import SettingsError

PROGRAM = "trimkv-eval"
TASKS = ("text", "recall", "conversation", "agreement")
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One run.

    Attributes:
        model, gates: as `load_model` takes them.
        gate_sinks: first positions pinned for the gates; None: what their checkpoint says.
        texts: files.
        tasks, methods: their names.
        budgets: M each; None: dense.
        regime: how everything is fed.
        text_tokens, excerpts: of each excerpt; how many a text.
        recall_cases, recall_lengths: questions a kind; tokens of their prompts.
        conversations: how many.
        agreement_tokens, new_tokens: read, and continued greedily.
        output: folder; None: only a picture is asked for.
        picture, picture_text: HTML file to write, text to show; None: none, the first of `texts`.
    """

    model: str
    gates: str | None
    gate_sinks: int | None
    texts: tuple[Path, ...]
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    budgets: tuple[int | None, ...]
    regime: Regime
    text_tokens: int
    excerpts: int
    recall_cases: int
    recall_lengths: tuple[int, ...]
    conversations: int
    agreement_tokens: int
    new_tokens: int
    output: Path | None
    resumes: bool
    picture: Path | None
    picture_text: Path | None
    picture_tokens: int
    kvpress_python: Path | None
    seed: int
    threads: int | None
    lanes: int
    device: str
    dtype: str | None


def read_settings(arguments: Sequence[str]) -> Settings:
    """Flags to settings.

    Raises:
        SystemExit: `--help`, or a flag that is malformed (argparse).
        SettingsError, MethodError: flags that do not go together.
    """
    given = build_parser().parse_args(arguments)
    tasks: tuple[str, ...] = given.tasks or (TASKS if given.text else ("recall", "conversation"))
    if {"text", "agreement"} & set(tasks) and not given.text:
        raise SettingsError("tasks 'text' and 'agreement' need --text FILE…")
    if given.output is None and given.picture is None:
        raise SettingsError("say where results go: --output FOLDER, or --picture FILE for a picture alone")
    if given.picture is not None and not (given.picture_text or given.text):
        raise SettingsError("--picture needs a text: --picture-text FILE or --text FILE")
    if given.picture is not None and all(budget is None for budget in given.budgets):
        raise SettingsError("--picture needs a budget to evict under: name a number in --budgets")
    check_names(given.methods)
    if min(given.text_tokens, given.agreement_tokens) < 2:
        raise SettingsError("--text-tokens and --agreement-tokens: at least 2, or nothing can be predicted")
    if "agreement" in tasks and given.agreement_tokens > given.text_tokens:
        raise SettingsError(
            f"--agreement-tokens {given.agreement_tokens} exceeds --text-tokens {given.text_tokens}: lower it"
        )
    return Settings(
        model=given.model,
        gates=given.gates,
        gate_sinks=given.gate_sinks,
        texts=tuple(given.text),
        tasks=tasks,
        methods=given.methods,
        budgets=given.budgets,
        regime=Regime(given.chunk, given.buffer, given.sinks),
        text_tokens=given.text_tokens,
        excerpts=given.excerpts,
        recall_cases=given.recall_cases,
        recall_lengths=given.recall_lengths,
        conversations=given.conversations,
        agreement_tokens=given.agreement_tokens,
        new_tokens=given.new_tokens,
        output=given.output,
        resumes=given.resume,
        picture=given.picture,
        picture_text=given.picture_text,
        picture_tokens=given.picture_tokens,
        kvpress_python=given.kvpress_python,
        seed=given.seed,
        threads=given.threads,
        lanes=given.lanes,
        device=given.device,
        dtype=given.dtype,
    )


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Measure what eviction costs: perplexity, recall, conversations and agreement with the dense "
        "model, for gates and other methods at the same number of entries, all fed in the same small chunks.",
    )
    what = parser.add_argument_group("what is measured")
    what.add_argument("--model", required=True, metavar="NAME", help="embedded, hub repo id, folder or GGUF file")
    what.add_argument("--gates", metavar="FOLDER", help="gate checkpoint (the model's own, if it has any)")
    what.add_argument(
        "--gate-sinks", type=_at_least(0), metavar="N", help="positions pinned for the gates (checkpoint's)"
    )
    what.add_argument(
        "--budgets",
        type=_budgets,
        default=(16, 32, 64, 128, 256, 512, None),
        metavar="LIST",
        help="entries a stream, or dense (16,32,64,128,256,512,dense)",
    )
    what.add_argument(
        "--methods", type=_names, default=DEFAULT_METHODS, metavar="LIST", help=f"({','.join(DEFAULT_METHODS)})"
    )
    what.add_argument("--tasks", type=_tasks, metavar="LIST", help=f"of {','.join(TASKS)} (all that can be done)")
    what.add_argument(
        "--text", type=Path, nargs="+", default=[], metavar="FILE", help="long texts, UTF-8, one a source"
    )
    what.add_argument(
        "--output", type=Path, metavar="FOLDER", help="for results.json, results.md, results.png and .svg"
    )
    what.add_argument(
        "--resume",
        action="store_true",
        help="keep rows of an earlier run that still hold; without it, --output may hold none",
    )

    size = parser.add_argument_group("how much")
    for flag, default, note in (
        ("--text-tokens", 4096, "tokens of an excerpt"),
        ("--excerpts", 2, "excerpts a text"),
        ("--recall-cases", 15, "questions a kind"),
        ("--conversations", 4, "with four questions each"),
        ("--agreement-tokens", 1024, "tokens read of one excerpt a source"),
        ("--new-tokens", 64, "tokens of a greedy continuation"),
    ):
        size.add_argument(flag, type=_at_least(1), default=default, metavar="N", help=f"{note} (%(default)s)")
    size.add_argument(
        "--recall-lengths", type=_lengths, default=(512, 1024, 2048), metavar="LIST", help="tokens (512,1024,2048)"
    )

    regime = parser.add_argument_group("how everything is fed")
    regime.add_argument(
        "--chunk", type=_at_least(1), default=64, metavar="N", help="tokens between evictions (%(default)s)"
    )
    regime.add_argument(
        "--buffer", type=_at_least(1), default=8, metavar="N", help="entries over the budget (%(default)s)"
    )
    regime.add_argument("--sinks", type=_at_least(0), default=4, metavar="N", help="pinned for baselines (%(default)s)")
    regime.add_argument("--seed", type=int, default=0, help="of questions and random choices (%(default)s)")

    picture = parser.add_argument_group("a picture of what is kept")
    picture.add_argument("--picture", type=Path, metavar="FILE", help="HTML file to write, at the first budget")
    picture.add_argument("--picture-text", type=Path, metavar="FILE", help="text to show (the first of --text)")
    picture.add_argument("--picture-tokens", type=_at_least(2), default=1024, metavar="N", help="of it (%(default)s)")

    machine = parser.add_argument_group("where it runs")
    machine.add_argument(
        "--kvpress-python", type=Path, metavar="FILE", help="Python that has kvpress, for kvpress:NAME"
    )
    machine.add_argument("--threads", type=_at_least(1), metavar="N", help="CPU threads (all)")
    machine.add_argument(
        "--lanes", type=_at_least(1), default=LANES, metavar="N", help="sequences a forward (%(default)s)"
    )
    machine.add_argument("--device", default="auto", help="cpu, cuda, cuda:N (cuda where there is one)")
    machine.add_argument("--dtype", choices=_DTYPES, help="(float32 on a CPU, else bfloat16)")
    return parser


def _at_least(least: int) -> type[int]:
    """A type for argparse: a whole number from `least`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from error
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is below {least}")
        return value

    return read  # type: ignore[return-value]  # argparse takes any callable; `type[int]` names the result


def _budgets(text: str) -> tuple[int | None, ...]:
    budgets: list[int | None] = []
    for part in _split(text):
        if part == DENSE:
            budgets.append(None)
        elif part.isdecimal() and int(part) > 0:
            budgets.append(int(part))
        else:
            raise argparse.ArgumentTypeError(f"{part!r} is no budget: use entries a stream (64) or {DENSE}")
    return tuple(budgets)


def _lengths(text: str) -> tuple[int, ...]:
    parts = _split(text)
    if bad := [part for part in parts if not part.isdecimal() or int(part) < 256]:
        raise argparse.ArgumentTypeError(f"{', '.join(bad)}: lengths are numbers of tokens, at least 256")
    return tuple(map(int, parts))


def _tasks(text: str) -> tuple[str, ...]:
    parts = _split(text)
    if unknown := [part for part in parts if part not in TASKS]:
        raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}: use {', '.join(TASKS)}")
    return tuple(parts)


def _names(text: str) -> tuple[str, ...]:
    return tuple(_split(text))


def _split(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise argparse.ArgumentTypeError("an empty list")
    return list(dict.fromkeys(parts))
