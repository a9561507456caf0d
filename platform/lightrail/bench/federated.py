"""How long a round takes, beside plain training and beside Flower's simulation."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping

from lightrail.bench.table import Table, Tables, measured_apart
from lightrail.errors import UserError

__all__ = ["add_arguments", "measure"]

_TITLES = {"tiny": "linear 64-10", "cnn": "CNN of two layers, 8 x 8 pictures, 29k parameters"}
_JOB, _FLOWER, _STEPS = "here, few rounds", "Flower, trainers", "steps alone"
_MOST_STEP, _MOST_ROUND, _MOST_MEMORY = 1.1, 1 / 20, 2000.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this bench."""
    parser.add_argument(
        "--clients", nargs="*", type=int, default=[8, 100], metavar="N", help="how many clients (8 100)"
    )
    parser.add_argument("--models", nargs="*", default=list(_TITLES), choices=_TITLES, help="which models")
    parser.add_argument(
        "--count",
        type=int,
        default=4,
        metavar="N",
        help="rounds that are timed in a process after the first (4)",
    )
    parser.add_argument(
        "--flower", default=sys.executable, metavar="PYTHON", help="a Python in which lightrail and flwr are installed"
    )


def measure(options: argparse.Namespace) -> Tables:
    """Measures every way in processes of its own that take turns.

    Args:
        options: As :func:`add_arguments` describes, and ``rounds``: how often each process is started.
    """
    found = Tables()
    for model in options.models:
        for clients in options.clients:
            found.tables += _compared(model, clients, options, found.left_out)
    table = Table(
        "memory: 1,000 clients, of which 1% take part in a round",
        "MB",
        "resident memory of the whole process at its peak, Python and torch included",
    )
    taken = [_process("many", "tiny", 1000, options)["megabytes"] for _ in range(options.rounds)]
    table.add("engine=here", taken, bound=_MOST_MEMORY)
    found.tables.append(table)
    return found


def _compared(model: str, clients: int, options: argparse.Namespace, left_out: list[str]) -> list[Table]:
    ways = [
        "plain",
        _STEPS,
        "here",
        "here in two processes",
        _JOB,
        "flower with trainers",
        "flower",
        "ours over flower",
    ]
    taken: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for number in range(options.rounds):
        # Whoever comes first in a round has no advantage over all rounds.
        for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
            try:
                taken[way].append(_process(way, model, clients, options))
            except UserError as error:
                if "flower" not in way:
                    raise
                left_out.append(f"left out: {way}, {model}, {clients} clients: {error.found}")
                ways = [each for each in ways if each != way]
    setting = f"{_TITLES[model]}; {clients} clients with 128 samples each, batches of 16, SGD"
    steps = Table(
        f"a client's step: {setting}",
        "ms",
        "the whole round over the steps that clients make in it, all that a round needs included, beside the plain run "
        "over as many steps; the first round, which prepares the data, is left out",
    )
    steps.add("plain", _column(taken["plain"], "milliseconds_per_step"))
    steps.add("engine=here", _column(taken["here"], "milliseconds_per_step"), "plain", _MOST_STEP)
    tables = [steps]
    if taken["flower"] and taken["flower with trainers"]:
        tables += [_rounds(setting, taken), _jobs(setting, options.count + 1, taken)]
    return tables


def _rounds(setting: str, taken: Mapping[str, list[dict[str, float]]]) -> Table:
    table = Table(
        f"a round: {setting}",
        "ms",
        "Flower's simulation with its own FedAvg, two clients at a time: a Lightning Trainer at each client, as a "
        "LightningModule wants one, and a plain loop of torch; start-up is not counted, for any of them; steps alone: "
        "all clients in one process, in torch, on batches that lie ready",
    )
    table.add(_FLOWER, _per_round(taken["flower with trainers"]))
    table.add("Flower, by hand", _per_round(taken["flower"]), _FLOWER)
    table.add("engine=here", _per_round(taken["here"]), _FLOWER, _MOST_ROUND)
    table.add("engine=here, processes=2", _per_round(taken["here in two processes"]), _FLOWER, _MOST_ROUND)
    if taken["ours over flower"]:
        table.add("engine=flower", _per_round(taken["ours over flower"]), _FLOWER)
    table.add(_STEPS, _per_round(taken[_STEPS]), _FLOWER)
    return table


def _jobs(setting: str, rounds: int, taken: Mapping[str, list[dict[str, float]]]) -> Table:
    table = Table(
        f"{rounds} rounds as they are waited for: {setting}",
        "s",
        "from the start of the program to its end, with all that is imported, started, written and stopped",
    )
    table.add(_FLOWER, _column(taken["flower with trainers"], "seconds"))
    table.add("Flower, by hand", _column(taken["flower"], "seconds"), _FLOWER)
    table.add("engine=here", _column(taken[_JOB], "seconds"), _FLOWER)
    if taken["ours over flower"]:
        table.add("engine=flower", _column(taken["ours over flower"], "seconds"), _FLOWER)
    return table


def _column(found: list[dict[str, float]], name: str) -> list[float]:
    return [each[name] for each in found]


def _per_round(found: list[dict[str, float]]) -> list[float]:
    return [1e3 / each["rounds_per_second"] for each in found]


def _process(way: str, model: str, clients: int, options: argparse.Namespace) -> dict[str, float]:
    python = options.flower if "flower" in way else sys.executable
    # Rounds that take milliseconds are timed over more of them.
    short = ("plain", _STEPS, "here", "here in two processes")
    rounds = max(options.count, min(5 * options.count, 200 // clients)) if way in short else options.count
    words = ["here" if way == _JOB else way, model, "--clients", str(clients), "--rounds", str(rounds)]
    began = time.perf_counter()
    found = measured_apart(
        "lightrail.bench.federated_ways",
        words,
        dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
        what=f"{way} cannot be measured",
        remedy="Install Flower with its simulation, or measure the others.",
        python=python,
    )
    return {**found, "seconds": time.perf_counter() - began}
