"""Perplexity on long texts, source by source.

Every text is cut into excerpts, each read from its start; every token but an excerpt's first is predicted, so the first
chunks count too. Knows no methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimkv_core.evaluation.measures import Measure
from trimkv_core.evaluation.tasks import Probe, ProbeResult, Span

BLOCK_TOKENS = 256


class TextError(ValueError):
    """A text that cannot be judged with; the message names the file."""


@dataclass(frozen=True, slots=True)
class Excerpt:
    """A stretch of a text.

    Attributes:
        source: the text's name.
        ids: its tokens.
    """

    source: str
    ids: tuple[int, ...]


def read_texts(paths: Sequence[Path]) -> dict[str, str]:
    """The texts by their names.

    Raises:
        TextError: a file is missing, is no text, or bears another's name.
    """
    texts: dict[str, str] = {}
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise TextError(f"text {path} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise TextError(f"text {path} is not UTF-8: {error}") from error
        if path.stem in texts:
            raise TextError(f"two texts are called {path.stem!r}: results would mix them up; rename one")
        texts[path.stem] = text
    return texts


def cut_excerpts(texts: dict[str, str], tokenizer: Any, *, tokens: int, excerpts: int) -> tuple[Excerpt, ...]:
    """Up to `excerpts` excerpts of `tokens` tokens a text, spread evenly over it.

    What the tokenizer begins every text with (a BOS token, for some models) begins every excerpt and counts.

    Raises:
        TextError: a text is shorter than one excerpt.
    """
    result = []
    prefix: list[int] = tokenizer("")["input_ids"]
    if tokens < len(prefix) + 2:
        raise TextError(f"an excerpt of {tokens} tokens leaves nothing to predict: raise --text-tokens")
    tokens -= len(prefix)
    for source, text in texts.items():
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        count = min(excerpts, len(ids) // tokens)
        if count < 1:
            raise TextError(
                f"text {source!r} has {len(ids)} tokens, an excerpt needs {tokens}: name a longer one or lower "
                "--text-tokens"
            )
        gap = (len(ids) - count * tokens) // count
        starts = [number * (tokens + gap) for number in range(count)]
        result += [Excerpt(source, (*prefix, *ids[start : start + tokens])) for start in starts]
    return tuple(result)


class TextTask:
    """Negative log-likelihood of excerpts, block by block."""

    name = "text"

    def __init__(self, excerpts: Sequence[Excerpt]) -> None:
        self.excerpts = tuple(excerpts)
        self.probes = tuple(Probe(excerpt.ids, (Span(1, len(excerpt.ids)),)) for excerpt in self.excerpts)

    def measure(self, results: Sequence[ProbeResult]) -> list[Measure]:
        """One measure a source, `nll`, in blocks of 256 tokens."""
        measures = []
        for source in dict.fromkeys(excerpt.source for excerpt in self.excerpts):
            sums: list[float] = []
            counts: list[int] = []
            for excerpt, result in zip(self.excerpts, results, strict=True):
                if excerpt.source == source:
                    blocks = [result.nll[at : at + BLOCK_TOKENS] for at in range(0, len(result.nll), BLOCK_TOKENS)]
                    sums += [sum(block) for block in blocks]
                    counts += [len(block) for block in blocks]
            measures.append(Measure("nll", source, tuple(sums), tuple(counts), len(self.excerpts[0].ids)))
        return measures
