"""The ``train`` command: normalise the command line, compose, check, build, execute, report."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightrail.errors import Interrupted

if TYPE_CHECKING:
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
    if options.multirun:
        from lightrail.sweep import run_sweep

        return run_sweep(overrides, options.config_dir)
    return _run_once(overrides, options.config_dir)


def _run_once(overrides: list[str], config_dirs: Sequence[str]) -> int:
    from lightrail.configuration import compose
    from lightrail.launch.submission import submitted
    from lightrail.run.build import build
    from lightrail.run.resume import find_resumed

    resumed = find_resumed(overrides)
    typed = list(overrides) if resumed is None else resumed.overrides(overrides)
    composition = compose(typed, config_dirs=config_dirs)
    status = submitted(composition, resumed)
    return run_to_end(build(composition, resumed)) if status is None else status


def run_to_end(run: Run) -> int:
    """Executes a run in this process, with progress and a table of results on the terminal.

    Args:
        run: The run.

    Returns:
        The exit status: 0, or 128 + N where signal N asked for a stop.
    """
    from lightrail.run.execution import execute

    is_first = os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("RANK", "0") == "0"
    if is_first:
        _announce(run)
    try:
        result = execute(run, show_progress=True)
    except Interrupted as stop:
        if is_first:
            print(f"stopped after step {stop.step}, saved; resume with:\ntrain run.resume={shlex.quote(stop.folder)}")
        return 128 + stop.signal_number
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
