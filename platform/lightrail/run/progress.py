"""What a terminal shows while a run goes on: one live line, or one line an epoch where nobody watches live."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

__all__ = ["Progress"]

_SHOWN_SECONDS = 0.1


class _Bar(tqdm):
    """tqdm's bar with a place for metrics that it does not punctuate."""

    metrics = ""

    @property
    def format_dict(self) -> dict[str, Any]:
        return {**super().format_dict, "metrics": self.metrics}


class Progress:
    """The progress of a run on standard error.

    Args:
        total: Optimizer steps (or samples) until the horizon; ``None`` where it is not known.
        first: Those done before, by the run that is resumed.
        epochs: Epochs until the horizon; ``None`` where it is not known.
        unit: What is counted: ``steps``; ``samples`` where steps differ in size; ``rounds``, in place of epochs too.
        enabled: ``False`` for silence (another rank, a notebook that wants none).
    """

    def __init__(
        self, total: int | None, first: int, epochs: int | None, enabled: bool = True, unit: str = "steps"
    ) -> None:
        self._total, self._epochs, self._counts_rounds = total, epochs, unit == "rounds"
        self._epoch = 0
        self._metrics: dict[str, float] = {}
        self._enabled = enabled
        self._live = enabled and sys.stderr.isatty()
        self._began = time.monotonic()
        self._next_refresh = 0.0
        self._steps = first
        self._bar = (
            _Bar(
                total=total,
                initial=first,
                unit=f" {unit}",
                dynamic_ncols=True,
                leave=False,
                mininterval=_SHOWN_SECONDS,
                bar_format="{desc} {bar:20} {n_fmt}/{total_fmt} · {rate_fmt} · {remaining} left{metrics}",
                colour="#4c78a8",
            )
            if self._live
            else None
        )

    def begin_epoch(self, epoch: int) -> None:
        """Epochs are counted from 0."""
        self._epoch = epoch
        if self._bar is not None:
            self._bar.set_description_str(self._name(), refresh=False)

    def to_step(self, steps: int) -> None:
        """The run has done ``steps`` optimizer steps; cheap enough for every one of them."""
        if self._bar is None:
            return
        now = time.monotonic()
        if now >= self._next_refresh:
            self._next_refresh = now + _SHOWN_SECONDS
            self._bar.update(steps - self._steps)
            self._steps = steps

    def show(self, metrics: Mapping[str, float | None]) -> None:
        """New values of metrics; ``None`` for one whose last value does not hold any more."""
        self._metrics = {k: v for k, v in {**self._metrics, **metrics}.items() if k != "lr" and v is not None}
        if self._bar is not None:
            self._bar.metrics = _side_by_side(self._metrics)

    def end_epoch(self, steps: int) -> None:
        """An epoch and its validation are done."""
        if self._enabled and not self._live:
            seconds = time.monotonic() - self._began
            name = f"round {steps}{_of(self._total)}" if self._counts_rounds else f"{self._name()}  step {steps}"
            print(f"{name}  {self._text()}  {seconds:.1f} s", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Clears the line."""
        if self._bar is not None:
            self._bar.close()

    def _name(self) -> str:
        return "rounds" if self._counts_rounds else f"epoch {self._epoch + 1}{_of(self._epochs)}"

    def _text(self) -> str:
        return "  ".join(f"{name} {value:.4g}" for name, value in self._metrics.items())


def _of(whole: int | None) -> str:
    return f"/{whole}" if whole and whole > 0 else ""


def _side_by_side(metrics: Mapping[str, float]) -> str:
    """Training and validation of one metric beside each other, since a line has little room."""
    names = dict.fromkeys(name.removeprefix("train_").removeprefix("val_") for name in metrics)
    parts = []
    for name in names:
        pair = [f"{metrics[k]:.4g}" for k in (f"train_{name}", f"val_{name}", name) if k in metrics]
        only_validated = f"val_{name}" in metrics and f"train_{name}" not in metrics
        parts.append(f" · val {name} {pair[0]}" if only_validated else f" · {name} {' val '.join(pair)}")
    return "".join(parts)
