"""The other side of `kvpress_client`: kvpress's methods under our feeding regime, in a Python of their own.

Run as `python -I kvpress_worker.py REQUEST REPLY`, two JSON files; imports nothing of ours, since the Python that has
kvpress 0.5.5 (transformers < 5.3) has none of it. Owns how a press that was made for whole prompts is asked after every
chunk, and the removal of what it scores lowest. Knows nothing of tasks or tables.

The regime: a sequence is read in chunks; each query of a chunk sees what its head still holds and the chunk up to
itself. Once a stream holds M + buffer entries or more after a chunk, M stay (AdaKV: M on average over the layer's
heads). Keys keep the rotation of their true positions, and queries get theirs. The first `sinks` positions are pinned
for every method. Entries leave the tensors; nothing is masked that could still be had.

What is kvpress's and what is ours: every score comes out of the press's own `score`, AdaKV's choice among heads out of
its own `compress`. Where a press assumes that the hidden states it gets belong to all keys, or start at position 0, it
is asked like this:

- knorm, keydiff: as they are; KeyDiff's mean key is that of the entries held (its paper's block-wise form).
- random: as it is, from one seed a run. An entry has to survive every draw, so what stays is mostly recent.
- streaming-llm: as it is, `n_sink` = sinks, its ratio set so that exactly M stay.
- tova: as it is: attention of the chunk's last token, one eviction a chunk rather than one a token.
- snapkv: `window_size` = M / 8, from 4 to 64: kvpress's 64 would leave nothing to choose at M = 64, where of 8, 16 and
  32 the 8 gave the lowest perplexity. A window that begins in an earlier chunk gets the hidden states and rotations
  kept from there. Pooling runs over neighbours in the cache, which after evictions need not be neighbours in the text.
- observed-attention: kvpress divides an entry's attention by the queries that could see it, which it takes from the
  entry's place in the cache; that holds for a whole prompt only. Here an entry's sum over all queries since it came is
  carried along and handed over as one row, scaled so that the division gives that sum by the true number of queries.
- h2o: the same press, scaled so that it gives the bare sum; half of M is kept for the most recent entries, as in the
  paper. kvpress has no press of that name.
- expected-attention: query statistics over the last 256 hidden states (kvpress's own number while decoding; they come
  on top of the entries counted). The future positions it averages over start at the true next position instead of at
  the number of hidden states, and are those of one chunk: the next eviction decides anew, and kvpress's 512 gave a
  higher perplexity.
- adakv, adakv-snapkv: AdaKV over expected attention or SnapKV as above. kvpress masks what AdaKV drops. Here it is
  removed: heads of a layer hold different numbers of entries, counted as such; the rows of shorter heads are filled up
  on the left to the longest one's length, and the filling is never seen or scored.

Letters: S sequences, H KV heads, G query heads a KV head, D head dimension, N columns held, T tokens of a chunk.
"""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

METHODS = (
    "expected-attention",
    "snapkv",
    "tova",
    "observed-attention",
    "h2o",
    "knorm",
    "keydiff",
    "streaming-llm",
    "random",
    "adakv",
    "adakv-snapkv",
)
# A press, or anything with its `score`: the tests have a few of their own.
Press = Any
# From scores [S, H, N] and the number of entries to keep a head, which stay [S, H, N].
Choice = Callable[[Tensor, int], Tensor]

_OBSERVED = ("observed-attention", "h2o")
_HISTORY = 256
_SEED = 0


@dataclass(frozen=True, slots=True)
class Regime:
    """How a sequence is read and when a stream is cut.

    Attributes:
        memory_size: M, entries a stream keeps.
        chunk: tokens a forward.
        buffer: entries beyond M before a stream is cut.
        sinks: first positions that always stay.
    """

    memory_size: int
    chunk: int
    buffer: int
    sinks: int


@dataclass(frozen=True, slots=True)
class Method:
    """A press and how it has to be asked.

    Attributes:
        press: whose `score` is called.
        choose: which entries stay; None keeps the best M of every head.
        observed: None, or how sums of attention are handed over: "mean" (a query) or "sum".
        recent: share of M kept for the most recent entries, besides what the press says.
    """

    press: Press
    choose: Choice | None = None
    observed: str | None = None
    recent: float = 0.0


def snapkv_window(regime: Regime) -> int:
    """Recent tokens whose attention SnapKV goes by, and which stay: M / 8 within bounds, at most half of the choice."""
    return max(1, min(64, max(4, regime.memory_size // 8), (regime.memory_size - regime.sinks) // 2))


def ratio_for(kept: int, columns: int) -> float:
    """The compression ratio at which kvpress keeps exactly `kept` of `columns`, whichever way its product rounds."""
    return max(0.0, 1 - (kept + 0.5) / columns)


def chunk_mask(counts: Tensor, columns: int, tokens: int, *, groups: int, dtype: torch.dtype) -> Tensor:
    """What the queries of a chunk may see, to be added to their logits.

    A row is `columns` held ones, of which the last `counts` are entries, then the chunk itself::

        . . e e e e | t t t t        . filling   e entry   t token up to the query's own

    Args:
        counts: [S, H] entries held.
        columns: N.
        tokens: T.
        groups: G.
        dtype: of the logits.

    Returns:
        [S, H * G, T, N + T], 0 where seen.
    """
    held = torch.arange(columns, device=counts.device) >= columns - counts[..., None]  # [S, H, N]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=counts.device).tril()
    lead = (*counts.shape, tokens)
    seen = torch.cat([held[:, :, None, :].expand(*lead, columns), causal.expand(*lead, tokens)], dim=-1)
    mask = torch.zeros(seen.shape, dtype=dtype, device=counts.device).masked_fill_(~seen, torch.finfo(dtype).min)
    return mask.repeat_interleave(groups, dim=1)


def right_aligned(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Where kept columns go so that they stand at the right end of every row, in their order.

    Args:
        keep: [S, H, N] bool.

    Returns:
        Columns to gather [S, H, W], W the most that a row keeps, and how many of them are kept ones [S, H].
    """
    counts = keep.sum(dim=-1)
    order = keep.to(torch.uint8).argsort(dim=-1, stable=True)  # dropped ones first, each kind in its order
    return order[..., keep.shape[-1] - int(counts.max()) :], counts


def best_of_each_head(scores: Tensor, kept: int) -> Tensor:
    """The `kept` highest of every row [S, H, N], as a mask."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(kept, dim=-1).indices, True)


class Stream:
    """The entries of one layer for one batch: how many, where from, and what a press has to know of the past."""

    def __init__(self, method: Method, regime: Regime, layer: Any) -> None:
        """Start empty.

        Args:
            method: whom to ask.
            regime: when.
            layer: of the cache: `keys` and `values` [S, H, N, D], to which a forward appends.
        """
        self.method = method
        self.regime = regime
        self.layer = layer
        self.counts: Tensor | None = None  # [S, H]
        self.peak: Tensor | None = None  # [S] most entries at a time, the mean over heads
        self.positions: Tensor | None = None  # [S, H, N]
        self._sums: Tensor | None = None  # [S, H * G, N]
        self._hidden: Tensor | None = None  # [S, up to _HISTORY, hidden size]
        self._rotations: tuple[Tensor, Tensor] | None = None  # cos and sin of the same tokens
        self._read = 0

    def mask(self, module: nn.Module, hidden: Tensor) -> Tensor:
        """The mask of the chunk that is about to be read; see `chunk_mask`."""
        config: Any = module.config
        if self.counts is None:
            self.counts = torch.zeros(hidden.shape[0], config.num_key_value_heads, dtype=torch.long).to(hidden.device)
            self.peak = self.counts.float().mean(dim=1)
            self.positions = self.counts.new_zeros(*self.counts.shape, 0)
        assert self.positions is not None
        groups = config.num_attention_heads // config.num_key_value_heads
        columns = self.positions.shape[-1]
        return chunk_mask(self.counts, columns, hidden.shape[1], groups=groups, dtype=hidden.dtype)

    def after(self, module: nn.Module, hidden: Tensor, attentions: Tensor | None, kwargs: dict[str, Any]) -> None:
        """Take note of a chunk that the layer has read, and cut the streams if it is time."""
        assert self.counts is not None and self.peak is not None and self.positions is not None
        tokens = hidden.shape[1]
        new = torch.arange(self._read, self._read + tokens, device=hidden.device)
        self.positions = torch.cat([self.positions, new.expand(*self.counts.shape, tokens)], dim=-1)
        self._read += tokens
        self.counts = self.counts + tokens
        self.peak = torch.maximum(self.peak, self.counts.float().mean(dim=1))
        self._remember(hidden, attentions, kwargs)
        limit = self.regime.memory_size + self.regime.buffer
        # Sequences of a batch are cut together: they have read the same number of tokens and kept the same number.
        if int(self.counts[0].sum()) >= limit * self.counts.shape[1]:
            self._evict(module, kwargs)

    def _remember(self, hidden: Tensor, attentions: Tensor | None, kwargs: dict[str, Any]) -> None:
        rotations = kwargs["position_embeddings"]
        if self._hidden is not None and self._rotations is not None:
            hidden = torch.cat([self._hidden, hidden], dim=1)
            rotations = tuple(torch.cat([old, new], dim=1) for old, new in zip(self._rotations, rotations, strict=True))
        self._hidden = hidden[:, -_HISTORY:]
        self._rotations = (rotations[0][:, -_HISTORY:], rotations[1][:, -_HISTORY:])
        if self.method.observed is not None:
            assert attentions is not None, "the model must run with eager attention"
            sums = attentions.sum(dim=2)  # [S, H * G, N + T]
            if self._sums is not None:
                sums[..., : self._sums.shape[-1]] += self._sums
            self._sums = sums

    def _evict(self, module: nn.Module, kwargs: dict[str, Any]) -> None:
        assert self.counts is not None and self.positions is not None
        kept, columns = self.regime.memory_size, self.positions.shape[-1]
        if int(self.counts[0].sum()) <= kept * self.counts.shape[1]:
            return
        scores = self._scores(module, kwargs).float()
        filling = torch.arange(columns, device=scores.device) < columns - self.counts[..., None]
        pinned = self.positions < self.regime.sinks
        if self.method.recent:
            pinned = pinned | (torch.arange(columns, device=scores.device) >= columns - int(kept * self.method.recent))
        scores = scores.masked_fill(pinned, float("inf")).masked_fill(filling, float("-inf"))
        index, self.counts = right_aligned((self.method.choose or best_of_each_head)(scores, kept))
        self.positions = self.positions.gather(-1, index)
        columns_of_entries = index[..., None].expand(-1, -1, -1, self.layer.keys.shape[-1])
        self.layer.keys = self.layer.keys.gather(2, columns_of_entries)
        self.layer.values = self.layer.values.gather(2, columns_of_entries)
        if self._sums is not None:
            groups = self._sums.shape[1] // index.shape[1]
            self._sums = self._sums.gather(-1, index.repeat_interleave(groups, dim=1))

    def _scores(self, module: nn.Module, kwargs: dict[str, Any]) -> Tensor:
        """Scores [S, H, N] of every entry, asked so that no press ever sees filling."""
        assert self.counts is not None and self.positions is not None and self._hidden is not None
        press, columns = self.method.press, self.positions.shape[-1]
        if hasattr(press, "next_position"):
            press.next_position = self._read
        if hasattr(press, "compression_ratio"):
            press.compression_ratio = ratio_for(self.regime.memory_size, columns)
        asked = kwargs | {"position_embeddings": self._rotations}
        keys, values = self.layer.keys, self.layer.values
        if int(self.counts.min()) == columns:
            scores: Tensor = press.score(module, self._hidden, keys, values, self._observed(), asked)
            return scores
        scores = keys.new_zeros((*self.counts.shape, columns))
        # Heads of one length at a time: the others are cut or filled up to it, and what is said of them is dropped.
        for row, lengths in enumerate(self.counts.tolist()):
            for length in sorted(set(lengths)):
                answer = press.score(
                    module,
                    self._hidden[row : row + 1],
                    keys[row : row + 1, :, -length:],
                    values[row : row + 1, :, -length:],
                    None,
                    asked | {"position_embeddings": tuple(part[-1:] for part in asked["position_embeddings"])},
                )
                for head, own in enumerate(lengths):
                    if own == length:
                        scores[row, head, -length:] = answer[0, head]
        return scores

    def _observed(self) -> Tensor | None:
        """Sums of attention as the one row [S, H * G, 1, N] that the press adds up and divides by N, N - 1, … 1."""
        if self.method.observed is None:
            return None
        assert self._sums is not None and self.positions is not None
        columns = self._sums.shape[-1]
        scale = torch.arange(columns, 0, -1, device=self._sums.device).to(self._sums.dtype)
        row = self._sums * scale
        if self.method.observed == "mean":
            seen_by = (self._read - self.positions).to(row.dtype)  # every query since the entry came, its own included
            row = row / seen_by.repeat_interleave(row.shape[1] // seen_by.shape[1], dim=1)
        return row[:, :, None]


class _LayerCache:
    """A layer of the cache: a forward appends, a `Stream` removes."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], dim=2)
        self.values = values if self.values is None else torch.cat([self.values, values], dim=2)
        return self.keys, self.values


class StreamCache:
    """What a model takes as its cache: a `Stream` a layer, and as many columns as each of them still has."""

    def __init__(self, method: Method, regime: Regime, *, num_layers: int) -> None:
        """Start empty."""
        self.layers = [_LayerCache() for _ in range(num_layers)]
        self.streams = [Stream(method, regime, layer) for layer in self.layers]
        self.is_compileable = False

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Append a chunk's keys and values [S, H, T, D] to a layer; everything it holds."""
        return self.layers[layer_idx].append(keys, values)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of a layer."""
        keys = self.layers[layer_idx].keys
        return 0 if keys is None else keys.shape[2]

    def peak_entries(self) -> Tensor:
        """[S] the most entries a sequence held at a time, a stream: every layer is cut at the same time."""
        peaks = [stream.peak for stream in self.streams if stream.peak is not None]
        return torch.stack(peaks).mean(dim=0)


def _attention_modules(model: nn.Module) -> list[Any]:
    """The attention of every layer, in order.

    Raises:
        ValueError: the model is none that can be hooked, or a layer has a window of its own.
    """
    decoder: Any = getattr(model, "model", None)
    layers = getattr(decoder, "layers", None)
    if layers is None or not all(hasattr(layer, "self_attn") for layer in layers):
        raise ValueError(
            f"{type(model).__name__} has no model.layers[…].self_attn: kvpress baselines need a text model"
        )
    kinds = set(getattr(decoder.config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ValueError(f"kvpress baselines need full attention in every layer, this model has {sorted(kinds)}")
    return [layer.self_attn for layer in layers]


@contextmanager
def _hooked(model: Any, cache: StreamCache) -> Iterator[None]:
    """Every layer asks its stream for the mask before attention, and reports to it after."""
    handles = []
    try:
        for module, stream in zip(_attention_modules(model), cache.streams, strict=True):

            def before(module: nn.Module, args: Any, kwargs: Any, *, stream: Stream = stream) -> tuple[Any, Any]:
                return args, kwargs | {"attention_mask": stream.mask(module, kwargs["hidden_states"])}

            def after(module: nn.Module, _: Any, kwargs: Any, output: Any, *, stream: Stream = stream) -> None:
                stream.after(module, kwargs["hidden_states"], output[1], kwargs)

            module.rotary_emb = model.model.rotary_emb  # where expected attention looks for it
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def read(
    model: Any, method: Method, regime: Regime, *, ids: Tensor, predicted: Sequence[Sequence[int]]
) -> list[dict[str, Any]]:
    """Read a batch under the regime, and say how likely the predicted tokens were.

    Args:
        model: a `transformers` text model with full attention.
        method: whom to ask what stays.
        regime: when.
        ids: [S, tokens].
        predicted: for each sequence the positions of the tokens to predict.

    Returns:
        For each sequence `nll` and `best`, one a predicted token in order, and `peak_entries`.
    """
    num_sequences, length = ids.shape
    # Renamed in transformers 5.24.
    cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    cache = StreamCache(method, regime, num_layers=len(_attention_modules(model)))
    answers: list[dict[str, Any]] = [{"nll": [], "best": []} for _ in range(num_sequences)]
    with _hooked(model, cache):
        for start in range(0, length, regime.chunk):
            stop = min(start + regime.chunk, length)
            # Logits at one position predict the next.
            here = [[at - 1 for at in positions if start < at <= stop] for positions in predicted]
            rows = sorted({at - start for positions in here for at in positions})
            where = {at: row for row, at in enumerate(rows)}
            positions = torch.arange(start, stop, device=ids.device)
            output = model(
                input_ids=ids[:, start:stop],
                # Four dimensions: taken as it is, so that `transformers` builds none. Each layer puts its own there.
                attention_mask=torch.zeros(1, 1, 1, 1, dtype=model.dtype, device=ids.device),
                position_ids=positions[None].expand(num_sequences, -1),
                **{cache_name: cache},
                use_cache=True,
                cache_position=positions,
                logits_to_keep=torch.tensor(rows or [0], device=ids.device),
            )
            for row, wanted in enumerate(here):
                if wanted:
                    logits = output.logits[row, [where[at - start] for at in wanted]].float()
                    targets = ids[row, [at + 1 for at in wanted]]
                    answers[row]["nll"] += nn.functional.cross_entropy(logits, targets, reduction="none").tolist()
                    answers[row]["best"] += logits.argmax(dim=-1).tolist()
    for answer, peak in zip(answers, cache.peak_entries().tolist(), strict=True):
        answer["peak_entries"] = peak
    return answers


def _kvpress_method(name: str, regime: Regime) -> Method:
    """The press of this name, set up for the regime."""
    kvpress = importlib.import_module("kvpress")
    window = snapkv_window(regime)

    class ExpectedAttention(kvpress.ExpectedAttentionPress):  # type: ignore[name-defined]
        """Looks ahead from the true position, however few hidden states it was given."""

        next_position = 0

        def apply_avg_rope(self, module: nn.Module, mu: Tensor, cov: Tensor, q_len: int) -> Any:
            return super().apply_avg_rope(module, mu, cov, self.next_position)

    class Given(kvpress.ScorerPress):  # type: ignore[name-defined]
        """Scores that were worked out before, for a press that wants to ask another one."""

        scores: Tensor

        def score(self, *_: Any, **__: Any) -> Tensor:
            return self.scores

    def adaptive(scores: Tensor, kept: int) -> Tensor:
        given = Given()
        given.scores = scores.clone()  # AdaKV writes into it
        wrapped = kvpress.AdaKVPress(given)
        wrapped.compression_ratio = ratio_for(kept, scores.shape[-1])
        module = nn.Module()
        module.config = type("Config", (), {"_attn_implementation": "sdpa"})  # type: ignore[assignment]
        wrapped.compress(module, None, scores, scores, None, {})
        keep = torch.ones_like(scores, dtype=torch.bool)
        keep[module.masked_key_indices] = False  # type: ignore[index]
        return keep

    expected = ExpectedAttention(n_sink=regime.sinks, n_future_positions=regime.chunk)
    if name in {"adakv", "adakv-snapkv"}:
        if name == "adakv":
            return Method(expected, choose=adaptive)
        return Method(kvpress.SnapKVPress(window_size=window), choose=adaptive)
    makers: dict[str, Callable[[], Method]] = {
        "expected-attention": lambda: Method(expected),
        "snapkv": lambda: Method(kvpress.SnapKVPress(window_size=window)),
        "tova": lambda: Method(kvpress.TOVAPress()),
        "observed-attention": lambda: Method(kvpress.ObservedAttentionPress(), observed="mean"),
        "h2o": lambda: Method(kvpress.ObservedAttentionPress(), observed="sum", recent=0.5),
        "knorm": lambda: Method(kvpress.KnormPress()),
        "keydiff": lambda: Method(kvpress.KeyDiffPress()),
        "streaming-llm": lambda: Method(kvpress.StreamingLLMPress(n_sink=regime.sinks)),
        "random": lambda: Method(kvpress.RandomPress()),
    }
    if name not in makers:
        raise ValueError(f"unknown method {name!r}: {', '.join(METHODS)}")
    return makers[name]()


def answer_request(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Load the model, read every probe, batches of equal lengths together; answers in the probes' order."""
    transformers = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("kvpress").setLevel(logging.ERROR)
    regime = Regime(**request["regime"])
    method = _kvpress_method(request["method"], regime)
    device = torch.device(request["device"])
    if request["threads"] is not None:
        torch.set_num_threads(request["threads"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        request["model_folder"],
        dtype="auto",
        attn_implementation="eager" if method.observed else "sdpa",
        local_files_only=True,
    )
    model = model.to(device).eval()
    torch.manual_seed(_SEED)
    by_length: dict[int, list[int]] = defaultdict(list)
    for at, probe in enumerate(request["probes"]):
        by_length[len(probe["ids"])].append(at)
    answers: dict[int, dict[str, Any]] = {}
    for members in by_length.values():
        for first in range(0, len(members), request["batch"]):
            batch = members[first : first + request["batch"]]
            probes = [request["probes"][at] for at in batch]
            ids = torch.tensor([probe["ids"] for probe in probes], device=device)
            predicted = [[at for start, stop in probe["spans"] for at in range(start, stop)] for probe in probes]
            answers |= zip(batch, read(model, method, regime, ids=ids, predicted=predicted), strict=True)
    return [answers[at] for at in range(len(request["probes"]))]


def main(request: Path, reply: Path) -> int:
    """Answer a request file into a reply file: `results`, or `error` in words (the traceback goes to stderr)."""
    try:
        document: dict[str, Any] = {"results": answer_request(json.loads(request.read_text(encoding="utf-8")))}
    except Exception as error:  # whatever it is, the other side is to read it
        traceback.print_exc()
        document = {"error": f"{type(error).__name__}: {error}"}
    reply.write_text(json.dumps(document), encoding="utf-8")
    return 1 if "error" in document else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
