"""From a composition that fits together to the objects of a run."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from omegaconf import OmegaConf
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrail.catalogue import load
from lightrail.configuration import Chosen, Composition, check_trainer_options
from lightrail.errors import CompositionError, ConfigurationError, UserError
from lightrail.kinds import KINDS
from lightrail.run.processes import fitted_trainer, plain_trainer, started_processes, take_rank
from lightrail.run.resolve import Resolved, resolve
from lightrail.run.resume import Resumed
from lightrail.run.run import Run
from lightrail.run.sharding_checks import check_module, is_sharding
from lightrail.step.players import Game, game_of
from lightrail.step.transform import Transform
from lightrail.traits import traits_of

__all__ = ["build"]


def build(composition: Composition, resumed: Resumed | None = None) -> Run:
    """Makes the objects that a composition names.

    Args:
        composition: What the configuration composed.
        resumed: The run that it continues, if any.

    Raises:
        UserError: Something that was chosen cannot be made or cannot work with the rest.
    """
    processes = started_processes()
    take_rank(processes)
    resolved = resolve(composition)
    config = composition.config
    check_trainer_options(config.trainer)
    trainer, fitted = fitted_trainer(plain_trainer(config.trainer), composition.overrides, processes)
    # Before the first weight is drawn.
    pl.seed_everything(config.seed, workers=True, verbose=False)
    data = _make_one(resolved, "data")
    sizes = dict(data.dimensions()) if data is not None and hasattr(data, "dimensions") else {}
    _record_sizes(composition, resolved, sizes)
    notes = [*composition.notes, *resolved.notes, *fitted]
    task = _make_task(resolved)
    if data is not None and not isinstance(data, LightningDataModule):
        raise _wrong_class("data", type(data), "a LightningDataModule")
    game = game_of(task)
    if is_sharding(config.trainer):
        check_module(task, is_game=game is not None)
    if game is not None:
        _check_game(config)
        game.attach(task)
    optimizer, schedule = _factories(resolved, task, game, notes)
    transforms = _make_transforms(resolved, task)
    run = Run(
        composition=composition,
        task=task,
        data=data,
        optimizer=optimizer,
        schedule=schedule,
        transforms=transforms,
        batching=_make_one(resolved, "batching"),
        callbacks=[make(resolved, each) for each in resolved.chosen.get("callback", ())],
        metrics={each.name: make(resolved, each) for each in resolved.chosen.get("metric", ())},
        loggers=[_logger_factory(resolved, each) for each in resolved.chosen.get("logger", ())],
        names={
            resolved.object(each): each.name.rpartition(".")[2]
            for chosen in resolved.chosen.values()
            for each in chosen
        },
        method_traits=tuple(
            traits_of(resolved.object(each), each.options)
            for kind in ("optimizer", "transform", "schedule", "batching")
            for each in resolved.chosen.get(kind, ())
        ),
        game=game,
        trainer=trainer,
        resumed=resumed,
        notes=notes,
    )
    for kind in ("privacy", "federated"):
        wrapper = resolved.one(kind)
        if wrapper is not None:
            run = make(resolved, wrapper, _parts(resolved, kind)).wrap(run)
    return run


def _parts(resolved: Resolved, kind: str) -> dict[str, Any]:
    """The plugins that are chosen within another."""
    parts = {}
    for each in KINDS.values():
        if each.within == kind:
            made = _make_one(resolved, each.name)
            if made is None and each.default is not None:
                made = load(each.name, each.default)()
            parts[each.name] = made
    return parts


def _check_game(config: Any) -> None:
    if str(config.trainer.precision) in ("16-mixed", "16"):
        raise CompositionError(
            "a task with several players cannot work at precision 16-mixed",
            found=f"trainer.precision={config.trainer.precision}: one gradient of one loss, scaled before the step",
            allowed="32-true, bf16-mixed, bf16-true, 64-true",
            remedy="Use trainer.precision=bf16-mixed.",
        )


def _record_sizes(composition: Composition, resolved: Resolved, sizes: Mapping[str, Any]) -> None:
    """What the data says of its sizes becomes part of the configuration, where the user left it open."""
    for kind in ("model", "task", "metric"):
        for each in resolved.chosen.get(kind, ()):
            parameters = _parameters(resolved.object(each))
            for name in parameters.keys() & sizes.keys():
                if each.options.get(name) is None:
                    each.options[name] = sizes[name]
                    OmegaConf.update(composition.config, f"{each.path}.{name}", sizes[name], force_add=True)


def _parameters(target: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(target).parameters
    except (TypeError, ValueError):
        return {}


def make(resolved: Resolved, chosen: Chosen, supplied: Mapping[str, Any] | None = None) -> Any:
    """Makes one plugin with its options.

    Args:
        resolved: The composition that it belongs to.
        chosen: The plugin.
        supplied: Values for parameters that the user left open, by name.

    Raises:
        ConfigurationError: The plugin does not accept its options.
    """
    target = resolved.object(chosen)
    return call(target, chosen, options_of(target, chosen, supplied or {}))


def options_of(target: Any, chosen: Chosen, supplied: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments for a plugin: what was configured, and what the platform knows where the user said nothing."""
    options = _plain(chosen.options)
    for name, parameter in _parameters(target).items():
        if name in supplied and options.get(name) is None:
            options[name] = supplied[name]
        elif isinstance(parameter.default, tuple) and isinstance(options.get(name), list):
            # YAML has no tuples.
            options[name] = tuple(options[name])
    return options


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    node = OmegaConf.create(dict(options))
    plain: dict[str, Any] = OmegaConf.to_container(node, resolve=True)  # type: ignore[assignment]
    if not _names_target(plain):
        return plain
    from hydra.utils import instantiate

    return {key: instantiate(value, _convert_="all") if _names_target(value) else value for key, value in plain.items()}


def _names_target(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "_target_" in value or any(map(_names_target, value.values()))
    return isinstance(value, list) and any(map(_names_target, value))


def call(target: Callable[..., Any], chosen: Chosen, options: Mapping[str, Any], *args: Any) -> Any:
    """Calls a plugin's class or function; what it says against its options becomes a four-part error."""
    try:
        return target(*args, **options)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        # A TypeError from deep inside is the plugin's own fault, and its traceback belongs to its author.
        if isinstance(error, TypeError) and not _is_about_the_call(error):
            raise
        raise ConfigurationError(
            f"{chosen.kind} '{chosen.name}' does not accept its options",
            found=", ".join(f"{chosen.path}.{k}={v!r}" for k, v in options.items() if _is_simple(v)) or "none",
            allowed=str(error),
            remedy=f"See `lightrail plugins {chosen.name}` for its options and their ranges.",
        ) from error


def _is_about_the_call(error: TypeError) -> bool:
    traceback = error.__traceback__
    depth = 0
    while traceback is not None:
        traceback, depth = traceback.tb_next, depth + 1
    return depth <= 2


def _is_simple(value: Any) -> bool:
    return isinstance(value, bool | int | float | str | list | tuple | type(None))


def _wrong_class(kind: str, found: type, wanted: str) -> CompositionError:
    return CompositionError(
        f"what was chosen as {kind} is not {wanted}",
        found=f"{found.__module__}.{found.__qualname__}",
        allowed=wanted,
        remedy=f"Choose another with {kind}=NAME, or {kind}._target_=your.Class.",
    )


def _make_one(resolved: Resolved, kind: str) -> Any:
    chosen = resolved.one(kind)
    return None if chosen is None else make(resolved, chosen)


def _make_task(resolved: Resolved) -> LightningModule:
    chosen = resolved.one("task")
    assert chosen is not None
    target = resolved.object(chosen)
    parameters = _parameters(target)
    supplied: dict[str, Any] = {}
    model = resolved.one("model")
    if "model" in parameters and "model" not in chosen.options:
        if model is not None:
            supplied["model"] = _make_one(resolved, "model")
    elif model is not None and model.explicit:
        raise CompositionError(
            f"task '{chosen.name}' takes no model",
            found=f"model={model.name}",
            allowed="a task whose constructor has a parameter 'model'",
            remedy=f"Leave model out, or add a parameter 'model' to {chosen.target}.",
        )
    task = call(target, chosen, options_of(target, chosen, supplied))
    if not isinstance(task, LightningModule):
        raise _wrong_class("task", type(task), "a LightningModule")
    return task


def _make_transforms(resolved: Resolved, task: LightningModule) -> list[Transform]:
    """Each is shown the task while its weights are fresh."""
    model = resolved.one("model")
    transforms: list[Transform] = []
    for each in resolved.chosen.get("transform", ()):
        supplied = {} if model is None else {"rebuild": partial(_rebuild, resolved, model)}
        transform = make(resolved, each, supplied)
        transform.attach(task)
        transforms.append(transform)
    return transforms


def _rebuild(resolved: Resolved, model: Chosen, **changes: Any) -> nn.Module:
    """The run's model once more, with some options changed; nothing is drawn from the run's random numbers."""
    changed = dataclasses.replace(model, options={**model.options, **changes})
    with torch.random.fork_rng():
        return make(resolved, changed)


Factory = Callable[[LightningModule], Optimizer]
ScheduleFactory = Callable[..., LRScheduler]


def _factories(
    resolved: Resolved, task: LightningModule, game: Game | None, notes: list[str]
) -> tuple[Factory | None, ScheduleFactory | None]:
    """How the optimizer and the schedule will be made; ``None`` for what the task does itself."""
    optimizer, schedule = resolved.one("optimizer"), resolved.one("schedule")
    methods = [each for kind in ("optimizer", "transform", "batching") for each in resolved.chosen.get(kind, ())]
    has_own = type(task).configure_optimizers is not LightningModule.configure_optimizers
    if has_own and not any(each.explicit for each in methods) and not (schedule and schedule.explicit):
        notes.append("optimizer: the task's own configure_optimizers; choose one with +optimizer=NAME")
        return None, None
    if optimizer is None:
        raise CompositionError(
            "the run has no optimizer",
            found="optimizer=null",
            allowed="an optimizer, or a task with configure_optimizers",
            remedy="Choose one with optimizer=NAME.",
        )
    if not task.automatic_optimization:
        raise CompositionError(
            f"task '{resolved.chosen['task'][0].name}' steps its optimizers itself",
            found=f"automatic_optimization=False, with optimizer={optimizer.name}",
            allowed="automatic optimization, or the task's own configure_optimizers",
            remedy="Leave optimizer, transform and schedule out, or let the task use automatic optimization.",
        )
    make_optimizer = _optimizer_factory(resolved, optimizer, game)
    if game is None:
        # Its options are tried before anything is spent, on parameters of their own.
        make_optimizer(_Probe())
    if schedule is None:
        return make_optimizer, None
    target = resolved.object(schedule)

    def make_schedule(opt: Optimizer, total_steps: int, **known: Any) -> LRScheduler:
        return call(target, schedule, options_of(target, schedule, known), opt, total_steps)

    return make_optimizer, make_schedule


class _Probe(LightningModule):
    """The smallest module that an optimizer can be built for."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)


def _optimizer_factory(resolved: Resolved, chosen: Chosen, game: Game | None) -> Factory:
    target = resolved.object(chosen)
    options = options_of(target, chosen, {})
    players = options.pop("players", {})
    named = traits_of(target, options).needs_parameter_names
    if players and game is None:
        raise CompositionError(
            "the task has no players",
            found=f"optimizer.players.{next(iter(players))}",
            allowed="options of the one optimizer",
            remedy="Leave optimizer.players out, or let the task name its players with players() and player_loss().",
        )

    def make(task: LightningModule, params: Sequence[Any], own: Mapping[str, Any]) -> Optimizer:
        if named:
            params = _with_names(task, params)
        optimizer = call(target, chosen, {**options, **own}, params)
        if not isinstance(optimizer, Optimizer):
            raise _wrong_class("optimizer", type(optimizer), "a torch.optim.Optimizer")
        return optimizer

    if game is not None:
        # Of the task at hand: a federated run trains copies.
        return lambda task: Game(task).optimizer(partial(make, task), players)
    return lambda task: make(task, parameters_of(task), {})


def _with_names(task: LightningModule, params: Sequence[Any]) -> list[Any]:
    """Pairs of name and parameter, in groups where there are groups."""
    names = {id(p): name for name, p in task.named_parameters()}
    return [
        {**each, "params": _with_names(task, each["params"])} if isinstance(each, dict) else (names[id(each)], each)
        for each in params
    ]


def parameters_of(task: LightningModule) -> list[Any]:
    """What an optimizer is built from: the task's own groups where it names some, else all that can be trained.

    Args:
        task: A task; its optional method ``parameter_groups()`` gives torch's list of group dictionaries.
    """
    groups: Any = getattr(task, "parameter_groups", None)
    if groups is not None:
        return [{**group, "params": [p for p in group["params"] if p.requires_grad]} for group in groups()]
    return [p for p in task.parameters() if p.requires_grad]


def _logger_factory(resolved: Resolved, chosen: Chosen) -> Callable[[str], Any]:
    return lambda folder: make(resolved, chosen, {"folder": folder})
