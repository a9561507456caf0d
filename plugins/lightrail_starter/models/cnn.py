"""A small convolutional network."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from lightrail.options import at_least, between
from lightrail.traits import Traits
from lightrail_starter.models.sizes import known

__all__ = ["CNN"]


class CNN(nn.Module):
    """Stages of two 3 by 3 convolutions with batch normalisation, each stage half as large as the one before.

    The mean over the last stage's positions feeds one linear layer, so images of any size at least
    ``2 ** (len(widths) - 1)`` pixels a side will do.

    Args:
        in_channels: Channels of an image; known from the data where none is given.
        out_features: Outputs: classes, or regression targets; known from the data where none is given.
        widths: Channels of each stage.
        dropout: Probability with which a feature is dropped before the linear layer, in [0, 1).

    Example:
        >>> import torch
        >>> CNN(in_channels=1, out_features=10)(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    traits: ClassVar[Traits] = Traits(example={"widths": [8, 16]})

    def __init__(
        self,
        in_channels: int | None = None,
        out_features: int | None = None,
        widths: list[int] | None = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        channels, outputs = known(in_channels=in_channels, out_features=out_features)
        between(0, 1, dropout=dropout)
        stages: list[nn.Module] = []
        for width in [32, 64] if widths is None else widths:
            at_least(1, widths=width)
            if stages:
                stages.append(nn.MaxPool2d(2))
            stages += [*_convolution(channels, width), *_convolution(width, width)]
            channels = width
        self.features = nn.Sequential(*stages)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(channels, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in_channels, H, W]`` to ``[B, out_features]``."""
        return self.head(self.features(x).mean(dim=(2, 3)))


def _convolution(in_channels: int, out_channels: int) -> tuple[nn.Module, ...]:
    # Batch normalisation has a shift of its own, so the convolution needs no bias.
    convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(out_channels), nn.ReLU()
