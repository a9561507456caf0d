"""The ``train`` command: normalise the command line, compose, check, build, execute, report."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightrail.errors import LOST_RANK, Interrupted, LostRank

if TYPE_CHECKING:
    from lightrail.configuration import Composition
    from lightrail.run.run import Run

__all__ = ["main", "run_to_end"]

_UNSPOKEN = ("logger", "callback", "launch", "sweep")


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains what the command line composes.

    Args:
        arguments: The words after ``train``; those of the process by default.

    Returns:
        The exit status: 0, 2 for a mistake that the user can mend, 128 + N where signal N asked for a stop.
    """
    from lightrail.command import reporting_errors

    options, overrides = _parser().parse_known_args(arguments)
    with reporting_errors() as outcome:
        outcome.status = _train(options, [*options.overrides, *overrides])
    return outcome.status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="train", add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("--cfg", action="store_true")
    parser.add_argument("--config-dir", "-cd", action="append", default=[])
    # What a launch starts elsewhere: the run whose order lies in this folder.
    parser.add_argument("--order")
    parser.add_argument("--version", action="store_true")
    return parser


def _train(options: argparse.Namespace, overrides: list[str]) -> int:
    from lightrail import __version__, configuration

    if options.version:
        print(f"lightrail {__version__}")
        return 0
    if options.help:
        print(configuration.help_text("train", options.config_dir))
        return 0
    if options.cfg:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(configuration.compose(overrides, config_dirs=options.config_dir).config), end="")
        return 0
    if options.order:
        from lightrail.launch.carrying_out import carry_out

        return carry_out(options.order)
    if options.multirun or any(each.lstrip("+").startswith("sweep.resume=") for each in overrides):
        from lightrail.run.processes import refuse_many
        from lightrail.sweep import run_sweep

        refuse_many("train -m")
        return run_sweep(overrides, options.config_dir)
    return _run_once(overrides, options.config_dir)


def _run_once(overrides: list[str], config_dirs: Sequence[str]) -> int:
    from lightrail.configuration import compose
    from lightrail.launch.submission import submitted
    from lightrail.run.processes import refuse_many, started_processes, take_rank
    from lightrail.run.resume import find_resumed

    # Before Lightning is imported, which takes a process without these variables for the first one.
    take_rank(started_processes())
    resumed = find_resumed(overrides)
    typed = list(overrides) if resumed is None else resumed.overrides(overrides)
    composition = compose(typed, config_dirs=config_dirs)
    _refuse_method(composition)
    elsewhere = next((each.name for each in composition.chosen if each.kind == "launch" and each.name != "here"), None)
    if elsewhere is not None:
        refuse_many(f"train launch={elsewhere}")
    status = submitted(composition, resumed)
    if status is not None:
        return status
    from lightrail.run.build import build

    return run_to_end(build(composition, resumed))


def _refuse_method(composition: Composition) -> None:
    from lightrail.errors import ConfigurationError

    method = next((each.name for each in composition.chosen if each.kind == "sweep"), None)
    if method is not None:
        raise ConfigurationError(
            "a sweep was asked for, and one run has nothing to vary",
            found=f"sweep={method} without -m",
            allowed=f"train -m sweep={method} KEY=… for a sweep; train without sweep=… for one run",
            remedy="Add -m, or leave sweep out.",
        )


def run_to_end(run: Run) -> int:
    """Executes a run in this process, with progress and a table of results on the terminal.

    Args:
        run: The run.

    Returns:
        The exit status: 0, 128 + N where signal N asked for a stop, or 69 where another rank of the run was lost.
    """
    from lightrail.run.execution import execute
    from lightrail.run.lost_ranks import leave_error
    from lightrail.run.processes import is_first_rank

    is_first = is_first_rank()
    if is_first:
        _announce(run)
    try:
        result = execute(run, show_progress=True)
    except Interrupted as stop:
        if is_first:
            print(f"stopped after step {stop.step}, saved; resume with:\ntrain run.resume={shlex.quote(stop.folder)}")
        return 128 + stop.signal_number
    except LostRank as lost:
        print(lost, file=sys.stderr, flush=True)
        leave_error(None if run.order is None else run.order.workspace / "error.txt", lost)
        return LOST_RANK
    if is_first:
        from lightrail.report import result_table

        result_table(result.summary, result.folder).print()
    return 0


def _announce(run: Run) -> None:
    """One line on what runs, and one for each decision that was taken for the user."""
    names = [f"{each.kind} {each.name}" for each in run.composition.chosen if each.kind not in _UNSPOKEN]
    print(" · ".join(names), file=sys.stderr)
    for note in run.notes:
        print(f"note: {note}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
