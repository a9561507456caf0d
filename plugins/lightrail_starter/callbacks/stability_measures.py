"""What a stability probe measures, each as a function of a closure over one batch that stands still."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lightrail.step import Closure
from lightrail.step.randomness import RandomState
from lightrail.step.running_statistics import Statistics
from lightrail.step.window import WindowClosure
from lightrail.traits import traits_of

__all__ = [
    "ProbeClosure",
    "WatchedReLUs",
    "coherence",
    "directional_sharpness",
    "evaluating",
    "from_one_seed",
    "stable_below",
]


class ProbeClosure(WindowClosure):
    """The task's loss on one batch, without a trace: no log, no statistics, no gradient left behind.

    Args:
        trainer: The trainer of the run.
        params: The parameters.
        batch: The batch, on its device.
    """

    def __init__(self, trainer: Trainer, params: list[Tensor], batch: Any) -> None:
        module = trainer.lightning_module
        super().__init__(trainer, params, Statistics(module))
        takes_index = len(inspect.signature(module.training_step).parameters) > 1
        self._open([(batch, 0) if takes_index else (batch,)])
        self._divisor = 1  # however many micro-batches a step of the run has


@contextmanager
def evaluating(module: LightningModule) -> Iterator[None]:
    """Inside, the module and all within are in evaluation mode; on the way out each is in its own again."""
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for each, mode in modes:
            each.training = mode


@contextmanager
def from_one_seed() -> Iterator[None]:
    """Inside, random numbers are the same every time; outside, nothing was drawn."""
    with RandomState.kept():
        RandomState.seed(0)
        yield


def directional_sharpness(closure: Closure, before: list[Tensor]) -> float | None:
    """``vᵀ H v / vᵀ v`` at ``before``, for the update v from there to where the parameters stand.

    ``None`` where nothing moved.
    """
    v = list(torch._foreach_sub([p.detach() for p in closure.params], before))
    length = _dot(v, v)
    if length == 0:
        return None
    with closure.at(before):
        return _dot(v, closure.hvp(v)) / length


def coherence(closure: Closure, groups: int) -> float | None:
    """The mean cosine between the gradients of two parts of the batch; ``None`` where fewer than two have one.

    With n unit vectors u_i that is ``(‖Σ u_i‖² − n) / (n (n − 1))``, so that only their sum is kept.
    """
    total: list[Tensor] = [torch.zeros_like(p) for p in closure.params]
    n = 0
    for part in range(groups):
        with closure.part(part, groups):
            gradient = closure.gradient()[1]
        length = _dot(gradient, gradient) ** 0.5
        if length > 0:
            torch._foreach_add_(total, gradient, alpha=1 / length)
            n += 1
    return (_dot(total, total) - n) / (n * (n - 1)) if n > 1 else None


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return float(torch.stack([(x.detach().double() * y.double()).sum() for x, y in zip(a, b, strict=True)]).sum())


class WatchedReLUs:
    """The outputs of a module's ``nn.ReLU`` layers during one evaluation, inside a ``with``.

    Args:
        module: Where the layers are.
    """

    def __init__(self, module: nn.Module) -> None:
        self.layers = [each for each in module.modules() if isinstance(each, nn.ReLU)]
        self._zeros: list[Tensor] = []
        self._alive: list[Tensor] = []
        self._numel = 0

    def __enter__(self) -> WatchedReLUs:
        self._handles = [layer.register_forward_hook(self._see) for layer in self.layers]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _see(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        fires = output.detach() != 0
        unit = 1 if output.dim() in (2, 4, 5) else output.dim() - 1
        self._zeros.append((~fires).sum())
        self._alive.append(fires.movedim(unit, 0).reshape(fires.shape[unit], -1).any(1))
        self._numel += output.numel()

    def shares(self, trainer: Trainer) -> dict[str, float]:
        """Over all ranks: the share of outputs that are zero, and of units that are zero for every sample."""
        if not self._numel:
            return {}
        zeros = torch.stack(self._zeros).sum().double() / self._numel
        alive = torch.cat(self._alive).double()
        found = trainer.strategy.reduce(torch.cat([zeros[None], alive]), reduce_op="mean")
        assert isinstance(found, Tensor)
        return {"zeros": float(found[0]), "dead_units": float((found[1:] == 0).double().mean())}


def stable_below(optimizer: Optimizer) -> float | None:
    """The sharpness above which steps along it grow: ``2 / lr``, of the group where that is least.

    Heavy-ball momentum μ makes it ``2 (1 + μ) / lr``, Nesterov's ``2 (1 + μ) / ((1 + 2 μ) lr)``, and dampening δ
    divides the former by ``1 − δ``. ``None`` for a method whose update is not the gradient times the learning rate.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, SGD) and not traits_of(inner).scales_with_gradient:
        return None
    limits = []
    for group in inner.param_groups:
        rate, mu = float(group.get("lr", 0.0)), float(group.get("momentum", 0.0))
        shrinks = 1 + 2 * mu if group.get("nesterov") else 1 - float(group.get("dampening", 0.0)) * (mu > 0)
        if rate > 0 and shrinks > 0:
            limits.append(2 * (1 + mu) / (shrinks * rate))
    return min(limits, default=None)
