"""Denoising diffusion."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from lightrail.errors import ConfigurationError
from lightrail.generation import CosineVP, KarrasVE, Level, LinearVP, NoisePath
from lightrail.options import one_of, positive
from lightrail.traits import Traits
from lightrail_generation.tasks.denoising_regression import DenoisingRegression
from lightrail_generation.tasks.time_sampling import TimeSampling
from lightrail_generation.tasks.weightings import (
    WEIGHTINGS,
    data_weight,
    edm_preconditioning,
    error_factor,
    output_scale,
    tensor_of,
)
from lightrail_generation.tasks.zero_terminal_snr import ZeroTerminalSNR

__all__ = ["Diffusion"]

SCHEDULES: dict[str, type[NoisePath]] = {"linear": LinearVP, "cosine": CosineVP, "edm": KarrasVE}
PREDICTIONS = ("noise", "data", "velocity", "score", "edm")


class Diffusion(DenoisingRegression):
    """Learns to undo the noise of x = α x0 + σ z: from the state and its time, the data, the noise or a mixture.

    loss = E_t w(t) ‖x0 − D(x, t)‖²; in the noise it is w SNR⁻¹ ‖z − ε‖², in the velocity w σ² ‖v − v̂‖² (where
    α² + σ² = 1).

    The network sees x/√(α² + σ²), which is x itself where α² + σ² = 1, and its output is of order one: a score is
    output/σ, a velocity √(α² + σ²) output. With ``edm``, D = c_skip x + c_out output, and the network sees c_in x.

    Args:
        model: ``model(x, time, label)``, see :class:`DenoisingTask`.
        prediction: ``noise``, ``data``, ``velocity``, ``score`` or ``edm`` (Karras's preconditioning); by default
            ``edm`` on the ``edm`` schedule, else ``velocity``.
        weighting: ``uniform``: the error of the network's output as it is, which under ``edm`` is Karras's own weight.
            As weights of ‖x0 − D‖², ``snr``: α²/σ²; ``min_snr``: min(SNR, γ); ``elbo``: −½ dSNR/dt over the density of
            t; ``edm``: SNR + 1/σ_data².
        schedule: ``linear`` (β from 0.1 to 20), ``cosine`` or ``edm`` (α = 1).
        time_sampling: ``uniform`` in t, ``lognormal`` (of σ/α) or ``logit_normal`` (of t); by default ``lognormal`` on
            the ``edm`` schedule, else ``uniform``.
        time_mean: Of the normal distribution behind the last two.
        time_std: Its standard deviation, above 0.
        min_snr_gamma: γ, above 0.
        sigma_data: The root mean square of the states, above 0; ``None`` to measure it.
        zero_terminal_snr: Whether α is rescaled so that it is exactly 0 at the noisy end.
        label_dropout: The share of labels that the network is not told, in [0, 1).
        center: Subtracted from the data; ``None`` to measure it.
        scale: What they are divided by; ``None`` to measure it.

    Raises:
        ConfigurationError: An option is out of range; ``zero_terminal_snr`` with ``noise`` or ``score``, from which
            the data cannot be had at α = 0, or on the ``edm`` schedule, where α is 1.

    Deviations:
        Time is continuous. σ_data is the root mean square about 0 rather than the standard deviation, so that states
        and targets have mean square 1 whatever their mean.

    Example:
        >>> Diffusion(nn.Identity(), prediction="noise", weighting="min_snr").form
        'noise'

    Reference:
        J. Ho, A. Jain and P. Abbeel (2020), Denoising Diffusion Probabilistic Models, arXiv 2006.11239, equation 14.
        T. Salimans and J. Ho (2022), Progressive Distillation for Fast Sampling of Diffusion Models, arXiv 2202.00512,
        section 4. T. Karras, M. Aittala, T. Aila and S. Laine (2022), arXiv 2206.00364, table 1. S. Lin, B. Liu, J. Li
        and X. Yang (2024), Common Diffusion Noise Schedules and Sample Steps are Flawed, arXiv 2305.08891.
    """

    traits: ClassVar[Traits] = Traits(
        rule="loss = E w(t) ‖x0 − D(α x0 + σ z, t)‖²",
        paper="J. Ho, A. Jain, P. Abbeel, 2020, Denoising Diffusion Probabilistic Models, arXiv 2006.11239",
    )

    def __init__(
        self,
        model: nn.Module,
        prediction: str | None = None,
        weighting: str = "uniform",
        schedule: str = "cosine",
        time_sampling: str | None = None,
        time_mean: float | None = None,
        time_std: float | None = None,
        min_snr_gamma: float = 5.0,
        sigma_data: float | None = None,
        zero_terminal_snr: bool = False,
        label_dropout: float = 0.1,
        center: float | None = None,
        scale: float | None = None,
    ) -> None:
        one_of(SCHEDULES, schedule=schedule)
        one_of(WEIGHTINGS, weighting=weighting)
        positive(min_snr_gamma=min_snr_gamma)
        prediction = prediction or ("edm" if schedule == "edm" else "velocity")
        one_of(PREDICTIONS, prediction=prediction)
        super().__init__(model, label_dropout, center, scale, sigma_data)
        if zero_terminal_snr:
            _check_terminal(schedule, prediction)
        self.prediction_of_network = prediction
        self.weighting = weighting
        self.min_snr_gamma = min_snr_gamma
        path = SCHEDULES[schedule]()
        self.path = ZeroTerminalSNR(path) if zero_terminal_snr else path
        self.form = "data" if prediction == "edm" else prediction
        kind = time_sampling or ("lognormal" if schedule == "edm" else "uniform")
        self.time_sampling = TimeSampling(self.path, kind, self.path.t_min, self.path.t_max, time_mean, time_std)

    def answer(self, x: Tensor, level: Level, time: Tensor, label: Tensor | None) -> Tensor:
        if self.prediction_of_network == "edm":
            skip, out, scale = (tensor_of(c, x) for c in edm_preconditioning(level, self.sigma_data.double()))
            return skip * x + out * self.network(scale * x, time, label)
        size = (level.alpha**2 + level.sigma**2) ** 0.5
        output = self.network(x / tensor_of(size, x), time, label)
        return tensor_of(output_scale(self.form, level), x) * output

    def weight(self, level: Level, t: Tensor) -> Any:
        sigma_data = self.sigma_data.double()
        if self.weighting == "uniform":
            if self.prediction_of_network == "edm":
                return edm_preconditioning(level, sigma_data)[1] ** -2
            return output_scale(self.form, level) ** -2
        of_data = data_weight(self.weighting, level, gamma=self.min_snr_gamma, sigma_data=sigma_data)
        if self.weighting == "elbo":
            of_data = of_data / self.time_sampling.density(t).view_as(of_data)
        return of_data * error_factor(self.form, level)


def _check_terminal(schedule: str, prediction: str) -> None:
    if schedule == "edm":
        raise ConfigurationError(
            "the edm schedule has no end without data",
            found="zero_terminal_snr=true, schedule=edm, where α is 1",
            allowed="schedule=linear or schedule=cosine",
            remedy="Leave zero_terminal_snr out.",
        )
    if prediction in ("noise", "score"):
        raise ConfigurationError(
            f"the data cannot be had from the {prediction} where there is no signal",
            found=f"zero_terminal_snr=true, prediction={prediction}",
            allowed="prediction=data, velocity or edm",
            remedy="Set prediction=velocity.",
        )
