"""Autoguidance: a worse version of the model shows what to move away from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lightrail.catalogue import import_target
from lightrail.errors import CompositionError, ConfigurationError
from lightrail.generation import Denoiser, Generated, Guidance, Level, Moment, NoisePath, Prediction, Sampler
from lightrail.traits import Traits
from lightrail_generation.guidance.affine import NoiseInterval, affine, check_scale
from lightrail_generation.guidance.judges import LoadRun, denoiser_of_run
from lightrail_generation.guidance.saturation import saturation

__all__ = ["Autoguidance", "on_path"]


def on_path(path: NoisePath, x: Tensor, level: Level) -> tuple[Tensor, Level]:
    """States and their level as they stand on another path: those with the same σ/α, so with the same data behind them.

    A level beyond the ends of the other path is taken for the nearest on it.

    Args:
        path: The other path.
        x: The states.
        level: Their level.

    Example:
        >>> from lightrail.generation import KarrasVE, LinearFlow
        >>> x, level = on_path(KarrasVE(), torch.ones(1), LinearFlow().level(0.5))
        >>> float(x), level.sigma
        (2.0, 1.0)
    """
    if isinstance(level.alpha, Tensor):
        lam = torch.as_tensor(level.lam).clamp(*_ends(path))
        there = path.levels(path.t_of_lam(lam).flatten(), lam.ndim)
    else:
        there = path.level(level.t)
        if (there.alpha, there.sigma) == (level.alpha, level.sigma):
            return x, there
        lowest, highest = _ends(path)
        there = path.level_at_lam(min(max(level.lam, lowest), highest))
    # The shares of data and noise change alike, α'/α = σ'/σ; past an end of the path the larger of the two counts.
    ratio = (there.alpha**2 + there.sigma**2) / (level.alpha**2 + level.sigma**2)
    return (x * ratio**0.5).to(x.dtype), there


def _ends(path: NoisePath) -> tuple[float, float]:
    """λ where a network on a path is asked first and last."""
    return path.level(path.t_max).lam, path.level(path.t_min).lam


class Autoguidance(Guidance):
    """Moves the prediction further away from that of a weaker model under the same condition.

    D = D_weak + w (D − D_weak)

    The weaker model makes the same mistakes, only more so: what separates the two points towards good samples, and does
    not narrow them to what a condition makes likely. Two evaluations, of which the weaker model's may be cheap.

    Args:
        run: The weaker model: a run that trained less, or a smaller network, on the same data (a folder, a checkpoint,
            or ``latest``), or
        weak: a :class:`Denoiser`, what makes one, or the dotted path of either.
        scale: w, at least 0; 1 is no guidance. 1.7 to 2.3 were best in the paper.
        rho_low: It acts at levels with rho_low < σ/α ≤ rho_high; at least 0.
        rho_high: The noisiest level, above ``rho_low``; ``None`` for all.
        load_run: Loads a run; supplied by the platform.

    Raises:
        ConfigurationError: An option is out of range, or neither or both of ``run`` and ``weak`` are given.
        CompositionError: The weaker model's samples are not like the model's: other sizes, units or classes.

    Deviations:
        The weaker model may have been trained on another noise path; it is then asked at the same σ/α.

    Example:
        >>> from lightrail.generation import GaussianMixture, sample
        >>> from lightrail_generation.samplers.ddim import DDIM
        >>> from lightrail_generation.time_grids.uniform import Uniform
        >>> mixture, sampler = GaussianMixture(), DDIM(steps=10)
        >>> guidance = Autoguidance(weak=GaussianMixture(variances=[0.5, 0.4, 0.7]))
        >>> guidance.prepare(mixture, sampler)
        >>> sample(mixture, sampler, sampler.grid(mixture.path, Uniform()), range(2), guidance=[guidance]).evaluations
        20

    Reference:
        T. Karras, M. Aittala, T. Kynkäänniemi, J. Lehtinen, T. Aila and S. Laine (2024), Guiding a Diffusion Model with
        a Bad Version of Itself, arXiv 2406.02507, equation 2 and section 4.
    """

    traits: ClassVar[Traits] = Traits(
        rule="D = D_weak + w (D − D_weak)",
        paper="T. Karras, M. Aittala, T. Kynkäänniemi, J. Lehtinen, T. Aila, S. Laine, 2024, Guiding a Diffusion Model "
        "with a Bad Version of Itself, arXiv 2406.02507",
        example={"weak": "lightrail.generation.GaussianMixture"},
    )
    asks = ("weak",)

    def __init__(
        self,
        run: str | None = None,
        weak: str | Denoiser | Callable[[], Denoiser] | None = None,
        scale: float = 2.0,
        rho_low: float = 0.0,
        rho_high: float | None = None,
        load_run: LoadRun | None = None,
    ) -> None:
        if (run is None) == (weak is None):
            raise ConfigurationError(
                "there is no weaker model" if run is None else "it is not clear which the weaker model is",
                found=f"run={run}, weak={weak}",
                allowed="one of the two",
                remedy="Set guidance.autoguidance.run=FOLDER to a run that trained less or a smaller network.",
            )
        check_scale(scale)
        self.scale = scale
        self.interval = NoiseInterval(rho_low, rho_high)
        self.weak = denoiser_of_run(run, load_run) if run is not None else _denoiser(weak)

    def prepare(self, denoiser: Denoiser, sampler: Sampler) -> None:
        self.weak.to(denoiser.device)
        said = [_said(each) for each in (denoiser, self.weak)]
        if said[0] != said[1] or not _have_the_same_units(denoiser, self.weak):
            raise CompositionError(
                "the weaker model's samples are not like those of the model",
                found=f"the model has {said[0]}, the weaker one {said[1]}"
                + (", in other units" if said[0] == said[1] else ""),
                allowed="two models of the same data and condition",
                remedy="Name a run on the same data that trained less, or a smaller network.",
            )

    def is_active(self, moment: Moment) -> bool:
        return self.scale != 1 and self.interval.meets(moment.level)

    def evaluate(self, name: str, moment: Moment) -> Prediction:
        x, level = on_path(self.weak.path, moment.x, moment.level)
        data = self.weak.predict(x.to(self.weak.dtype), level, moment.condition).data
        return Prediction(moment.x, moment.level, "data", data.to(moment.x.dtype))

    def mix(self, named: Mapping[str, Prediction], moment: Moment) -> Prediction:
        cond = named["cond"]
        # The two answer in forms of their own; the data are what both are about.
        data = Prediction(cond.x, cond.level, "data", cond.data)
        return affine(named["weak"], data, self.interval.scale(self.scale, moment.level))

    def measure(self, generated: Generated) -> dict[str, float]:
        """``saturation``: how far the samples lie from the middle of their range."""
        return {"saturation": saturation(generated.samples)}


def _denoiser(weak: object) -> Denoiser:
    found = import_target(weak) if isinstance(weak, str) else weak
    made = found() if not isinstance(found, Denoiser) and callable(found) else found
    if not isinstance(made, Denoiser):
        raise ConfigurationError(
            "the weaker model is not one that can be asked",
            found=f"weak={weak!r}",
            allowed="a lightrail.Denoiser, what makes one, or the dotted path of either",
            remedy="Set weak to such a path, or run=FOLDER to a run.",
        )
    return made


def _said(denoiser: Denoiser) -> str:
    return f"states of shape {tuple(denoiser.shape)} and {denoiser.classes} classes"


@torch.no_grad()
def _have_the_same_units(one: Denoiser, other: Denoiser) -> bool:
    for value in (0.0, 1.0):
        samples = [
            each.decode(torch.full((1, *each.shape), value, dtype=each.dtype, device=each.device)).float()
            for each in (one, other)
        ]
        if samples[0].shape != samples[1].shape or not torch.allclose(*samples, rtol=1e-2, atol=1e-2):
            return False
    return True
