"""What a solver's own arithmetic costs, beside the scheduler of the same method: the network answers at no cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from lightrail.bench.diffusers_schedulers import Scheduler
from lightrail.bench.table import Table
from lightrail.catalogue import available, load
from lightrail.generation import Condition, Denoiser, Evaluator, Noise
from lightrail.generation.gaussian_mixture import PATHS
from lightrail.testing.solver_runs import EvenLambda

__all__ = ["SHAPE", "StillDenoiser", "measure_arithmetic"]

STEPS = 20
SHAPE = (3, 64, 64)
BOUND = 0.5

_Settings = Mapping[str, Any]
# A sampler and a scheduler of the same method with the same order.
_PAIRS: tuple[tuple[str, _Settings, str, _Settings], ...] = (
    ("ddim", {}, "DDIMScheduler", {"clip_sample": False}),
    ("ddpm", {}, "DDPMScheduler", {"clip_sample": False}),
    ("edm_euler", {}, "EulerDiscreteScheduler", {}),
    ("edm_heun", {}, "HeunDiscreteScheduler", {}),
    ("dpm_solver", {"order": 2}, "KDPM2DiscreteScheduler", {}),
    ("dpm_solver_pp", {"order": 2}, "DPMSolverMultistepScheduler", {"solver_order": 2}),
    ("dpm_solver_pp", {"order": 3}, "DPMSolverMultistepScheduler", {"solver_order": 3}),
    ("deis", {"method": "loglam", "order": 2}, "DEISMultistepScheduler", {"solver_order": 3}),
    ("deis", {"method": "rhoab", "order": 3}, "LMSDiscreteScheduler", {}),
    ("unipc", {"order": 2}, "UniPCMultistepScheduler", {"solver_order": 2}),
    ("unipc", {"order": 3}, "UniPCMultistepScheduler", {"solver_order": 3}),
    ("plms", {}, "PNDMScheduler", {"skip_prk_steps": True}),
)


class StillDenoiser(Denoiser):
    """Answers every question with the same noise, at once, under any of ten classes or none.

    Args:
        batch: Samples at a time.
    """

    form = "noise"
    classes = 10

    def __init__(self, batch: int) -> None:
        self.path = PATHS["ddpm"]()
        self.shape = SHAPE
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn((batch, *SHAPE), generator=generator)
        self.answer = torch.randn((batch, *SHAPE), generator=generator)

    def output(self, x: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        return self.answer if len(x) == len(self.answer) else self.answer.repeat(len(x) // len(self.answer), 1, 1, 1)

    def unconditional(self, condition: Condition | None) -> Condition | None:
        return None if condition is None else {"label": torch.full_like(condition["label"], self.classes)}


def measure_arithmetic(rounds: int, batch: int = 64, only: Collection[str] = (), *, with_peers: bool = True) -> Table:
    """Times whole runs of a method here and there in turn, and divides by the evaluations.

    Args:
        rounds: How often each pair is measured.
        batch: Samples at a time.
        only: Some samplers; all that have a peer where none is given.
        with_peers: Whether the schedulers are measured too.
    """
    table = Table(
        f"arithmetic of a solver: an evaluation of {batch} x {' x '.join(map(str, SHAPE))} float32, the network's own "
        f"time excluded, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}",
        "ms",
        f"medians of {rounds} rounds of {STEPS} steps, ratios round by round",
    )
    still = StillDenoiser(batch)
    for name, options, peer, settings in _PAIRS:
        if name not in available("sampler") or (only and name not in only):
            continue
        label = ", ".join((name, *(f"{key}={value}" for key, value in options.items())))
        ours = _of_sampler(name, options, still)
        theirs = _of_scheduler(peer, settings, still) if with_peers else None
        mine, beside = [], []
        for _ in range(rounds):
            mine.append(ours())
            if theirs is not None:
                beside.append(theirs())
        table.add(label, mine, peer if beside else None, BOUND if beside else None, beside)
        if beside:
            table.add(f"  {peer}", beside)
    return table


def _of_sampler(name: str, options: _Settings, still: StillDenoiser) -> Callable[[], float]:
    sampler = load("sampler", name)(steps=STEPS, **options)
    sampler.prepare(still)
    grid = sampler.grid(still.path, EvenLambda())
    noise = Noise(0, range(len(still.x)), SHAPE)

    @torch.no_grad()
    def run() -> float:
        evaluator = Evaluator(still)
        began = time.perf_counter()
        sampler.solve(sampler.start(still.x, noise, grid), evaluator, grid)
        return 1e3 * (time.perf_counter() - began) / evaluator.evaluations

    run()
    return run


def _of_scheduler(name: str, settings: _Settings, still: StillDenoiser) -> Callable[[], float]:
    peer = Scheduler(name, "", settings)

    @torch.no_grad()
    def run() -> float:
        scheduler, x = peer.built(STEPS), still.x
        began = time.perf_counter()
        for t in scheduler.timesteps:
            scheduler.scale_model_input(x, t)
            x = scheduler.step(still.answer, t, x).prev_sample
        return 1e3 * (time.perf_counter() - began) / len(scheduler.timesteps)

    run()
    return run
