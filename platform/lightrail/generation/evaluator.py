"""The network as a sampler asks it: with its condition, counted."""

from __future__ import annotations

from torch import Tensor

from lightrail.generation.denoiser import Condition, Denoiser
from lightrail.generation.noise_path import Level
from lightrail.generation.prediction import Prediction

__all__ = ["Evaluator"]


class Evaluator:
    """Asks a denoiser about a batch under its condition, and counts.

    Args:
        denoiser: The network on its path.
        condition: What steers these samples, one row each.

    Attributes:
        evaluations: How often the network was asked for each sample.
    """

    def __init__(self, denoiser: Denoiser, condition: Condition | None = None) -> None:
        self.denoiser = denoiser
        self.condition = condition
        self.evaluations = 0

    def __call__(self, x: Tensor, level: Level, *, network_time: Tensor | float | None = None) -> Prediction:
        self.evaluations += 1
        return self.denoiser.predict(x, level, self.condition, network_time)
