"""The ``generate`` command: compose, check, sample, measure, report."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from lightrail.errors import Interrupted

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Samples what the command line composes.

    Args:
        arguments: The words after ``generate``; those of the process by default.

    Returns:
        The exit status: 0, 2 for a mistake that the user can mend, 128 + N where signal N asked for a stop.
    """
    from lightrail.command import reporting_errors

    options, overrides = _parser().parse_known_args(arguments)
    with reporting_errors() as outcome:
        outcome.status = _generate(options, [*options.overrides, *overrides])
    return outcome.status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="generate", add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--cfg", action="store_true")
    parser.add_argument("--config-dir", "-cd", action="append", default=[])
    parser.add_argument("--version", action="store_true")
    return parser


def _generate(options: argparse.Namespace, overrides: list[str]) -> int:
    from lightrail import __version__, configuration

    if options.version:
        print(f"lightrail {__version__}")
        return 0
    if options.help:
        print(configuration.help_text("generate", options.config_dir))
        return 0
    if options.cfg:
        from omegaconf import OmegaConf

        from lightrail.generation.composed import normalised

        composition = configuration.compose(
            normalised(overrides), config_name="generate", config_dirs=options.config_dir
        )
        print(OmegaConf.to_yaml(composition.config), end="")
        return 0
    return _generate_once(overrides, options.config_dir)


def _generate_once(overrides: list[str], config_dirs: Sequence[str]) -> int:
    from lightrail.generation.execution import generate
    from lightrail.report import result_table

    try:
        result = generate(overrides, config_dirs=config_dirs)
    except Interrupted as stop:
        print(f"stopped after {stop.step} samples, kept; go on with:\ngenerate run.resume={shlex.quote(stop.folder)}")
        return 128 + stop.signal_number
    if result.text is not None:
        print()
    result_table(result.summary, result.folder).print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
