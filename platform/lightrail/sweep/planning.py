"""From a command line to a sweep that is written down: everything is composed and checked before anything starts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightrail.configuration.command_line import Token
from lightrail.errors import ConfigurationError, UserError
from lightrail.launch.job import Job
from lightrail.launch.launch import Launch
from lightrail.sweep.ledger import Ledger
from lightrail.sweep.method import Choices, Dimension, Goal, SweepMethod, plain_space, space_from

if TYPE_CHECKING:
    from lightrail.configuration import Chosen, Composition

__all__ = ["Planned", "composed_trial", "found_again", "planned_sweep"]

_BAD_AT_MOST = 5  # are named; more of the same teach nothing
_OF_THE_GRID = ("sweep.metric", "sweep.direction")  # a method has them among its own options


@dataclass(frozen=True)
class Planned:
    """A sweep that is ready to be carried out.

    Args:
        ledger: Its folder.
        launch: Where its trials are carried out.
        method: What proposes its trials; ``None`` where all are written already.
    """

    ledger: Ledger
    launch: Launch
    method: SweepMethod | None = None


def planned_sweep(overrides: Sequence[str], config_dirs: Sequence[str] = ()) -> Planned:
    """Writes a sweep into a new folder.

    Args:
        overrides: As typed, with sweeps such as ``seed=1,2``, and ``sweep=NAME`` for a method.
        config_dirs: Folders of the user's own configuration.

    Raises:
        UserError: Trials that cannot be carried out, named; nothing was started then.
    """
    keys = {Token.parse(each).key: each for each in overrides}
    if "run.resume" in keys:
        raise ConfigurationError(
            "a sweep begins new runs, and cannot go on with one",
            found=f"-m {keys['run.resume']}",
            allowed="run.resume without -m; a sweep goes on with `train sweep.resume=FOLDER`",
            remedy="Leave out -m, or run.resume.",
        )
    typed = keys.get("sweep", keys.get("sweep._target_", "")).partition("=")[2]
    if typed.lower() not in ("", "null", "none"):
        return _planned_method(overrides, config_dirs)
    return _planned_grid(overrides, config_dirs)


def _planned_grid(overrides: Sequence[str], config_dirs: Sequence[str]) -> Planned:
    from lightrail.configuration import sweep

    own = {token.key: token.value for token in map(Token.parse, overrides) if token.key in _OF_THE_GRID}
    jobs = sweep([each for each in overrides if Token.parse(each).key not in own], config_dirs=config_dirs)
    varying = varying_keys(jobs)
    values = [values_of(job, varying) for job in jobs]
    compositions = _checked([_words(each) for each in values], jobs, config_dirs)
    launch = _launch_of_all(compositions)
    goal = _goal(compositions[0], own.get("sweep.metric"), own.get("sweep.direction"))
    ledger = _new_ledger(compositions[0], is_named="run.name" not in varying)
    for number, composition in enumerate(compositions):
        ledger.order(number, values[number], composition, len(jobs))
    return Planned(_written(ledger, overrides, len(jobs), goal, launch), launch)


def _planned_method(overrides: Sequence[str], config_dirs: Sequence[str]) -> Planned:
    from lightrail.configuration import compose
    from lightrail.sweep.space import space_of

    space, fixed = space_of(list(overrides), config_dirs=config_dirs)
    probes = _probes(space)
    first = compose([*fixed, *_typed(probes[0])], config_dirs=config_dirs)
    chosen = next(each for each in first.chosen if each.kind == "sweep")
    trial_words = [each for each in fixed if Token.parse(each).group.partition(".")[0] != "sweep"]
    jobs = [[*trial_words, *_typed(probe)] for probe in probes]
    compositions = _checked([_words(probe) for probe in probes], jobs, config_dirs)
    launch = _launch_of_all(compositions)
    options = dict(chosen.options)
    ledger = _new_ledger(first)
    try:
        method = _made_method(chosen, space, ledger.folder, _goal(first))
    except BaseException:
        shutil.rmtree(ledger.folder)
        raise
    content = {
        "method": {"name": chosen.name, "target": chosen.target, "options": options},
        "space": plain_space(space),
        "fixed": trial_words,
        "config_dirs": [os.path.abspath(each) for each in config_dirs],
    }
    return Planned(_written(ledger, overrides, method.trials, method.goal, launch, **content), launch, method)


def _made_method(chosen: Chosen, space: Mapping[str, Dimension], folder: Path, goal: Goal) -> SweepMethod:
    from lightrail.catalogue.target import import_target
    from lightrail.run.build import call, options_of

    if chosen.plugin is not None:
        chosen.plugin.check_extras()
    target = import_target(chosen.target)
    supplied = {"space": space, "folder": folder, "goal": goal}
    return call(target, chosen, {**options_of(target, chosen, {}), **supplied})


def found_again(ledger: Ledger, parallel: int | None = None) -> Planned:
    """A sweep that was written before, made ready to go on.

    Args:
        ledger: Its folder.
        parallel: Trials at a time from now on, at least 1; ``None`` for as many as before.

    Raises:
        UserError: Its launch or its method is not installed here.
    """
    from lightrail.launch.choice import launch_of

    content = ledger.content
    known = content["launch"]
    options = known["options"] if parallel is None else {**known["options"], "parallel": parallel}
    launch = launch_of(Job(ledger.folder, known["name"], "", options))
    if (method := content.get("method")) is None:
        return Planned(ledger, launch)
    from lightrail.catalogue.plugin import find
    from lightrail.configuration import Chosen

    plugin = None if method["name"] == method["target"] else find("sweep", method["name"])
    chosen = Chosen("sweep", method["name"], "sweep", method["target"], plugin, True, method["options"])
    space = space_from(content["space"])
    return Planned(ledger, launch, _made_method(chosen, space, ledger.folder, Goal(**content["goal"])))


def composed_trial(ledger: Ledger, values: Mapping[str, str], *, is_here: bool) -> Composition:
    """The composition of a trial that a method proposes.

    Args:
        ledger: The sweep's.
        values: What the method gives to each key.
        is_here: Whether it will be carried out on this machine.

    Raises:
        UserError: It cannot be composed, or its plugins do not fit together.
    """
    from lightrail.configuration import compose
    from lightrail.run.resolve import resolve

    composition = compose([*ledger.content["fixed"], *_typed(values)], config_dirs=ledger.content["config_dirs"])
    resolve(composition, is_here=is_here)
    return composition


def _checked(labels: Sequence[str], jobs: Sequence[Sequence[str]], config_dirs: Sequence[str]) -> list[Composition]:
    """Every job's composition; those that cannot be carried out are told together, before anything is written."""
    from lightrail.configuration import compose
    from lightrail.run.resolve import resolve

    compositions: list[Composition] = []
    bad: list[tuple[str, UserError]] = []
    for label, job in zip(labels, jobs, strict=True):
        try:
            compositions.append(compose(job, config_dirs=config_dirs))
            launch = next((each.name for each in compositions[-1].chosen if each.kind == "launch"), None)
            resolve(compositions[-1], is_here=launch in (None, "here"))
        except UserError as error:
            bad.append((label, error))
        if len(bad) == _BAD_AT_MOST:
            break
    if not bad:
        return compositions
    first = bad[0][1]
    if len(jobs) == 1 or (len(bad) == min(len(jobs), _BAD_AT_MOST) and len({str(error) for _, error in bad}) == 1):
        raise first
    raise type(first)(
        f"{'at least ' if len(bad) == _BAD_AT_MOST else ''}{len(bad)} of {len(jobs)} jobs cannot be carried out; none "
        "was started",
        found="\n".join(f"{label}: {error.what} ({error.found})" for label, error in bad),
        allowed=first.allowed,
        remedy=f"{first.remedy} Or leave what does not fit out of the sweep.",
    ) from first


def _launch_of_all(compositions: Sequence[Composition]) -> Launch:
    """The launch that all of them choose, asked whether it can carry each of them out."""
    from omegaconf import OmegaConf

    from lightrail.launch.choice import chosen_launch, launch_of

    found = {
        next((f"{each.name} {each.options}" for each in one.chosen if each.kind == "launch"), "null")
        for one in compositions
    }
    if len(found) > 1:
        raise ConfigurationError(
            "the jobs of a sweep go to different launches",
            found="; ".join(sorted(found)),
            allowed="one launch, with the same options, for all jobs of a sweep",
            remedy="Give launch one value, or start a sweep for each.",
        )
    launch = chosen_launch(compositions[0]) or launch_of(Job(Path(), "here", "", {}))
    for composition in compositions if not launch.in_this_process else ():
        trainer: Any = OmegaConf.to_container(composition.config.trainer, resolve=True)
        launch.check(trainer)
    return launch


def _goal(composition: Composition, metric: str | None = None, direction: str | None = None) -> Goal:
    """What a sweep is after: what its user says, else what its task does."""
    from lightrail.catalogue.target import import_target

    said = Goal.of(import_target(next(each.target for each in composition.chosen if each.kind == "task")))
    if direction not in (None, "min", "max") or (metric not in (None, said.metric) and direction is None):
        raise ConfigurationError(
            f"whether less or more of '{metric or said.metric}' is better is not said",
            found=f"sweep.direction={direction}",
            allowed="sweep.direction=min or sweep.direction=max",
            remedy="Add it beside sweep.metric.",
        )
    return Goal(metric or said.metric, direction or said.mode)  # type: ignore[arg-type]


def _new_ledger(composition: Composition, *, is_named: bool = True) -> Ledger:
    from lightrail.run.folder import RunFolder

    run = composition.config.run
    folder = RunFolder.create(Path(run.root), run.name if is_named else None, "sweep", bare=True).path
    (folder / "jobs").mkdir()
    return Ledger(folder)


def _written(ledger: Ledger, overrides: Sequence[str], planned: int, goal: Goal, launch: Launch, **more: Any) -> Ledger:
    from lightrail.run.lock import command_of

    return ledger.write(
        command=command_of(["-m", *overrides]),
        directory=os.getcwd(),
        planned=planned,
        goal=asdict(goal),
        launch={"name": launch.name, "options": launch.options},
        **more,
    )


def varying_keys(jobs: Sequence[Sequence[str]]) -> list[str]:
    """The keys that differ between jobs, in the order in which they stand.

    Example:
        >>> varying_keys([["+optimizer=adamw", "+seed=1"], ["+optimizer=adamw", "+seed=2"]])
        ['seed']
    """
    seen: dict[str, set[str | None]] = {}
    for job in jobs:
        for token in map(Token.parse, job):
            seen.setdefault(token.key, set()).add(token.value)
    return [key for key, values in seen.items() if len(values) > 1]


def values_of(job: Sequence[str], keys: Sequence[str]) -> dict[str, str]:
    """What a job gives to some keys, as typed."""
    given = {token.key: token.value or "" for token in map(Token.parse, job)}
    return {key: given[key] for key in keys if key in given}


def _words(values: Mapping[str, str]) -> str:
    return " ".join(_typed(values))


def _typed(values: Mapping[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in values.items()]


def _probes(space: Mapping[str, Dimension]) -> list[dict[str, str]]:
    """Configurations in which each value of each choice and both ends of each interval occur once."""
    ends = {
        key: list(dimension.values)
        if isinstance(dimension, Choices)
        else [dimension.typed(dimension.low), dimension.typed(dimension.high)]
        for key, dimension in space.items()
    }
    first = {key: values[0] for key, values in ends.items()}
    others = [{**first, key: value} for key, values in ends.items() for value in values[1:]]
    return [first, *others]
