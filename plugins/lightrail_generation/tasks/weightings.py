"""What an error at one level of noise counts, and how a network's output is scaled."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightrail.generation import Level
from lightrail.generation.prediction import weights_of

__all__ = [
    "WEIGHTINGS",
    "data_weight",
    "edm_preconditioning",
    "error_factor",
    "output_scale",
    "snr",
    "tensor_of",
]

WEIGHTINGS = ("uniform", "snr", "min_snr", "elbo", "edm")


def snr(level: Level) -> Any:
    """SNR = α²/σ²."""
    return level.alpha**2 / level.sigma**2


def error_factor(form: str, level: Level) -> Any:
    """‖x0 − D‖² for an error of 1 in a prediction y = a x0 + b z: (σ/(α b − σ a))².

    It is 1 for the data, (σ/α)² for the noise, σ² for the velocity where α² + σ² = 1, and σ⁴/α² for the score.
    """
    a, b = weights_of(form, level)
    return (level.sigma / (level.alpha * b - level.sigma * a)) ** 2


def output_scale(form: str, level: Level) -> Any:
    """By what a network's output, of order one, is multiplied to give a prediction in that form."""
    if form == "score":
        return 1 / level.sigma
    return (level.alpha**2 + level.sigma**2) ** 0.5 if form == "velocity" else 1.0


def edm_preconditioning(level: Level, sigma_data: Any) -> tuple[Any, Any, Any]:
    """The c_skip, c_out and c_in with which D(x) = c_skip x + c_out F(c_in x), for any α.

    With q = α² σ_data² + σ²: c_skip = α σ_data²/q, c_out = σ σ_data/√q, c_in = 1/√q. At α = 1 they are those of the
    paper; at α² + σ² = 1 and σ_data = 1, −F is the velocity.

    Args:
        level: The level of noise.
        sigma_data: The root mean square of the data as states.

    Reference:
        T. Karras, M. Aittala, T. Aila and S. Laine (2022), Elucidating the Design Space of Diffusion-Based Generative
        Models, arXiv 2206.00364, table 1 and appendix B.6.
    """
    q = level.alpha**2 * sigma_data**2 + level.sigma**2
    return level.alpha * sigma_data**2 / q, level.sigma * sigma_data / q**0.5, q**-0.5


def _elbo(level: Level) -> Any:
    """−½ dSNR/dt, the limit of (SNR(t − dt) − SNR(t))/(2 dt), written so that it is finite at α = 0."""
    alpha, sigma = level.alpha, level.sigma
    return (alpha**2 * level.sigma_rate / sigma - alpha * level.alpha_rate) / sigma**2


def data_weight(weighting: str, level: Level, *, gamma: float, sigma_data: Any) -> Any:
    """What ‖x0 − D‖² counts at a level.

    Args:
        weighting: ``snr``: α²/σ², the error of the noise. ``min_snr``: at most γ of it. ``elbo``: −½ dSNR/dt, to be
            divided by the density of t: the bound on the likelihood. ``edm``: SNR + 1/σ_data².
        level: The level of noise.
        gamma: γ.
        sigma_data: The root mean square of the data as states.

    Reference:
        D. P. Kingma, T. Salimans, B. Poole and J. Ho (2021), Variational Diffusion Models, arXiv 2107.00630,
        sections 4 and 5, for ``elbo``.
        T. Hang, S. Gu, C. Li, J. Bao, D. Chen, H. Hu, X. Geng and B. Guo (2023), Efficient Diffusion Training via
        Min-SNR Weighting Strategy, arXiv 2303.09556, for ``min_snr``.
    """
    if weighting == "edm":
        return snr(level) + 1 / sigma_data**2
    if weighting == "elbo":
        return _elbo(level)
    if weighting == "min_snr":
        ratio = snr(level)
        return ratio.clamp(max=gamma) if isinstance(ratio, Tensor) else min(ratio, gamma)
    return snr(level)


def tensor_of(value: Any, like: Tensor) -> Tensor | float:
    """A factor in the type of the states that it multiplies; a number stays one."""
    return value.to(like.device, like.dtype) if isinstance(value, Tensor) else value
