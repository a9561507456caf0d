"""Factors that bound what the gradient of one sample can add to a sum."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightrail.errors import ConfigurationError
from lightrail.options import between, non_negative, positive

__all__ = [
    "adapted_norm",
    "automatic_factors",
    "centred_count",
    "flat_factors",
    "gradient_noise",
    "per_layer_factors",
]


def flat_factors(norms: Tensor, C: float | Tensor) -> Tensor:
    r"""Factors that shorten what is longer than C, and leave the rest as it is.

    .. math:: c_i = \min(1, C / \|g_i\|)

    Args:
        norms: ‖g_i‖, of any shape, at least 0.
        C: The largest norm, greater than 0; a number, or a tensor that broadcasts against ``norms``.

    Returns:
        c, in the shape of ``norms``, in [0, 1]; 0 where a norm is not finite, or so large that the factor vanishes.

    Example:
        >>> flat_factors(torch.tensor([0.0, 0.5, 2.0, float("inf")]), 1.0)
        tensor([1.0000, 1.0000, 0.5000, 0.0000])

    Reference:
        M. Abadi, A. Chu, I. Goodfellow, H. B. McMahan, I. Mironov, K. Talwar and L. Zhang (2016), Deep Learning with
        Differential Privacy, CCS, arXiv 1607.00133, algorithm 1.
    """
    # A norm of 0 divides to infinity, which the bound of 1 meets.
    return _exact((C / norms).clamp(max=1.0), norms)


def automatic_factors(norms: Tensor, C: float, gamma: float) -> Tensor:
    r"""Factors that give every gradient a norm just below C, but for those that are small beside gamma.

    .. math:: c_i = C / (\|g_i\| + \gamma)

    Args:
        norms: ‖g_i‖, of any shape, at least 0.
        C: The norm that none reaches, greater than 0; it only scales the sum.
        gamma: γ, greater than 0: the norm at which half of C is given.

    Returns:
        c, in the shape of ``norms``, above 0; 0 where a norm is not finite.

    Example:
        >>> automatic_factors(torch.tensor([0.0, 0.5, 1.5]), 1.0, 0.5)
        tensor([2.0000, 1.0000, 0.5000])

    Reference:
        Z. Bu, Y.-X. Wang, S. Zha and G. Karypis (2023), Automatic Clipping: Differentially Private Deep Learning Made
        Easier and Stronger, NeurIPS, arXiv 2206.07136, AUTO-S.
    """
    return _exact(C / (norms + gamma), norms)


def per_layer_factors(norms: Tensor, C: float) -> Tensor:
    r"""Factors that bound each of P layers alone, such that all together are at most C.

    .. math:: c_i^l = \min(1, C_l / \|g_i^l\|), \qquad C_l = C / \sqrt{P}

    Args:
        norms: ‖g_i^l‖ ``[P, B]``, at least 0.
        C: The largest joint norm, greater than 0.

    Returns:
        c ``[P, B]``, in [0, 1].

    Example:
        >>> per_layer_factors(torch.tensor([[3.0], [0.1], [1.0], [0.0]]), 2.0).flatten()
        tensor([0.3333, 1.0000, 1.0000, 1.0000])

    Reference:
        H. B. McMahan, D. Ramage, K. Talwar and L. Zhang (2018), Learning Differentially Private Recurrent Language
        Models, ICLR, arXiv 1710.06963, section 2.
    """
    return flat_factors(norms, C / math.sqrt(len(norms)))


def centred_count(norms: Tensor, C: float) -> Tensor:
    r"""How many gradients are not clipped, each counting half more or half less than nothing.

    .. math:: k = \sum_i \left(1[\|g_i\| \le C] - \tfrac12\right)

    One sample moves it by 1/2, and would move the plain count by 1.

    Args:
        norms: ‖g_i‖ ``[B]``.
        C: The norm from which on a gradient is clipped, at least 0.

    Returns:
        k, a 0-d tensor.

    Example:
        >>> centred_count(torch.tensor([0.2, 0.9, 7.0]), 1.0)
        tensor(0.5000)

    Reference:
        G. Andrew, O. Thakkar, H. B. McMahan and S. Ramaswamy (2021), Differentially Private Learning with Adaptive
        Clipping, NeurIPS, arXiv 1905.03871, algorithm 1.
    """
    return (norms <= C).to(norms.dtype).sub(0.5).sum()


def adapted_norm(C: float, fraction: float, quantile: float, lr: float) -> float:
    r"""The next clipping norm: lower where too many gradients are within it, higher where too few are.

    .. math:: C' = C \exp(-\eta_C (b - \gamma_q))

    Args:
        C: The norm so far, greater than 0.
        fraction: b, the noisy share of gradients within it; the noise may take it out of [0, 1].
        quantile: γ_q, the share that is wanted, in [0, 1].
        lr: η_C, at least 0.

    Returns:
        C', within the numbers of single precision.

    Example:
        >>> adapted_norm(1.0, fraction=0.5, quantile=0.5, lr=0.2), round(adapted_norm(1.0, 1.0, 0.5, 0.2), 6)
        (1.0, 0.904837)

    Reference:
        G. Andrew, O. Thakkar, H. B. McMahan and S. Ramaswamy (2021), Differentially Private Learning with Adaptive
        Clipping, NeurIPS, arXiv 1905.03871, section 2.
    """
    positive(C=C)
    between(0.0, 1.0, closed="both", quantile=quantile)
    non_negative(lr=lr)
    limits = torch.finfo(torch.float32)
    exponent = math.log(C) - lr * (fraction - quantile)
    return math.exp(min(max(exponent, math.log(limits.tiny)), math.log(limits.max) / 2))


def gradient_noise(z: float, sigma_b: float) -> float:
    r"""The noise multiplier of a sum that, with a noisy count of sensitivity 1/2 beside it, costs exactly z.

    .. math:: z_\Delta = (z^{-2} - (2 \sigma_b)^{-2})^{-1/2}

    Args:
        z: The noise multiplier of the two together, at least 0.
        sigma_b: σ_b, the standard deviation of the noise of the count, greater than z / 2.

    Returns:
        z_Δ, at least z.

    Raises:
        ConfigurationError: The count alone costs more than z.

    Example:
        >>> round(gradient_noise(1.0, sigma_b=10.0), 7)
        1.0012523

    Reference:
        G. Andrew, O. Thakkar, H. B. McMahan and S. Ramaswamy (2021), Differentially Private Learning with Adaptive
        Clipping, NeurIPS, arXiv 1905.03871, theorem 1.
    """
    non_negative(z=z, sigma_b=sigma_b)
    if z and z >= 2 * sigma_b:
        raise ConfigurationError(
            "counting how many gradients are clipped costs more than the whole step may",
            found=f"count_noise={sigma_b:g} with a noise multiplier of {z:g}",
            allowed=f"count_noise above {z / 2:g}",
            remedy=f"Set privacy.count_noise={z:.3g} or more, or train with larger batches or another clip.",
        )
    return z / math.sqrt(1 - (z / (2 * sigma_b)) ** 2) if z else 0.0


def _exact(factors: Tensor, norms: Tensor) -> Tensor:
    # A factor below the normal numbers has too few digits left to bound anything.
    is_kept = torch.isfinite(norms) & (factors >= torch.finfo(factors.dtype).tiny)
    return torch.where(is_kept, factors, torch.zeros_like(factors))
