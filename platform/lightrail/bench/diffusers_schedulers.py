"""The deterministic schedulers of diffusers, as peers of samplers."""

from __future__ import annotations

import copy
import functools
import importlib.util
import inspect
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightrail.generation import GaussianMixture

__all__ = ["Scheduler", "is_installed", "last_time", "schedulers"]

SPACINGS = ("linspace", "leading", "trailing")
SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
TABLE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def _settings(**choices: Sequence[Any]) -> list[dict[str, Any]]:
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def _without_noise(t: float) -> float:
    return 0.0


# For each class where its states live (x at whole times, x at a σ/α, or x/α) and the settings of the method.
_CLASSES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "DDIMScheduler": ("times", [{"clip_sample": False}]),
    "PNDMScheduler": ("times", _settings(skip_prk_steps=[True, False], set_alpha_to_one=[True])),
    "EulerDiscreteScheduler": ("scaled", [{}]),
    "HeunDiscreteScheduler": ("scaled", [{}]),
    "KDPM2DiscreteScheduler": ("scaled", [{}]),
    "LMSDiscreteScheduler": ("scaled", [{}]),
    "DPMSolverMultistepScheduler": (
        "sigmas",
        [*_settings(solver_order=[2], solver_type=["midpoint", "heun"]), *_settings(solver_order=[3])],
    ),
    "DPMSolverSinglestepScheduler": ("sigmas", _settings(solver_order=[2, 3], lower_order_final=[True])),
    "DEISMultistepScheduler": ("sigmas", _settings(solver_order=[1, 2, 3])),
    "UniPCMultistepScheduler": ("sigmas", _settings(solver_order=[2, 3], solver_type=["bh1", "bh2"])),
    "SASolverScheduler": (
        "sigmas",
        [{"predictor_order": order, "corrector_order": order, "tau_func": _without_noise} for order in (2, 3)],
    ),
}


@dataclass(frozen=True)
class Scheduler:
    """One scheduler with its settings.

    Args:
        name: Of the class.
        space: Where its states live: ``times``, ``sigmas`` or ``scaled``.
        options: Beside the table of noise levels.
        spacing: Of those, what spaces its times, in words.
    """

    name: str
    space: str
    options: Mapping[str, Any] = field(default_factory=dict)
    spacing: str = ""

    @property
    def label(self) -> str:
        """The settings of the method, and the spacing."""
        silent = ("clip_sample", "set_alpha_to_one", "lower_order_final", "timestep_spacing", "tau_func", *SIGMAS)
        told = [f"{key}={value}" for key, value in self.options.items() if key not in silent]
        return ", ".join([*told, *([self.spacing] if self.spacing else [])])

    @functools.cached_property
    def _fresh(self) -> Any:
        # Some take a second to be made.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return getattr(_diffusers(), self.name)(**TABLE, **self.options)

    def built(self, count: int) -> Any:
        """The scheduler, with its times set."""
        scheduler = copy.deepcopy(self._fresh)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler.set_timesteps(count)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        return scheduler

    def within(self, budget: int) -> Any:
        """Built with the most steps that ask the network at most ``budget`` times; ``None`` where none do."""
        # One evaluation a step, with one or nine beside them, or two a step but in the last.
        for count in sorted({budget, budget - 1, budget - 9, (budget + 1) // 2} - {0}, reverse=True):
            try:
                scheduler = self.built(count)
            except Exception:  # a number of steps that it cannot do
                continue
            if 0 < len(scheduler.timesteps) <= budget:
                return scheduler
        return None

    @torch.no_grad()
    def solved(self, scheduler: Any, mixture: GaussianMixture, start: Tensor) -> Tensor:
        """Where it ends.

        The network is asked at the very noise level that the scheduler computes with, in double precision.

        Args:
            scheduler: Built, and not used yet.
            mixture: On the path ``ddpm``.
            start: Standard normal, ``[B, …]``.
        """
        x = start * float(scheduler.init_noise_sigma)
        for index, t in enumerate(scheduler.timesteps):
            scheduler.scale_model_input(x, t)  # some keep count of it
            if self.space == "times":
                level = mixture.path.level(float(t))
            else:
                level = mixture.path.level_at_lam(-math.log(float(_sigma(scheduler, index))))
            state = x * level.alpha if self.space == "scaled" else x
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                x = scheduler.step(mixture.predict(state, level).noise, t, x).prev_sample
        return x


def last_time(scheduler: Any) -> float:
    """The time that it ends at: the data, or that of the table's least noise where it keeps that."""
    sigmas = getattr(scheduler, "sigmas", None)
    return 0.0 if sigmas is not None and float(sigmas[-1]) > 0 else -1.0


def _sigma(scheduler: Any, index: int) -> Tensor:
    between = getattr(scheduler, "sigmas_interpol", None)
    return scheduler.sigmas[index] if between is None or index % 2 == 0 else between[index]


@functools.cache
def _diffusers() -> Any:
    import diffusers
    from diffusers.utils import logging

    logging.set_verbosity_error()
    return diffusers


def is_installed() -> bool:
    """Whether there is diffusers to compare with."""
    return importlib.util.find_spec("diffusers") is not None


def schedulers(names: Sequence[str] = ()) -> Iterator[Scheduler]:
    """Every scheduler, with each of its settings and each of its spacings.

    Args:
        names: Some classes; all where none is given.
    """
    for name, (space, settings) in _CLASSES.items():
        if (names and name not in names) or not hasattr(_diffusers(), name):
            continue
        accepted = inspect.signature(getattr(_diffusers(), name).__init__).parameters
        for options, (spacing, spaced) in itertools.product(settings, _spacings(accepted)):
            yield Scheduler(name, space, {**options, **spaced}, spacing)


def _spacings(accepted: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    spacings = SPACINGS if "timestep_spacing" in accepted else ("",)
    found = []
    for spacing, sigmas in itertools.product(spacings, ("", *SIGMAS)):
        if sigmas and sigmas not in accepted:
            continue
        options = {**({"timestep_spacing": spacing} if spacing else {}), **({sigmas: True} if sigmas else {})}
        words = [spacing, sigmas.removeprefix("use_").replace("_", " ")]
        found.append((" ".join(word for word in words if word), options))
    return found
