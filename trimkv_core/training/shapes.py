"""How fast an entry fades from soft attention, as a function of its score s = log β · age.

Pure functions; know no attention and no gates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class DecayShape:
    """The bias f(s) = ε·s + (κ - ε)·min(s + 1, 0) that training adds to the logit of an entry with score s ≤ 0.

    ε = κ = 1 is s itself, the papers' decay (arXiv 2512.03324, 2605.09649). Smaller ε and larger κ leave an entry
    alone until its score reaches -1 and then drop it fast, which is nearer to what an eviction does. The ranking of
    scores, and with it what is kept when serving, does not depend on the shape.

    Attributes:
        epsilon: slope above -1, at least 0.
        kappa: slope below -1, at least ε.
    """

    epsilon: float = 1.0
    kappa: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.epsilon <= self.kappa:
            raise ValueError(
                f"decay shape epsilon={self.epsilon}, kappa={self.kappa} is not possible: 0 ≤ epsilon ≤ kappa"
            )

    @property
    def is_plain(self) -> bool:
        """Whether f(s) = s."""
        return self.epsilon == self.kappa == 1.0

    def bias(self, score: Tensor) -> Tensor:
        """f of scores of any shape."""
        if self.is_plain:
            return score
        return self.epsilon * score + (self.kappa - self.epsilon) * (score + 1.0).clamp(max=0.0)

    def slope(self, score: Tensor) -> Tensor:
        """The derivative of `bias`, same shape."""
        if self.is_plain:
            return torch.ones_like(score)
        return torch.where(score < -1.0, self.kappa, self.epsilon)
