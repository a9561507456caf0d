"""A prediction: what a network says of a noisy state, in whichever of five forms is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightrail.generation.noise_path import Level
from lightrail.options import one_of

__all__ = ["FORMS", "Prediction", "mapped_level", "weights_of"]

FORMS = ("data", "noise", "velocity", "flow", "score")


def weights_of(form: str, level: Level) -> tuple[Any, Any]:
    """The (a, b) with which a form is a x0 + b z.

    ``data`` is x0, ``noise`` z, ``velocity`` α z − σ x0, ``flow`` dx/dt = (dα/dt) x0 + (dσ/dt) z along a path with x0
    and z fixed, ``score`` ∇ log p = −z/σ.
    """
    if form == "data":
        return 1.0, 0.0
    if form == "noise":
        return 0.0, 1.0
    if form == "velocity":
        return -level.sigma, level.alpha
    if form == "flow":
        return level.alpha_rate, level.sigma_rate
    return 0.0, -1 / level.sigma


class Prediction:
    """What a network says at one state: any form, converted when it is asked for and kept.

    With x = α x0 + σ z and a network's output y = a x0 + b z, for det = α b − σ a:
    x0 = (b x − σ y)/det and z = (α y − a x)/det. The factors are worked out in double precision.

    Args:
        x: The state ``[B, …]``.
        level: Its level of noise.
        form: What ``value`` is: data, noise, velocity, flow or score.
        value: ``[B, …]``.

    Example:
        >>> from lightrail.generation.noise_path import LinearFlow
        >>> x, data = torch.tensor([[0.5]]), torch.tensor([[0.0]])
        >>> there = Prediction(x, LinearFlow().level(0.5), "data", data)
        >>> float(there.noise), float(there.flow)
        (1.0, 1.0)
    """

    __slots__ = ("form", "known", "level", "x")

    def __init__(self, x: Tensor, level: Level, form: str, value: Tensor) -> None:
        one_of(FORMS, form=form)
        self.x = x
        self.level = level
        self.form = form
        self.known: dict[str, Tensor] = {form: value}

    def get(self, form: str) -> Tensor:
        """The prediction in one form, ``[B, …]``."""
        if form not in self.known:
            self.known[form] = self._converted(form)
        return self.known[form]

    def _converted(self, form: str) -> Tensor:
        level = self.level
        source = next((each for each in ("data", "noise") if each in self.known), self.form)
        a, b = weights_of(source, level)
        c, d = weights_of(form, level)
        # c x0 + d z in x and y.
        determinant = level.alpha * b - level.sigma * a
        of_x = (c * b - d * a) / determinant
        of_y = (d * level.alpha - c * level.sigma) / determinant
        return _combined(of_x, self.x, of_y, self.known[source])

    @property
    def data(self) -> Tensor:
        """The data that the network sees behind the state, D."""
        return self.get("data")

    @property
    def noise(self) -> Tensor:
        """The noise, ε."""
        return self.get("noise")

    @property
    def velocity(self) -> Tensor:
        """v = α ε − σ D."""
        return self.get("velocity")

    @property
    def flow(self) -> Tensor:
        """dx/dt of the probability flow."""
        return self.get("flow")

    @property
    def score(self) -> Tensor:
        """∇ log p(x) = −ε/σ."""
        return self.get("score")

    def with_data(self, data: Tensor) -> Prediction:
        """The prediction with other data; the noise follows, as the state is what it is.

        Args:
            data: ``[B, …]``.
        """
        return Prediction(self.x, self.level, "data", data)

    def map(self, function: Callable[[Tensor], Tensor]) -> Prediction:
        """The prediction with a function applied to each of its tensors; how samples are chosen or moved."""
        mapped = object.__new__(Prediction)
        mapped.x, mapped.form = function(self.x), self.form
        mapped.level = mapped_level(self.level, function)
        mapped.known = {form: function(value) for form, value in self.known.items()}
        return mapped


def mapped_level(level: Level, function: Callable[[Tensor], Tensor]) -> Level:
    """A level with a function applied to its tensors, where it is one a sample."""
    if not isinstance(level.alpha, Tensor):
        return level
    values = (level.t, level.alpha, level.sigma, level.alpha_rate, level.sigma_rate)
    return Level(*(function(value) for value in values))  # type: ignore[arg-type]


def _combined(of_x: Any, x: Tensor, of_y: Any, y: Tensor) -> Tensor:
    """of_x x + of_y y in the state's type; the factors are numbers or one a sample."""
    if isinstance(of_x, Tensor) or isinstance(of_y, Tensor):
        wide = torch.promote_types(x.dtype, torch.float32)
        return (of_x * x.double() + of_y * y.double()).to(wide).to(x.dtype)
    if of_x == 0:
        return y * of_y
    return (x * of_x).add_(y, alpha=of_y)  # in place of a fresh product, so that a gradient through it stays right
