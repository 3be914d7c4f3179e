"""Caches for `model.generate` and plain forwards: what a user of `transformers` hands in as `past_key_values`.

Owns the arguments, named as in trimkv 0.1.5, and what they mean as a `Budget`. The service does not use these
classes: its runner drives the sequence table itself.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal, Self, TypeVar

import torch
from transformers import PreTrainedModel

from trimkv_core.budget import Budget, BudgetError, Scope, Strategy
from trimkv_core.budgeted_cache import BudgetedCache
from trimkv_core.overlay import gates_of

DEFAULT_BLOCK_SIZE = 16
DEFAULT_BUFFER_SIZE = 32

Kind = TypeVar("Kind", bound=StrEnum)


class PagedTrimKVCache(BudgetedCache):
    """DBTrimKV's cache: one budget a sequence, shared by all layers and heads (arXiv 2605.09649).

    Arguments are named as in trimkv 0.1.5. The pool starts at `num_blocks_ratio` of what the batch may need and grows
    if that was too little, so no prompt is too long for it.

    Args:
        num_layers, num_heads: L and H (KV heads) of the model.
        max_seq_len: tokens a sequence is expected to reach; sizes the pool.
        memory_size: M, entries a stream holds on average right after an eviction; None: no ceiling.
        alpha_threshold: for `strategy="threshold"`, the retention under which an entry goes.
        buffer_size: slack in entries a stream before an eviction runs.
        min_tokens_per_head: entries every stream keeps in any case.
        sliding_window_size: newest positions that are never evicted.
        num_sink_tokens: first positions that are never evicted.
        strategy: `fixed_budget`, `threshold` or `dense`.
        lookahead_steps: how many coming steps an entry is scored over.
        block_size: entries a page, 1 to 256.
        num_blocks_ratio: share of the expected pages to start with.
        device, dtype: what the model's keys must be on and of; None: whatever they are.
        scope: `global` (DBTrimKV) or `local` (TrimKV).
        backend: attention backend, `auto` for the best there is.

    Raises:
        BudgetError: a budget out of range or in contradiction with itself.
    """

    def __init__(  # noqa: PLR0917 - the package's own order of arguments, which callers rely on
        self,
        num_layers: int,
        num_heads: int,
        max_seq_len: int | None = None,
        memory_size: int | None = None,
        alpha_threshold: float | None = None,
        buffer_size: int = 1,
        min_tokens_per_head: int = 0,
        sliding_window_size: int = 0,
        strategy: str = "fixed_budget",
        lookahead_steps: int = 1,
        block_size: int = DEFAULT_BLOCK_SIZE,
        num_blocks_ratio: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_sink_tokens: int = 0,
        scope: str = "global",
        backend: str = "auto",
    ) -> None:
        budget = Budget(
            memory_size=memory_size,
            buffer_size=buffer_size,
            strategy=_parse(Strategy, "strategy", strategy),
            scope=_parse(Scope, "scope", scope),
            alpha_threshold=alpha_threshold,
            min_tokens_per_head=min_tokens_per_head,
            sliding_window_size=sliding_window_size,
            num_sink_tokens=num_sink_tokens,
            lookahead_steps=lookahead_steps,
        )
        super().__init__(
            budget,
            num_layers=num_layers,
            num_heads=num_heads,
            max_seq_len=max_seq_len,
            num_blocks_ratio=num_blocks_ratio,
            block_size=block_size,
            device=device,
            dtype=dtype,
            backend=backend,
        )

    @classmethod
    def for_model(
        cls,
        model: PreTrainedModel,
        *,
        memory_size: int | Literal["trained"] | None = "trained",
        buffer_size: int | None = None,
        **overrides: Any,
    ) -> Self:
        """A cache that takes everything it is not told from the model and its gates.

        Args:
            model: as `from_pretrained` of this package returns it.
            memory_size: M; `"trained"`: what the gates were trained for; None: no ceiling.
            buffer_size: None: the checkpoint's, else 32.
            overrides: any other argument of the class.

        Raises:
            BudgetError: a budget was asked for and the model has no gates.
        """
        config = model.config
        has_gates = bool(gates_of(model))
        if memory_size == "trained":
            memory_size = getattr(config, "memory_size", None) if has_gates else None
        if memory_size is not None and not has_gates:
            raise BudgetError("memory_size", memory_size, "a model without gates keeps everything; use None")
        if buffer_size is None:
            buffer_size = getattr(config, "buffer_size", None) or DEFAULT_BUFFER_SIZE
        fields: dict[str, Any] = {
            "num_layers": config.num_hidden_layers,
            "num_heads": config.num_key_value_heads,
            "max_seq_len": config.max_position_embeddings,
            "memory_size": memory_size,
            "buffer_size": buffer_size,
            "num_sink_tokens": (getattr(config, "num_sink_tokens", None) or 0) if has_gates else 0,
            "scope": "global" if getattr(config, "global_capacity", True) else "local",
            "device": model.device,
        }
        return cls(**(fields | overrides))


class TrimKVCache(BudgetedCache):
    """TrimKV's cache: every stream has M entries of its own (arXiv 2512.03324), on the same pages.

    Arguments as in `PagedTrimKVCache`; layers and heads are the model's.
    """

    def __init__(  # noqa: PLR0917 - as above
        self,
        max_seq_len: int | None = None,
        memory_size: int | None = None,
        buffer_size: int = 1,
        sliding_window_size: int = 0,
        strategy: str = "fixed_budget",
        lookahead_steps: int = 1,
        device: torch.device | str | None = None,
        *,
        alpha_threshold: float | None = None,
        min_tokens_per_head: int = 0,
        num_sink_tokens: int = 0,
        block_size: int = DEFAULT_BLOCK_SIZE,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        budget = Budget(
            memory_size=memory_size,
            buffer_size=buffer_size,
            strategy=_parse(Strategy, "strategy", strategy),
            scope=Scope.LOCAL,
            alpha_threshold=alpha_threshold,
            min_tokens_per_head=min_tokens_per_head,
            sliding_window_size=sliding_window_size,
            num_sink_tokens=num_sink_tokens,
            lookahead_steps=lookahead_steps,
        )
        super().__init__(
            budget,
            num_layers=None,
            num_heads=None,
            max_seq_len=max_seq_len,
            num_blocks_ratio=1.0,
            block_size=block_size,
            device=device,
            dtype=dtype,
            backend=backend,
        )


def _parse(kind: type[Kind], field: str, value: str) -> Kind:
    try:
        return kind(value)
    except ValueError:
        raise BudgetError(field, value, "one of " + ", ".join(member.value for member in kind)) from None
