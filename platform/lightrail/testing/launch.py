"""Conformance of launches: an order is started, found again by another process, carried out, and cancelled."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from lightrail.errors import UserError
from lightrail.launch.job import PHASES, Job, JobState
from lightrail.launch.launch import Launch
from lightrail.launch.order import Order
from lightrail.testing.building import built, check_is_documented, refuses_unknown_options, require_refused
from lightrail.testing.suite import Check, NonConformance, NotApplicable, Suite, known_exceptions, name_of, require

__all__ = ["LaunchSuite"]

Options = Mapping[str, Any]
PATIENCE = 120.0
# The smallest run that saves: a step, no loggers, no pictures.
SHORT = ("model=mlp", "logger=null", "callback=null", "trainer.max_steps=1", "trainer.accelerator=cpu")
ENDLESS = (*SHORT[:-2], "trainer.max_steps=1000000000", "trainer.max_epochs=-1", "trainer.accelerator=cpu")
_ASK = "import sys, pathlib, lightrail.launch as l; print(l.Job.of(pathlib.Path(sys.argv[1])).state().phase)"


@contextmanager
def _ordered(launch: Launch, overrides: tuple[str, ...]) -> Iterator[Order]:
    """An order in a new run folder, which goes away with whatever carries it out."""
    from omegaconf import OmegaConf

    from lightrail.configuration import compose
    from lightrail.launch.submission import ordered

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as root:
        composition = compose([*overrides, f"run.root={root}", "run.name=conformance"])
        trainer: Any = OmegaConf.to_container(composition.config.trainer, resolve=True)
        try:
            launch.check(trainer)
        except UserError as error:
            raise NotApplicable(f"not available here: {error.what}: {error.found}") from error
        order = ordered(composition)
        try:
            yield order
        finally:
            job = Job.of(order.folder)
            if job is not None and not job.state().is_over:
                launch.cancel(job)
                _waited(job, lambda state: state.is_over, "end after it was cancelled")


def _made(plugin: Any, options: Options) -> Launch:
    launch = built(plugin, options)
    # Any process finds it again by where it is defined: a plugin under test need not be registered.
    launch.name, launch.options = f"{plugin.__module__}.{plugin.__qualname__}", dict(options)
    return launch


def _waited(job: Job, condition: Callable[[JobState], bool], what: str) -> JobState:
    end = time.monotonic() + PATIENCE
    while not condition(state := job.state()):
        log = "" if state.phase in ("pending", "running") else f"; {state.reason}"
        require(not state.is_over and time.monotonic() < end, f"the job is {state.phase} and does not {what}{log}")
        time.sleep(0.1)
    return state


def check_builds_from_options(plugin: Any, options: Options) -> None:
    """``plugin(**options)`` is a lightrail.Launch, which knows how many jobs of a sweep it may have at a time."""
    launch = built(plugin, options)
    require(isinstance(launch, Launch), f"it is no lightrail.Launch but {type(launch).__name__}")
    require(launch.parallel is None or launch.parallel >= 1, f"parallel is {launch.parallel!r}")


def check_rejects_unknown_options(plugin: Any, options: Options) -> None:
    """An option that the signature lacks is an error."""
    built(plugin, options)
    refuses_unknown_options(plugin, options)


def check_refuses_options_out_of_range(plugin: Any, options: Options) -> None:
    """No jobs at a time, and fewer than no restarts, are refused in four parts."""
    require_refused(plugin, {**options, "parallel": 0}, "parallel=0")
    require_refused(plugin, {**options, "restarts": -1}, "restarts=-1")


def check_carries_out_an_order(plugin: Any, options: Options) -> None:
    """It starts an order and returns; any process finds the job by its folder and learns that it has finished."""
    launch = _made(plugin, options)
    with _ordered(launch, SHORT) as order:
        job = launch.start(order).keep()
        require(job.folder == order.folder and job.number, f"the job is {job}")
        require(Job.of(order.folder) == job, "job.json does not hold what the launch knows of the job")
        found = subprocess.run(
            [sys.executable, "-c", _ASK, str(order.folder)], env=os.environ, capture_output=True, text=True, check=False
        )
        require(found.stdout.strip() in PHASES, f"another process does not find the job: {found.stdout}{found.stderr}")
        state = _waited(job, lambda state: state.is_over, "end")
        require(state.phase == "finished", f"a run of one step has {state.phase}: {state.reason}{_printed(order)}")
        require((order.folder / "summary.json").is_file(), "it has finished without a summary in the order's folder")
        launch.cancel(job)
        require(job.state().phase == "finished", "cancelling a job that is over changes how it ended")


def check_cancels_a_job(plugin: Any, options: Options) -> None:
    """A job that is under way is asked to stop by an object that did not start it, and stops."""
    launch = _made(plugin, options)
    with _ordered(launch, ENDLESS) as order:
        starts = order.workspace / "starts.jsonl"
        job = launch.start(order).keep()
        _waited(job, lambda state: state.phase == "running" and starts.exists(), "begin")
        again = Job.of(order.folder)
        assert again is not None
        _made(plugin, options).cancel(again)
        state = _waited(job, lambda state: state.is_over, "stop")
        require(state.phase == "stopped", f"a job that was cancelled has {state.phase}: {state.reason}")
        _until_quiet(order)


def _until_quiet(order: Order) -> None:
    """Until no process holds the order any more."""
    from lightrail.launch.node import is_held

    end = time.monotonic() + PATIENCE
    while is_held(order.folder):
        if time.monotonic() > end:
            raise NonConformance("a job that has stopped leaves processes behind")
        time.sleep(0.1)


def _printed(order: Order) -> str:
    logs = sorted(order.workspace.glob("*.log"))
    return "".join(f"\n{log.name}: {log.read_text()[-500:]}" for log in logs)


CHECKS: tuple[Check, ...] = (
    check_is_documented,
    check_builds_from_options,
    check_rejects_unknown_options,
    check_refuses_options_out_of_range,
    check_carries_out_an_order,
    check_cancels_a_job,
)


class LaunchSuite(Suite):
    """Every check of a launch; what is not available on this machine is skipped by name."""

    kind: ClassVar[str] = "launch"
    checks: ClassVar[tuple[Check, ...]] = (*CHECKS, known_exceptions(frozenset(map(name_of, CHECKS))))
