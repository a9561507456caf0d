"""The noise of one step, and the account of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightrail.privacy.engine import PrivacyEngine

__all__ = ["StepRelease"]


class StepRelease:
    """How a method gets its noise in one step; see :class:`lightrail.privacy.Release`.

    Args:
        engine: Of a run whose plan is made.
        sum_over_ranks: Adds a tensor over all ranks, in place.
    """

    def __init__(self, engine: PrivacyEngine, sum_over_ranks: Callable[[Tensor], None]) -> None:
        assert engine.horizon is not None
        assert engine.ledger is not None
        assert engine.ledger.noise is not None
        self.horizon = engine.horizon
        self.step = engine.step
        self.batch = engine.method.batch_at(self.step, engine.horizon)
        self.noise: float = engine.ledger.noise
        self.noises: list[float] = []
        self._source = engine.noise
        self._ranks = engine.ranks
        self._sum_over_ranks = sum_over_ranks

    def __call__(self, sums: Sequence[Tensor], *, sensitivity: float, noise: float) -> list[Tensor]:
        self.noises.append(noise)
        found = [each if each.dtype in (torch.float32, torch.float64) else each.float() for each in sums]
        # Independent shares on the ranks add up to the whole: no rank ever holds, or sends, a sum without noise.
        self._source.add_to(found, noise * sensitivity / self._ranks**0.5)
        return self.summed(found)

    def summed(self, sums: Sequence[Tensor]) -> list[Tensor]:
        for each in sums:
            self._sum_over_ranks(each)
        return list(sums)
