"""Conformance of sweep methods: proposals lie in the space, are the same again, and survive a restart."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from lightrail.sweep.method import Choices, Dimension, Goal, Interval, SweepMethod
from lightrail.testing.building import accepts, check_is_documented, check_names_its_paper, refuses_unknown_options
from lightrail.testing.suite import Check, Suite, known_exceptions, name_of, require
from lightrail.traits import traits_of

__all__ = ["SweepSuite"]

Options = Mapping[str, Any]
GOAL = Goal("val_loss", "min")
SPACE: dict[str, Dimension] = {
    "optimizer.lr": Interval(1e-5, 0.1, log=True),
    "optimizer.momentum": Interval(0.0, 0.99),
    "model.width": Interval(8, 64, whole=True),
    "data.batch_size": Interval(4, 256, log=True, whole=True),
    "optimizer": Choices(("adamw", "sgd", "a 'quoted' word")),
    "+schedule": Choices(("null",)),
}
# Enough for two proposals beyond a start at random.
TRIALS, LEARNING = 7, 5


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "sweep"


def _made(plugin: Any, options: Options, folder: Path, **more: Any) -> SweepMethod:
    given = {"space": SPACE, "folder": folder, "goal": GOAL, "trials": TRIALS}
    start = {"startup": LEARNING} if accepts(plugin, "startup") else {}
    return plugin(**{**given, **start, **options, **more})


def _loss(values: Mapping[str, str]) -> float:
    rate, momentum = float(values["optimizer.lr"]), float(values["optimizer.momentum"])
    return (math.log10(rate) + 3) ** 2 + (momentum - 0.9) ** 2 + (values["optimizer"] == "sgd")


def _carried_out(method: SweepMethod, numbers: range) -> list[dict[str, str]]:
    asked = []
    for number in numbers:
        asked.append(method.ask(number))
        method.tell(number, _loss(asked[-1]))
    return asked


def check_builds_from_options(plugin: Any, options: Options) -> None:
    """With a space, a folder and a goal it is a lightrail.SweepMethod that has written nothing."""
    with _folder() as folder:
        method = _made(plugin, options, folder)
        require(isinstance(method, SweepMethod), f"it is no lightrail.SweepMethod but {type(method).__name__}")
        require(not folder.exists(), "it writes before it is asked")


def check_rejects_unknown_options(plugin: Any, options: Options) -> None:
    """An option that the signature lacks is an error."""
    with _folder() as folder:
        refuses_unknown_options(lambda **given: _made(plugin, given, folder), options)


def check_proposes_within_the_space(plugin: Any, options: Options) -> None:
    """Every trial gives each key a value of its dimension, as it is typed."""
    with _folder() as folder:
        for values in _carried_out(_made(plugin, options, folder), range(TRIALS)):
            require(set(values) == set(SPACE), f"the space has {sorted(SPACE)}, a trial has {sorted(values)}")
            for key, text in values.items():
                require(isinstance(text, str), f"{key}={text!r} is no text as it is typed")
                require(SPACE[key].holds(text), f"{key}={text} is not in {SPACE[key]}")


def check_proposes_alike_for_a_seed(plugin: Any, options: Options) -> None:
    """The same seed proposes the same trials, and another one others."""
    with _folder() as folder:
        first = _carried_out(_made(plugin, options, folder / "1"), range(TRIALS))
        again = _carried_out(_made(plugin, options, folder / "2"), range(TRIALS))
        require(first == again, "the same seed proposes other trials")
        if traits_of(plugin).is_stochastic:
            other = _made(plugin, {**options, "seed": 12345}, folder / "3").ask(0)
            require(other != first[0], "another seed begins with the same trial")


def check_survives_a_restart(plugin: Any, options: Options) -> None:
    """One made anew over the folder answers what it answered, and goes on as if nothing had happened."""
    with _folder() as folder:
        whole = _carried_out(_made(plugin, options, folder / "whole"), range(TRIALS))
        half = _carried_out(_made(plugin, options, folder / "half"), range(TRIALS - 1))
        anew = _made(plugin, options, folder / "half")
        require([anew.ask(number) for number in range(TRIALS - 1)] == half, "after a restart it answers otherwise")
        last = anew.ask(TRIALS - 1)
        require(last == whole[-1], f"after a restart it goes on with {last}, else with {whole[-1]}")
        require(_made(plugin, options, folder / "half").ask(TRIALS - 1) == last, "asked again it answers otherwise")


def check_accepts_failures(plugin: Any, options: Options) -> None:
    """A trial that failed, or whose value is not finite, is told of once or twice, and the search goes on."""
    with _folder() as folder:
        method = _made(plugin, options, folder)
        for number in range(TRIALS):
            method.ask(number)
            value = (None, math.nan, math.inf, 1.0, -2.0)[number % 5]
            method.tell(number, value)
            method.tell(number, value)


def check_tells_once(plugin: Any, options: Options) -> None:
    """Telling a trial again, with whatever value, changes no later proposal."""
    with _folder() as folder:
        once, twice = _made(plugin, options, folder / "1"), _made(plugin, options, folder / "2")
        _carried_out(once, range(TRIALS - 1))
        for number, values in enumerate(_carried_out(twice, range(TRIALS - 1))):
            twice.tell(number, -_loss(values))
        require(once.ask(TRIALS - 1) == twice.ask(TRIALS - 1), "telling a trial twice changes what comes next")


def check_asks_in_parallel(plugin: Any, options: Options) -> None:
    """Trials are proposed before the first of them has ended, and no two of those are the same."""
    with _folder() as folder:
        method = _made(plugin, options, folder)
        asked = [method.ask(number) for number in range(TRIALS)]
        distinct = {tuple(values.items()) for values in asked}
        require(len(distinct) == len(asked), "of trials that run side by side two are the same")


def check_judges_from_another_process(plugin: Any, options: Options) -> None:
    """One made anew, as each job makes it, is asked about its trial; a value that is not finite is no judgement."""
    with _folder() as folder:
        method = _made(plugin, options, folder)
        method.ask(0)
        for validation, value in enumerate((0.5, math.nan, 0.4), 1):
            judged = _made(plugin, options, folder).is_hopeless(0, validation, value)
            require(judged is False, f"the first trial of all is hopeless at validation {validation}: {judged!r}")
        method.tell(0, 0.4)


CHECKS: tuple[Check, ...] = (
    check_is_documented,
    check_names_its_paper,
    check_builds_from_options,
    check_rejects_unknown_options,
    check_proposes_within_the_space,
    check_proposes_alike_for_a_seed,
    check_survives_a_restart,
    check_accepts_failures,
    check_tells_once,
    check_asks_in_parallel,
    check_judges_from_another_process,
)


class SweepSuite(Suite):
    """Every check of a sweep method."""

    kind: ClassVar[str] = "sweep"
    checks: ClassVar[tuple[Check, ...]] = (*CHECKS, known_exceptions(frozenset(map(name_of, CHECKS))))
