"""The exact classifier of a mixture of Gaussians: the test bed of guidance by a classifier."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightrail.generation.gaussian_mixture import MEANS, VARIANCES, WEIGHTS

__all__ = ["MixtureClassifier"]


class MixtureClassifier:
    """Which component of Σ w_k N(m_k, v_k I) a point is from: logits log w_k − |x − m_k|²/(2 v_k) − (n/2) log 2π v_k.

    Args:
        means: One point a component; those of :class:`lightrail.generation.GaussianMixture` by default, as are the
            others.
        weights: Positive, one a component.
        variances: Positive, one a component.

    Example:
        >>> MixtureClassifier()(torch.tensor([[1.0, 0.5], [-1.0, -0.3]])).argmax(1)
        tensor([0, 1])
    """

    def __init__(
        self,
        means: Sequence[Sequence[float]] = MEANS,
        weights: Sequence[float] = WEIGHTS,
        variances: Sequence[float] = VARIANCES,
    ) -> None:
        self.means, self.weights, self.variances = (
            torch.as_tensor(each, dtype=torch.float64) for each in (means, weights, variances)
        )

    def __call__(self, samples: Tensor) -> Tensor:
        """Points ``[B, n]`` to logits ``[B, K]``."""
        m, w, v = (each.to(samples.device) for each in (self.means, self.weights, self.variances))
        squares = (samples.double()[:, None] - m).square().sum(-1)
        logits = w.log() - squares / (2 * v) - m.shape[1] / 2 * (2 * math.pi * v).log()
        return logits.to(torch.promote_types(samples.dtype, torch.float32))
