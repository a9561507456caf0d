"""Thresholding: the predicted data are kept within their range."""

from __future__ import annotations

from typing import ClassVar

from lightrail.errors import CompositionError
from lightrail.generation import Denoiser, Generated, Guidance, Moment, Prediction, Sampler
from lightrail.generation.observing import sample_shape
from lightrail.options import between, one_of, positive
from lightrail.traits import Traits
from lightrail_generation.guidance.saturation import saturation
from lightrail_generation.samplers.dpm_solver_pp import thresholded

__all__ = ["Thresholding"]


class Thresholding(Guidance):
    """Clamps the predicted data, by a fixed limit or by each sample's own.

    static: D ← clamp(D, −l, l);  dynamic: D ← l clamp(D, −s, s)/s,  s = max(l, quantile of |D|)

    What is predicted of the noise follows the data. No evaluation is added. It acts on what guidance before and behind
    it in the chain has mixed.

    Args:
        kind: ``dynamic`` clamps a sample at a quantile of its own magnitudes and divides by it, which keeps pixels from
            piling up at the ends of the range; ``static`` clamps all alike.
        quantile: Of ``dynamic``, in (0, 1].
        limit: l, above 0: the end of the range of states, 1 for images.

    Raises:
        ConfigurationError: An option is out of range.
        CompositionError: The states are latents, which have no such range.

    Deviations:
        With ``limit`` other than 1 the rule is applied to D/l.

    Example:
        >>> import torch
        >>> from lightrail.generation import GaussianMixture, sample
        >>> from lightrail_generation.samplers.ddim import DDIM
        >>> from lightrail_generation.time_grids.uniform import Uniform
        >>> mixture, sampler = GaussianMixture(), DDIM(steps=10)
        >>> grid, clamp = sampler.grid(mixture.path, Uniform()), Thresholding("static", limit=0.5)
        >>> float(sample(mixture, sampler, grid, range(8), guidance=[clamp]).x.abs().max())
        0.5

    Reference:
        C. Saharia, W. Chan, S. Saxena, L. Li, J. Whang, E. Denton and others (2022), Photorealistic Text-to-Image
        Diffusion Models with Deep Language Understanding, arXiv 2205.11487, section 2.3.
    """

    traits: ClassVar[Traits] = Traits(
        rule="D ← l clamp(D, −s, s)/s, s = max(l, quantile of |D|)",
        paper="C. Saharia, W. Chan, S. Saxena and others, 2022, Photorealistic Text-to-Image Diffusion Models with "
        "Deep Language Understanding, arXiv 2205.11487",
        example={"kind": "dynamic"},
    )

    def __init__(self, kind: str = "dynamic", quantile: float = 0.995, limit: float = 1.0) -> None:
        one_of(("dynamic", "static"), kind=kind)
        between(0, 1, closed="right", quantile=quantile)
        positive(limit=limit)
        self.kind = kind
        self.quantile = quantile
        self.limit = limit

    def prepare(self, denoiser: Denoiser, sampler: Sampler) -> None:
        shape = sample_shape(denoiser)
        if shape != tuple(denoiser.shape):
            raise CompositionError(
                "thresholding clamps pixels, and the states of this model are latents",
                found=f"states of shape {tuple(denoiser.shape)} for samples of shape {shape}",
                allowed="a model whose states are the samples themselves",
                remedy="Leave thresholding out; guidance=[apg] keeps samples from saturating in any space.",
            )

    def correct(self, prediction: Prediction, moment: Moment) -> Prediction:
        data = prediction.data
        if self.kind == "static":
            return prediction.with_data(data.clamp(-self.limit, self.limit))
        if self.limit == 1:
            return thresholded(prediction, self.quantile)
        return prediction.with_data(
            self.limit * thresholded(prediction.with_data(data / self.limit), self.quantile).data
        )

    def measure(self, generated: Generated) -> dict[str, float]:
        """``saturation``: how far the samples lie from the middle of their range."""
        return {"saturation": saturation(generated.samples)}
