"""The schedule that a first run's gradient norms ask for."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left, insort
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrail.errors import ConfigurationError
from lightrail.options import between, one_of
from lightrail.step import Closure
from lightrail.step.update_size import scales_with_gradient
from lightrail.traits import Traits
from lightrail_schedules.gradient_norms import FILE_NAME, GradientNorms, newest_recorded, norms_of, read_norms
from lightrail_schedules.horizon import Horizon
from lightrail_schedules.linear_decay import linear_multiplier
from lightrail_schedules.multiplied import Multiplied, declares

__all__ = ["median_filtered", "refined", "refined_shape"]

_WRITTEN_TIMES = 20  # in the course of a run: the file of one that was killed lacks a twentieth at most


def refined_shape(g: np.ndarray, power: float) -> np.ndarray:
    """``w_t · sum_{s>t} w_s`` with ``w_t = g_t^-power``, its largest value 1.

    Args:
        g: Norms, finite and > 0, at least two.
        power: 2 for the norms ``||g||_2`` of SGD, 1 for the norms ``||g||_1`` of Adam.

    Example:
        >>> refined_shape(np.array([4.0, 2.0, 1.0, 1.0, 2.0]), power=2).round(9).tolist()
        [0.125, 0.45, 1.0, 0.2, 0.0]
    """
    w = (g / g.min()) ** -power  # the shape does not know the unit of g; in this one nothing overflows
    after = np.append(np.cumsum(w[::-1])[::-1][1:], 0.0)
    return w * after / (w * after).max()


def median_filtered(g: np.ndarray, tau: float) -> np.ndarray:
    """The median of the ``2 floor(tau T / 2) + 1`` values around each.

    Beyond the start the first value goes on; beyond the end the series is mirrored about its last value.

    Args:
        g: A series of T values.
        tau: The width, as a part of the series.

    Example:
        >>> median_filtered(np.array([9.0, 1.0, 2.0, 50.0, 4.0]), tau=0.4).tolist()
        [9.0, 2.0, 2.0, 4.0, 50.0]
    """
    half = int(tau * len(g)) // 2
    padded = np.concatenate([np.full(half, g[0]), np.pad(g, (0, half), mode="reflect")]).tolist()
    window = sorted(padded[: 2 * half])
    medians = []
    for old, new in zip(padded, padded[2 * half :], strict=False):
        insort(window, new)
        medians.append(window[half])
        del window[bisect_left(window, old)]
    return np.array(medians)


def _stretched(shape: np.ndarray, total: int) -> list[float]:
    """The shape over another number of steps, from its first step to its last, its largest value 1."""
    found = np.interp(np.linspace(0, len(shape) - 1, total), np.arange(len(shape)), shape)
    return (found / found.max()).tolist()


class _Recording(Multiplied):
    """Linear decay, which writes down the norms of the gradients on the way."""

    def __init__(self, optimizer: Optimizer, horizon: Horizon, folder: str | None) -> None:
        self._horizon = horizon
        self._folder = folder
        self._norms = GradientNorms(horizon.total)
        self.notes = []
        if folder is not None:
            self.notes.append(
                f"a linear decay that writes {FILE_NAME}; train once more with schedule.from_run={folder}"
            )
        super().__init__(optimizer, lambda t: linear_multiplier(t, horizon, 0.0))

    def observe(self, params: list[Tensor], closure: Closure) -> None:
        """Measures the gradient of this step."""
        t, total = self.last_epoch, self._horizon.total
        self._norms.put(t, norms_of([p.grad for p in params if p.grad is not None]))
        every = max(1, total // _WRITTEN_TIMES)
        if self._folder is not None and (t + 1 == total or (t + 1 < total and (t + 1) % every == 0)):
            self._norms.write(self._folder)

    def logged(self) -> dict[str, float]:
        return {} if self._norms.latest is None else {"gradient_norm": float(self._norms.latest[0])}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "norms": self._norms.rows().clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.carry_over(state_dict)

    def carry_over(self, state_dict: dict[str, Any]) -> None:
        """What holds of an earlier state whatever the horizon is now."""
        if "norms" in state_dict:
            self._norms.load(state_dict["norms"])


class _Refined(Multiplied):
    """What the norms of another run ask for."""

    def __init__(self, optimizer: Optimizer, horizon: Horizon, shape: list[float], notes: list[str]) -> None:
        self.notes = notes
        super().__init__(optimizer, lambda t: horizon.warm(t) * shape[min(t, len(shape) - 1)])


@declares(
    Traits(
        rule="first run: lr_t = lr (1 - t/T); then: lr_t ~ lr w_t sum_{s>t} w_s, w = 1 / the norms of its gradients",
        paper=(
            "Defazio, Cutkosky, Mehta, Mishchenko, 2023, Optimal Linear Decay Learning Rate Schedules and Further "
            "Refinements, arXiv:2310.07831"
        ),
        watches_gradient=True,
        example={"warmup_steps": 0.1},
    )
)
def refined(
    optimizer: Optimizer,
    total_steps: int,
    *,
    from_run: str | None = None,
    norm: str = "auto",
    tau: float = 0.1,
    warmup_steps: int | float = 0,
    folder: str | None = None,
) -> LRScheduler:
    """A linear decay that records gradient norms; in a second run, the schedule that those norms ask for.

    First run: ``lr_t = lr (1 - t/T)``, and ``gradient_norms.csv`` in the run folder. Second run, with ``from_run``:
    ``lr_t = lr · w_t sum_{s>t} w_s``, scaled so that its largest value is the learning rate, with ``w_t = G_t^-2`` for
    SGD and the norms ``||g||_2``, ``w_t = G_t^-1`` for Adam and the norms ``||g||_1``, G being their running median.
    Where gradients are large at first it warms up, where they shrink at the end it falls fast, and where they are all
    alike it is a linear decay.

    Args:
        optimizer: Any torch optimizer.
        total_steps: T, optimizer steps of the run, >= 1.
        from_run: The folder of the first run, or ``latest`` for the newest beside this one; nothing for a first run.
        norm: ``l2`` for w = G^-2, ``l1`` for w = G^-1; ``auto`` for l2 where updates grow with the gradient (SGD),
            and l1 where they are divided by its history (Adam).
        tau: Width of the running median, as a part of the run, in [0, 1]: ``2 floor(tau T / 2) + 1`` steps.
        warmup_steps: W, in steps, or as a fraction of the run below 1: a linear warm-up before the linear decay of
            the first run; in the second run, a factor ``min(1, (t+1)/(W+1))`` more.
        folder: The folder of this run, which lightrail supplies; nothing is written without one.

    Returns:
        A scheduler, stepped once an optimizer step. That of a first run has ``observe(params, closure)``, to be called
        before each optimizer step with the raw gradient in ``.grad``; lightrail does.

    Raises:
        ConfigurationError: The run has no step, an option is out of range, or the folder has no norms that can be
            used: none at all, fewer than two, or a running median that is zero or not finite.

    Guarantees:
        A first run is ``linear_decay``, bit for bit, and a resumed one records on. The last step of a second run has
        the learning rate 0.

    Deviations:
        A run of another length than the recorded one takes its shape, stretched. Norms are those before clipping and
        before any transform. A norm that is not a number counts as infinite in the median.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.SGD([w], lr=1.0)
        >>> schedule = refined(optimizer, 4)
        >>> w.grad = torch.tensor([3.0, -4.0])
        >>> schedule.observe([w], None)
        >>> schedule.logged()
        {'gradient_norm': 5.0}

    Reference:
        Defazio et al., 2023, arXiv:2310.07831: refinement of schedules, for SGD and for Adam; the running median and
        its edges are those of its published code.
    """
    horizon = Horizon.of(total_steps, warmup_steps)
    one_of(("auto", "l2", "l1"), norm=norm)
    between(0.0, 1.0, closed="both", tau=tau)
    if from_run is None:
        return _Recording(optimizer, horizon, folder)
    if from_run == "latest":
        from_run = newest_recorded(folder)
    if norm == "auto":
        norm = "l2" if scales_with_gradient(optimizer) else "l1"
    shape = _shape_of(from_run, norm, tau)
    notes = [f"refined from the {norm.upper()} norms of {len(shape)} gradients of {from_run}"]
    if len(shape) != horizon.total:
        notes.append(f"recorded over {len(shape)} steps, stretched over the {horizon.total} of this run")
    return _Refined(optimizer, horizon, _stretched(shape, horizon.total), notes)


def _shape_of(folder: str, norm: str, tau: float) -> np.ndarray:
    recorded = read_norms(folder, norm)
    g = median_filtered(np.where(np.isnan(recorded), np.inf, recorded), tau)
    wrong = np.flatnonzero(~(np.isfinite(g) & (g > 0)))
    if len(wrong):
        raise ConfigurationError(
            f"the gradient norms of {folder} give no schedule",
            found=f"a running median of {g[wrong[0]]:g} at step {wrong[0]}, and {len(wrong)} such steps of {len(g)}",
            allowed="norms that are finite and greater than zero",
            remedy="Refine from a run that did not diverge and had not come to rest, or widen schedule.tau.",
        )
    return refined_shape(g, power=2.0 if norm == "l2" else 1.0)


def _traits_under(options: Mapping[str, Any]) -> Traits:
    """Only a first run looks at gradients."""
    traits: Traits = refined.traits  # type: ignore[attr-defined]
    return dataclasses.replace(traits, watches_gradient=options.get("from_run") is None)


refined.traits_under = _traits_under  # type: ignore[attr-defined]
