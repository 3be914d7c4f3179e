"""What the CPU benchmark is measured against: ratios of numbers of one run, and what they should be.

Owns the goals, the sizes they speak of and their table. A ratio that lacks one of its numbers says so. Knows no server
and no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gpu_report import Goal
from workload import Row

STATIC = "transformers, static batch"
NOT_MEASURED = "not measured"
HEADER = ("what", "measured", "goal", "verdict")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The sizes that the goals speak of.

    Attributes:
        few, many: sequences.
        short, long: prompt tokens.
        budget: M.
        streams, stream_prompt, stream_new: how many streams go through HTTP and the engine alone, and their tokens.
    """

    few: int = 1
    many: int = 16
    short: int = 512
    long: int = 4096
    budget: int = 128
    streams: int = 64
    stream_prompt: int = 128
    stream_new: int = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Matmuls:
    """Milliseconds of the bare matmuls: of a decode step, by its rows, and of a prefill chunk."""

    decode_ms: dict[int, float]
    chunk_rows: int
    chunk_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Alone:
    """The engine alone: milliseconds of a decode step, by its sequences, and of a chunk; tokens/s of many streams."""

    decode_ms: dict[int, float]
    chunk_ms: float
    tokens_per_second: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Http:
    """The same streams through HTTP: tokens/s, and what the client's process took for a whole run of them."""

    tokens_per_second: float | None
    client_cpu_seconds: float
    wall_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """What one run of the benchmark has measured; None where a part was left out."""

    rows: Sequence[Row]
    matmuls: Matmuls | None = None
    alone: Alone | None = None
    http: Http | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """One line of the table: `above` over `below` against a goal.

    Attributes:
        what: the ratio in words.
        above, below: None where it was not measured.
        unit: of both.
        goal: what the ratio should be.
        note: what a reader should know beside the numbers.
    """

    what: str
    above: float | None
    below: float | None
    unit: str
    goal: Goal
    note: str = ""

    @property
    def value(self) -> float | None:
        """The ratio, None where a part of it is missing."""
        return self.above / self.below if self.above is not None and self.below else None

    @property
    def verdict(self) -> str:
        """`met`, `missed` or `not measured`."""
        if self.value is None:
            return NOT_MEASURED
        return "met" if self.goal.is_met(self.value) else "missed"

    @property
    def measured(self) -> str:
        """The ratio and what it is made of."""
        if self.value is None:
            return NOT_MEASURED
        return f"{self.value:.2f} ({self.above:,.1f} ÷ {self.below:,.1f} {self.unit}{self.note})"


def find_ratios(numbers: Numbers, sizes: Sizes) -> list[Ratio]:
    """Every ratio that has a goal, measured or not, in the order of the table."""
    return [*_against_matmuls(numbers, sizes), *_against_static(numbers.rows, sizes), _against_alone(numbers, sizes)]


def _against_matmuls(numbers: Numbers, sizes: Sizes) -> list[Ratio]:
    alone, matmuls = numbers.alone, numbers.matmuls
    found = []
    for count in (sizes.few, sizes.many):
        step = f"decode step, {_count(count, 'sequence')} of {sizes.short:,} tokens at M = {sizes.budget}"
        found.append(
            Ratio(
                what=f"{step} ÷ bare matmuls of {_count(count, 'row')}",
                above=None if alone is None else alone.decode_ms.get(count),
                below=None if matmuls is None else matmuls.decode_ms.get(count),
                unit="ms",
                goal=Goal(1.8, is_ceiling=True),
            )
        )
    tokens = "" if matmuls is None else f" of {matmuls.chunk_rows:,} tokens"
    found.append(
        Ratio(
            what=f"prefill chunk{tokens} at M = {sizes.budget} ÷ its bare matmuls",
            above=None if alone is None else alone.chunk_ms,
            below=None if matmuls is None else matmuls.chunk_ms,
            unit="ms",
            goal=Goal(1.6, is_ceiling=True),
        )
    )
    return found


def _against_static(rows: Sequence[Row], sizes: Sizes) -> list[Ratio]:
    found = []
    for prompt, budget, decode_goal, prefill_goal in (
        (sizes.long, sizes.budget, Goal(10.0), Goal(3.0)),
        (sizes.short, 0, Goal(2.0), Goal(1.2)),
    ):
        ours = _find_row(rows, service_name(budget), sizes.many, prompt)
        static = _find_row(rows, STATIC, sizes.many, prompt)
        what = f"{sizes.many} × {prompt:,} tokens {f'at M = {budget}' if budget else 'dense'} ÷ {STATIC}"
        parts: tuple[tuple[str, Callable[[Row], float | None], Goal], ...] = (
            ("decode", lambda row: row.decode_tokens_per_second, decode_goal),
            ("prefill", lambda row: row.prefill_tokens_per_second, prefill_goal),
        )
        for part, rate, goal in parts:
            above, below = (None if row is None else rate(row) for row in (ours, static))
            found.append(Ratio(what=f"{what}: {part}", above=above, below=below, unit="tokens/s", goal=goal))
    return found


def _against_alone(numbers: Numbers, sizes: Sizes) -> Ratio:
    http, alone = numbers.http, numbers.alone
    note = ""
    if http is not None:
        note = f"; client: {http.client_cpu_seconds:.2f} s of CPU time in {http.wall_seconds:.1f} s"
    return Ratio(
        what=f"tokens/s through HTTP ÷ the engine's alone, {sizes.streams} streams at M = {sizes.budget}",
        above=None if http is None else http.tokens_per_second,
        below=None if alone is None else alone.tokens_per_second,
        unit="tokens/s",
        goal=Goal(0.95),
        note=note,
    )


def service_name(budget: int) -> str:
    """What the table calls this service at a budget; 0 is dense."""
    return f"trimkv-serve, {f'budget {budget}' if budget else 'dense'}"


def _find_row(rows: Sequence[Row], system: str, concurrency: int, prompt_tokens: int) -> Row | None:
    wanted = (system, concurrency, prompt_tokens)
    return next((row for row in rows if (row.system, row.concurrency, row.prompt_tokens) == wanted), None)


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def render_goals(ratios: Sequence[Ratio]) -> str:
    """The table in Markdown."""
    lines = [f"| {' | '.join(HEADER)} |", f"|{'---|' * len(HEADER)}"]
    lines += [f"| {ratio.what} | {ratio.measured} | {ratio.goal} | {ratio.verdict} |" for ratio in ratios]
    return "\n".join(lines)
