"""Before anything is spent: what of a run could not be private is refused, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from lightrail.catalogue import import_target
from lightrail.errors import CompositionError
from lightrail.privacy.engine import PrivacyEngine
from lightrail.privacy.method import PrivacyMethod
from lightrail.privacy.refusals import sharded
from lightrail.traits import traits_of

if TYPE_CHECKING:
    from lightrail.run.run import Run

__all__ = ["made_private", "replace_batch_norm"]

_MOST_GROUPS = 32


def made_private(method: PrivacyMethod, run: Run) -> Run:
    """A run whose every step is private.

    Args:
        method: Which gradients, how clipped, what noise, at what cost.
        run: As it was composed.

    Raises:
        CompositionError: Something in it would see, or release, more than the private gradient.
    """
    _check_methods(run)
    _check_trainer(run)
    _check_metrics(run)
    notes = list(run.notes)
    is_chosen = any(each.kind == "model" and each.explicit for each in run.composition.chosen)
    if method.replace_batch_norm or (method.replace_batch_norm is None and not is_chosen):
        count = replace_batch_norm(run.task)
        if count:
            notes.append(f"privacy: {count} BatchNorm layers, which mix samples, are GroupNorm now")
    _check_modules(run.task)
    if method.public_metrics:
        notes.append(
            "privacy: figures of the training data (train_…) are logged and are not covered by epsilon; "
            "privacy.public_metrics=false leaves them out"
        )
    if method.deterministic_noise or method.noise == 0:
        why = "its noise follows from the seed" if method.deterministic_noise else "it has no noise"
        notes.append(f"privacy: this run is NOT private: {why}")
    return dataclasses.replace(run, privacy=PrivacyEngine(method, run), notes=notes)


def _check_methods(run: Run) -> None:
    if run.game is not None:
        raise _refusal("a task with several players", ", ".join(run.game.players), "a task with one loss")
    if not run.task.automatic_optimization:
        raise _refusal("a task that steps its optimizers itself", "automatic_optimization=False", "the step of the run")
    if run.batching is not None:
        raise _refusal(
            "batching, which decides on batches by what it sees",
            f"batching={type(run.batching).__name__}",
            "batches that are drawn by privacy.sampling",
        )
    for each in run.composition.chosen:
        traits = traits_of(import_target(each.target), each.options)
        if each.kind in ("optimizer", "transform", "schedule", "callback") and traits.evaluates_again:
            raise CompositionError(
                f"{each.kind} '{each.name}' evaluates the data more than once a step, which would release more than is "
                "accounted for",
                found=f"{each.kind}={each.name} with privacy",
                allowed="methods that evaluate the gradient once a step",
                remedy=f"Choose another {each.kind}; `lightrail plugins {each.name}` says what it asks for.",
            )
        if each.kind == "data" and traits.fits_to_data:
            raise _refusal(
                f"data '{each.name}', which {traits.fits_to_data}",
                f"data={each.name}",
                "data that is prepared without a look at all of it, or by statistics of other data",
                f"Choose other data; `lightrail plugins {each.name}` says whether an option switches this off.",
            )


def _check_trainer(run: Run) -> None:
    trainer = run.trainer
    if str(trainer.get("precision")) in ("16-mixed", "16", "16-true"):
        raise _refusal(
            "half precision with a scaled loss, whose skipped steps depend on single samples",
            f"trainer.precision={trainer['precision']}",
            "32-true, 64-true, bf16-mixed, bf16-true",
            "Use trainer.precision=bf16-mixed.",
        )
    if int(trainer.get("accumulate") or 1) != 1:
        raise _refusal(
            "accumulation, since large batches are cut by privacy itself",
            f"trainer.accumulate={trainer['accumulate']}",
            "trainer.accumulate=1",
            "Set data.batch_size to the samples of a step, and privacy.max_physical_batch to what fits in memory.",
        )
    strategy = trainer.get("strategy")
    if isinstance(strategy, str) and any(word in strategy for word in ("fsdp", "deepspeed", "model_parallel", "xla")):
        raise sharded(strategy)
    if trainer.get("overfit_batches"):
        raise _refusal("a part of the batches", f"trainer.overfit_batches={trainer['overfit_batches']}", "all records")
    limit = trainer.get("limit_train_batches", 1.0)
    if limit not in (None, 1.0) and type(limit) is not int:
        raise _refusal("a share of the batches", f"trainer.limit_train_batches={limit}", "a number of batches")


def _check_metrics(run: Run) -> None:
    """A metric that keeps single samples' values would put them in the log."""
    from torchmetrics import CatMetric, Metric, MetricCollection

    def leaks(metric: Any) -> bool:
        inner = metric.values() if isinstance(metric, MetricCollection) else [metric]
        return any(isinstance(each, CatMetric) for each in inner)

    own = {name: each for name, each in run.task.named_modules() if isinstance(each, Metric)}
    for name, metric in {**run.metrics, **own}.items():
        if leaks(metric):
            raise _refusal(
                f"metric '{name}', which logs the values of single samples",
                f"a {type(metric).__name__}",
                "metrics that are averages over many samples",
            )


def _check_modules(task: LightningModule) -> None:
    for name, module in _trained(task):
        where = f"{type(module).__name__} at '{name}'"
        if isinstance(module, _BatchNorm):
            raise _refusal(
                "BatchNorm, which normalises each sample by the others of its batch",
                where,
                "GroupNorm, LayerNorm, InstanceNorm, RMSNorm",
                "Use privacy.replace_batch_norm=true, which puts GroupNorm in its place, or another model.",
            )
        if isinstance(module, _InstanceNorm) and module.track_running_stats:
            raise _refusal("running statistics of the data", where, "InstanceNorm with track_running_stats=False")
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            raise _refusal(
                "an embedding that rescales the rows that the data looks up", f"{where}, max_norm", "max_norm=None"
            )


def _trained(task: LightningModule) -> Iterator[tuple[str, nn.Module]]:
    for name, module in task.named_modules():
        is_frozen_norm = isinstance(module, _BatchNorm) and not module.training
        if not is_frozen_norm:
            yield name, module


def replace_batch_norm(module: nn.Module) -> int:
    """Puts GroupNorm in the place of every BatchNorm, with its scale and shift.

    Args:
        module: Changed in place.

    Returns:
        How many there were.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 48, 3), nn.BatchNorm2d(48))
        >>> replace_batch_norm(net), type(net[1]).__name__, net[1].num_groups
        (1, 'GroupNorm', 24)
    """
    count = 0
    for name, child in list(module.named_children()):
        if not isinstance(child, _BatchNorm):
            count += replace_batch_norm(child)
            continue
        channels = child.num_features
        # Features without a length or a picture are normalised over each other: one alone would always be 0.
        most = 1 if isinstance(child, nn.BatchNorm1d) else min(_MOST_GROUPS, channels)
        groups = next(g for g in range(most, 0, -1) if channels % g == 0)
        norm = nn.GroupNorm(groups, channels, eps=child.eps, affine=child.affine)
        if child.affine:
            norm.weight, norm.bias = child.weight, child.bias
        setattr(module, name, norm)
        count += 1
    return count


def _refusal(
    what: str, found: str, allowed: str, remedy: str = "Leave it out, or leave privacy out."
) -> CompositionError:
    return CompositionError(f"a private run cannot have {what}", found=found, allowed=allowed, remedy=remedy)
