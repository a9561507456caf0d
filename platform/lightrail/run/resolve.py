"""Checks a whole composition against the traits of its plugins, before any data is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightrail.catalogue import available, import_target
from lightrail.configuration import Chosen, Composition
from lightrail.errors import CompositionError
from lightrail.kinds import KINDS
from lightrail.run.processes import fitted_trainer, plain_trainer, started_processes
from lightrail.run.sharding_checks import check_sharding
from lightrail.traits import Traits, traits_of

__all__ = ["Resolved", "resolve"]


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A composition whose plugins fit together.

    Args:
        chosen: The plugins that take part, by kind, in order.
        objects: The class or function of each.
        notes: What was decided for the user, one sentence each.
    """

    chosen: Mapping[str, tuple[Chosen, ...]]
    objects: Mapping[str, Any]
    notes: tuple[str, ...]

    def one(self, kind: str) -> Chosen | None:
        """The plugin of a kind of which there can be one."""
        return next(iter(self.chosen.get(kind, ())), None)

    def object(self, chosen: Chosen) -> Any:
        return self.objects[chosen.path]


def resolve(composition: Composition, *, is_here: bool = True) -> Resolved:
    """Loads what was chosen and checks that it fits together.

    Args:
        composition: What the configuration composed.
        is_here: Whether it will run on this machine, whose devices are then counted.

    Raises:
        CompositionError: Plugins that cannot work together, with what to change.
        PluginError: A plugin that cannot be loaded.
    """
    chosen = list(composition.chosen)
    objects = {each.path: import_target(each.target) for each in chosen}
    notes: list[str] = []
    trainer = composition.config.trainer
    methods = [
        (each, traits_of(objects[each.path], each.options))
        for each in chosen
        if each.kind in ("optimizer", "transform", "schedule", "batching")
    ]
    _check_precision(methods, str(trainer.precision))
    check_sharding(methods, chosen, objects, trainer, notes)
    if is_here:
        _check_devices(fitted_trainer(plain_trainer(trainer), composition.overrides, started_processes())[0])
    _check_batching(chosen, trainer)
    _check_evaluation_points(methods)
    _check_parts(chosen)
    task = next((each for each in chosen if each.kind == "task"), None)
    if task is None:
        raise CompositionError(
            "the run has no task",
            found="task=null",
            allowed="a task, which owns the loss",
            remedy="Choose one with task=NAME, or task._target_=your.LightningModule.",
        )
    _check_task(methods, task, objects[task.path])
    chosen = _without_fought_schedule(chosen, methods, notes)
    grouped: dict[str, tuple[Chosen, ...]] = {}
    for each in chosen:
        grouped[each.kind] = (*grouped.get(each.kind, ()), each)
    return Resolved(grouped, objects, tuple(notes))


def _check_parts(chosen: Sequence[Chosen]) -> None:
    """What belongs within another kind does nothing without it."""
    kinds = {each.kind for each in chosen}
    for each in chosen:
        owner = KINDS[each.kind].within
        if owner is not None and owner not in kinds:
            raise CompositionError(
                f"{each.kind} '{each.name}' does nothing without a {owner} method",
                found=f"{owner}.{each.kind}={each.name}",
                allowed=f"with {owner}=NAME; installed: {', '.join(available(owner)) or 'none'}",
                remedy=f"Choose one with +{owner}=NAME, or leave {each.kind} out.",
            )


def _check_precision(methods: Sequence[tuple[Chosen, Traits]], precision: str) -> None:
    for chosen, traits in methods:
        asks = traits.evaluates_again or traits.watches_gradient or chosen.kind == "batching"
        if asks and precision in ("16-mixed", "16"):
            raise CompositionError(
                f"{chosen.kind} '{chosen.name}' cannot work at precision 16-mixed",
                found=f"trainer.precision={precision}: the gradient is scaled and evaluated once, before the step",
                allowed="32-true, bf16-mixed, bf16-true, 64-true",
                remedy="Use trainer.precision=bf16-mixed, or a method that needs one gradient only.",
            )


def _check_batching(chosen: Sequence[Chosen], trainer: Any) -> None:
    """A share of the batches means nothing where their number and size change."""
    batching = next((each for each in chosen if each.kind == "batching"), None)
    limit = trainer.get("limit_train_batches", 1.0)
    if batching is not None and limit not in (None, 1.0):
        raise CompositionError(
            f"batching '{batching.name}' decides how many batches there are",
            found=f"trainer.limit_train_batches={limit}",
            allowed="a horizon in samples",
            remedy="Use trainer.max_samples=N in place of trainer.limit_train_batches.",
        )


def _check_evaluation_points(methods: Sequence[tuple[Chosen, Traits]]) -> None:
    """Two methods that evaluate elsewhere than they train would each move the other's point."""
    movers = [chosen for chosen, traits in methods if traits.has_evaluation_point]
    if len(movers) > 1:
        raise CompositionError(
            "two methods each want the parameters evaluated at a point of their own",
            found=", ".join(f"{each.kind} '{each.name}'" for each in movers),
            allowed="one method that averages, or looks from another point",
            remedy=f"Leave out {movers[-1].kind} '{movers[-1].name}', or choose another {movers[0].kind}.",
        )


def _check_devices(trainer: Mapping[str, Any]) -> None:
    accelerator, devices = str(trainer["accelerator"]), trainer["devices"]
    wanted = len(devices) if isinstance(devices, Sequence) and not isinstance(devices, str) else devices
    present = torch.cuda.device_count()
    if accelerator in ("gpu", "cuda"):
        allowed = f"{present} GPU{'s' if present != 1 else ''} on this machine"
        if present == 0 or (isinstance(wanted, int) and wanted > present):
            raise CompositionError(
                "the run asks for more devices than there are",
                found=f"trainer.accelerator={accelerator} trainer.devices={devices}",
                allowed=allowed,
                remedy="Ask for fewer with trainer.devices=N, or use trainer=cpu."
                if present == 0
                else f"Ask for at most trainer.devices={present}.",
            )
    elif accelerator == "auto" and present and isinstance(wanted, int) and wanted > present:
        raise CompositionError(
            "the run asks for more devices than there are",
            found=f"trainer.devices={devices}",
            allowed=f"{present} GPUs on this machine",
            remedy=f"Ask for at most trainer.devices={present}, or use trainer.accelerator=cpu.",
        )


_TASK_METHODS = (
    ("needs_sampled_loss", "sampled_loss", "sampled_loss(self, batch, generator)"),
    ("needs_objectives", "objectives", "objectives(self, batch)"),
    ("needs_clusters", "clusters", "clusters(self, batch)"),
    ("needs_sample_losses", "sample_losses", "sample_losses(self, batch)"),
    ("needs_outputs", "outputs", "outputs(self, batch) and output_loss(self, outputs, batch)"),
    ("needs_outputs", "output_loss", "outputs(self, batch) and output_loss(self, outputs, batch)"),
)


def _check_task(methods: Sequence[tuple[Chosen, Traits]], task: Chosen, task_class: Any) -> None:
    for chosen, traits in methods:
        for trait, method, signature in _TASK_METHODS:
            if getattr(traits, trait) and not callable(getattr(task_class, method, None)):
                raise CompositionError(
                    f"{chosen.kind} '{chosen.name}' needs a task with {signature}",
                    found=f"task '{task.name}' ({task.target}) has none",
                    allowed=f"a task that defines {signature}",
                    remedy=f"Add {signature} to {task.target}, or choose another {chosen.kind}.",
                )


def _without_fought_schedule(
    chosen: list[Chosen], methods: Sequence[tuple[Chosen, Traits]], notes: list[str]
) -> list[Chosen]:
    """A method that sets its own step size refuses a schedule; one that is only there by default gives way."""
    setter = next((method for method, traits in methods if traits.sets_step_size), None)
    schedule = next((each for each in chosen if each.kind == "schedule"), None)
    if setter is None or schedule is None:
        return chosen
    if schedule.explicit:
        raise CompositionError(
            f"{setter.kind} '{setter.name}' sets its own step size, and a schedule would fight it",
            found=f"schedule={schedule.name}",
            allowed="schedule=null",
            remedy=f"Leave the schedule out, or choose another {setter.kind}.",
        )
    notes.append(f"no schedule: {setter.kind} '{setter.name}' sets its own step size")
    return [each for each in chosen if each is not schedule]
