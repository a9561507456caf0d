"""A learning rate that was tuned at one batch size, at another."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrail.options import at_least, between, one_of, positive
from lightrail.step import Closure
from lightrail.step.update_size import scales_with_gradient
from lightrail.traits import Traits
from lightrail_schedules.cosine import cosine_multiplier
from lightrail_schedules.horizon import Horizon
from lightrail_schedules.linear_decay import linear_multiplier
from lightrail_schedules.max_lr_probe import sharpness_of, stable_lr
from lightrail_schedules.multiplied import Multiplied, declares

__all__ = ["batch_factor", "batch_scaling"]

_SHAPES: dict[str, Callable[[int, Horizon, float], float]] = {
    "constant": lambda t, horizon, final: horizon.warm(t),
    "linear_decay": linear_multiplier,
    "cosine": cosine_multiplier,
}
_POWERS = {"linear": 1.0, "sqrt": 0.5}


def batch_factor(b: float, b0: float, p: float, cap: float = math.inf) -> float:
    """``min(cap, (b/b0)^p)``: by what the learning rate goes up from b0 samples a step to b.

    Example:
        >>> batch_factor(256, 64, p=1.0), batch_factor(256, 64, p=0.5)
        (4.0, 2.0)
    """
    return min(cap, (b / b0) ** p)


class _Scaled(Multiplied):
    """``lr · min(factor, limit) · shape(t)``; the limit is what a probe at the first step finds."""

    def __init__(self, optimizer: Optimizer, shape: Callable[[int], float], factor: float, notes: list[str]) -> None:
        self.notes = notes
        self._factor, self._limit = factor, math.inf
        super().__init__(optimizer, lambda t: min(self._factor, self._limit) * shape(t))


class _Probed(_Scaled):
    """Measures the sharpness at the first step, and keeps the peak of SGD below what that makes unstable."""

    _sharpness: float | None = None

    def __init__(
        self, optimizer: Optimizer, shape: Callable[[int], float], factor: float, notes: list[str], *, caps: bool
    ) -> None:
        self._caps = caps
        super().__init__(optimizer, shape, factor, notes)

    def observe(self, params: list[Tensor], closure: Closure) -> None:
        """Probes once in the life of a run, and takes effect before the update of that very step."""
        if self._sharpness is None:
            self._sharpness = sharpness_of(closure)
            self._set_limit()
            # Sets the rates anew, of this step already.
            self.load_state_dict(self.state_dict())

    def _bounds(self) -> list[float]:
        """The largest stable learning rate of each group."""
        assert self._sharpness is not None
        return [
            stable_lr(
                self._sharpness,
                group.get("momentum", 0.0),
                dampening=group.get("dampening", 0.0),
                nesterov=bool(group.get("nesterov", False)),
            )
            for group in self.optimizer.param_groups
        ]

    def _set_limit(self) -> None:
        if self._caps and math.isfinite(self._sharpness or math.nan):
            pairs = zip(self._bounds(), map(float, self.base_lrs), strict=True)
            self._limit = min((bound / rate for bound, rate in pairs if rate > 0), default=math.inf)

    def logged(self) -> dict[str, float]:
        if self._sharpness is None:
            return {}
        found = {"sharpness": self._sharpness, "max_lr": min(self._bounds())}
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "sharpness": self._sharpness, "limit": self._limit}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._sharpness = state_dict.get("sharpness")
        self._limit = state_dict.get("limit", math.inf)
        super().load_state_dict(state_dict)

    def carry_over(self, state_dict: dict[str, Any]) -> None:
        """What holds of an earlier state whatever the horizon is now."""
        found = {name: state_dict[name] for name in ("sharpness", "limit") if name in state_dict}
        self.load_state_dict({**super().state_dict(), **found})


@declares(
    Traits(
        rule="lr = lr (b/b0)^p, p = 1 for SGD and 1/2 for Adam",
        paper=(
            "Granziol, Zohren, Roberts, 2022, Learning Rates as a Function of Batch Size: A Random Matrix Theory "
            "Approach to Neural Network Training, arXiv:2006.09092"
        ),
        example={"base_batch_size": 32, "shape": "cosine", "warmup_steps": 0.1},
    )
)
def batch_scaling(
    optimizer: Optimizer,
    total_steps: int,
    *,
    base_batch_size: int,
    rule: str = "auto",
    cap: float | None = None,
    shape: str = "constant",
    warmup_steps: int | float = 0,
    final: float = 0.0,
    probe: bool = False,
    batch_size: int | None = None,
) -> LRScheduler:
    """The learning rate that was tuned at one batch size, scaled to that of this run.

    ``lr_t = lr · min(cap, (b/b0)^p) · shape(t)``: p = 1 where updates grow with the gradient (SGD), since noise in the
    batch sets their largest stable step; p = 1/2 where they are divided by its history (Adam).

    Args:
        optimizer: Any torch optimizer, its learning rate being that for ``base_batch_size``.
        total_steps: T, optimizer steps of the run, >= 1.
        base_batch_size: b0, samples a step, over all devices and accumulated batches, at which the learning rate was
            tuned, >= 1.
        rule: ``linear`` for p = 1; ``sqrt`` for p = 1/2; ``auto`` for what the optimizer asks for.
        cap: The largest factor ``(b/b0)^p``, > 0; nothing for no cap. Gains end where the curvature of all data, not
            the noise of the batch, bounds the step.
        shape: ``constant``, ``linear_decay`` or ``cosine``: how the learning rate goes on over the run.
        warmup_steps: W, in steps, or as a fraction of the run below 1.
        final: What is left at T, as a fraction of the learning rate, in [0, 1]; not for ``constant``.
        probe: Whether the sharpness lambda of the first batch is measured, by about 30 Hessian-vector products. Where
            updates grow with the gradient, the peak is then held at ``2 (1+momentum) / lambda``; elsewhere that bound
            does not hold, since a preconditioned Hessian takes the place of lambda's, and is shown only.
        batch_size: b, samples in one optimizer step at the start, which lightrail supplies; where it is not known,
            nothing is scaled.

    Returns:
        A scheduler, stepped once an optimizer step. With ``probe`` it has ``observe(params, closure)``, to be called
        before each optimizer step; lightrail does.

    Raises:
        ConfigurationError: The run has no step, the warm-up does not fit into it, or an option is out of range.

    Guarantees:
        At ``batch_size=base_batch_size`` it is its shape, bit for bit. A resumed run keeps what its first step probed.

    Deviations:
        The paper probes on the fly throughout the run, for learning rate and momentum; here once, for a cap.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        >>> batch_scaling(optimizer, 10, base_batch_size=32, batch_size=128).get_last_lr()
        [0.4]

    Reference:
        Granziol, Zohren and Roberts, 2022, Journal of Machine Learning Research 23, arXiv:2006.09092.
    """
    horizon = Horizon.of(total_steps, warmup_steps)
    at_least(1, base_batch_size=base_batch_size)
    one_of(("auto", "linear", "sqrt"), rule=rule)
    one_of(_SHAPES, shape=shape)
    between(0.0, 1.0, closed="both", final=final)
    if cap is not None:
        positive(cap=cap)
    grows = scales_with_gradient(optimizer)
    if rule == "auto":
        rule = "linear" if grows else "sqrt"
    factor = 1.0
    if batch_size is None:
        notes = ["the batch size is not known, so the learning rate is not scaled"]
    else:
        factor = batch_factor(batch_size, base_batch_size, _POWERS[rule], math.inf if cap is None else cap)
        notes = [f"lr times {factor:.4g}, {rule} from {base_batch_size} samples a step to {batch_size}"]
    curve = _SHAPES[shape]
    if not probe:
        return _Scaled(optimizer, lambda t: curve(t, horizon, final), factor, notes)
    if not grows:
        notes.append("the probe reports only; its bound is that of SGD, and this method has a preconditioner")
    return _Probed(optimizer, lambda t: curve(t, horizon, final), factor, notes, caps=grows)


def _traits_under(options: Mapping[str, Any]) -> Traits:
    traits: Traits = batch_scaling.traits  # type: ignore[attr-defined]
    probes = bool(options.get("probe"))
    return dataclasses.replace(traits, watches_gradient=probes, needs_second_derivatives=probes)


batch_scaling.traits_under = _traits_under  # type: ignore[attr-defined]
