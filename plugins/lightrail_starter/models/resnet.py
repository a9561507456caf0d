"""A residual network for small images."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from lightrail.errors import ConfigurationError
from lightrail.options import at_least
from lightrail.traits import Traits
from lightrail_starter.models.sizes import known

__all__ = ["ResNet"]


class ResNet(nn.Module):
    """Three stages of pre-activation residual blocks, at full, half and quarter resolution.

    x ← x + conv(relu(norm(conv(relu(norm(x))))))

    Args:
        in_channels: Channels of an image; known from the data where none is given.
        out_features: Outputs: classes, or regression targets; known from the data where none is given.
        depth: Layers with weights, 6 n + 2 for n blocks a stage: 8, 14, 20, 32, 44, 56, …
        width: Channels of the first stage, at least 1; each later stage has twice as many.

    Raises:
        ConfigurationError: ``depth`` is not 6 n + 2.

    Deviations:
        Where a block changes the number of channels, the shortcut is a 1 by 1 convolution of the normalised input.

    Example:
        >>> import torch
        >>> ResNet(in_channels=3, out_features=10, depth=8)(torch.zeros(2, 3, 12, 12)).shape
        torch.Size([2, 10])

    Reference:
        K. He, X. Zhang, S. Ren and J. Sun (2016), Identity Mappings in Deep Residual Networks, arXiv:1603.05027,
        figure 1(b).
    """

    traits: ClassVar[Traits] = Traits(
        paper="He, Zhang, Ren and Sun (2016), Identity Mappings in Deep Residual Networks, arXiv:1603.05027",
        example={"depth": 8, "width": 4},
    )

    def __init__(
        self,
        in_channels: int | None = None,
        out_features: int | None = None,
        depth: int = 20,
        width: int = 16,
    ) -> None:
        super().__init__()
        channels, outputs = known(in_channels=in_channels, out_features=out_features)
        at_least(1, width=width)
        if depth < 8 or (depth - 2) % 6:
            raise ConfigurationError(
                "depth does not fill three equal stages",
                found=f"depth={depth}",
                allowed="6 n + 2: 8, 14, 20, 26, 32, …",
                remedy=f"Set model.depth={max(8, depth - (depth - 2) % 6)}.",
            )
        blocks: list[nn.Module] = []
        in_width = width
        for stage in range(3):
            out_width = width * 2**stage
            for block in range((depth - 2) // 6):
                blocks.append(_Block(in_width, out_width, stride=2 if stage and not block else 1))
                in_width = out_width
        self.stem = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(*blocks, nn.BatchNorm2d(in_width), nn.ReLU())
        self.head = nn.Linear(in_width, outputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in_channels, H, W]`` to ``[B, out_features]``."""
        return self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))


class _Block(nn.Module):
    """One residual block."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.BatchNorm2d(in_channels), nn.ReLU())
        self.residual = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        )
        changes = stride != 1 or in_channels != out_channels
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        entered = self.enter(x)
        return (x if self.shortcut is None else self.shortcut(entered)) + self.residual(entered)
