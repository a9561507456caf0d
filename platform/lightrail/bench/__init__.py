"""Measurements: each is a table of what was measured beside its peer, in one run, and the same as JSON."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence
from pathlib import Path

from lightrail.errors import PluginError, closest

__all__ = ["BENCHES", "main"]

BENCHES = {
    "startup": "how long the command line and a run take to begin",
    "step": "what a training step costs over plain PyTorch and bare Lightning, and what optimizers cost over AdamW",
}


def main(arguments: Sequence[str]) -> int:
    """Runs one bench.

    Args:
        arguments: The words after ``lightrail bench``.

    Returns:
        The exit status.

    Raises:
        PluginError: There is no bench of that name.
    """
    parser = argparse.ArgumentParser(
        prog="lightrail bench",
        description="Measure, beside a peer, in one run.",
        epilog="\n".join(f"{name:<10}{what}" for name, what in BENCHES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", help=", ".join(BENCHES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures (NAME.json by default)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured; medians are shown")
    options = parser.parse_args(arguments)
    if options.name not in BENCHES:
        raise PluginError(
            f"there is no bench '{options.name}'",
            found=options.name,
            allowed=", ".join(BENCHES),
            remedy=f"{closest(options.name, BENCHES)}Run `lightrail bench --help` for what each measures.",
        )
    from lightrail.files import replacing

    table = importlib.import_module(f"lightrail.bench.{options.name}").measure(options.rounds)
    print(table.text())
    path = options.json or Path(f"{options.name}.json")
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(table.to_dict(), indent=2) + "\n")
    print(f"\nwritten to {path}")
    return 0
