"""Decode steps that run ahead of the host: a step is launched before the tokens of the one before are read.

Owns the meeting of captured decode programs and their sampling parameters. Knows no queues, no text and no budgets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from service.generation.device_sampler import DeviceSampler
from service.generation.sampler import SamplingState
from trimkv_core.decode_program import DecodePrograms, PendingTokens
from trimkv_core.device_sequences import DeviceSequenceTable
from trimkv_core.lean.decoder import LeanDecoder
from trimkv_core.pages import PagePool
from trimkv_core.sequences import SequenceTable


class DeviceAheadRunner:
    """Launches decode steps over one table."""

    def __init__(self, programs: DecodePrograms, sampler: DeviceSampler) -> None:
        self._programs = programs
        self._sampler = sampler

    def can_choose(self, state: SamplingState) -> bool:
        """Whether a request's next token can be chosen on the device."""
        return self._sampler.can_choose(state)

    @torch.inference_mode()
    def set_last_tokens(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Tell the device of tokens that the host has chosen."""
        if rows:
            self._programs.set_last_tokens(rows, tokens)

    @torch.inference_mode()
    def launch(self, rows: Sequence[int], sampling: Sequence[SamplingState]) -> PendingTokens:
        """One decode step; each row's last token is its input, and what is chosen its next."""
        chooser = self._sampler.prepare(self._programs.size_for(len(rows)), sampling)
        return self._programs.run(rows, chooser)


def ahead_factory(
    decoder: LeanDecoder, *, vocab_size: int, num_query_heads: int
) -> Callable[[PagePool, int], tuple[SequenceTable, DeviceAheadRunner]]:
    """What makes a table and the steps over it; on a GPU they are captured then."""

    def make(pool: PagePool, max_num_seqs: int) -> tuple[SequenceTable, DeviceAheadRunner]:
        table = DeviceSequenceTable(pool, max_num_seqs)
        programs = DecodePrograms(decoder, table, max_rows=max_num_seqs, num_query_heads=num_query_heads)
        sampler = DeviceSampler(vocab_size, pool.device, programs.sizes)
        if pool.device.type == "cuda":
            programs.capture(sampler.choosers)
        return table, DeviceAheadRunner(programs, sampler)

    return make
