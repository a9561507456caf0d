# pyright: reportMissingImports=false
"""Gradient descent with a private method on gradients that are known sample by sample, without a trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from privacy_runs import Module
from torch import Tensor, nn

from lightrail.privacy import PrivacyMethod, PrivateHorizon
from lightrail.sample_gradients import SampleGradients
from lightrail.sample_gradients.pieces import Piece

__all__ = ["Descent", "Dropped", "GivenRelease", "descend", "logistic", "sampled"]


def sampled(w: Tensor, gradients: Tensor) -> SampleGradients:
    """Gradients of samples, ``[B, d]``, as the engine would hand them over."""
    return SampleGradients([w], [[Piece(w, gradients)]])


def logistic(records: int, dimension: int, seed: int = 0) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor]:
    """Noisy labels of a plane: the gradient of samples at a point, and all samples' numbers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(records, dimension, generator=generator, dtype=torch.float64) / dimension**0.5
    plane = torch.randn(dimension, generator=generator, dtype=torch.float64)
    y = torch.sign(x @ plane + 0.1 * torch.randn(records, generator=generator, dtype=torch.float64))
    yx = y[:, None] * x

    def gradient(w: Tensor, rows: Tensor) -> Tensor:
        mine = yx if len(rows) == records else yx[rows]
        return -torch.sigmoid(-(mine @ w))[:, None] * mine

    return gradient, torch.arange(records)


@dataclass
class GivenRelease:
    """Noise of a seed, and a list of what was released."""

    horizon: PrivateHorizon
    noise: float
    seed: int = 0
    step: int = 0
    batch: int = 0
    released: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, sums: Sequence[Tensor], *, sensitivity: float, noise: float) -> list[Tensor]:
        self.released.append((sensitivity, noise))
        drawn = [torch.randn(s.shape, generator=self._generator, dtype=s.dtype) for s in sums]
        return [s + noise * sensitivity * xi for s, xi in zip(sums, drawn, strict=True)]

    def summed(self, sums: Sequence[Tensor]) -> list[Tensor]:
        return list(sums)


@dataclass
class Descent:
    """The iterates before each step and after the last, the gradients, and what was released."""

    points: list[Tensor]
    gradients: list[Tensor]
    released: list[tuple[float, float]]


def descend(
    method: PrivacyMethod,
    gradient: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    horizon: PrivateHorizon,
    *,
    noise: float = 0.0,
    rate: Callable[[int], float] = lambda step: 0.5,
    outside: Callable[[Tensor], Tensor] = torch.zeros_like,
    parts: int = 1,
    seed: int = 0,
) -> Descent:
    """Steps ``w ← w - rate · (g + outside(w))`` with the gradients g of a method, on Poisson batches of a seed."""
    method.prepare(horizon)
    release = GivenRelease(horizon, noise, seed)
    coins = torch.Generator().manual_seed(seed + 1)
    w = torch.nn.Parameter(start.clone())
    found = Descent([start.clone()], [], release.released)
    for step in range(horizon.steps):
        release.step, release.batch = step, method.batch_at(step, horizon)
        elsewhere = method.elsewhere([w])
        chance = release.batch / horizon.records
        drawn = torch.rand(horizon.records, generator=coins, dtype=torch.float64) < chance
        sums = method.nothing([w])
        with torch.no_grad():
            for rows in drawn.nonzero()[:, 0].chunk(parts):
                here = sampled(w, gradient(w, rows))
                there = None if elsewhere is None else sampled(w, gradient(elsewhere[0], rows))
                sums = [a + b for a, b in zip(sums, method.contribution(here, there), strict=True)]
            (g,) = method.gradient(sums, [w], release)
            found.gradients.append(g.clone())
            w -= rate(step) * (g + outside(w))
            found.points.append(w.detach().clone())
    return found


class Dropped(Module):
    """Half of a layer is dropped for each sample; which half, and at what weights, is kept with the step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
        self.seen: list[tuple[int, Tensor, Tensor]] = []
        self.net[1].register_forward_hook(self._look)

    def _look(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        if self.training:
            weight = self.get_parameter("net.0.weight").detach().clone()
            self.seen.append((self.trainer.global_step, weight, output.detach() != 0))
