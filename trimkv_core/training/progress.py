"""What a person sees of a run while it runs: a bar in a terminal, lines in a log.

Owns stderr's looks. Knows no model and decides nothing.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

from trimkv_core.training.curve import CurvePoint

logger = logging.getLogger(__name__)


class Progress:
    """A progress bar where stderr is a terminal, else a log line every `log_every` steps; silent for other processes.

    Use as a context manager.
    """

    def __init__(self, *, first_step: int, steps: int, log_every: int, is_shown: bool) -> None:
        self._steps, self._log_every, self._is_shown = steps, log_every, is_shown
        self._bar: Any = _open_bar(first_step, steps) if is_shown and sys.stderr.isatty() else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, point: CurvePoint) -> None:
        """One step is done."""
        if not self._is_shown:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"loss {point.loss:.4f} kl {point.kl:.4f} ntp {point.ntp:.3f} capacity {point.capacity:.3f} "
                f"soft size {point.soft_size:.1f}",
                refresh=False,
            )
            self._bar.update(1)
        elif point.step % self._log_every == 0 or point.step in (1, self._steps):
            logger.info(
                "step=%d/%d loss=%.4f kl=%.4f ntp=%.4f capacity=%.4f soft_size=%.1f target=%.1f lr=%.2e grad_norm=%.3g "
                "tokens=%d seconds=%.2f",
                point.step,
                self._steps,
                point.loss,
                point.kl,
                point.ntp,
                point.capacity,
                point.soft_size,
                point.capacity_target,
                point.learning_rate,
                point.gradient_norm,
                point.tokens,
                point.seconds,
            )


def _open_bar(first_step: int, steps: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None  # log lines do as well
    return tqdm(initial=first_step, total=steps, unit="step", file=sys.stderr, dynamic_ncols=True, smoothing=0.1)
