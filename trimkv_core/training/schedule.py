"""What changes from step to step: learning rate, capacity target and decay. Pure functions of settings and step.

Steps are counted from 1. Knows no model.
"""

from __future__ import annotations

import math
import random

from trimkv_core.training.evictions import EvictionRule
from trimkv_core.training.losses import LossKind
from trimkv_core.training.objective import Objective
from trimkv_core.training.settings import TrainSettings
from trimkv_core.training.shapes import DecayShape

_WARMUP_SHARE = 0.03


def learning_rate_at(settings: TrainSettings, step: int) -> float:
    """A line up over the warm-up, then a cosine down to almost 0 at the last step."""
    warmup = settings.warmup_steps
    if warmup is None:
        warmup = round(_WARMUP_SHARE * settings.steps)
    if step <= warmup:
        return settings.learning_rate * step / warmup
    share = (step - warmup - 1) / (settings.steps - warmup)
    return settings.learning_rate * 0.5 * (1.0 + math.cos(math.pi * share))


def capacity_target_at(settings: TrainSettings, step: int) -> float:
    """Entries a stream that are asked for: from the start's to the end's over the first half of the run."""
    end = float(settings.memory_size) if settings.capacity_target is None else settings.capacity_target
    start = end if settings.capacity_target_start is None else settings.capacity_target_start
    share = min(1.0, 2.0 * (step - 1) / settings.steps)
    return start + (end - start) * share


def kappa_at(settings: TrainSettings, step: int) -> float:
    """The decay's far slope, in a line over the whole run."""
    return _in_a_line(settings.kappa, settings.kappa_end, step, settings.steps)


def _in_a_line(start: float, end: float | None, step: int, steps: int) -> float:
    return start if end is None else start + (end - start) * (step - 1) / max(steps - 1, 1)


def _drawn_budget(settings: TrainSettings, target: float, step: int) -> float:
    """A budget between target / spread and target · spread, evenly in its logarithm; the same in every process."""
    drawn = random.Random(f"{settings.seed} budget {step}").uniform(-1.0, 1.0)
    return target * math.pow(settings.eviction_spread, drawn)


def objective_at(settings: TrainSettings, step: int, *, is_global: bool) -> Objective:
    """What step `step` minimises."""
    target = capacity_target_at(settings, step)
    evictions = None
    if settings.act_evictions:
        evictions = EvictionRule(
            memory_size=_drawn_budget(settings, target, step),
            interval=settings.eviction_interval,
            num_sink_tokens=settings.num_sink_tokens,
            is_global=is_global,
            sharpness=_in_a_line(settings.eviction_sharpness, settings.eviction_sharpness_end, step, settings.steps),
            softness=settings.eviction_softness,
        )
    return Objective(
        loss=LossKind(settings.loss),
        capacity_weight=settings.capacity_weight,
        memory_size=target,
        is_global=is_global,
        num_sink_tokens=settings.num_sink_tokens,
        shape=DecayShape(epsilon=settings.epsilon, kappa=kappa_at(settings, step)),
        evictions=evictions,
        logit_block=settings.logit_block,
    )
