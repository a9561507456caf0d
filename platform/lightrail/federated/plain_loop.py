"""The loop of a visit without a trainer: of a plain task a trainer's own work takes longer than a small step.

It gives the numbers that the trainer gives, bit for bit. A task that uses more of a trainer than this loop has is told
from its hooks, or from what it asks for on the way, and is trained by the trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.data import DataLoader

from lightrail.federated.indexed_batches import batches_of
from lightrail.federated.local_model import as_it_was
from lightrail.run.run import Run
from lightrail.step.transform import TransformedOptimizer

__all__ = ["NeedsTrainer", "is_plain", "train_plainly"]

_HOOKS = (
    "on_fit_start", "on_fit_end", "on_train_start", "on_train_end", "on_train_epoch_start", "on_train_epoch_end",
    "on_train_batch_start", "on_train_batch_end", "on_before_zero_grad", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step", "optimizer_step", "optimizer_zero_grad", "backward", "configure_gradient_clipping",
    "lr_scheduler_step", "configure_model", "configure_callbacks", "setup", "teardown",
)  # fmt: skip
_OF_BATCHES = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
_HARMLESS = {"accelerator", "precision", "accumulate", "max_samples"}  # options that are looked at one by one


class NeedsTrainer(Exception):
    """The task asks for something that only a trainer has."""


def is_plain(run: Run, trainer: Trainer, options: Mapping[str, Any]) -> bool:
    """Whether a trainer would do nothing for a task that this loop does not.

    Args:
        run: Of the clients.
        trainer: That would do it.
        options: Of the trainer, without those that are about the run as a whole.
    """
    task = run.task
    if run.optimizer is None or run.privacy is not None or run.batching is not None or run.game is not None:
        return False
    if any(traits.evaluates_again or traits.watches_gradient for traits in run.method_traits):
        return False
    if run.composition.config.run.on_nan == "skip" or trainer.strategy.root_device.type != "cpu":
        return False
    is_default = all(value is None for key, value in options.items() if key not in _HARMLESS)
    if not is_default or str(options.get("precision", "32-true")) not in ("32-true", "32"):
        return False
    if int(options.get("accumulate") or 1) != 1 or not task.automatic_optimization:
        return False
    if any(is_overridden(name, task) for name in (*_HOOKS, *_OF_BATCHES)):
        return False
    return run.data is None or not any(is_overridden(name, run.data, LightningDataModule) for name in _OF_BATCHES)


class _NoTrainer:
    """Stands where a task looks for its trainer."""

    def __getattr__(self, name: str) -> Any:
        raise NeedsTrainer(name)


def train_plainly(
    run: Run, loader: DataLoader[Any], epochs: int, steps: int | None, known: Mapping[str, Any]
) -> tuple[int, dict[str, float], float]:
    """Trains a plain task.

    Args:
        run: With its transforms and its schedule.
        loader: The client's samples.
        epochs: Passes over them.
        steps: Optimizer steps in place of passes.
        known: What a schedule may ask for, by name.

    Returns:
        Steps, the means of what the task returned or logged, and the last learning rate.

    Raises:
        NeedsTrainer: The task asked for its trainer; it may have been trained half of the way.
    """
    task = run.task
    assert run.optimizer is not None
    inner = run.optimizer(task)
    optimizer = TransformedOptimizer(inner, run.transforms) if run.transforms else inner
    count = epochs * len(loader) if steps is None else steps
    schedule = None if run.schedule is None else run.schedule(inner, count, **known)
    figures = _Figures()
    with _without_trainer(task, figures):
        step = _step_of(task)
        forget, move = _forgetting(optimizer, inner), _moving(optimizer)
        for index, batch in _batches(loader, count):
            _make(move, forget, step, batch, index, figures)
            if schedule is not None:
                schedule.step()
    return count, figures.means(), float(inner.param_groups[0]["lr"])


def _batches(loader: DataLoader[Any], count: int) -> Iterator[tuple[int, Any]]:
    """So many batches, pass after pass, each with its place in its pass."""
    left = count
    while left > 0:
        for index, batch in enumerate(batches_of(loader)):
            yield index, batch
            left -= 1
            if not left:
                return


def _takes(step: Callable[..., Any]) -> tuple[bool, bool]:
    """Whether a step takes the loader's iterator, and whether it takes the batch's number, as Lightning finds it."""
    takes_iterator = is_param_in_hook_signature(step, "dataloader_iter", explicit=True)
    return takes_iterator, is_param_in_hook_signature(step, "batch_idx", min_args=2)


_takes_of_function = lru_cache(maxsize=16)(_takes)


def _step_of(task: LightningModule) -> Callable[[Any, int], Any]:
    step: Callable[..., Any] = task.training_step
    # Of a method, that of its function, which is looked at once for all visits.
    function = getattr(step, "__func__", None)
    takes_iterator, takes_index = _takes(step) if function is None else _takes_of_function(function)
    if takes_iterator:
        raise NeedsTrainer("dataloader_iter")
    return step if takes_index else lambda batch, index: step(batch)


def _forgetting(optimizer: Optimizer, inner: Optimizer) -> Callable[[], None]:
    """What forgets the last gradient: of a small model, the calls around that take longer than the thing itself."""
    if type(inner).zero_grad is not Optimizer.zero_grad or "zero_grad" in vars(inner):
        return optimizer.zero_grad
    params = [p for group in inner.param_groups for p in group["params"]]

    def forget() -> None:
        for p in params:
            p.grad = None

    return forget


def _moving(optimizer: Optimizer) -> Callable[[Callable[[], Tensor]], Any]:
    """The optimizer's step: as torch found it, where nobody listens to what torch has put around it."""
    kind: Any = type(optimizer)
    bare = getattr(kind.step, "__wrapped__", None) if getattr(kind.step, "hooked", False) else None
    if bare is None or "step" in vars(optimizer) or _is_listened_to(optimizer):
        as_it_is: Any = optimizer.step
        return as_it_is
    # The mark that is set for a profiler takes a seventh of a small step.
    return lambda closure: bare(optimizer, closure)


def _is_listened_to(optimizer: Optimizer) -> bool:
    hooks = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        _global_optimizer_pre_hooks,
        _global_optimizer_post_hooks,
    )
    return any(hooks) or torch.autograd.profiler._is_profiler_enabled


def _make(
    move: Callable[[Callable[[], Tensor]], Any],
    forget: Callable[[], None],
    step: Callable[[Any, int], Any],
    batch: Any,
    index: int,
    figures: _Figures,
) -> None:
    def closure() -> Tensor:
        with torch.enable_grad():
            outputs = step(batch, index)
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
            if not isinstance(loss, Tensor):
                raise NeedsTrainer("a step that returns no loss")
            forget()
            loss.backward()
        figures.add(outputs if isinstance(outputs, Mapping) else {"loss": outputs})
        return loss

    move(closure)


@contextmanager
def _without_trainer(task: LightningModule, figures: _Figures) -> Iterator[None]:
    with as_it_was(task, "_trainer", "log", "log_dict"):
        task._trainer = _NoTrainer()  # type: ignore[assignment]
        task.log = figures.log  # type: ignore[method-assign,assignment]
        task.log_dict = figures.log_dict  # type: ignore[method-assign,assignment]
        yield


class _Figures:
    """The scalars that a task returned or logged."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = {}

    def add(self, found: Mapping[str, Any]) -> None:
        for name, value in found.items():
            if isinstance(value, Tensor) and value.dim() == 0:
                self._values.setdefault(name, []).append(value.detach())

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(value, Tensor | int | float):
            raise NeedsTrainer(f"log of a {type(value).__name__}")
        self.add({name.removeprefix("train_"): torch.as_tensor(value, dtype=torch.float32).squeeze()})

    def log_dict(self, values: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        for name, value in values.items():
            self.log(name, value)

    def means(self) -> dict[str, float]:
        return {name: float(torch.stack(values).double().mean()) for name, values in self._values.items()}
