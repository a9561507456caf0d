"""Local curvature smoothing with Stein's identity."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from lightrail.generation import Level
from lightrail.options import one_of, positive
from lightrail.traits import Traits
from lightrail_generation.tasks.denoising import DenoisingTask, Example
from lightrail_generation.tasks.diffusion import SCHEDULES
from lightrail_generation.tasks.time_sampling import TimeSampling
from lightrail_generation.tasks.weightings import tensor_of

__all__ = ["LCSS"]

NORMS = ("state", "perturbed")


class LCSS(DenoisingTask):
    """Learns the score with no denoising target: by Stein's identity more passes give the trace of its derivative.

    loss = E σ² [s(x')·(x' − x)/ς² + ½‖s(x)‖²],  x = α x0 + σ z,  x' = x + ς z',  ς = smoothing · σ

    The first term is E tr ∇s(x') exactly, so that the loss is that of implicit score matching with the curvature
    smoothed around x. The network's output is ε = −σ s.

    Args:
        model: ``model(x, time, label)``, see :class:`DenoisingTask`.
        norm_at: Where ‖s‖² is taken: ``state``: at x, so that the score of x is learned; ``perturbed``: at x', which
            makes it denoising score matching and learns the score of x'.
        smoothing: ς/σ, above 0; small values smooth less.
        antithetic: Whether each z' is taken with −z', for another pass.
        schedule: ``linear``, ``cosine`` or ``edm``.
        time_sampling: ``uniform``, ``lognormal`` or ``logit_normal``; by default ``lognormal`` on the ``edm`` schedule,
            else ``uniform``.
        label_dropout: The share of labels that the network is not told, in [0, 1).
        center: Subtracted from the data; ``None`` to measure it.
        scale: What they are divided by; ``None`` to measure it.

    Raises:
        ConfigurationError: An option is out of range.

    Deviations:
        The paper takes any process for x and has one ς; here x lies on a noise path, and ς grows with its noise. It
        takes one z' a sample; then the first term varies like 1/smoothing, and a smoothing large enough to bear that
        learns scores that are too large in the tails. With −z' beside it the term stays bounded. No code was published.

    Example:
        >>> LCSS(nn.Identity()).form
        'noise'

    Reference:
        G. Osada, M. Shing and T. Nishide (2024), Local Curvature Smoothing with Stein's Identity for Efficient Score
        Matching, arXiv 2412.03962.
    """

    traits: ClassVar[Traits] = Traits(
        rule="loss = E σ² [s(x')·(x' − x)/ς² + ½‖s(x)‖²], x' = x + ς z'",
        paper="G. Osada, M. Shing, T. Nishide, 2024, Local Curvature Smoothing with Stein's Identity for Efficient "
        "Score Matching, arXiv 2412.03962",
    )
    form = "noise"

    def __init__(
        self,
        model: nn.Module,
        norm_at: str = "state",
        smoothing: float = 0.1,
        antithetic: bool = True,
        schedule: str = "cosine",
        time_sampling: str | None = None,
        label_dropout: float = 0.1,
        center: float | None = None,
        scale: float | None = None,
    ) -> None:
        one_of(NORMS, norm_at=norm_at)
        one_of(SCHEDULES, schedule=schedule)
        positive(smoothing=smoothing)
        super().__init__(model, label_dropout, center, scale)
        self.norm_at = norm_at
        self.smoothing = float(smoothing)
        self.antithetic = antithetic
        self.path = SCHEDULES[schedule]()
        kind = time_sampling or ("lognormal" if schedule == "edm" else "uniform")
        self.time_sampling = TimeSampling(self.path, kind, self.path.t_min, self.path.t_max)

    def answer(self, x: Tensor, level: Level, time: Tensor, label: Tensor | None) -> Tensor:
        size = (level.alpha**2 + level.sigma**2) ** 0.5
        return self.network(x / tensor_of(size, x), time, label)

    def losses(self, example: Example) -> Tensor:
        x0 = example.x0
        level = self.path.levels(example.t, x0.dim())
        sigma = tensor_of(level.sigma, x0)
        x = tensor_of(level.alpha, x0) * x0 + sigma * self.noise(example)
        z = example.draws.normal(x0)
        signs = (1, -1) if self.antithetic else (1,)
        losses = x0.new_zeros(len(x0))
        for sign in signs:
            moved = sign * self.smoothing * z
            noise = self.answer(x + sigma * moved, level, example.t, example.shown)
            normed = 0.5 * noise.square() if self.norm_at == "perturbed" else 0.0
            losses = losses + (normed - noise * moved / self.smoothing**2).flatten(1).mean(1) / len(signs)
        if self.norm_at == "perturbed":
            return losses
        return losses + 0.5 * self.answer(x, level, example.t, example.shown).square().flatten(1).mean(1)
