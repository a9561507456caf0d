"""PFGM++: diffusion with the heavy-tailed noise of an electric field in more dimensions."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from lightrail.generation import Level, Noise
from lightrail.options import positive
from lightrail.traits import Traits
from lightrail_generation.tasks.denoising import Example
from lightrail_generation.tasks.diffusion import Diffusion

__all__ = ["PFGMPP", "field_noise"]

# The farthest draws, R beyond √999 r, as the published code cuts them off; they matter for small D only.
_MOST_RATIO = 999.0
_EDGE = 1e-7


def field_noise(g: Tensor, u: Tensor, augmented: float) -> Tensor:
    """The noise of unit σ, ``[B, …]``: R û with R = √D √(B/(1 − B)), B ~ Beta(N/2, D/2), û uniform on the sphere.

    B/(1 − B) is the ratio of two χ² numbers, of N and of D degrees of freedom, and g = ‖g‖ û brings the first: the
    noise is g √(D/χ²_D), a multivariate t distribution that tends to the normal one as D grows.

    Args:
        g: Standard normal numbers ``[B, …]``, N a sample.
        u: Numbers in [0, 1), ``[B]``, that decide χ²_D.
        augmented: D, above 0.
    """
    from scipy.special import gammaincinv

    place = u.double().cpu().clamp(_EDGE, 1 - _EDGE).numpy()
    chi_square = 2 * torch.from_numpy(gammaincinv(augmented / 2, place)).to(g.device).clamp(min=1e-300)
    ratio = g.double().flatten(1).square().sum(1) / chi_square
    factor = (augmented / chi_square * (_MOST_RATIO / ratio).clamp(max=1)).sqrt()
    return g * factor.to(g.dtype).view(-1, *[1] * (g.dim() - 1))


class PFGMPP(Diffusion):
    """Learns to undo heavy-tailed noise, that of a Poisson flow in N + D dimensions, between PFGM and diffusion.

    x = x0 + R û, r = σ √D, R = r √(B/(1 − B)), B ~ Beta(N/2, D/2), û uniform on the sphere of the N dimensions of the
    data; the target x0, the preconditioning and the weight are EDM's, and so is the equation that samples. Sampling
    starts from the same noise at σ_max.

    Args:
        model: ``model(x, time, label)``, see :class:`DenoisingTask`.
        augmented_dimensions: D, above 0: 1 is PFGM, and towards infinity the noise is Gaussian, which is EDM.
        sigma_data: The root mean square of the states, above 0; ``None`` to measure it.
        time_mean: The mean of log σ.
        time_std: Its standard deviation, above 0.
        label_dropout: The share of labels that the network is not told, in [0, 1).
        center: Subtracted from the data; ``None`` to measure it.
        scale: What they are divided by; ``None`` to measure it.

    Raises:
        ConfigurationError: An option is out of range.

    Deviations:
        The published code also keeps B above 0.001, which here would change the noise where N is far below D. There
        is no score, and samplers that add noise are not right: their noise is Gaussian.

    Example:
        >>> PFGMPP(nn.Identity(), augmented_dimensions=128).gives
        ('data', 'noise', 'velocity', 'flow')

    Reference:
        Y. Xu, Z. Liu, Y. Tian, S. Tong, M. Tegmark and T. Jaakkola (2023), PFGM++: Unlocking the Potential of
        Physics-Inspired Generative Models, arXiv 2302.04265.
    """

    traits: ClassVar[Traits] = Traits(
        rule="loss = E λ(σ) ‖x0 − D(x0 + R û, σ)‖², R = σ √D √(B/(1 − B)), B ~ Beta(N/2, D/2)",
        paper="Y. Xu, Z. Liu, Y. Tian, S. Tong, M. Tegmark, T. Jaakkola, 2023, PFGM++: Unlocking the Potential of "
        "Physics-Inspired Generative Models, arXiv 2302.04265",
    )
    gives = ("data", "noise", "velocity", "flow")
    sampler_name = "edm_heun"

    def __init__(
        self,
        model: nn.Module,
        augmented_dimensions: float = 2048.0,
        sigma_data: float | None = None,
        time_mean: float = -1.2,
        time_std: float = 1.2,
        label_dropout: float = 0.1,
        center: float | None = None,
        scale: float | None = None,
    ) -> None:
        positive(augmented_dimensions=augmented_dimensions)
        super().__init__(
            model,
            schedule="edm",
            time_mean=time_mean,
            time_std=time_std,
            sigma_data=sigma_data,
            label_dropout=label_dropout,
            center=center,
            scale=scale,
        )
        self.augmented_dimensions = float(augmented_dimensions)

    def noise(self, example: Example) -> Tensor:
        u = example.draws.uniform(len(example.x0))
        return field_noise(example.draws.normal(example.x0), u, self.augmented_dimensions)

    def start(self, noise: Noise, level: Level) -> Tensor:
        return field_noise(noise.normal(-1), noise.uniform(-1), self.augmented_dimensions) * level.sigma
