"""The ``lightrail`` command: what is installed, jobs, sweeps, searches, privacy's cost, completion, benchmarks."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lightrail.command.errors import Outcome, reporting_errors

__all__ = ["Outcome", "main", "reporting_errors"]

_HELP = """\
Usage: lightrail COMMAND

  plugins [NAME] [--kind KIND] [--json]  what is installed; with a name, its options, traits and paper
  plugins SCHEDULE --plot [FILE]         the curve of a schedule
  jobs [JOB] [--follow | --cancel]       runs that a launch was handed: `lightrail jobs --help`
  sweep [FOLDER | latest]                the table of a sweep, and a report: `lightrail sweep --help`
  search NAME run=FOLDER …               fit times, ratios or statistics to a model: `lightrail search --help`
  privacy plan|audit …                   what privacy costs: `lightrail privacy --help`
  federated server|client …              clients on machines of their own: `lightrail federated --help`
  bench NAME                             measure: `lightrail bench --help` lists the benchmarks
  completion bash|zsh|fish               a script that completes train, generate and lightrail
  --version                              the version

`train --help` shows what a run can be made of.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: The words after ``lightrail``; those of the process by default.

    Returns:
        The exit status.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    with reporting_errors() as outcome:
        outcome.status = _run(words) or 0
    return outcome.status


def _run(words: list[str]) -> int | None:
    name, rest = (words[0], words[1:]) if words else ("--help", [])
    # Each command is imported alone: completion answers at every TAB.
    match name:
        case "plugins":
            from lightrail.command.plugins import main as command
        case "jobs":
            from lightrail.command.jobs import main as command
        case "sweep":
            from lightrail.command.sweep import main as command
        case "search":
            from lightrail.command.search import main as command
        case "privacy":
            from lightrail.command.privacy import main as command
        case "federated":
            from lightrail.command.federated import main as command
        case "bench":
            from lightrail.bench import main as command
        case "completion":
            from lightrail.command.completion import main as command
        case "complete":
            from lightrail.command.candidates import main as command
        case "--version":
            from lightrail import __version__

            print(f"lightrail {__version__}")
            return 0
        case "-h" | "--help" | "help":
            print(_HELP, end="")
            return 0
        case _:
            raise _unknown(name)
    return command(rest)


def _unknown(name: str) -> Exception:
    from lightrail.errors import ConfigurationError, closest

    commands = ("plugins", "jobs", "sweep", "search", "privacy", "federated", "bench", "completion")
    return ConfigurationError(
        f"lightrail has no command '{name}'",
        found=name,
        allowed=", ".join(commands),
        remedy=f"{closest(name, commands)}To train, the command is `train`.",
    )
