"""A small convolutional network from a noisy image to one of its size."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightrail.options import at_least, between
from lightrail.traits import Traits
from lightrail_generation.models.conditioning import Conditioning
from lightrail_generation.models.sizes import divisible, known

__all__ = ["UNet"]

SMALLEST, LEVELS_AT_MOST = 4, 4
HEAD = 32  # channels of an attention head, where the width allows it


class UNet(nn.Module):
    """Residual blocks down to few pixels and up again, each level joined to its twin by a skip connection.

    A block is x + conv(silu((1 + s) norm(h) + b)) with h = conv(silu(norm(x))), where the scale s and the shift b come
    from the time and the label. The last convolution of each block starts at 0, and so does the network. ``blocks``
    names them in order.

    Args:
        in_channels: Channels of an image; known from the data where none is given.
        image_size: Pixels a side, a multiple of 2^(``levels`` − 1); known from the data where none is given.
        num_classes: Labels; known from the data where none is given, 0 for a network without labels.
        width: Channels of the first level, an even number; the second has twice and the others four times as many.
        levels: At least 1, each with half the pixels a side of the one before; ``None`` for as many as leave 4 pixels,
            at most 4.
        depth: Blocks a level, on the way down and on the way up, at least 1.
        attention: Attention follows each block where a side has at most so many pixels; 0 for none.
        dropout: Probability with which a feature is dropped within a block, in [0, 1).

    Raises:
        ConfigurationError: An option is out of range, or the image cannot be halved as often as ``levels`` says.

    Example:
        >>> model = UNet(in_channels=1, image_size=8, num_classes=10, width=8)
        >>> model(torch.randn(5, 1, 8, 8), torch.rand(5), torch.arange(5)).shape
        torch.Size([5, 1, 8, 8])

    Reference:
        J. Ho, A. Jain and P. Abbeel (2020), Denoising Diffusion Probabilistic Models, arXiv 2006.11239, appendix B,
        with the blocks of P. Dhariwal and A. Nichol (2021), Diffusion Models Beat GANs on Image Synthesis, arXiv
        2105.05233, section 3.
    """

    traits: ClassVar[Traits] = Traits(example={"width": 8})

    def __init__(
        self,
        in_channels: int | None = None,
        image_size: int | None = None,
        num_classes: int | None = None,
        width: int = 32,
        levels: int | None = None,
        depth: int = 1,
        attention: int = 8,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        channels, side = known(in_channels=in_channels, image_size=image_size)
        at_least(1, width=width, depth=depth)
        at_least(0, attention=attention)
        between(0, 1, dropout=dropout)
        divisible(2, "pairs of channels", width=width)
        levels = _levels(side) if levels is None else levels
        at_least(1, levels=levels)
        divisible(2 ** (levels - 1), "levels that each halve the image", image_size=side)
        self.num_classes = num_classes or 0
        self.conditioning = Conditioning(4 * width, self.num_classes)
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        widths = [width * min(2**level, 4) for level in range(levels)]
        attends = [side >> level <= attention for level in range(levels)]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        before = width
        for level, (wide, attend) in enumerate(zip(widths, attends, strict=True)):
            self.down.append(_Level(before, wide, 0, depth, 4 * width, attend, dropout))
            self.up.insert(0, _Level(widths[min(level + 1, levels - 1)], wide, wide, depth, 4 * width, attend, dropout))
            before = wide
        self.middle = _Block(before, before, 4 * width, attends[-1], dropout)
        self.leave = nn.Sequential(_norm(width), nn.SiLU(), _zero(nn.Conv2d(width, channels, 3, padding=1)))

    @property
    def blocks(self) -> tuple[str, ...]:
        """The names of its blocks, down, in the middle and up."""
        sides = {
            side: [f"{side}.{i}.blocks.{j}" for i, level in enumerate(levels) for j in range(len(level.blocks))]  # type: ignore[arg-type]
            for side, levels in (("down", self.down), ("up", self.up))
        }
        return (*sides["down"], "middle", *sides["up"])

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        """``[B, in_channels, H, W]`` at times ``[B]`` under labels ``[B]`` to ``[B, in_channels, H, W]``."""
        c = F.silu(self.conditioning(time, label))
        h, skips = self.enter(x), []
        for place, level in enumerate(self.down):
            if place:
                h = F.avg_pool2d(h, 2)
            h = level(h, c, skips)
        h = self.middle(h, c)
        for place, level in enumerate(self.up):
            if place:
                h = F.interpolate(h, scale_factor=2.0, mode="nearest")
            h = level(h, c, skips)
        return self.leave(h)


def _levels(side: int) -> int:
    levels = 1
    while levels < LEVELS_AT_MOST and side % 2 == 0 and side // 2 >= SMALLEST:
        side, levels = side // 2, levels + 1
    return levels


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(8, channels), channels)


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class _Level(nn.Module):
    """The blocks at one size; on the way down they leave their outputs in ``skips``, on the way up they take them."""

    def __init__(
        self, before: int, width: int, skip: int, depth: int, conditioning: int, attends: bool, dropout: float
    ) -> None:
        super().__init__()
        self.takes = skip > 0
        self.blocks = nn.ModuleList(
            _Block((width if place else before) + skip, width, conditioning, attends, dropout) for place in range(depth)
        )

    def forward(self, x: Tensor, c: Tensor, skips: list[Tensor]) -> Tensor:
        for block in self.blocks:
            x = block(torch.cat((x, skips.pop()), dim=1) if self.takes else x, c)
            if not self.takes:
                skips.append(x)
        return x


class _Block(nn.Module):
    def __init__(self, before: int, width: int, conditioning: int, attends: bool, dropout: float) -> None:
        super().__init__()
        self.first_norm = _norm(before)
        self.first = nn.Conv2d(before, width, 3, padding=1)
        self.modulation = nn.Linear(conditioning, 2 * width)
        self.second_norm = _norm(width)
        self.dropout = nn.Dropout(dropout)
        self.second = _zero(nn.Conv2d(width, width, 3, padding=1))
        self.skip = nn.Identity() if before == width else nn.Conv2d(before, width, 1)
        self.attention = _Attention(width) if attends else nn.Identity()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.first(F.silu(self.first_norm(x)))
        scale, shift = self.modulation(c)[:, :, None, None].chunk(2, dim=1)
        h = self.second_norm(h) * (1 + scale) + shift
        return self.attention(self.skip(x) + self.second(self.dropout(F.silu(h))))


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // HEAD) if width % HEAD == 0 else 1
        self.norm = _norm(width)
        self.read = nn.Conv2d(width, 3 * width, 1)
        self.write = _zero(nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, width, height, across = x.shape
        parts = self.read(self.norm(x)).view(batch, 3, self.heads, width // self.heads, height * across)
        q, k, v = parts.transpose(-1, -2).unbind(1)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(x.shape)
        return x + self.write(mixed)
