"""Stochastic interpolants."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightrail.errors import CompositionError
from lightrail.generation import Level, LinearFlow, Noise, NoisePath, Prediction
from lightrail.options import one_of
from lightrail.traits import Traits
from lightrail_generation.tasks.data_range import inputs_of
from lightrail_generation.tasks.denoising import DenoisingTask, Example
from lightrail_generation.tasks.draws import Draws
from lightrail_generation.tasks.evaluating import evaluating
from lightrail_generation.tasks.time_sampling import TimeSampling
from lightrail_generation.tasks.weightings import tensor_of

__all__ = ["GAMMAS", "InterpolantPath", "StochasticInterpolant"]

GAMMAS = ("zero", "sqrt", "quadratic", "sin2")
INTERPOLANTS = ("linear", "trigonometric")
SOURCES = ("gaussian", "paired")
# Where γ ~ √t, its derivative has no bound at the two ends.
_MARGIN = 1e-3
# Where γ is less, dividing by it would blow up what η is wrong by.
_LEAST_GAMMA = 1e-2


def _gamma_square(kind: str, t: Tensor) -> tuple[Tensor, Tensor]:
    """γ² and its derivative."""
    both = t * (1 - t)
    if kind == "sqrt":
        return both, 1 - 2 * t
    if kind == "quadratic":
        return both**2, 2 * both * (1 - 2 * t)
    if kind == "sin2":
        sine, cosine = (math.pi * t).sin(), (math.pi * t).cos()
        return sine**4, 4 * math.pi * sine**3 * cosine
    return torch.zeros_like(t), torch.zeros_like(t)


class InterpolantPath(NoisePath):
    """x = a x0 + b y + γ z with y and z standard normal, which in law is a x0 + √(b² + γ²) times one normal number.

    Args:
        interpolant: ``linear``: a = 1 − t, b = t; ``trigonometric``: a = cos(πt/2), b = sin(πt/2).
        gamma: ``zero``, ``sqrt``: √(t(1 − t)), ``quadratic``: t(1 − t), ``sin2``: sin²(πt).
    """

    def __init__(self, interpolant: str = "linear", gamma: str = "zero") -> None:
        one_of(INTERPOLANTS, interpolant=interpolant)
        one_of(GAMMAS, gamma=gamma)
        self.interpolant = interpolant
        self.kind = gamma

    def gamma(self, t: Tensor) -> Tensor:
        """γ(t)."""
        return _gamma_square(self.kind, t)[0].clamp(min=0).sqrt()

    def gamma_rate(self, t: Tensor) -> Tensor:
        """dγ/dt."""
        square, rate = _gamma_square(self.kind, t)
        return rate / (2 * square.sqrt()) if self.kind != "zero" else rate

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t if self.interpolant == "linear" else (math.pi / 2 * t).cos()

    def alpha_rate(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t) if self.interpolant == "linear" else -math.pi / 2 * (math.pi / 2 * t).sin()

    def beta(self, t: Tensor) -> Tensor:
        """b(t), the share of the source."""
        return t if self.interpolant == "linear" else (math.pi / 2 * t).sin()

    def beta_rate(self, t: Tensor) -> Tensor:
        """db/dt."""
        return torch.ones_like(t) if self.interpolant == "linear" else math.pi / 2 * (math.pi / 2 * t).cos()

    def sigma(self, t: Tensor) -> Tensor:
        return (self.beta(t) ** 2 + _gamma_square(self.kind, t)[0]).clamp(min=0).sqrt()

    def sigma_rate(self, t: Tensor) -> Tensor:
        return (self.beta(t) * self.beta_rate(t) + _gamma_square(self.kind, t)[1] / 2) / self.sigma(t)

    def starting_scale(self, level: Level) -> float:
        return 1.0 if level.t >= self.t_max else level.sigma


class _InterpolantPrediction(Prediction):
    """A flow whose score is another network's, asked for when it is needed."""

    __slots__ = ("_ask",)

    def __init__(self, x: Tensor, level: Level, flow: Tensor, ask: Callable[[], Tensor]) -> None:
        super().__init__(x, level, "flow", flow)
        self._ask = ask

    def _converted(self, form: str) -> Tensor:
        return self._ask() if form == "score" else super()._converted(form)

    def map(self, function: Callable[[Tensor], Tensor]) -> Prediction:
        _ = self.score  # of these states, which the mapped ones may not be
        return super().map(function)


class StochasticInterpolant(DenoisingTask):
    """Learns the velocity of an interpolant between data and source, and the noise that blurs it, which is the score.

    x = a x0 + b y + γ z, loss = E [½‖u‖² − u·(a' x0 + b' y + γ' z)] + E [½‖η‖² − η·z], u and η of (x, t)

    Time runs from the data, t = 0, to the source y, t = 1. The velocity u is dx/dt of a deterministic sampler and
    −η/γ the score, with which ``si_sde`` adds as much noise as is wanted. u and η are two networks of one
    architecture; without γ there is the first alone, and u is that of flow matching.

    Args:
        model: ``model(x, time, label)``, see :class:`DenoisingTask`; η is a copy of it.
        gamma: ``zero``, ``sqrt``: √(t(1 − t)), ``quadratic``: t(1 − t), or ``sin2``: sin²(πt).
        interpolant: ``linear``: a = 1 − t, b = t; ``trigonometric``: a = cos(πt/2), b = sin(πt/2).
        antithetic: Whether each z is taken with −z, which removes what grows like 1/γ from the loss; two evaluations.
        source: ``gaussian``: y is standard normal; ``paired``: y is the second tensor of a batch (x0, y), in the
            data's units.
        label_dropout: The share of labels that the network is not told, in [0, 1).
        center: Subtracted from the data; ``None`` to measure it.
        scale: What they are divided by; ``None`` to measure it.

    Raises:
        ConfigurationError: An option is out of range.

    Deviations:
        The paper runs time from the source to the data. With ``sqrt``, times are drawn from [0.001, 0.999]. Where
        γ < 0.01 the score is that of the flow, which from a Gaussian source it would be everywhere if both were learned
        perfectly; from a ``paired`` one it is −η/0.01 there. From a ``paired`` source nothing can be generated out of
        noise: give ``sample`` its start.

    Example:
        >>> StochasticInterpolant(nn.Identity(), gamma="zero").denoiser().sampler_name
        'flow_heun'

    Reference:
        M. S. Albergo, N. M. Boffi and E. Vanden-Eijnden (2023), Stochastic Interpolants: A Unifying Framework for Flows
        and Diffusions, arXiv 2303.08797, sections 2.2 and 6.1.
    """

    traits: ClassVar[Traits] = Traits(
        rule="loss = E [½‖u‖² − u·(a' x0 + b' y + γ' z)] + E [½‖η‖² − η·z], x = a x0 + b y + γ z",
        paper="M. S. Albergo, N. M. Boffi, E. Vanden-Eijnden, 2023, Stochastic Interpolants: A Unifying Framework for "
        "Flows and Diffusions, arXiv 2303.08797",
    )
    form = "flow"

    def __init__(
        self,
        model: nn.Module,
        gamma: str = "sqrt",
        interpolant: str = "linear",
        antithetic: bool = True,
        source: str = "gaussian",
        label_dropout: float = 0.1,
        center: float | None = None,
        scale: float | None = None,
    ) -> None:
        one_of(SOURCES, source=source)
        super().__init__(model, label_dropout, center, scale)
        self.blur = InterpolantPath(interpolant, gamma)
        self.noise_model = None if gamma == "zero" else copy.deepcopy(model)
        self.antithetic = antithetic
        self.source = source
        self.path = self.blur if source == "gaussian" else LinearFlow()
        margin = _MARGIN if gamma == "sqrt" else 0.0
        self.time_sampling = TimeSampling(self.path, "uniform", margin, 1 - margin)
        self.sampler_name = "flow_heun" if gamma == "zero" else "si_sde"
        if source == "paired":
            self.gives = ("flow",) if gamma == "zero" else ("flow", "score")

    def example(self, batch: Any, draws: Draws) -> Example:
        found = super().example(batch, draws)
        if self.source == "gaussian":
            return found
        other = batch[1] if isinstance(batch, list | tuple) and len(batch) > 1 else None
        if not isinstance(other, Tensor) or other.shape != found.x0.shape:
            raise CompositionError(
                "the batches bring no source for their data",
                found=f"a second tensor of shape {list(other.shape)}" if isinstance(other, Tensor) else "no second one",
                allowed=f"batches (x0, y) of one shape, here {list(found.x0.shape)}",
                remedy="Set task.source=gaussian, or give data that yield pairs.",
            )
        return Example(found.x0, found.label, found.shown, found.t, draws, self.states(inputs_of(other)))

    def losses(self, example: Example) -> Tensor:
        x0, y = example.x0, self.noise(example)
        z = None if self.noise_model is None else example.draws.normal(x0)
        t = example.t.view(-1, *[1] * (x0.dim() - 1))
        values = (self.blur.alpha(t), self.blur.beta(t), self.blur.gamma(t))
        rates = (self.blur.alpha_rate(t), self.blur.beta_rate(t), self.blur.gamma_rate(t))
        a, b, c = (tensor_of(value, x0) for value in values)
        a_rate, b_rate, c_rate = (tensor_of(rate, x0) for rate in rates)
        if z is None:
            return self._velocity_loss(a * x0 + b * y, a_rate * x0 + b_rate * y, example)
        total = x0.new_zeros(len(x0))
        signs = (1, -1) if self.antithetic else (1,)
        for sign in signs:
            x = a * x0 + b * y + sign * c * z
            rate = a_rate * x0 + b_rate * y + sign * c_rate * z
            noise = self.network(x, example.t, example.shown, self.noise_model)
            total = total + self._velocity_loss(x, rate, example) + _quadratic(noise, sign * z)
        return total / len(signs)

    def _velocity_loss(self, x: Tensor, rate: Tensor, example: Example) -> Tensor:
        return _quadratic(self.network(x, example.t, example.shown), rate)

    def answer(self, x: Tensor, level: Level, time: Tensor, label: Tensor | None) -> Tensor:
        return self.network(x, time, label)

    def prediction(self, x: Tensor, level: Level, time: Tensor, label: Tensor | None) -> Prediction:
        flow = self.answer(x, level, time, label).to(x.dtype)
        gamma = self.blur.gamma(torch.as_tensor(level.t, dtype=torch.float64))
        is_clear = self.source == "gaussian" and bool((gamma < _LEAST_GAMMA).any())
        if self.noise_model is None or is_clear:
            return Prediction(x, level, "flow", flow)
        scale = tensor_of(-1 / gamma.clamp(min=_LEAST_GAMMA), x)

        def score() -> Tensor:
            with evaluating(self):  # asked for later, when the mode may be another
                return scale * self.network(x, time, label, self.noise_model).to(x.dtype)

        return _InterpolantPrediction(x, level, flow, score)

    def start(self, noise: Noise, level: Level) -> Tensor:
        if self.source == "gaussian":
            return super().start(noise, level)
        raise CompositionError(
            "this model starts from data of its source, not from noise",
            found="task.source=paired",
            allowed="states to start from: lightrail.generation.sample(…, start=states)",
            remedy="Give the start, or train with task.source=gaussian.",
        )


def _quadratic(answer: Tensor, target: Tensor) -> Tensor:
    """½‖answer‖² − answer · target, averaged over each sample, ``[B]``."""
    return (0.5 * answer.square() - answer * target).flatten(1).mean(1)
