"""Rotary position embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Rotary"]


class Rotary(nn.Module):
    """Turns each pair of features by an angle in proportion to its position.

    (x_i, x_{i + d/2}) ← R(t ω_i) (x_i, x_{i + d/2}), ω_i = base^(−2i/d), so that the inner product of a query at t and
    a key at s depends on t − s only.

    Args:
        features: Features of one head, d; even.
        context: Positions, at least 1.
        base: Of the frequencies, above 1.

    Example:
        >>> Rotary(features=4, context=3)(torch.ones(1, 1, 3, 4))[0, 0, 0].tolist()
        [1.0, 1.0, 1.0, 1.0]

    Reference:
        J. Su et al. (2021), RoFormer: Enhanced Transformer with Rotary Position Embedding, arXiv:2104.09864,
        section 3.2; the pairs are halves of the vector apart, not neighbours.
    """

    cosine: Tensor
    sine: Tensor

    def __init__(self, features: int, context: int, base: float = 10_000.0) -> None:
        super().__init__()
        frequency = base ** (-torch.arange(0, features, 2, dtype=torch.float64) / features)
        angle = torch.outer(torch.arange(context, dtype=torch.float64), frequency)
        # They follow from the options, so checkpoints need not hold them.
        self.register_buffer("cosine", angle.cos().float(), persistent=False)
        self.register_buffer("sine", angle.sin().float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., T, features]`` to the same shape and type; T at most ``context``."""
        length = x.shape[-2]
        cosine, sine = self.cosine[:length].to(x.dtype), self.sine[:length].to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cosine - b * sine, a * sine + b * cosine), dim=-1)
