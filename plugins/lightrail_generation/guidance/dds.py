"""Decomposed diffusion sampling: a few steps of conjugate gradients on the predicted data."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightrail.errors import CompositionError
from lightrail.generation import (
    Denoiser,
    Guidance,
    Level,
    Moment,
    Prediction,
    Sampler,
    State,
    StateMeasurement,
    conjugate_gradients,
)
from lightrail.options import at_least, positive
from lightrail.traits import SamplingClaim, Traits
from lightrail_generation.guidance.dps import refuse_fixed_states

__all__ = ["DDS", "KeepsNoise", "carried_noise", "consistent_data"]


_TRAINED = {"digits": ("experiment=digits_diffusion",)}
_DIGITS = ("run={digits}", "+sampler=ddim", "sampler.steps=50", "generate.count=64")
_FREQUENCIES = (*_DIGITS, "generate.measurement=mask_fourier")
_DDS = (*_FREQUENCIES, "sampler.eta=0.85", "+guidance=[dds]")
# Of 0.5, 1, 2 and 3, with and without fresh noise, that with the best PSNR.
_DPS = (*_FREQUENCIES, "+guidance=[dps]", "guidance.dps.zeta=2")
_MASKED = (*_DIGITS, "generate.measurement=inpaint")


def consistent_data(data: Tensor, measured: StateMeasurement, gamma: float, steps: int) -> Tensor:
    """argmin γ/2 ‖y − A x‖² + ½ ‖x − D‖² within D and the first Krylov directions.

    Args:
        data: D, ``[B, …]``.
        measured: A and y, of states.
        gamma: γ; infinite where y holds exactly: then ‖y − A x‖² alone, from D.
        steps: Conjugate-gradient steps ℓ; each sample has step lengths of its own.
    """
    wide = data.to(torch.promote_types(data.dtype, torch.float32))
    back = measured.adjoint(measured.value.to(wide.dtype))
    if math.isinf(gamma):
        found = conjugate_gradients(lambda x: measured.adjoint(measured.apply(x)), back, wide, steps)
    else:
        right = wide + gamma * back
        found = conjugate_gradients(lambda x: x + gamma * measured.adjoint(measured.apply(x)), right, wide, steps)
    return found.to(data.dtype)


def carried_noise(here: Level, there: Level, eta: float) -> Any:
    """How much of the state at s a first-order step carries to t: (σ_t/σ_s) √(1 − η² (1 − e^{−2h})).

    Args:
        here: s; a number, or one a sample.
        there: t.
        eta: η, the share of fresh noise, as in DDIM.
    """
    lost = 1 - (there.rho / here.rho) ** 2
    return there.sigma / here.sigma * (1 - eta**2 * lost) ** 0.5


class KeepsNoise(Guidance, ABC):
    """Corrects the predicted data D to D' and keeps the predicted noise ε, as if the state were α D' + σ ε.

    A sampler steps from the state that it has, so that ε would follow: ε' = (x − α D')/σ. What its step carries along
    of α_s (D' − D), the difference of the two states, is added after the step; for DDIM that is α_t D' + σ_t ε.

    Args:
        keep_noise: Whether; without, ε follows.
    """

    def __init__(self, keep_noise: bool = True) -> None:
        self.keep_noise = keep_noise
        self._eta = 0.0

    def prepare(self, denoiser: Denoiser, sampler: Sampler) -> None:
        if not self.keep_noise:
            return
        refuse_fixed_states(self, sampler)
        card, name = sampler.card, type(sampler.solver).__name__
        self._eta = 0.0 if card.fresh_noise is None else card.fresh_noise
        if card.is_stochastic and card.fresh_noise is None:
            raise CompositionError(
                f"{type(self).__name__} cannot keep the noise that {name} makes anew",
                found=f"keep_noise=true and sampler={name}",
                allowed="a deterministic sampler, ddim, ddpm or dpm_solver_pp",
                remedy="Set keep_noise=false, or choose another sampler.",
            )

    @abstractmethod
    def corrected(self, data: Tensor, moment: Moment) -> Tensor:
        """D' for the predicted data D, ``[B, …]``."""

    def correct(self, prediction: Prediction, moment: Moment) -> Prediction:
        data = self.corrected(prediction.data, moment)
        if self.keep_noise and "moved" not in moment.memory:
            # Of the first prediction of the step: that at the state which the step starts from.
            moment.memory["moved"] = (data - prediction.data).detach()
        return prediction.with_data(data)

    def after_step(self, state: State, moment: Moment) -> State:
        moved = moment.memory.pop("moved", None)
        there = moment.grid[state.index]
        if moved is None or there.is_clean or state.index <= moment.index:
            return state
        share = carried_noise(moment.level, there, self._eta) * moment.level.alpha
        return dataclasses.replace(state, x=state.x + (share * moved).to(state.x.dtype))


class DDS(KeepsNoise):
    """Draws the predicted data towards what was measured by a few conjugate-gradient steps, without the network.

    D' = argmin over D + K_ℓ of γ/2 ‖y − A x‖² + ½ ‖x − D‖²,  x_t = α_t D' + σ_t (√(1 − η²) ε + η z)

    K_ℓ is the Krylov space of (I + γ AᵀA) x = D + γ Aᵀ y. The network's noise ε is kept. η belongs to the sampler:
    ``ddim`` with ``sampler.eta`` of 0.8 or so is the paper's. One evaluation a step, and no gradient through the
    network.

    Args:
        steps: ℓ, conjugate-gradient steps, at least 0; 0 is the sampler alone.
        gamma: γ, above 0: how much y weighs against the prediction, in the units of the states. Data of variance v,
            measured with noise of variance s², would have γ = v/s².
        noiseless: Whether y holds exactly, γ = ∞: steps on AᵀA x = Aᵀ y from D. ``None`` for where the measurement has
            no noise.
        keep_noise: Whether ε stays the network's, as in the paper, or follows D'.

    Raises:
        ConfigurationError: An option is out of range.
        CompositionError: A latent model, whose states have no linear measurement; or a sampler whose step carries
            something else along than the state (``bdia``, ``dmcmc``, ``si_sde``, …).

    Deviations:
        The published code has one step length for a whole batch; here each sample has its own. It leaves the state
        before the last without noise; here that is the time grid's. DDIM's fresh noise is σ_t η √(1 − e^{−2h}), a
        little less than the paper's η σ_t. With samplers of higher order, ε is kept at the start of the step.

    Example:
        >>> from lightrail.generation import GaussianMixture, Observed, sample
        >>> from lightrail_generation.measurements.inpaint import Inpaint
        >>> from lightrail_generation.time_grids.uniform import Uniform
        >>> mixture, sampler, operator = GaussianMixture(), DDIM(steps=20), Inpaint(hidden=[1])
        >>> operator.prepare((2,))
        >>> observed = Observed(operator, torch.ones(4, 1, dtype=torch.float64))
        >>> drawn = sample(mixture, sampler, sampler.grid(mixture.path, Uniform()), range(4), guidance=[DDS()],
        ...                observed=observed)
        >>> [round(value, 6) for value in drawn.x[:, 0].tolist()], drawn.evaluations
        ([1.0, 1.0, 1.0, 1.0], 20)

    Reference:
        H. Chung, S. Lee and J. C. Ye (2024), Decomposed Diffusion Sampler for Accelerating Large-Scale Inverse
        Problems, arXiv 2303.05754.
    """

    traits: ClassVar[Traits] = Traits(
        rule="D' = argmin over D + K_ℓ of γ/2 ‖y − A x‖² + ½ ‖x − D‖²",
        paper="H. Chung, S. Lee, J. C. Ye, 2024, Decomposed Diffusion Sampler for Accelerating Large-Scale Inverse "
        "Problems, arXiv 2303.05754",
        example={"steps": 5},
        sampling_claims=(
            SamplingClaim(
                sentence="restores a digit of which half the frequencies were measured, with a better PSNR than DPS",
                metric="psnr",
                overrides=_DDS,
                baseline=_DPS,
                trained=_TRAINED,
            ),
            SamplingClaim(
                sentence="restores a digit with a box hidden in its middle, with a better PSNR than DPS",
                metric="psnr",
                overrides=(*_MASKED, "sampler.eta=0.85", "+guidance=[dds]"),
                baseline=(*_MASKED, "+guidance=[dps]", "guidance.dps.zeta=3"),
                trained=_TRAINED,
            ),
            SamplingClaim(
                sentence="takes at most 0.7 of the time of DPS",
                metric="sampling_seconds",
                overrides=_DDS,
                baseline=_DPS,
                is_higher_better=False,
                ratio=0.7,
                trained=_TRAINED,
            ),
        ),
    )
    needs_measurement = True

    def __init__(
        self, steps: int = 5, gamma: float = 5.0, noiseless: bool | None = None, keep_noise: bool = True
    ) -> None:
        super().__init__(keep_noise)
        at_least(0, steps=steps)
        positive(gamma=gamma)
        self.steps = steps
        self.gamma = gamma
        self.noiseless = noiseless

    def is_active(self, moment: Moment) -> bool:
        return self.steps > 0

    def corrected(self, data: Tensor, moment: Moment) -> Tensor:
        assert moment.observed is not None
        is_exact = moment.observed.operator.noise == 0 if self.noiseless is None else self.noiseless
        measured = moment.observed.on_states(moment.denoiser)
        return consistent_data(data, measured, math.inf if is_exact else self.gamma, self.steps)
