"""Weights of particles: how many are still worth something, and which are drawn again."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["effective_sample_size", "systematic_resampling"]


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """(Σ w)²/Σ w², from 1 to K, float64.

    Args:
        log_weights: log w, not normalised, ``[…, K]``; −∞ is a weight of 0, but not for all.

    Example:
        >>> effective_sample_size(torch.tensor([[0.0, 0.0], [0.0, -torch.inf]])).tolist()
        [2.0, 1.0]

    Reference:
        J. S. Liu (2001), Monte Carlo Strategies in Scientific Computing, section 2.5.3.
    """
    weights = (log_weights.double() - log_weights.double().amax(-1, keepdim=True)).exp()
    return weights.sum(-1).square() / weights.square().sum(-1)


def systematic_resampling(log_weights: Tensor, uniform: Tensor) -> Tensor:
    """Which particles are drawn: j is drawn ⌊K w_j⌋ or ⌈K w_j⌉ times, K w_j times on average.

    The i-th draw is the first j with w_1 + … + w_j > (i + u)/K, worked out in float64.

    Args:
        log_weights: log w, not normalised, ``[…, K]``; −∞ is a weight of 0, but not for all.
        uniform: u in [0, 1), one for all K, ``[…]``.

    Returns:
        Numbers from 0 to K − 1, rising, ``[…, K]``.

    Example:
        >>> systematic_resampling(torch.tensor([0.1, 0.6, 0.3]).log(), torch.tensor(0.5)).tolist()
        [1, 1, 2]

    Reference:
        G. Kitagawa (1996), Monte Carlo Filter and Smoother for Non-Gaussian Nonlinear State Space Models, appendix.
    """
    count = log_weights.shape[-1]
    sums = log_weights.double().softmax(-1).cumsum(-1)
    # So that the last sum is 1 to the bit, and no particle of weight 0 at the end is drawn.
    sums = sums / sums[..., -1:]
    places = torch.arange(count, dtype=torch.float64, device=log_weights.device)
    wanted = (places + uniform.double().to(log_weights.device)[..., None]) / count
    return torch.searchsorted(sums.contiguous(), wanted.contiguous(), right=True).clamp(max=count - 1)
