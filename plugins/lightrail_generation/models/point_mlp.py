"""A network from a noisy point to one of its size."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from lightrail.options import at_least, between
from lightrail.traits import Traits
from lightrail_generation.models.conditioning import Conditioning
from lightrail_generation.models.sizes import divisible, known

__all__ = ["PointMLP"]


class PointMLP(nn.Module):
    """Residual layers over the numbers of a state, with the input of each scaled and shifted by the time and the label.

    h ← h + W₂ silu(W₁ ((1 + s) norm(h) + b))

    States of any shape are flattened, and come back in it.

    Args:
        in_features: Numbers a state; known from the data where none is given.
        num_classes: Labels; known from the data where none is given, 0 for a network without labels.
        width: Features of a layer, an even number.
        depth: Residual layers, at least 1.
        dropout: Probability with which a feature is dropped before it is added, in [0, 1).

    Raises:
        ConfigurationError: An option is out of range.

    Example:
        >>> import torch
        >>> model = PointMLP(in_features=2, num_classes=0, width=16)
        >>> model(torch.randn(5, 2), torch.rand(5)).shape
        torch.Size([5, 2])
    """

    traits: ClassVar[Traits] = Traits(example={"width": 16})

    def __init__(
        self,
        in_features: int | None = None,
        num_classes: int | None = None,
        width: int = 128,
        depth: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        (features,) = known(in_features=in_features)
        at_least(1, width=width, depth=depth)
        between(0, 1, dropout=dropout)
        divisible(2, "pairs of features", width=width)
        self.num_classes = num_classes or 0
        self.conditioning = Conditioning(width, self.num_classes)
        self.enter = nn.Linear(features, width)
        self.blocks = nn.ModuleList(_Block(width, dropout) for _ in range(depth))
        self.leave = nn.Linear(width, features)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        """``[B, …]`` at times ``[B]`` under labels ``[B]`` to the same shape."""
        c = F.silu(self.conditioning(time, label))
        h = self.enter(x.flatten(1))
        for block in self.blocks:
            h = block(h, c)
        return self.leave(h).view(x.shape)


class _Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.layers = nn.Sequential(
            nn.Linear(width, 2 * width), nn.SiLU(), nn.Dropout(dropout), nn.Linear(2 * width, width)
        )

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        scale, shift = self.modulation(c).chunk(2, dim=1)
        return h + self.layers(self.norm(h) * (1 + scale) + shift)
