"""DP-SGD: clipped gradients of single samples, their sum, and Gaussian noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightrail.options import positive
from lightrail.privacy import PrivacyMethod, Release
from lightrail.sample_gradients import SampleGradients
from lightrail.traits import Traits

__all__ = ["DPSGD"]


def flat_clipping(norms: Tensor, C: float) -> Tensor:
    return (C / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_max(1.0)


class DPSGD(PrivacyMethod):
    """Adds Gaussian noise to the sum of clipped gradients."""

    traits: ClassVar[Traits] = Traits(rule="x", needs_per_sample_gradients=True)

    def __init__(self, *, clip: Literal["flat"] = "flat", clip_norm: float = 1.0, **common: Any) -> None:
        super().__init__(**common)
        positive(clip_norm=clip_norm)
        self.clip, self.clip_norm = clip, clip_norm

    @property
    def clipping(self) -> str:
        return f"{self.clip}, norm {self.clip_norm:g}"

    def contribution(self, here: SampleGradients, there: SampleGradients | None) -> list[Tensor]:
        return here.weighted_sum(flat_clipping(here.norms(), self.clip_norm))

    def gradient(self, sums: list[Tensor], params: Sequence[Tensor], release: Release) -> list[Tensor]:
        noisy = release(sums, sensitivity=self.clip_norm, noise=release.noise)
        return [each / release.batch for each in noisy]
