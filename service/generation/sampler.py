"""Logits → the next token of every row, each row by its own parameters.

Owns the order in which parameters apply, and what a request carries from token to token: its random numbers and the
counts its penalties need. Knows no model, no text and no end of an answer.

Letters: N rows, V vocabulary, R rows of one kind, C candidates of a row.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from enum import Enum, auto

import torch
from torch import Tensor
from torch.nn import functional

from service.engine.interface import SamplingParams
from service.generation.drawing import (
    NOTHING,
    UNDECIDED,
    Filters,
    choose_best,
    draw_among_all,
    draw_among_best,
    draw_plain,
)

# How many of a row's best tokens are looked at before all of them are: enough for nearly every nucleus, and 40 times
# cheaper than sorting 150,000.
CANDIDATES = 256


class SamplingState:
    """What sampling one request needs to know from token to token. Owned by the worker, advanced by `Sampler.sample`.

    Attributes:
        params: the request's.
        generated: tokens generated so far.
    """

    def __init__(self, params: SamplingParams, *, prompt_ids: Sequence[int], eos_token_ids: tuple[int, ...]) -> None:
        self.params = params
        self.generated = 0
        # Random takes a seed's absolute value; the two's complement keeps -1 and 1 apart.
        self._random = random.Random(None if params.seed is None else params.seed % 2**64)
        self._end_ids = tuple({*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)})
        self.counts: TokenCounts | None = None
        if params.repetition_penalty != 1.0:
            self.counts = TokenCounts(prompt_ids)
        elif params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
            self.counts = TokenCounts(())

    @property
    def forbidden_ids(self) -> tuple[int, ...]:
        """Tokens that would end the answer before `min_tokens` are generated."""
        return self._end_ids if self.generated < self.params.min_tokens else ()

    def draw(self) -> float:
        """A number in [0, 1); one a sampled token."""
        return self._random.random()

    def advance(self, token_id: int) -> None:
        """Take note of the token chosen."""
        self.generated += 1
        if self.counts is not None:
            self.counts.add(token_id)


class TokenCounts:
    """How often each token was generated; tokens of the prompt count 0. Grows with the tokens seen, not with V."""

    def __init__(self, prompt_ids: Iterable[int]) -> None:
        unique = dict.fromkeys(prompt_ids)
        self._slots = {token_id: slot for slot, token_id in enumerate(unique)}
        self._ids = torch.tensor(list(unique), dtype=torch.int64)
        self._times = torch.zeros(len(unique), dtype=torch.float32)

    @property
    def ids(self) -> Tensor:
        """int64 [seen]."""
        return self._ids[: len(self._slots)]

    @property
    def times(self) -> Tensor:
        """float32 [seen], of the same tokens."""
        return self._times[: len(self._slots)]

    def add(self, token_id: int) -> None:
        """Count one more generated token."""
        slot = self._slots.setdefault(token_id, len(self._slots))
        if slot == self._ids.numel():
            room = max(slot, 64)
            self._ids = functional.pad(self._ids, (0, room))
            self._times = functional.pad(self._times, (0, room))
        self._ids[slot] = token_id
        self._times[slot] += 1


class _Kind(Enum):
    """The work a row needs."""

    GREEDY = auto()
    PLAIN = auto()  # no filter but min_p
    TOP_K = auto()  # within the candidates
    NUCLEUS = auto()  # top_p without top_k
    LARGE_TOP_K = auto()


class Sampler:
    """Chooses the next token of many requests at once.

    In this order: repetition penalty, presence and frequency penalty, `min_tokens`, temperature, top_k, top_p, min_p,
    draw. top_k keeps the k best; top_p the fewest of the best whose share of what top_k left reaches p; min_p what is
    at least p times as likely as the best. Of equal tokens the lower id is the better.

    A row's token depends on its logits, its parameters and its own random numbers, never on the other rows: a drawn
    token takes one number, and is the first at which the weights, cumulated in float64 in the order of ids, pass it.
    On a CPU rows are computed one by one, so this holds to the last bit; elsewhere to the rounding of float64 sums.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._candidates = min(CANDIDATES, vocab_size)
        # A CPU gains nothing from a batch of rows, and loses more to fresh memory for copies of them.
        self._is_row_by_row = device.type == "cpu"

    @torch.inference_mode()
    def sample(self, logits: Tensor, states: Sequence[SamplingState]) -> list[int | None]:
        """The next token of every row, None for one without a finite logit; advances the others' `states`.

        Waits for the device once, and again only for rows whose filters keep more than `CANDIDATES` tokens.

        Args:
            logits: [N, V], any floating dtype. float32 logits change in place where penalties or `min_tokens` apply.
            states: N, in the order of the rows.

        Raises:
            ValueError: the shape does not fit the states and the vocabulary.
        """
        expected = (len(states), self._vocab_size)
        if tuple(logits.shape) != expected:
            raise ValueError(f"logits of shape {tuple(logits.shape)}: {len(states)} states need {expected}.")
        if not states:
            return []
        logits = self._process(logits, states)
        uniform = [0.0 if state.params.temperature == 0.0 else state.draw() for state in states]
        tokens = self._choose(logits, states, uniform)
        undecided = [row for row, token in enumerate(tokens) if token == UNDECIDED]
        if undecided:
            exact = torch.cat([self._draw_exactly(logits, states, uniform, row) for row in undecided])
            for row, token in zip(undecided, exact.tolist(), strict=True):
                tokens[row] = token
        chosen = [None if token == NOTHING else token for token in tokens]
        for state, token in zip(states, chosen, strict=True):
            if token is not None:
                state.advance(token)
        return chosen

    def _process(self, logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
        """Apply penalties and `min_tokens` to the few logits they mean."""
        counted = [(row, state.params, state.counts) for row, state in enumerate(states) if state.counts is not None]
        forbidden = [(row, token) for row, state in enumerate(states) for token in state.forbidden_ids]
        if counted or forbidden:
            logits = logits.float()
        if counted:
            sizes = torch.tensor([counts.ids.numel() for _, _, counts in counted])
            settings = torch.tensor(
                [[p.repetition_penalty, p.presence_penalty, p.frequency_penalty] for _, p, _ in counted]
            )
            settings = settings.repeat_interleave(sizes, dim=0).to(self._device)
            repetition, presence, frequency = settings.unbind(1)
            rows = torch.tensor([row for row, _, _ in counted]).repeat_interleave(sizes).to(self._device)
            ids = torch.cat([counts.ids for _, _, counts in counted]).to(self._device)
            times = torch.cat([counts.times for _, _, counts in counted]).to(self._device)
            values = logits[rows, ids]
            values = torch.where(values > 0, values / repetition, values * repetition)
            logits[rows, ids] = values - frequency * times - presence * (times > 0)
        if forbidden:
            rows, ids = torch.tensor(forbidden, device=self._device).unbind(1)
            logits[rows, ids] = float("-inf")
        return logits

    def _choose(self, logits: Tensor, states: Sequence[SamplingState], uniform: Sequence[float]) -> list[int]:
        """A token, `NOTHING` or `UNDECIDED` for every row, in one transfer."""
        kinds: dict[_Kind, list[int]] = {}
        for row, state in enumerate(states):
            kinds.setdefault(self._kind(state.params), []).append(row)
        tokens = [UNDECIDED] * len(states)
        kinds.pop(_Kind.LARGE_TOP_K, None)
        order: list[int] = []
        chosen: list[Tensor] = []
        for kind, rows in kinds.items():
            is_whole = len(rows) == len(states) and (kind is _Kind.GREEDY or not self._is_row_by_row)
            for block in [rows] if is_whole else self._blocks(rows):
                part = logits if is_whole else _take(logits, block)
                params = [states[row].params for row in block]
                chosen.append(self._choose_block(kind, part, params, [uniform[row] for row in block]))
                order += block
        if chosen:
            for row, token in zip(order, torch.cat(chosen).tolist(), strict=True):
                tokens[row] = token
        return tokens

    def _choose_block(
        self, kind: _Kind, logits: Tensor, params: Sequence[SamplingParams], uniform: Sequence[float]
    ) -> Tensor:
        """int64 [R] for `logits` [R, V] of one kind."""
        if kind is _Kind.GREEDY:
            return choose_best(logits)
        filters = self._filters(params, uniform)
        if kind is _Kind.PLAIN:
            return draw_plain(logits.float(), filters)
        return draw_among_best(logits.float(), filters, candidates=self._candidates, is_nucleus=kind is _Kind.NUCLEUS)

    def _draw_exactly(
        self, logits: Tensor, states: Sequence[SamplingState], uniform: Sequence[float], row: int
    ) -> Tensor:
        params = states[row].params
        top_k = params.top_k if self._has_top_k(params) else 0
        return draw_among_all(
            logits[row : row + 1].float(), self._filters([params], uniform[row : row + 1]), top_k=top_k
        )

    def _kind(self, params: SamplingParams) -> _Kind:
        if params.temperature == 0.0:
            return _Kind.GREEDY
        if self._has_top_k(params):
            return _Kind.TOP_K if params.top_k < self._candidates else _Kind.LARGE_TOP_K
        return _Kind.NUCLEUS if params.top_p < 1.0 else _Kind.PLAIN

    def _has_top_k(self, params: SamplingParams) -> bool:
        return 0 < params.top_k < self._vocab_size

    def _blocks(self, rows: list[int]) -> list[list[int]]:
        return [[row] for row in rows] if self._is_row_by_row else [rows]

    def _filters(self, params: Sequence[SamplingParams], uniform: Sequence[float]) -> Filters:
        """One transfer to the device for all parameters."""
        values = [
            [p.temperature, p.top_k if self._has_top_k(p) else self._vocab_size, p.top_p, p.min_p, number]
            for p, number in zip(params, uniform, strict=True)
        ]
        columns = torch.tensor(values, dtype=torch.float64).T.to(self._device, non_blocking=True)
        temperature, top_k, top_p, min_p, drawn = columns.contiguous().unsqueeze(-1).unbind(0)
        return Filters(
            temperature=temperature.float(),
            top_k=top_k.long(),
            top_p=top_p,
            min_p=min_p.float() if any(p.min_p > 0.0 for p in params) else None,
            uniform=drawn,
        )


def _take(logits: Tensor, rows: list[int]) -> Tensor:
    """`rows` of [N, V]: a view of a single one, else a copy."""
    return logits[rows[0] : rows[0] + 1] if len(rows) == 1 else logits[rows]
