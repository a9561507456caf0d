"""What a network is told beside the state: the time and the label, as one vector."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightrail.options import at_least

__all__ = ["Conditioning", "time_features"]

SCALE = 1000.0  # of times: frequencies are made for numbers between 0 and 1000, and times are of order one
LONGEST = 10_000.0  # the ratio of the highest to the lowest frequency


def time_features(time: Tensor, count: int) -> Tensor:
    """cos(ω_k t) and sin(ω_k t), ω_k = 1000 · 10000^{−k/h} for k = 0, …, h − 1 with h = ``count``/2: ``[B, count]``.

    Args:
        time: ``[B]``, of order one.
        count: Features, an even number.

    Example:
        >>> time_features(torch.tensor([0.0]), 4)
        tensor([[1., 1., 0., 0.]])
    """
    half = count // 2
    steps = torch.arange(half, device=time.device, dtype=torch.float32) / half
    angles = time.float()[:, None] * (SCALE * torch.exp(-math.log(LONGEST) * steps))
    return torch.cat((angles.cos(), angles.sin()), dim=1)


class Conditioning(nn.Module):
    """The time and the label of each sample as one vector: c = W₂ silu(W₁ features(t)) + E[label].

    Args:
        width: Of the vector, an even number.
        num_classes: Labels; the row after the last of E means "no label". With 0 labels are not looked at.

    Example:
        >>> conditioning = Conditioning(width=8, num_classes=3)
        >>> time = torch.zeros(2)
        >>> nothing = conditioning(time, None)
        >>> bool((nothing == conditioning(time, torch.tensor([3, 3]))).all())
        True

    Reference:
        J. Ho, A. Jain and P. Abbeel (2020), Denoising Diffusion Probabilistic Models, arXiv 2006.11239, appendix B, for
        the time; J. Ho and T. Salimans (2022), Classifier-Free Diffusion Guidance, arXiv 2207.12598, section 3, for the
        label that is none.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        at_least(0, num_classes=num_classes)
        self.width = width
        self.num_classes = num_classes
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(num_classes + 1, width) if num_classes else None
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.02)

    def forward(self, time: Tensor, label: Tensor | None = None) -> Tensor:
        """``[B]`` times and ``[B]`` labels, or ``None`` for no label, to ``[B, width]``."""
        c = self.time(time_features(time, self.width).to(next(self.time.parameters()).dtype))
        if self.label is None:
            return c
        if label is None:
            label = torch.full((len(time),), self.num_classes, device=time.device)
        return c + self.label(label)
