"""What the paper on Feynman–Kac correctors promises, as generations of Gaussians whose targets are known."""

from __future__ import annotations

from lightrail.traits import SamplingClaim

__all__ = ["CLAIMS"]

_COMMON = (
    "denoiser=gaussian_mixture",
    "denoiser.path=edm",
    "+sampler=ddpm",
    "sampler.steps=100",
    "sampler.variance=large",
    "+time_grid=karras",
    "generate.count=1000",
    "generate.batch_size=1000",
    "+guidance=[feynman_kac]",
    "guidance.feynman_kac.particles=1000",
)
# N(1, 1), and the same mixed with N(−1, 1): the mean of q_c³/q_u² is by quadrature.
_GUIDED = (
    *_COMMON,
    "denoiser.means=[[1.0],[-1.0]]",
    "denoiser.weights=[0.5,0.5]",
    "denoiser.variances=[1.0,1.0]",
    "generate.label=0",
    "guidance.feynman_kac.beta=3",
)
_ANNEALED = (
    *_COMMON,
    "denoiser.means=[[0.0]]",
    "denoiser.weights=[1.0]",
    "denoiser.variances=[1.0]",
    "guidance.feynman_kac.target=annealing",
    "guidance.feynman_kac.beta=2",
)

CLAIMS = (
    SamplingClaim(
        "weighted samples of q_c³/q_u² have its mean, which those of the guided score alone overshoot",
        metric="mean",
        overrides=_GUIDED,
        baseline=(*_GUIDED, "guidance.feynman_kac.resample=never"),
        target=1.4395,
    ),
    SamplingClaim(
        "weighted samples of q² have half the variance, which those of the annealed score alone undershoot",
        metric="variance",
        overrides=_ANNEALED,
        baseline=(*_ANNEALED, "guidance.feynman_kac.resample=never"),
        target=0.5,
    ),
)
