"""What private training costs in time and memory, beside plain training and every mode of Opacus."""

from __future__ import annotations

import argparse
from statistics import median

from lightrail.bench.privacy_ways import OPACUS, WAYS, WITH_FOUR_DRAWS
from lightrail.bench.table import Table, Tables, measured_apart
from lightrail.errors import PluginError, UserError, closest

__all__ = ["add_arguments", "measure"]

_TITLES = {
    "mlp": "MLP 1024-2048-2048-10, 6.3M parameters",
    "cnn": "residual CNN with GroupNorm, 0.7M parameters, 3 x 32 x 32",
    "tokens": "transformer of 4 blocks, 3.7M parameters, 32 tokens",
    "tiny": "linear 4-10",
}
# What the C library frees is handed back at once, so that memory is what is in use; it costs time.
_HANDS_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
_MOST_MEMORY = 1.3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this bench."""
    parser.add_argument("--models", nargs="*", default=["mlp", "cnn", "tokens"], metavar="NAME", help="which models")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="samples a step (64)")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="steps that are timed in each process (5)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to train")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of the processor (1)")


def measure(options: argparse.Namespace) -> Tables:
    """Trains every model in every way, each time in a process of its own; the ways take turns.

    Args:
        options: As :func:`add_arguments` describes, and ``rounds``.

    Raises:
        PluginError: Opacus is not installed, there is no such model, or a way that is not Opacus's cannot train it.
    """
    _check(options)
    found = Tables()
    for model in options.models:
        times, memory = _taken(model, options, found.left_out)
        found.tables.append(_of_time(model, options, times))
        found.tables.append(_of_memory(model, options, memory))
    return found


def _check(options: argparse.Namespace) -> None:
    from importlib.util import find_spec

    for model in options.models:
        if model not in _TITLES:
            raise PluginError(
                f"there is no model '{model}' to measure",
                found=model,
                allowed=", ".join(_TITLES),
                remedy=f"{closest(model, _TITLES)}Name one of them, or leave --models out.",
            )
    if find_spec("opacus") is None:
        raise PluginError(
            "the peer of this bench is Opacus",
            found="it is not installed",
            allowed="opacus 1.6",
            remedy="Run: pip install opacus",
        )


def _taken(
    model: str, options: argparse.Namespace, left_out: list[str]
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    times: dict[str, list[float]] = {}
    memory: dict[str, dict[str, float]] = {}
    ways = list(WAYS)
    for way in WAYS:
        try:
            found = _process(way, model, options, steps=1, environment=_HANDS_BACK)
        except UserError as error:
            if way not in OPACUS:
                raise
            left_out.append(f"left out: {way} with {model}: {error.found}")
            ways.remove(way)
            continue
        if way != WITH_FOUR_DRAWS:
            memory[way] = found
    for number in range(options.rounds):
        # Whoever comes first in a round has no advantage over all rounds.
        for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
            found = _process(way, model, options, steps=options.steps, environment={})
            times.setdefault(way, []).append(found["milliseconds"])
    return {way: times[way] for way in ways}, memory


def _process(
    way: str, model: str, options: argparse.Namespace, steps: int, environment: dict[str, str]
) -> dict[str, float]:
    words = [way, model, "--batch", str(options.batch), "--steps", str(steps), "--device", options.device]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(options.threads))
    return measured_apart(
        "lightrail.bench.privacy_ways",
        words,
        {**threads, **environment},
        what=f"{way} cannot train {model}",
        remedy="Measure the others.",
    )


def _setting(model: str, options: argparse.Namespace) -> str:
    threads = f"{options.threads} thread{'s' * (options.threads > 1)}"
    where = f"cpu, {threads}" if options.device == "cpu" else options.device
    return f"{_TITLES[model]}; {options.batch} samples a step, SGD, {where}"


def _of_time(model: str, options: argparse.Namespace, times: dict[str, list[float]]) -> Table:
    clock = "processor time" if options.device == "cpu" else "time"
    table = Table(
        f"{clock} of a step: {_setting(model, options)}",
        "ms",
        f"medians of {options.rounds} rounds in new processes of {options.steps} steps each, that take turns; noise "
        "included: ours is secret and the sum of four draws; Opacus's is of torch's generator, which can be foretold, "
        f"and of one draw, or of four as in its secure mode ('{WITH_FOUR_DRAWS}')",
    )
    peers = {way: found for way, found in times.items() if way in OPACUS and way != WITH_FOUR_DRAWS}
    best = min(peers, key=lambda way: median(peers[way])) if peers else None
    for way, found in times.items():
        table.add(way, found, "plain" if way != "plain" else None)
    if best is not None:
        table.add(f"ours, beside {best}", times["ours"], best, 1.0)
    if WITH_FOUR_DRAWS in times:
        table.add("ours, beside four draws", times["ours"], WITH_FOUR_DRAWS, 1.0)
    return table


def _of_memory(model: str, options: argparse.Namespace, memory: dict[str, dict[str, float]]) -> Table:
    held = (
        "what tensors take"
        if options.device == "cuda"
        else "resident memory beyond that of a process which has trained something tiny in the same way"
    )
    table = Table(
        f"memory at its peak: {_setting(model, options)}",
        "MB",
        f"parameters, gradients, activations and records: {held}, measured once, with freed memory handed back at "
        "once; the first step of ours compares samples with samples alone, and has a row of its own",
    )
    for way, found in memory.items():
        bound = _MOST_MEMORY if way == "ours" else None
        table.add(way, [found["memory"]], "plain" if way != "plain" else None, bound)
    table.add("ours, with the first step", [memory["ours"]["whole"]], "plain")
    return table
