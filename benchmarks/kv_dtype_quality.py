"""What 8-bit keys and values cost in quality: the embedded model reads prose with both kinds of entries, side by side.

    python benchmarks/kv_dtype_quality.py --output benchmarks/results/kv_dtype_quality-DATE.json

Two caches are fed the same tokens in chunks, by the same lean decoder and the same attention backend: one stores
float32, the other float8_e4m3fn with a scale an entry. After every chunk both evict under the same budget, each by its
own scores. Compared are the distributions of every next token, and what was kept. The text is Python's own reference
(`pydoc_data.topics`), which every machine has; its wording follows the Python version, which the result names.

Letters: T tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from serve_cpu_report import describe_machine
from torch import Tensor
from transformers import AutoTokenizer

from trimkv_core.attention.base import PagedStep
from trimkv_core.attention.torch import TorchBackend
from trimkv_core.batches import Segment
from trimkv_core.budget import Budget
from trimkv_core.byte_ledger import geometry_of
from trimkv_core.embedded import embedded_model_path
from trimkv_core.fp8 import FP8, name_kv_dtype
from trimkv_core.lean.decoder import LeanDecoder, make_lean_decoder
from trimkv_core.models import TrimKVForCausalLM
from trimkv_core.pages import PagePool
from trimkv_core.sequences import SequenceTable

BLOCK_SIZE, BUFFER = 16, 32
# Long ones, and more of prose than of tables.
TOPICS = ("specialnames", "compound", "types", "debugger", "execmodel", "assignment")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """One budget, over all texts.

    Attributes:
        budget: M; None: dense.
        tokens: that were predicted.
        perplexity, fp8_perplexity: with float32 and with 8-bit entries.
        kl: mean Kullback-Leibler divergence of the 8-bit distribution from the float32 one, nats a token.
        kl_p99: what 99 % of the tokens stay below.
        same_best: share of tokens whose likeliest next token is the same.
        same_kept: share of the entries kept at the end of a text that both caches kept.
        seconds: that both took together.
    """

    budget: int | None
    tokens: int
    perplexity: float
    fp8_perplexity: float
    kl: float
    kl_p99: float
    same_best: float
    same_kept: float
    seconds: float


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Per token: losses with either cache [T], divergence [T], whether the best is the same [T]."""

    loss: Tensor
    fp8_loss: Tensor
    divergence: Tensor
    is_same: Tensor


class Cache:
    """One sequence over entries of one type."""

    def __init__(
        self, decoder: LeanDecoder, config: object, dtype: torch.dtype, *, budget: Budget, tokens: int
    ) -> None:
        geometry = geometry_of(config, block_size=BLOCK_SIZE, dtype=dtype)
        pages = budget.ceiling_pages(geometry, total_tokens=tokens, forward_tokens=tokens)
        self.table = SequenceTable(PagePool(geometry, pages, dtype=dtype), 1)
        self.row = self.table.open(pages)
        self._decoder, self._budget, self._backend = decoder, budget, TorchBackend()

    def feed(self, ids: Tensor) -> Tensor:
        """Read a chunk, then evict: int64 [T] → log probabilities [T, V]."""
        before = self.table.seen(self.row)
        batch = self.table.extend([Segment(self.row, ids.numel())])
        logits = self._decoder.forward(ids, batch.position, PagedStep(self._backend, self.table, batch), None)
        if self.table.is_due(self.row, self._budget, before=before):
            self.table.evict([(self.row, self._budget)])
        return torch.log_softmax(logits.float(), -1)

    def kept(self) -> set[tuple[int, int, int]]:
        """Layer, head and position of every entry held."""
        geometry = self.table.geometry
        return {
            (layer, head, position)
            for layer in range(geometry.num_layers)
            for head in range(geometry.num_heads)
            for position in self.table.positions_of(self.row, layer, head).tolist()
        }


def compare(caches: tuple[Cache, Cache], ids: Tensor, *, chunk: int) -> Iterator[_Chunk]:
    """Feed both caches the same text; the last token has no next one."""
    for start in range(0, ids.numel() - 1, chunk):
        part = ids[start : min(start + chunk, ids.numel() - 1)]
        following = ids[start + 1 : start + 1 + part.numel(), None]
        exact, rounded = (cache.feed(part) for cache in caches)
        yield _Chunk(
            loss=-exact.gather(1, following)[:, 0],
            fp8_loss=-rounded.gather(1, following)[:, 0],
            divergence=(exact.exp() * (exact - rounded)).sum(-1),
            is_same=exact.argmax(-1) == rounded.argmax(-1),
        )


def measure(decoder: LeanDecoder, config: object, texts: list[Tensor], *, budget: Budget, chunk: int) -> Quality:
    """All texts under one budget."""
    begin, shared, kept = time.perf_counter(), 0, 0
    parts: list[_Chunk] = []
    for ids in texts:
        caches = tuple(
            Cache(decoder, config, dtype, budget=budget, tokens=ids.numel()) for dtype in (torch.float32, FP8)
        )
        parts += compare((caches[0], caches[1]), ids, chunk=chunk)
        left, right = (cache.kept() for cache in caches)
        shared, kept = shared + len(left & right), kept + len(left)
    divergence = torch.cat([part.divergence for part in parts])
    return Quality(
        budget=budget.memory_size,
        tokens=divergence.numel(),
        perplexity=math.exp(torch.cat([part.loss for part in parts]).mean()),
        fp8_perplexity=math.exp(torch.cat([part.fp8_loss for part in parts]).mean()),
        kl=float(divergence.mean()),
        kl_p99=float(divergence.quantile(0.99)),
        same_best=float(torch.cat([part.is_same for part in parts]).float().mean()),
        same_kept=shared / kept,
        seconds=time.perf_counter() - begin,
    )


def read_texts(count: int, tokens: int) -> list[Tensor]:
    """The first `tokens` tokens of the first `count` topics: int64 [tokens] each."""
    tokenizer = AutoTokenizer.from_pretrained(str(embedded_model_path()))
    cut = {"truncation": True, "max_length": tokens}
    return [torch.tensor(tokenizer(topics[name], **cut)["input_ids"]) for name in TOPICS[:count]]


def budget_of(model: object, size: int, *, chunk: int) -> Budget:
    """The budget of `size` entries a stream; 0: dense."""
    if size == 0:
        return Budget.dense()
    sinks = model.config.num_sink_tokens  # type: ignore[attr-defined]
    return Budget(memory_size=size, buffer_size=BUFFER, num_sink_tokens=sinks, prefill_chunk=chunk)


def render(rows: list[Quality]) -> str:
    """The table."""
    lines = [
        f"{'kv_budget':>10}{'perplexity':>12}{'fp8_e4m3':>10}{'ratio':>8}{'mean KL':>10}{'99 % below':>12}"
        f"{'same best':>11}{'same kept':>11}"
    ]
    for row in rows:
        lines.append(
            f"{row.budget or 'dense':>10}{row.perplexity:>12.3f}{row.fp8_perplexity:>10.3f}"
            f"{row.fp8_perplexity / row.perplexity:>8.4f}{row.kl:>10.5f}{row.kl_p99:>12.4f}"
            f"{row.same_best:>11.2%}{row.same_kept:>11.2%}"
        )
    return "\n".join(lines)


def _earlier_rows(path: Path, setup: dict[str, object], *, besides: list[Quality]) -> list[Quality]:
    """What an earlier run of the same setup has measured of other budgets."""
    if not path.is_file():
        return []
    earlier = json.loads(path.read_text(encoding="utf-8"))
    if earlier["setup"] != setup:
        raise SystemExit(f"{path} has rows of another setup: name another file")
    measured = {row.budget for row in besides}
    return [Quality(**row) for row in earlier["rows"] if row["budget"] not in measured]


def main() -> None:
    parser = argparse.ArgumentParser(description="Quality of 8-bit keys and values against float32 ones.")
    parser.add_argument("--budgets", type=int, nargs="+", default=[0, 128, 64], help="0 for dense (%(default)s)")
    parser.add_argument("--texts", type=int, default=4, choices=range(1, len(TOPICS) + 1), help="(%(default)s)")
    parser.add_argument("--tokens", type=int, default=2048, help="of each text (%(default)s)")
    parser.add_argument("--chunk", type=int, default=64, help="tokens between evictions (%(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file to write; rows of other budgets in it are kept")
    given = parser.parse_args()
    model = TrimKVForCausalLM.from_pretrained("embedded", dtype=torch.float32)
    decoder = make_lean_decoder(model)
    if decoder is None:
        raise SystemExit("the embedded model is one the lean decoder knows")
    texts = read_texts(given.texts, given.tokens)
    rows = []
    for size in given.budgets:
        budget = budget_of(model, size, chunk=given.chunk)
        rows.append(measure(decoder, model.config, texts, budget=budget, chunk=given.chunk))
    served = {"dtype": "float32", "backend": TorchBackend.name}
    setup = {
        "model": "embedded",
        "kv_dtypes": ["float32", name_kv_dtype(FP8)],
        "text": [f"pydoc_data.topics: {name}" for name in TOPICS[: given.texts]],
        "tokens_a_text": [ids.numel() for ids in texts],
        "chunk": given.chunk,
        "buffer": BUFFER,
        "decoder": decoder.name,
    }
    machine = describe_machine(served, threads=torch.get_num_threads())
    if given.output:
        rows = [*_earlier_rows(given.output, setup, besides=rows), *rows]
        rows.sort(key=lambda row: -(row.budget or 1 << 31))
        result = {"machine": machine, "setup": setup, "rows": [asdict(row) for row in rows]}
        given.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(
        f"{len(texts)} texts of {given.tokens} tokens, chunks of {given.chunk}, seconds: "
        + ", ".join(f"{row.seconds:.0f}" for row in rows)
    )
    print(render(rows))


if __name__ == "__main__":
    main()
