"""Choosing a token from logits: pure functions over rows.

Every row is judged by itself: no operation mixes rows. Knows no requests and no penalties.

Letters: R rows, V vocabulary, C candidates of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

# In place of a token id: the row has no finite logit, or its candidates may not hold all that its filters keep.
NOTHING = -1
UNDECIDED = -2
# A weight is 0 in float32 before e⁻¹⁰⁴: the last bucket has all that is farther.
BUCKETS_PER_NAT = 32
BUCKETS = 104 * BUCKETS_PER_NAT


@dataclass(frozen=True, slots=True)
class Filters:
    """The parameters of R rows, each [R, 1].

    Attributes:
        temperature: float32, above 0.
        top_k: int64, V when off.
        top_p: float64, 1 when off.
        min_p: float32; None when off in all rows.
        uniform: float64, the row's random number in [0, 1).
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor | None
    uniform: Tensor


def choose_best(logits: Tensor) -> Tensor:
    """The id of the highest logit of [R, V], the lowest of equals: int64 [R]."""
    best, ids = logits.max(dim=-1)
    return torch.where(best.isfinite(), ids, NOTHING)


def draw_plain(logits: Tensor, filters: Filters) -> Tensor:
    """A token of each row of [R, V], filtered by `min_p` only: int64 [R]."""
    weights = _weigh(logits, logits.amax(dim=-1, keepdim=True), filters)
    index, is_valid = _draw(weights, filters)
    return torch.where(is_valid, index, NOTHING)[:, 0]


def best_ids(logits: Tensor, candidates: int) -> Tensor:
    """The ids of the C best of each row of float32 [R, V], of equal logits the lower ids: int64 [R, C]."""
    # Adding 0 makes -0 a 0: they are equal, but their bits are not.
    bits = (logits + 0.0).contiguous().view(torch.int32).to(torch.int64)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # as integers they compare as the floats do
    ids = torch.arange(logits.shape[-1], device=logits.device)
    return ((ordered << 32) | (0x7FFFFFFF - ids)).topk(candidates, dim=-1).indices


def draw_among_best(
    logits: Tensor, filters: Filters, *, candidates: int, is_nucleus: bool, ids: Tensor | None = None
) -> Tensor:
    """A token of each row of [R, V] from its C best, `UNDECIDED` where the filters may keep more: int64 [R].

    Args:
        logits: float32 [R, V].
        filters: of the rows.
        candidates: C; every `top_k` that is not off is below it.
        is_nucleus: whether `top_k` is off in all rows; otherwise it is on in all.
        ids: of the C best as `best_ids` finds them; with a `top_k` in all rows nothing is undecided then.
    """
    is_exact = ids is not None and not is_nucleus
    if ids is None:
        values, ids = logits.topk(candidates, dim=-1)
    else:
        values = logits.gather(-1, ids)
    best = values[:, :1]
    mass = _weigh(logits, best, filters).sum(dim=-1, keepdim=True, dtype=torch.float64) if is_nucleus else None
    ids, by_id = ids.sort(dim=-1)
    kept = _filter(values.gather(-1, by_id), best, filters, mass)
    index, is_valid = _draw(kept.weights, filters)
    # Nothing outside is above `edge`: what is kept is all there if it is above, or if weights end before.
    is_decided = (kept.last > kept.edge) | kept.has_weightless | (candidates == logits.shape[-1])
    token = ids.gather(-1, index)
    if not is_exact:
        token = torch.where(is_decided, token, UNDECIDED)
    return torch.where(is_valid, token, NOTHING)[:, 0]


def draw_among_all(logits: Tensor, filters: Filters, *, top_k: int) -> Tensor:
    """As `draw_among_best` with C = V, for one row [1, V], `top_k` 0 when off: int64 [1].

    Sorts only what is needed. Waits for the device.
    """
    best = logits.amax(dim=-1, keepdim=True)
    if top_k:
        # Written so that NaN stays in and is found out.
        ids = (~(logits < logits.topk(top_k, dim=-1).values[:, -1:]))[0].nonzero().T
        weights = _filter(logits.gather(-1, ids), best, filters, None).weights
    else:
        ids = torch.arange(logits.shape[-1], device=logits.device)[None]
        weights = _weigh(logits, best, filters)
        weights = torch.where(_nucleus(logits, best, weights, filters), weights, 0.0)
    index, is_valid = _draw(weights, filters)
    return torch.where(is_valid, ids.gather(-1, index), NOTHING)[:, 0]


def _nucleus(logits: Tensor, best: Tensor, weights: Tensor, filters: Filters) -> Tensor:
    """What top_p keeps of one row, bool [1, V].

    Tokens are put in buckets by how far they are from the best, and only the bucket in which their mass reaches p is
    sorted: all of the nearer ones stay, all of the farther ones go.
    """
    enough = (filters.top_p * weights.sum(dtype=torch.float64))[0]
    distance = (best - logits).div_(filters.temperature).mul_(BUCKETS_PER_NAT)
    bucket = distance.clamp_(max=BUCKETS - 1).long()[0]
    reached = torch.bincount(bucket, weights=weights[0].double(), minlength=BUCKETS).cumsum(0)
    last = torch.searchsorted(reached, enough).clamp(max=BUCKETS - 1)
    ids = (bucket == last).nonzero()[:, 0]
    ids = ids[logits[0, ids].argsort(descending=True, stable=True)]
    mass = weights[0, ids].cumsum(0, dtype=torch.float64)
    is_kept = bucket < last
    before = functional.pad(reached, (1, 0))[last]
    is_kept[ids] = before + functional.pad(mass[:-1], (1, 0)) < enough
    return is_kept[None]


@dataclass(frozen=True, slots=True)
class _Kept:
    """What top_k and top_p keep of C candidates.

    Attributes:
        weights: float32 [R, C], 0 where dropped.
        last: float32 [R, 1], the lowest logit kept.
        edge: float32 [R, 1], the lowest logit of all candidates.
        has_weightless: bool [R, 1], whether `edge` has a weight of 0.
    """

    weights: Tensor
    last: Tensor
    edge: Tensor
    has_weightless: Tensor


def _filter(values: Tensor, best: Tensor, filters: Filters, mass: Tensor | None) -> _Kept:
    """Apply top_k and top_p to `values` [R, C], which lie in the order of ids.

    `mass` [R, 1] is of all that top_k leaves; None if that is among the candidates.
    """
    weights = _weigh(values, best, filters)
    # Stable, so that the lower of equal ids is the better one.
    values, order = values.sort(dim=-1, descending=True, stable=True)
    ranked = weights.gather(-1, order)
    cumulated = ranked.cumsum(dim=-1, dtype=torch.float64)
    size = values.shape[-1]
    if mass is None:
        mass = cumulated.gather(-1, filters.top_k.clamp(max=size) - 1)
    enough = torch.where(filters.top_p < 1.0, filters.top_p * mass, torch.inf)
    rank = torch.arange(size, device=values.device)
    is_needed = (functional.pad(cumulated[:, :-1], (1, 0)) < enough) | (rank == 0)
    is_kept = is_needed & (rank < filters.top_k) & (ranked > 0)
    count = is_kept.sum(dim=-1, keepdim=True)
    return _Kept(
        weights=torch.where(torch.zeros_like(is_kept).scatter(-1, order, is_kept), weights, 0.0),
        last=values.gather(-1, (count - 1).clamp(min=0)),
        edge=values[:, -1:],
        has_weightless=ranked[:, -1:] == 0,
    )


def _weigh(logits: Tensor, best: Tensor, filters: Filters) -> Tensor:
    """Probabilities as multiples of the best token's, float32; NaN in the whole row if `best` is not finite."""
    return (logits - best).div_(filters.temperature).exp_()


def _draw(weights: Tensor, filters: Filters) -> tuple[Tensor, Tensor]:
    """Where the cumulated `weights` [R, C] pass the row's random number, and whether they can: int64, bool [R, 1]."""
    if filters.min_p is not None:
        weights = torch.where(weights >= filters.min_p, weights, 0.0)
    cumulated = weights.cumsum(dim=-1, dtype=torch.float64)
    total = cumulated[:, -1:]
    # The total is at least 1 and the number at most 1 - 2⁻⁵³, so their product stays below it: the entry found is the
    # first above the product, hence above its predecessor, hence of a weight that is not 0.
    index = torch.searchsorted(cumulated, filters.uniform * total, right=True)
    return index.clamp(max=weights.shape[-1] - 1), total > 0
