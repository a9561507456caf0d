"""What guidance by two predictions shares: the affine combination, the levels it acts at, what it needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.generation import Condition, Level, Moment, Prediction
from lightrail.options import non_negative

__all__ = ["NoiseInterval", "affine", "check_scale", "condition_of"]


def affine(reference: Prediction, cond: Prediction, w: float | Tensor) -> Prediction:
    """reference + w (cond − reference), which is the same in every form of a prediction.

    It is worked out in the form of ``cond``, the network's own, so that nothing is converted.

    Args:
        reference: What is moved away from.
        cond: What is moved towards; the result is of its state.
        w: 1 for ``cond`` itself; a number, or one a sample, ``[B, 1, …]``.

    Example:
        >>> from lightrail.generation import LinearFlow
        >>> x, level = torch.zeros(1, 1), LinearFlow().level(0.5)
        >>> away, to = (Prediction(x, level, "data", torch.full((1, 1), value)) for value in (1.0, 2.0))
        >>> float(affine(away, to, 3.0).data)
        4.0
    """
    value = cond.get(cond.form)
    weight = w.to(value.dtype) if isinstance(w, Tensor) else w
    return Prediction(cond.x, cond.level, cond.form, torch.lerp(reference.get(cond.form), value, weight))


@dataclass(frozen=True)
class NoiseInterval:
    """The levels at which guidance acts: low < ρ ≤ high, with ρ = σ/α the noise of x/α, on any path.

    Args:
        low: At least 0.
        high: Above ``low``; ``None`` for no end.

    Raises:
        ConfigurationError: No level lies between them.
    """

    low: float = 0.0
    high: float | None = None

    def __post_init__(self) -> None:
        non_negative(rho_low=self.low)
        if self.high is not None and not self.high > self.low:
            raise ConfigurationError(
                "no level of noise lies where guidance is to act",
                found=f"rho_low={self.low}, rho_high={self.high}",
                allowed="rho_low below rho_high",
                remedy="Set rho_high above rho_low, or to null for no end.",
            )

    def meets(self, level: Level) -> bool:
        """Whether the level of any sample lies inside."""
        inside: Any = self._inside(level)
        return bool(inside.any()) if isinstance(inside, Tensor) else inside

    def scale(self, w: float, level: Level) -> float | Tensor:
        """w inside, and 1 outside: a number, or one a sample where each has its own level."""
        inside: Any = self._inside(level)
        return 1 + (w - 1) * inside.double() if isinstance(inside, Tensor) else w if inside else 1.0

    def _inside(self, level: Level) -> Any:
        rho, high = level.rho, math.inf if self.high is None else self.high
        return (rho > self.low) & (rho <= high) if isinstance(rho, Tensor) else self.low < rho <= high


def check_scale(scale: float) -> None:
    """A scale is a finite number of at least 0.

    Raises:
        ConfigurationError: It is not.
    """
    non_negative(scale=scale)


def condition_of(moment: Moment, name: str) -> Condition:
    """What the samples are steered by.

    Args:
        moment: Where.
        name: The guidance that needs it.

    Raises:
        CompositionError: They are steered by nothing.
    """
    if moment.condition is None:
        raise CompositionError(
            f"{name} compares what the model says with and without a condition, and there is none",
            found="samples of no class and no prompt",
            allowed="a model that knows classes or reads text",
            remedy="Set generate.label or generate.prompt, or leave guidance out.",
        )
    return moment.condition
