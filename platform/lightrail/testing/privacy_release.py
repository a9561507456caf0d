"""Conformance of private methods, step by step, without a run: what they release, and what one sample moves of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightrail.privacy.method import PrivacyMethod, PrivateHorizon
from lightrail.sample_gradients import SampleGradients
from lightrail.testing.privacy_runs import NoisyStep, gradients_of
from lightrail.testing.runs import require_close
from lightrail.testing.suite import Check, require

__all__ = ["RELEASE_CHECKS", "with_noise"]

Options = Mapping[str, Any]
HORIZON = PrivateHorizon(records=64, batch=16, steps=12)
NOISE = 1.5
SAMPLES = 7
STEPS = 5


def with_noise(plugin: Any, options: Options, noise: float, **more: Any) -> PrivacyMethod:
    """The method with a noise of its own, in place of a target, and the quick accountant."""
    return plugin(**{**options, "accountant": "rdp", "epsilon": None, "noise": noise, **more})


def _begun(plugin: Any, options: Options, noise: float = NOISE) -> tuple[PrivacyMethod, PrivateHorizon]:
    method = with_noise(plugin, options, noise)
    horizon = PrivateHorizon(64, 64, 12) if method.sampling == "full" else HORIZON
    method.prepare(horizon)
    return method, horizon


def _parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(21)
    return [nn.Parameter(torch.randn(shape, generator=generator).double()) for shape in ((3, 4), (3,), ())]


def _drawn(params: Sequence[Tensor], seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(SAMPLES, *p.shape, generator=generator).double() for p in params]


def _absurd(params: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Huge, tiny and vanishing gradients, and one that is twice there."""
    scales = torch.tensor([1e30, 1e-30, 0.0, 1e6, 1.0, 1.0, 40.0], dtype=torch.float64)
    found = []
    for each in _drawn(params, seed):
        each[5] = each[4]
        found.append(each * scales.view(-1, *[1] * (each.dim() - 1)))
    return found


def _rows(gradients: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
    return [each[list(rows)] for each in gradients]


class _Steps:
    """A method walks some steps, on gradients that are given; what is released has no noise."""

    def __init__(self, plugin: Any, options: Options, noise: float = NOISE) -> None:
        self.method, self.horizon = _begun(plugin, options, noise)
        self.params = _parameters()
        self.step = 0
        self.noise = noise

    def elsewhere(self) -> bool:
        """Whether the step needs gradients at another point."""
        return self.method.elsewhere(self.params) is not None

    def contribution(self, here: Sequence[Tensor], there: Sequence[Tensor] | None) -> list[Tensor]:
        def of(gradients: Sequence[Tensor]) -> SampleGradients:
            return gradients_of(self.params, gradients)

        with torch.no_grad():
            return self.method.contribution(of(here), None if there is None else of(there))

    def gradient(self, sums: Sequence[Tensor], fixed: Any = None) -> tuple[list[Tensor], NoisyStep]:
        batch = self.method.batch_at(self.step, self.horizon)
        release = NoisyStep(self.horizon, self.noise, self.step, batch, fixed)
        with torch.no_grad():
            found = self.method.gradient([each.clone() for each in sums], self.params, release)
        return found, release

    def go_on(self, gradient: Sequence[Tensor], lr: float = 0.05) -> None:
        with torch.no_grad():
            for p, g in zip(self.params, gradient, strict=True):
                p.sub_(lr * g.to(p.dtype).view(p.shape))
        self.step += 1


def _walk(steps: _Steps, draw: Any) -> Iterator[tuple[list[Tensor], list[Tensor] | None]]:
    """The gradients of each step; what is made of them between two takes the method on."""
    for t in range(STEPS):
        yield draw(steps.params, 100 + t), draw(steps.params, 200 + t) if steps.elsewhere() else None


def check_bounds_each_sample(plugin: Any, options: Options) -> None:
    """Leaving out any one sample moves what is released by at most the sensitivity that the method states.

    Gradients are drawn, and absurd (1e30, 1e-30, zero, all but alike); the state is that of the same past.
    """
    for draw in (_drawn, _absurd):
        steps = _Steps(plugin, options)
        for here, there in _walk(steps, draw):
            whole = copy.deepcopy(steps)
            found, released = whole.gradient(whole.contribution(here, there))
            for left_out in range(SAMPLES):
                rows = [i for i in range(SAMPLES) if i != left_out]
                without = copy.deepcopy(steps)
                part = without.contribution(_rows(here, rows), None if there is None else _rows(there, rows))
                _require_near(released, without.gradient(part)[1], steps.step)
            steps = whole
            steps.go_on(found)


def _require_near(whole: NoisyStep, part: NoisyStep, step: int) -> None:
    told = [[(sensitivity, noise) for _, sensitivity, noise in each.released] for each in (whole, part)]
    require(told[0], f"step {step} releases nothing: all of its gradient would have to be noise")
    require(told[0] == told[1], f"in step {step} sensitivity or noise depend on the data: {told[0]}, {told[1]}")
    for (a, sensitivity, _), (b, _, _) in zip(whole.released, part.released, strict=True):
        moved = float(torch.stack([(x - y).double().norm() for x, y in zip(a, b, strict=True)]).norm())
        size = max((float(x.abs().max()) for x in (*a, *b) if x.numel()), default=0.0)
        require(
            moved <= sensitivity * (1 + 1e-6) + 1e-12 * size,
            f"one sample moves what step {step} releases by {moved:.6g}, and the sensitivity is {sensitivity:.6g}",
        )


def check_releases_what_it_plans(plugin: Any, options: Options) -> None:
    """The releases of a step cost, together, the noise multiplier of its event."""
    steps = _Steps(plugin, options)
    for here, there in _walk(steps, _drawn):
        planned = steps.method.noise_at(steps.step, NOISE, steps.horizon)
        found, released = steps.gradient(steps.contribution(here, there))
        cost = released.cost
        require(
            abs(cost - planned) <= 1e-9 * planned,
            f"step {steps.step} releases at a noise multiplier of {cost:.9g}, and {planned:.9g} is accounted for",
        )
        steps.go_on(found)


def check_shows_nothing_but_what_is_released(plugin: Any, options: Options) -> None:
    """Gradients and logged figures are made of what was released: given the same, other data give the same."""
    first, second = _Steps(plugin, options), _Steps(plugin, options)

    def fixed(each: Tensor) -> Tensor:
        return torch.linspace(-1, 1, each.numel(), dtype=each.dtype).view(each.shape)

    for t in range(STEPS):
        ends = []
        for steps, seed in ((first, 0), (second, 1000)):
            there = _drawn(steps.params, 200 + t + seed) if steps.elsewhere() else None
            sums = steps.contribution(_drawn(steps.params, 100 + t + seed, 1.0 + seed), there)
            found, _ = steps.gradient(sums, fixed)
            ends.append((found, steps.method.logged()))
            steps.go_on(found)
        (a, figures), (b, others) = ends
        same = all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        require(same, f"the gradient of step {t} depends on the data beyond what was released")
        require(figures == others, f"figures logged after step {t} depend on the data beyond what was released")


def check_adds_micro_batches(plugin: Any, options: Options) -> None:
    """Contributions of two micro-batches add up to that of both, in the shapes of ``nothing``."""
    steps = _Steps(plugin, options)
    for here, there in _walk(steps, _drawn):
        nothing = steps.method.nothing(steps.params)
        whole = steps.contribution(here, there)
        parts = [
            steps.contribution(_rows(here, rows), None if there is None else _rows(there, rows))
            for rows in (range(3), range(3, SAMPLES))
        ]
        added = [a + b for a, b in zip(*parts, strict=True)]
        require_close(added, whole, f"in step {steps.step} two micro-batches do not add up to the one they make", 1e-9)
        shapes, own = [each.shape for each in whole], [each.shape for each in nothing]
        require(own == shapes, f"nothing() has the shapes {own}, a contribution {shapes}")
        require(not any(bool(each.any()) for each in nothing), "nothing() is not zero")
        found, _ = steps.gradient(whole)
        wanted = [p.shape for p in steps.params]
        require([each.shape for each in found] == wanted, "gradient() does not return one tensor for each parameter")
        steps.go_on(found)


def check_follows_small_gradients(plugin: Any, options: Options) -> None:
    """Without noise the first step goes along the sum of small gradients, and twice as far for twice the samples.

    What a sum is divided by is the expected batch: how many samples there really are is private.
    """
    steps = _Steps(plugin, options, noise=0.0)
    here = _drawn(steps.params, 100, 1e-6)
    there = here if steps.elsewhere() else None
    ends = []
    for rows in (range(SAMPLES), [*range(SAMPLES)] * 2):
        own = copy.deepcopy(steps)
        part = None if there is None else _rows(there, rows)
        ends.append(own.gradient(own.contribution(_rows(here, rows), part))[0])
    expected = torch.cat([each.sum(0).flatten() for each in here])
    found = torch.cat([each.flatten() for each in ends[0]])
    cosine = float(torch.nn.functional.cosine_similarity(found.double(), expected, dim=0))
    require(cosine > 0.999, f"without noise the first step points elsewhere than the gradients (cosine {cosine:.3f})")
    require_close(ends[1], [2 * each for each in ends[0]], "twice the samples do not go twice as far")


def check_leaves_out_what_is_not_finite(plugin: Any, options: Options) -> None:
    """A sample whose gradient is infinite or not a number, wherever it is taken, adds nothing."""
    for wrong in (float("inf"), float("nan")):
        steps = _Steps(plugin, options)
        for here, there in _walk(steps, _drawn):
            rows = [i for i in range(SAMPLES) if i != 2]
            kept = steps.contribution(_rows(here, rows), None if there is None else _rows(there, rows))
            for each in (here, there or here):
                each[0][2].view(-1)[1] = wrong
            found = steps.contribution(here, there)
            require_close(found, kept, f"a sample with a gradient of {wrong} changes step {steps.step}", 1e-9)
            steps.go_on(steps.gradient(kept)[0])


def check_plans_every_step(plugin: Any, options: Options) -> None:
    """Its events have every step, with noise that grows with the run's; the rest of a run is its end."""
    method, horizon = _begun(plugin, options)

    def each(noise: float, first: int = 0) -> list[tuple[float, int, int]]:
        events = method.events(noise, horizon, first)
        return [(event.noise, event.batch, event.records) for event in events for _ in range(event.steps)]

    whole = each(NOISE)
    require(len(whole) == horizon.steps, f"events() have {len(whole)} steps of {horizon.steps}")
    for step, (noise, batch, records) in enumerate(whole):
        require(noise > 0, f"the event of step {step} has no noise")
        require(records == horizon.records, f"the event of step {step} says {records} records of {horizon.records}")
        expected = method.batch_at(step, horizon)
        require(batch == expected, f"the event of step {step} says a batch of {batch}, batch_at {expected}")
    require(each(NOISE, 5) == whole[5:], "events() from step 5 on are not the rest of the run")
    for less, more in zip(whole, each(2 * NOISE), strict=True):
        require(less[0] < more[0], "twice the noise of the run does not make every step noisier")


RELEASE_CHECKS: tuple[Check, ...] = (
    check_plans_every_step,
    check_bounds_each_sample,
    check_releases_what_it_plans,
    check_shows_nothing_but_what_is_released,
    check_adds_micro_batches,
    check_follows_small_gradients,
    check_leaves_out_what_is_not_finite,
)
