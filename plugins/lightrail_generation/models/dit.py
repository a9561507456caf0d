"""A transformer from a noisy image to one of its size."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightrail.options import at_least, between
from lightrail.traits import Traits
from lightrail_generation.models.conditioning import Conditioning, time_features
from lightrail_generation.models.sizes import divisible, known

__all__ = ["DiT"]


class DiT(nn.Module):
    """A transformer over patches, whose normalisations are scaled, shifted and gated by the time and the label.

    x ← x + g₁ attention((1 + s₁) norm(x) + b₁), x ← x + g₂ mlp((1 + s₂) norm(x) + b₂)

    The linear map from the condition to (s, b, g) starts at 0 (adaLN-Zero), so each block starts as the identity; the
    network starts at 0. ``blocks`` holds the blocks, each from tokens ``[B, T, width]`` and a condition to tokens.

    Args:
        in_channels: Channels of an image; known from the data where none is given.
        image_size: Pixels a side, a multiple of ``patch``; known from the data where none is given.
        num_classes: Labels; known from the data where none is given, 0 for a network without labels.
        patch: Pixels a side of a patch, which is one token, at least 1.
        width: Features of a token, a multiple of 4 and of ``heads``.
        depth: Blocks, at least 1.
        heads: Attention heads, at least 1.
        mlp_ratio: The width of a block's hidden layer relative to ``width``, at least 1.
        dropout: Probability with which a feature is dropped before it is added to a token, in [0, 1).

    Raises:
        ConfigurationError: An option is out of range, or does not divide another as said.

    Example:
        >>> model = DiT(in_channels=1, image_size=8, num_classes=10, width=16, depth=2)
        >>> model(torch.randn(5, 1, 8, 8), torch.rand(5), torch.arange(5)).shape
        torch.Size([5, 1, 8, 8])

    Reference:
        W. Peebles and S. Xie (2023), Scalable Diffusion Models with Transformers, arXiv 2212.09748, section 3.2.
    """

    traits: ClassVar[Traits] = Traits(example={"width": 16, "depth": 2})

    def __init__(
        self,
        in_channels: int | None = None,
        image_size: int | None = None,
        num_classes: int | None = None,
        patch: int = 2,
        width: int = 96,
        depth: int = 4,
        heads: int = 4,
        mlp_ratio: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        channels, side = known(in_channels=in_channels, image_size=image_size)
        at_least(1, patch=patch, width=width, depth=depth, heads=heads, mlp_ratio=mlp_ratio)
        between(0, 1, dropout=dropout)
        divisible(patch, "the patch", image_size=side)
        divisible(4, "positions in two dimensions", width=width)
        divisible(heads, "the heads", width=width)
        self.num_classes = num_classes or 0
        self.patch = patch
        self.conditioning = Conditioning(width, self.num_classes)
        self.enter = nn.Conv2d(channels, width, patch, stride=patch)
        self.register_buffer("positions", _positions(side // patch, width), persistent=False)
        self.blocks = nn.ModuleList(_Block(width, heads, mlp_ratio, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = _zero(nn.Linear(width, 2 * width))
        self.leave = _zero(nn.Linear(width, channels * patch**2))

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        """``[B, in_channels, H, W]`` at times ``[B]`` under labels ``[B]`` to ``[B, in_channels, H, W]``."""
        c = F.silu(self.conditioning(time, label))
        tokens = self.enter(x).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            tokens = block(tokens, c)
        scale, shift = self.modulation(c)[:, None].chunk(2, dim=-1)
        patches = self.leave(self.norm(tokens) * (1 + scale) + shift).transpose(1, 2)
        return F.fold(patches, x.shape[-2:], self.patch, stride=self.patch)


def _positions(side: int, width: int) -> Tensor:
    """Sines and cosines of a token's row and column, ``[side², width]``."""
    # Times are scaled by 1000 within: a token's number is to be its angle.
    along = time_features(torch.arange(side) / 1000, width // 2)
    rows, columns = along[:, None].expand(-1, side, -1), along[None].expand(side, -1, -1)
    return torch.cat((rows, columns), dim=-1).reshape(side * side, width)


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp_ratio: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = _zero(nn.Linear(width, 6 * width))
        self.read = nn.Linear(width, 3 * width)
        self.write = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_ratio * width), nn.GELU(approximate="tanh"), nn.Linear(mlp_ratio * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens ``[B, T, width]`` under a condition ``[B, width]``."""
        s1, b1, g1, s2, b2, g2 = self.modulation(c)[:, None].chunk(6, dim=-1)
        x = x + g1 * self.dropout(self._attention(self.norm(x) * (1 + s1) + b1))
        return x + g2 * self.dropout(self.mlp(self.norm(x) * (1 + s2) + b2))

    def _attention(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.read(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.write(mixed.transpose(1, 2).reshape(batch, length, width))
