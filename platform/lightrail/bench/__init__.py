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
    "optimizers": "what every optimizer's update costs, beside torch's AdamW and other libraries",
    "samplers": "how exact samplers are under a budget of evaluations and what their steps cost, beside diffusers",
    "guidance": "what guidance costs beside the evaluations that it asks for, as a share of a network's own time",
    "privacy": "what a private step takes in time and memory, beside plain training and every mode of Opacus",
    "federated": "how long a round takes, beside plain training and beside Flower's simulation",
    "launch": "how long launches take to start a run, and again after its death; DDP of two processes beside one",
    "claims": "what the papers claim, under one budget of passes and trials, with a verdict each",
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
    name = next((word for word in arguments if not word.startswith("-")), None)
    if name is not None and name not in BENCHES:
        raise PluginError(
            f"there is no bench '{name}'",
            found=name,
            allowed=", ".join(BENCHES),
            remedy=f"{closest(name, BENCHES)}Run `lightrail bench --help` for what each measures.",
        )
    parser = argparse.ArgumentParser(
        prog="lightrail bench",
        description="Measure, beside a peer, in one run.",
        epilog="\n".join(f"{name:<12}{what}" for name, what in BENCHES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", help=", ".join(BENCHES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures (NAME.json by default)")
    parser.add_argument("--document", type=Path, metavar="FILE", help="where to write the table as Markdown")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured; medians are shown")
    bench = importlib.import_module(f"lightrail.bench.{name}") if name is not None else None
    if bench is not None and hasattr(bench, "add_arguments"):
        bench.add_arguments(parser)
    options = parser.parse_args(arguments)
    from lightrail.files import replacing

    assert bench is not None  # the parser has required a name
    found = bench.measure(options)
    print(found.text())
    path = options.json or Path(f"{options.name}.json")
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(found.to_dict(), indent=2) + "\n")
    if options.document:
        options.document.parent.mkdir(parents=True, exist_ok=True)
        # How it was made, without where it was written.
        flags = ("--json", "--document", "--folder")
        places = {*flags, *(str(getattr(options, flag[2:], None)) for flag in flags)}
        words = " ".join(("lightrail", "bench", *(word for word in arguments if word not in places)))
        with replacing(options.document) as temporary:
            body = found.markdown() if hasattr(found, "markdown") else f"```text\n{found.text()}\n```"
            temporary.write_text(f"Made by `{words}`; not edited by hand.\n\n{body}\n")
    print(f"\nwritten to {path}")
    return 0
