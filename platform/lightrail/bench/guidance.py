"""What guidance costs beside the evaluations that it asks for, as a share of a network's own time."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lightrail.bench.sampler_arithmetic import SHAPE, StillDenoiser
from lightrail.bench.table import Table
from lightrail.catalogue import available, load
from lightrail.errors import PluginError, UserError
from lightrail.generation import Guidance, sample
from lightrail.testing.building import missing_options
from lightrail.testing.sampler_wrapper import FirstOrder
from lightrail.testing.solver_runs import EvenLambda
from lightrail.traits import traits_of

__all__ = ["add_arguments", "measure"]

STEPS, BATCH = 10, 4
BOUND = 0.03


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this bench."""
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="some guidance, rather than all")


def measure(options: argparse.Namespace) -> Table:
    """Times runs with a model that answers at once, with and without guidance, beside a U-Net's evaluation.

    Args:
        options: As :func:`add_arguments` describes, and ``rounds``.

    Raises:
        PluginError: No guidance has one of the names, or there is no network to compare with.
    """
    network = _network()
    table = Table(
        f"guidance beside its evaluations: a step of {BATCH} x {' x '.join(map(str, SHAPE))} float32, without the "
        f"network's own time, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}; its share of an "
        "evaluation of a U-Net",
        "ms",
        f"medians of {options.rounds} rounds of {STEPS} steps, with the unguided run's own time taken off",
    )
    unet = [network() for _ in range(options.rounds)]
    for name in options.only or available("guidance"):
        try:
            run = _run(name)
        except UserError as error:
            print(f"left out: {name}: {error.what}", file=sys.stderr)
            continue
        found = [max(1e-6, run()) for _ in range(options.rounds)]
        table.add(name, found, "an evaluation of a U-Net", BOUND, unet)
    if not table.rows:
        raise PluginError(
            "there is no guidance to measure",
            found=" ".join(options.only) or "none installed",
            allowed="names of guidance, as `lightrail plugins --kind guidance` lists them",
            remedy="Name one of them, or leave --only out.",
        )
    table.add("an evaluation of a U-Net", unet)
    return table


def _network() -> Callable[[], float]:
    """The time of one evaluation, in milliseconds."""
    unet: Any = load("model", "unet")(in_channels=SHAPE[0], image_size=SHAPE[1], num_classes=10)
    x, t = torch.zeros(BATCH, *SHAPE), torch.full((BATCH,), 0.5)
    label = torch.zeros(BATCH, dtype=torch.long)

    @torch.no_grad()
    def run() -> float:
        began = time.perf_counter()
        unet(x, t, label)
        return 1e3 * (time.perf_counter() - began)

    run()
    return run


def _run(name: str) -> Callable[[], float]:
    """What a step costs more than without guidance, in milliseconds."""
    plugin = load("guidance", name)
    example = traits_of(plugin).example
    if missing := missing_options(plugin, example, given=0):
        raise PluginError(
            "its example lacks options",
            found=", ".join(missing),
            allowed="guidance that its example builds",
            remedy="Measure it on a run of yours.",
        )
    guidance: Guidance = plugin(**example)
    runs_again = type(guidance).around is not Guidance.around
    if guidance.needs_measurement or runs_again or guidance.population * guidance.candidates > 1:
        raise PluginError(
            "it needs a measurement, or draws several states or several times for one sample",
            found=name,
            allowed="guidance of single samples in one run",
            remedy="Measure it on a run of yours.",
        )
    still, sampler = StillDenoiser(BATCH), FirstOrder(STEPS)
    guidance.prepare(still, sampler)
    grid = sampler.grid(still.path, EvenLambda())
    condition = {"label": torch.zeros(BATCH, dtype=torch.long)}

    def timed(chain: Sequence[Guidance]) -> float:
        began = time.perf_counter()
        sample(still, sampler, grid, range(BATCH), condition=condition, guidance=chain)
        return 1e3 * (time.perf_counter() - began) / STEPS

    try:
        timed([guidance])
    except UserError:
        raise
    except Exception as error:  # a classifier of points, say, in the example that the suites build it with
        raise PluginError(
            "its example is not for images",
            found=f"{type(error).__name__}: {error}",
            allowed="guidance whose traits.example works on any samples",
            remedy="Measure it on a run of yours.",
        ) from error
    return lambda: timed([guidance]) - timed([])
