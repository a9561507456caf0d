"""The clock of a schedule: it counts samples where a step has more or fewer than it began with."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrail.run.windows import Windows

__all__ = ["Clock", "Horizon"]


@dataclass(frozen=True)
class Horizon:
    """Where a run ends.

    Args:
        steps: Optimizer steps of ``batch_size`` samples.
        batch_size: Samples a step, over all ranks and micro-batches; ``None`` where the loader does not say.
    """

    steps: int
    batch_size: int | None = None

    @property
    def samples(self) -> int | None:
        return None if self.batch_size is None else self.steps * self.batch_size

    def __str__(self) -> str:
        return f"{self.steps:,} steps" + (f" ({self.samples:,} samples)" if self.samples else "")


class Clock(LRScheduler):
    """A schedule that is stepped once for every ``batch_size`` samples of its horizon.

    Where every step has that many, it is the schedule itself. Where a batching changes them, the schedule moves as far
    as the samples say. A run that is resumed with another horizon goes on where the new curve stands after as many
    samples, and says so.

    ``LRScheduler.__init__`` is not called, on purpose: the schedule inside has done what it does.

    Args:
        make: Makes the schedule for a number of steps; ``None`` for a constant rate.
        optimizer: The optimizer.
        horizon: Of this run.
        windows: Who counts the samples, where steps differ in size.
        note: Where decisions that concern the user are said.
    """

    def __init__(
        self,
        make: Callable[[int], LRScheduler] | None,
        optimizer: Optimizer,
        horizon: Horizon,
        windows: Windows | None = None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.optimizer = optimizer
        self.horizon = horizon
        self.scheduler = None if make is None else make(horizon.steps)
        self._windows = windows
        self._note = note
        self._count = 0
        self._initial = [_number(group["lr"]) for group in optimizer.param_groups]
        self._factor = 1.0  # of the batching, in the rates as they stand
        if windows is not None:
            windows.before_step = self.answer_batch
        for text in getattr(self.scheduler, "notes", ()):
            note(f"schedule: {text}")

    def step(self, epoch: int | None = None) -> None:
        """One optimizer step was made."""
        windows = self._windows
        if windows is None:
            self._advance_to(self._count + 1)
            return
        self._multiply(1 / self._factor)
        batch_size = self.horizon.batch_size or 1
        self._advance_to(self._count + 1 if windows.counts_steps else windows.samples // batch_size)
        self._multiply(self._factor)

    def answer_batch(self) -> None:
        """The learning rate as the size of the step under way asks."""
        portion = self._windows.portion if self._windows else None
        if portion is not None and portion.lr_factor != self._factor:
            self._multiply(portion.lr_factor / self._factor)
            self._factor = portion.lr_factor

    def _advance_to(self, count: int) -> None:
        while self._count < count:
            self._count += 1
            if self.scheduler is not None:
                self.scheduler.step()

    def _multiply(self, by: float) -> None:
        if by != 1.0:
            self._set([by * _number(group["lr"]) for group in self.optimizer.param_groups])

    def _set(self, rates: list[float]) -> None:
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def get_last_lr(self) -> list[Any]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def logged(self) -> dict[str, float]:
        """What the schedule inside says of itself."""
        scheduler: Any = self.scheduler
        return scheduler.logged() if hasattr(scheduler, "logged") else {}

    def state_dict(self) -> dict[str, Any]:
        return {
            "count": self._count,
            "factor": self._factor,
            "horizon": asdict(self.horizon),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        old = Horizon(**state_dict["horizon"])
        if old == self.horizon:
            self._count = state_dict["count"]
            self._factor = state_dict["factor"]
            if self.scheduler is not None:
                self.scheduler.load_state_dict(state_dict["scheduler"])
                self._multiply(self._factor)
            return
        self._go_on(old, state_dict["count"], state_dict["scheduler"])

    def _go_on(self, old: Horizon, count: int, state: dict[str, Any] | None) -> None:
        """To where the new curve stands; of the schedule's old state only what it carries over holds."""
        before = _number(self.optimizer.param_groups[0]["lr"])
        if old.batch_size and self.horizon.batch_size:
            count = count * old.batch_size // self.horizon.batch_size
        self._set(self._initial)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of steps of a schedule without steps of its optimizer
            self._advance_to(count)
        if state is not None and hasattr(self.scheduler, "carry_over"):
            self.scheduler.carry_over(state)  # type: ignore[union-attr]
        if self.scheduler is not None:
            now = _number(self.optimizer.param_groups[0]["lr"])
            self._note(
                f"schedule: the horizon was {old} and is {self.horizon}; after {count:,} of these steps lr goes on "
                f"from {now:.3g} (it was {before:.3g})"
            )


def _number(rate: float | Tensor) -> float:
    return float(rate)
