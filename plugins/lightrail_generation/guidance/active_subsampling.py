"""Active subsampling: measurements are taken where the particles of a population disagree."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightrail.errors import ConfigurationError
from lightrail.generation import Generated, Measurement, Moment, Prediction, State
from lightrail.options import at_least, between, one_of, positive
from lightrail.traits import SamplingClaim, Traits
from lightrail_generation.guidance.dps import DPS, norms
from lightrail_generation.measurements.inpaint import Inpaint
from lightrail_generation.measurements.mask_fourier import MaskFourier

__all__ = ["ActiveSubsampling", "disagreement", "groups_of"]

ACQUISITIONS = ("entropy", "random")
UNITS = ("pixel", "column")
# Three entries of ±1, by the toss of a coin each, among others that are always the same; three may be measured.
_CORNERS = (
    "denoiser=gaussian_mixture",
    f"denoiser.means={[[a, b, c, 0.5, -0.5, 0.0, 0.0] for a in (-1.0, 1.0) for b in (-1.0, 1.0) for c in (-1.0, 1.0)]}",
    f"denoiser.weights={[1.0] * 8}",
    f"denoiser.variances={[0.01] * 8}",
    "+sampler=ddim",
    "sampler.steps=30",
    "+measurement=inpaint",
    "measurement.hidden=[6]",
    "+guidance=[active_subsampling]",
    "guidance.active_subsampling.measurements=3",
    "guidance.active_subsampling.particles=8",
    "guidance.active_subsampling.zeta=0.3",
    "guidance.active_subsampling.stop=0.4",
    "generate.count=64",
)


def disagreement(measured: Tensor, groups: Tensor, sigma: float) -> Tensor:
    """How uncertain each measurement is under a mixture of Gaussians around the particles, ``[N, U]`` in float64.

    −log Σ_i log Σ_j exp(−|y_i − y_j|²_a/(2σ²)), the norm over the entries of measurement a. It is in the order of the
    entropy Σ_i −log Σ_j exp(…), and tells far particles from farther ones, where that is 0.

    Args:
        measured: What would be measured of each of K particles, ``[N, K, E]``.
        groups: To which measurement each entry belongs, from 0, ``[E]``.
        sigma: σ, the width of each Gaussian.

    Example:
        >>> apart = torch.tensor([[[0.0, 0.0, 5.0], [1.0, 900.0, 5.0]]])
        >>> disagreement(apart, torch.arange(3), 0.1).argmax(1).tolist()
        [1]
    """
    y = measured.double()
    particles, units = y.shape[1], int(groups.max()) + 1
    found = []
    for i in range(particles):
        squares = (y - y[:, i : i + 1]).square()
        distances = y.new_zeros(len(y), particles, units).index_add(2, groups, squares)
        others = torch.arange(particles, device=y.device) != i
        # log Σ_{j≠i}; with it the sum over all j is 1 + exp of it.
        log_others = (-distances[:, others] / (2 * sigma**2)).logsumexp(1)
        found.append(torch.where(log_others < -30, log_others, F.softplus(log_others).log()))
    return -torch.stack(found).logsumexp(0)


def groups_of(operator: Measurement, shape: tuple[int, ...], unit: str) -> Tensor:
    """Which entries are measured together, a number from 0 for each entry of y.

    Args:
        operator: A.
        shape: Of one y.
        unit: ``pixel``, all channels of a place, or ``column``, all places one above the other.
    """
    if isinstance(operator, Inpaint):
        sides = operator.seen.shape[-2:]
        places = operator.seen.flatten().nonzero()[:, 0]
    elif isinstance(operator, MaskFourier):
        sides = operator.mask.shape
        seen = operator.mask.flatten().nonzero()[:, 0]
        places = seen[:, None].expand(shape)
    else:
        sides = torch.Size(shape[-2:])
        places = torch.arange(math.prod(shape))
    modulus = sides[-1] if unit == "column" else math.prod(sides)
    return torch.unique(places.flatten() % modulus, return_inverse=True)[1]


class ActiveSubsampling(DPS):
    """Takes one measurement after another while it samples, each where the particles' predictions disagree most.

    a* = argmax_a −Σ_i log Σ_j exp(−|ŷ_i − ŷ_j|²_a/(2σ²)) of those not taken,  ŷ_i = A D(x_i);
    x ← x − ζ ∇_x ‖M (y − A D(x))‖,  M: those taken so far

    The particles of a population are samples that fit the same measurements; what is observed is all that could be
    taken, and of it only what was chosen is used. Across the window of steps the number taken grows evenly.

    Args:
        measurements: How many are taken in all, at least 1; no more than there are.
        particles: K, samples of a population, at least 2.
        unit: What one measurement is: ``pixel``, all channels of a place (an entry of points, a frequency of a
            Fourier measurement), or ``column``.
        sigma: σ above 0, in the units of y: about how far apart predictions are that should count as different. The
            paper's is 10 for pixels from 0 to 255.
        zeta: ζ, at least 0, the length of a step toward what was measured, as for ``dps``; 0 leaves the samples alone.
        start: Of the steps, the share after which measuring begins, in [0, 1).
        stop: The share after which all is measured, above ``start``, at most 1.
        acquisition: ``entropy``, as above, or ``random``, to compare with.

    Raises:
        ConfigurationError: An option is out of range.
        CompositionError: The sampler goes on from earlier states.

    Deviations:
        The released code has exp(+…), which grows without bound for particles far apart; the sign here is the
        entropy's. It is ranked by its logarithm, so that it is not 0 for all of them. The step follows the gradient of
        the norm, as that of ``dps`` does, so that its length does not depend on how far the data are off.

    Example:
        >>> from lightrail.generation import GaussianMixture, Observed, sample
        >>> from lightrail_generation.samplers.ddim import DDIM
        >>> from lightrail_generation.time_grids.uniform import Uniform
        >>> operator, mixture, sampler = Inpaint(hidden=[1]), GaussianMixture(), DDIM(steps=20)
        >>> operator.prepare((2,))
        >>> observed = Observed(operator, torch.full((4, 1), 1.5, dtype=torch.float64))
        >>> guidance = ActiveSubsampling(measurements=1, particles=4, zeta=0.3)
        >>> grid = sampler.grid(mixture.path, Uniform())
        >>> found = sample(mixture, sampler, grid, range(4), guidance=[guidance], observed=observed)
        >>> bool((found.x[:, 0] - 1.5).abs().mean() < 0.5)
        True

    Reference:
        O. Nolan, T. S. W. Stevens, W. L. van Nierop and R. J. G. van Sloun (2024), Active Diffusion Subsampling, arXiv
        2406.14388, algorithm 1.
    """

    traits: ClassVar[Traits] = Traits(
        rule="a* = argmax_a −Σ_i log Σ_j exp(−|ŷ_i − ŷ_j|²_a/(2σ²)), x ← x − ζ ∇ ‖M (y − A D)‖",
        paper="O. Nolan, T. S. W. Stevens, W. L. van Nierop, R. J. G. van Sloun, 2024, Active Diffusion Subsampling, "
        "arXiv 2406.14388",
        example={"measurements": 1, "particles": 4, "zeta": 0.3},
        sampling_claims=(
            SamplingClaim(
                "measurements where particles disagree tell more than as many at random",
                metric="rmse",
                overrides=_CORNERS,
                baseline=(*_CORNERS, "guidance.active_subsampling.acquisition=random"),
                is_higher_better=False,
            ),
        ),
    )

    def __init__(
        self,
        measurements: int = 50,
        particles: int = 16,
        unit: str = "pixel",
        sigma: float = 0.04,
        zeta: float = 1.0,
        start: float = 0.0,
        stop: float = 0.8,
        acquisition: str = "entropy",
    ) -> None:
        super().__init__(zeta)
        at_least(1, measurements=measurements)
        at_least(2, particles=particles)
        one_of(UNITS, unit=unit)
        one_of(ACQUISITIONS, acquisition=acquisition)
        positive(sigma=sigma)
        between(0, 1, start=start)
        between(0, 1, closed="right", stop=stop)
        if not start < stop:
            raise ConfigurationError(
                "active_subsampling has no steps to measure in",
                found=f"start={start}, stop={stop}",
                allowed="start below stop",
                remedy="Set guidance.active_subsampling.start=0 and stop=0.8.",
            )
        self.measurements = measurements
        self.population = particles
        self.unit = unit
        self.sigma = sigma
        self.start = start
        self.stop = stop
        self.acquisition = acquisition

    def after_step(self, state: State, moment: Moment) -> State:
        assert moment.prediction is not None
        assert moment.observed is not None
        observed, decode = moment.observed, moment.denoiser.decode
        groups = groups_of(observed.operator, tuple(observed.value.shape[1:]), self.unit).to(state.x.device)
        taken = self._taken(moment, groups)
        moment.memory["taken"] = taken
        if not bool(taken.any()):
            return state
        mask = taken[:, groups]

        def misfit(prediction: Prediction) -> Tensor:
            return norms(observed.residual(decode(prediction.data)).flatten(1) * mask)

        _, gradient = moment.gradient(misfit)
        x = state.x - self.zeta * gradient
        return dataclasses.replace(state, x=x.to(state.x.dtype))

    def _taken(self, moment: Moment, groups: Tensor) -> Tensor:
        """Which measurements are taken, one row a sample and the same for all of a population, ``[B, U]``."""
        count, units = self.population, int(groups.max()) + 1
        nothing = torch.zeros(len(moment.x), units, dtype=torch.bool, device=moment.x.device)
        taken = moment.memory.get("taken", nothing)
        more = self._wanted(moment, units) - int(taken[0].sum())
        if more <= 0:
            return taken
        scores = self._scores(moment, groups, units).masked_fill(taken[::count], -math.inf)
        chosen = scores.topk(more, dim=1).indices.repeat_interleave(count, 0)
        return taken.scatter(1, chosen, value=True)

    def _wanted(self, moment: Moment, units: int) -> int:
        done = (moment.index + 1) / moment.grid.steps
        share = min(max((done - self.start) / (self.stop - self.start), 0.0), 1.0)
        return math.floor(min(self.measurements, units) * share + 1e-9)

    def _scores(self, moment: Moment, groups: Tensor, units: int) -> Tensor:
        if self.acquisition == "random":
            return moment.uniform(shape=(units,))[:: self.population].double()
        assert moment.prediction is not None
        assert moment.observed is not None
        with torch.no_grad():
            measured = moment.observed.operator.apply(moment.denoiser.decode(moment.prediction.data))
        return disagreement(measured.flatten(1).unflatten(0, (-1, self.population)), groups, self.sigma)

    def measure(self, generated: Generated) -> dict[str, float]:
        """``rmse``: the root mean square distance from what was measured, where it is known."""
        if generated.observed is None or generated.observed.truth is None:
            return {}
        error = generated.samples.double() - generated.observed.truth.double()
        return {"rmse": float(error.square().mean().sqrt())}
