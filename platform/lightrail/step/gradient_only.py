"""torch's own closure as a :class:`Closure`: what a method gets in a loop that has no more to give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightrail.errors import ClosureError
from lightrail.step.closure import QUESTIONS, Closure

__all__ = ["GradientOnly"]


class GradientOnly(Closure):
    """torch's own closure, or none at all: one gradient, and a refusal by name of anything more.

    Args:
        closure: torch's closure; ``None`` where the gradient already stands in ``.grad``.
        params: The parameters that are being optimized.
        reason: Why there is no more to ask, for the error.
    """

    def __init__(
        self,
        closure: Callable[[], Any] | None,
        params: Sequence[Tensor],
        reason: str = "the loop hands over torch's own closure",
    ) -> None:
        super().__init__(lambda: torch.zeros(()), params)
        self._closure = closure
        self._reason = reason
        self._loss: Any = None

    @torch.enable_grad()
    def __call__(self) -> Any:
        if self._closure is None:
            if self.evaluations:
                self._refuse()
        else:
            self._loss = self._closure()
        self.evaluations += 1
        return self._loss

    def _refuse(self) -> Any:
        raise ClosureError(
            "the method evaluates the loss again, and this loop gives it one gradient only",
            found=self._reason,
            allowed="a lightrail.Closure",
            remedy="Pass optimizer.step(lightrail.Closure(loss_fn, params)) in a loop of your own; "
            "under `train` this closure is built for you at any precision but 16-mixed.",
        )

    @contextmanager
    def at(self, points: Sequence[Tensor]) -> Iterator[Closure]:
        self._refuse()
        yield self

    @contextmanager
    def part(self, index: int, count: int) -> Iterator[Closure]:
        self._refuse()
        yield self


def _refused(self: GradientOnly, *_args: Any, **_options: Any) -> Any:
    return self._refuse()


for _question in QUESTIONS:
    setattr(GradientOnly, _question, _refused)
