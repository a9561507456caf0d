"""Classifier-free guidance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lightrail.generation import Generated, Guidance, Moment, Prediction
from lightrail.generation.prediction import FORMS
from lightrail.options import between, one_of
from lightrail.traits import Traits
from lightrail_generation.guidance.affine import NoiseInterval, affine, check_scale, condition_of
from lightrail_generation.guidance.saturation import saturation

__all__ = ["CFG", "rescaled"]


def rescaled(guided: Tensor, cond: Tensor, phi: float) -> Tensor:
    """φ g std(c)/std(g) + (1 − φ) g, with each sample's own standard deviations.

    Args:
        guided: g, ``[B, …]``.
        cond: c, ``[B, …]``.
        phi: φ, the share that has the deviation of c.
    """
    wanted, found = (_deviation(each) for each in (cond, guided))
    ratio = torch.where(found > 0, wanted / found, 1.0)
    return guided * (1 + phi * (ratio - 1)).to(guided.dtype).view(-1, *[1] * (guided.ndim - 1))


def _deviation(samples: Tensor) -> Tensor:
    wide = torch.promote_types(samples.dtype, torch.float32)
    return samples.flatten(1).to(wide).std(1, correction=0)


class CFG(Guidance):
    """Moves the prediction under the condition further away from the one without.

    D = D_u + w (D_c − D_u), the same in any form of the prediction

    Two evaluations, in one call of the network; one where it does not act, or with w = 1.

    Args:
        scale: w, at least 0: 1 is no guidance, 0 forgets the condition. Models of pixels do well with 1.5 to 4, latent
            text-to-image models with about 7.5.
        rho_low: It acts at levels with rho_low < σ/α ≤ rho_high; at least 0.
        rho_high: The noisiest level, above ``rho_low``; ``None`` for all.
        rescale: φ in [0, 1], the share of the guided prediction that is given the standard deviation of the
            conditional one, sample by sample; 0.7 in its paper.
        rescale_form: What of the prediction is rescaled: data, noise, velocity, flow or score; ``None`` for the
            network's own output. Unlike w, this is not the same in every form.

    Raises:
        ConfigurationError: An option is out of range.
        CompositionError: While sampling, where there is no condition.

    Deviations:
        The paper writes (1 + w') D_c − w' D_u, with w' = w − 1. Its published limits of an interval are levels σ of
        a path with α = 1; here they are σ/α, which is the same there.

    Example:
        >>> from lightrail.generation import GaussianMixture, sample
        >>> from lightrail_generation.samplers.ddim import DDIM
        >>> from lightrail_generation.time_grids.uniform import Uniform
        >>> mixture, sampler = GaussianMixture(), DDIM(steps=10)
        >>> grid, label = sampler.grid(mixture.path, Uniform()), {"label": torch.tensor([0, 1])}
        >>> sample(mixture, sampler, grid, range(2), condition=label, guidance=[CFG(scale=2.0)]).evaluations
        20

    Reference:
        J. Ho and T. Salimans (2022), Classifier-Free Diffusion Guidance, arXiv 2207.12598, equation 6; the interval of
        T. Kynkäänniemi, M. Aittala, T. Karras, S. Laine, T. Aila and J. Lehtinen (2024), Applying Guidance in a Limited
        Interval Improves Sample and Distribution Quality in Diffusion Models, arXiv 2404.07724; the rescaling of S.
        Lin, B. Liu, J. Li and X. Yang (2023), Common Diffusion Noise Schedules and Sample Steps are Flawed, arXiv
        2305.08891, section 3.4.
    """

    traits: ClassVar[Traits] = Traits(
        rule="D = D_u + w (D_c − D_u)",
        paper="J. Ho, T. Salimans, 2022, Classifier-Free Diffusion Guidance, arXiv 2207.12598",
        example={"scale": 2.0},
    )
    asks = ("uncond",)

    def __init__(
        self,
        scale: float = 3.0,
        rho_low: float = 0.0,
        rho_high: float | None = None,
        rescale: float = 0.0,
        rescale_form: str | None = None,
    ) -> None:
        check_scale(scale)
        between(0, 1, closed="both", rescale=rescale)
        if rescale_form is not None:
            one_of(FORMS, rescale_form=rescale_form)
        self.scale = scale
        self.interval = NoiseInterval(rho_low, rho_high)
        self.rescale = rescale
        self.rescale_form = rescale_form

    def is_active(self, moment: Moment) -> bool:
        return self.scale != 1 and self.interval.meets(moment.level)

    def mix(self, named: Mapping[str, Prediction], moment: Moment) -> Prediction:
        condition_of(moment, "cfg")
        cond = named["cond"]
        guided = affine(named["uncond"], cond, self.interval.scale(self.scale, moment.level))
        if not self.rescale:
            return guided
        form = self.rescale_form or cond.form
        return Prediction(cond.x, cond.level, form, rescaled(guided.get(form), cond.get(form), self.rescale))

    def measure(self, generated: Generated) -> dict[str, float]:
        """``saturation``: how far the samples lie from the middle of their range."""
        return {"saturation": saturation(generated.samples)}
