"""Adaptive projected guidance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lightrail.generation import Generated, Guidance, Moment, Prediction
from lightrail.options import between, non_negative, positive
from lightrail.traits import SamplingClaim, Traits
from lightrail_generation.guidance.affine import NoiseInterval, check_scale, condition_of
from lightrail_generation.guidance.saturation import saturation

__all__ = ["APG", "clipped", "projected", "with_momentum"]


def clipped(d: Tensor, r: float) -> Tensor:
    """d min(1, r/|d|): each sample's norm is at most r.

    Example:
        >>> clipped(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 1.0).norm(dim=1)
        tensor([1.0000, 0.5000])
    """
    wide = d.flatten(1).to(torch.promote_types(d.dtype, torch.float32))
    share = (r / wide.norm(dim=1)).clamp(max=1)
    return d * share.to(d.dtype).view(-1, *[1] * (d.ndim - 1))


def projected(d: Tensor, onto: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of d along ``onto`` and at right angles to it, sample by sample, in double precision.

    Args:
        d: ``[B, …]``.
        onto: ``[B, …]``; of one that is 0, the part along it is 0.
    """
    a, b = d.flatten(1).double(), onto.flatten(1).double()
    unit = torch.nn.functional.normalize(b, dim=1, eps=1e-30)
    along = (a * unit).sum(1, keepdim=True) * unit
    return along.view(d.shape), (a - along).view(d.shape)


def with_momentum(d: Tensor, beta: float, moment: Moment) -> Tensor:
    """m = d + β m, with m of the step before.

    What is asked again within a step sees the momentum that the step began with, so that guidance stays a function of
    the state for solvers that ask several times.
    """
    memory = moment.memory
    if memory.get("step") != moment.index:
        memory["before"], memory["step"] = memory.get("running"), moment.index
        memory.pop("running", None)
    before = memory["before"]
    running = d if before is None else d + beta * before
    memory.setdefault("running", running.detach())
    return running


class APG(Guidance):
    """Moves away from the unconditional prediction, but mostly not along the prediction itself, which only saturates.

    m ← D_c − D_u + β m,  d = m min(1, r/|m|),  D = D_c + (w − 1)(d_⊥ + η d_∥)

    with d_∥ the part of d along D_c. Norms and projections are over all elements of one sample, in the space of the
    predicted data. The cost is that of classifier-free guidance: two evaluations in one call.

    Args:
        scale: w, at least 0; 1 is no guidance.
        eta: η, the share of the part along the prediction that is kept, at least 0; 1 is classifier-free guidance with
            momentum and a bounded step.
        norm_threshold: r, above 0, the largest norm of d, in units of states; ``None`` for no bound. It grows with the
            square root of a sample's elements: 2.5 in the paper for states of 64 by 64 by 4, 15 for larger ones.
        momentum: β in (−1, 1); below 0 it pushes away from where guidance pointed before; 0 for none.
        rho_low: It acts at levels with rho_low < σ/α ≤ rho_high; at least 0.
        rho_high: The noisiest level, above ``rho_low``; ``None`` for all.

    Raises:
        ConfigurationError: An option is out of range.
        CompositionError: While sampling, where there is no condition.

    Deviations:
        The momentum is renewed once a step; within a step, solvers that ask several times see the same one. Samplers
        that ask once a step, as in the paper, do not differ. Other libraries start from D_u, or project the network's
        bare output; both are another method.

    Example:
        >>> from lightrail.generation import GaussianMixture, sample
        >>> from lightrail_generation.samplers.ddim import DDIM
        >>> from lightrail_generation.time_grids.uniform import Uniform
        >>> mixture, sampler = GaussianMixture(), DDIM(steps=10)
        >>> grid, label = sampler.grid(mixture.path, Uniform()), {"label": torch.tensor([0, 1])}
        >>> sample(mixture, sampler, grid, range(2), condition=label, guidance=[APG(scale=8.0)]).evaluations
        20

    Reference:
        S. Sadat, O. Hilliges and R. M. Weber (2024), Eliminating Oversaturation and Artifacts of High Guidance Scales
        in Diffusion Models, arXiv 2410.02416, section 5 and algorithm 1.
    """

    traits: ClassVar[Traits] = Traits(
        rule="m ← D_c − D_u + β m; d = m min(1, r/|m|); D = D_c + (w − 1)(d_⊥ + η d_∥)",
        paper="S. Sadat, O. Hilliges, R. M. Weber, 2024, Eliminating Oversaturation and Artifacts of High Guidance "
        "Scales in Diffusion Models, arXiv 2410.02416",
        example={"scale": 4.0},
        sampling_claims=tuple(
            SamplingClaim(
                f"at a scale of 8, {promise} than with classifier-free guidance",
                metric=metric,
                overrides=("run={digits}", "+guidance=[apg]", "guidance.apg.scale=8", "generate.count=200"),
                baseline=("run={digits}", "+guidance=[cfg]", "guidance.cfg.scale=8", "generate.count=200"),
                is_higher_better=False,
                trained={"digits": ("experiment=digits_diffusion",)},
            )
            for metric, promise in (
                ("saturation", "samples are less saturated"),
                ("frechet", "samples are nearer to the data"),
            )
        ),
    )
    asks = ("uncond",)

    def __init__(
        self,
        scale: float = 5.0,
        eta: float = 0.0,
        norm_threshold: float | None = 2.5,
        momentum: float = -0.5,
        rho_low: float = 0.0,
        rho_high: float | None = None,
    ) -> None:
        check_scale(scale)
        non_negative(eta=eta)
        if norm_threshold is not None:
            positive(norm_threshold=norm_threshold)
        between(-1, 1, closed="neither", momentum=momentum)
        self.scale = scale
        self.eta = eta
        self.norm_threshold = norm_threshold
        self.momentum = momentum
        self.interval = NoiseInterval(rho_low, rho_high)

    def is_active(self, moment: Moment) -> bool:
        return self.scale != 1 and self.interval.meets(moment.level)

    def mix(self, named: Mapping[str, Prediction], moment: Moment) -> Prediction:
        condition_of(moment, "apg")
        cond = named["cond"]
        d = cond.data - named["uncond"].data
        if self.momentum:
            d = with_momentum(d, self.momentum, moment)
        if self.norm_threshold is not None:
            d = clipped(d, self.norm_threshold)
        along, across = projected(d, cond.data)
        update = (self.interval.scale(self.scale, moment.level) - 1) * (across + self.eta * along)
        return cond.with_data((cond.data.double() + update).to(cond.data.dtype))

    def measure(self, generated: Generated) -> dict[str, float]:
        """``saturation``: how far the samples lie from the middle of their range."""
        return {"saturation": saturation(generated.samples)}
