"""Conformance of guidance, on models whose answers are exact and on a small network, with every installed sampler."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightrail.catalogue import available, load
from lightrail.errors import CompositionError, UserError
from lightrail.generation import (
    Condition,
    Denoiser,
    GaussianMixture,
    Generated,
    Guidance,
    LinearVP,
    Measurement,
    Noise,
    Observed,
    Sampled,
    Sampler,
    check_fit,
    sample,
)
from lightrail.generation.gaussian_mixture import PATHS
from lightrail.testing.building import built, check_is_documented, check_names_its_paper, refuses_unknown_options
from lightrail.testing.sampler_wrapper import FirstOrder
from lightrail.testing.solver_runs import EvenLambda, require_near
from lightrail.testing.suite import Check, NotApplicable, Suite, known_exceptions, name_of, require
from lightrail.traits import traits_of

__all__ = ["GuidanceSuite", "Residual"]

Options = Mapping[str, Any]
STEPS = 6
APART = 1e-6  # what single precision may change where a network of its own is asked
STOP = 0.05  # where the exact models' runs end: some noise stays in


class _Counted(GaussianMixture):
    """Counts the rows that it is asked about."""

    def __init__(self, path: str, dtype: str = "float64") -> None:
        super().__init__(path=path, dtype=dtype)
        self.rows = 0

    def output(self, x: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        self.rows += len(x)
        return super().output(x, t, condition)


class _Layer(nn.Module):
    """A residual block, as guidance that skips some finds it by name."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class _Blocks(nn.Module):
    """Three blocks, named as in most models, and a head."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Layer(width) for _ in range(3))
        self.head = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Residual(Denoiser):
    """A small network of three blocks that knows three classes and none.

    Args:
        dtype: Of its weights and states.
    """

    form = "data"
    classes = 3

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.path = LinearVP()
        self.shape = (4,)
        self.dtype = dtype
        self.rows = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.network = _Blocks(9, 4).to(dtype).requires_grad_(False)

    def output(self, x: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        self.rows += len(x)
        label = torch.full((len(x),), 3) if condition is None else condition["label"]
        seen = torch.cat([x, t[:, None].to(x), nn.functional.one_hot(label, 4).to(x)], 1)
        return self.network(seen)

    def unconditional(self, condition: Condition | None) -> Condition | None:
        return None if condition is None else {**condition, "label": torch.full_like(condition["label"], 3)}

    def examples(self, count: int) -> Tensor:
        return Noise(7, range(count), self.shape, self.dtype).normal(0)


class _Half(Measurement):
    """The first half of a sample's entries."""

    def prepare(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def apply(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        return flat[:, : -(-flat.shape[1] // 2)]

    def adjoint(self, y: Tensor) -> Tensor:
        size = math.prod(self.shape)
        padded = torch.cat([y, y.new_zeros(len(y), size - y.shape[1])], 1)
        return padded.view(len(y), *self.shape)

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        return self.adjoint(y)


def _models(dtype: torch.dtype = torch.float64) -> Iterator[Any]:
    for path in PATHS:
        yield _Counted(path, str(dtype).removeprefix("torch."))
    yield Residual(dtype)


@functools.cache
def _samplers() -> tuple[tuple[str, Any], ...]:
    """A method of first order, and every installed one that solves the process of an exact model."""
    found: list[tuple[str, Any]] = [("a method of first order", lambda: FirstOrder(STEPS))]
    for name in available("sampler"):
        try:
            plugin = load("sampler", name)
        except UserError:
            continue
        if isinstance(plugin, type) and issubclass(plugin, Sampler):
            example = {**dict(traits_of(plugin).example), "steps": STEPS}
            found.append((name, functools.partial(plugin, **example)))
    return tuple(found)


class _Setting:
    """One guidance with a model and a sampler that it takes."""

    def __init__(self, guidance: Guidance, model: Any, sampler: Sampler, others: Sequence[Guidance] = ()) -> None:
        self.guidance, self.model, self.sampler = guidance, model, sampler
        self.chain = (*others, guidance)
        check_fit(model, sampler)
        sampler.prepare(model)
        guidance.prepare(model, sampler)
        stop = max(STOP, model.path.t_min) if model.path.t_max <= 1 else None
        self.grid = sampler.grid(model.path, EvenLambda(stop=stop, end="zero" if stop is None else "minimum"))

    def draw(self, indices: Sequence[int], start: Tensor | None = None) -> Sampled:
        numbers = [index // self.guidance.population for index in indices]
        condition = {"label": torch.tensor([number % 3 for number in numbers])}
        return sample(
            self.model,
            self.sampler,
            self.grid,
            indices,
            seed=3,
            condition=condition,
            guidance=self.chain,
            observed=self.observed(numbers) if self.guidance.needs_measurement else None,
            start=start,
        )

    def observed(self, numbers: Sequence[int]) -> Observed:
        operator = _Half()
        operator.prepare(self.model.shape)
        truth = self.model.examples(max(numbers) + 1)[list(numbers)]
        return Observed(operator, operator.apply(truth), truth)


def _setting(plugin: Any, options: Options, dtype: torch.dtype = torch.float64) -> _Setting:
    """The first model and sampler that it does not refuse."""
    refusals = []
    for model in _models(dtype):
        for name, sampler in _samplers():
            try:
                setting = _Setting(built(plugin, options), model, sampler())
                setting.draw(range(setting.guidance.population))
            except CompositionError as error:
                refusals.append(f"{name}: {error.what}")
            else:
                setting.model.rows = 0
                return setting
    raise NotApplicable(f"it refuses every model and sampler of the suite; the last is {refusals[-1]}")


def check_builds_from_options(plugin: Any, options: Options) -> None:
    """``plugin(**options)`` is a lightrail.Guidance."""
    guidance = built(plugin, options)
    require(isinstance(guidance, Guidance), f"it is no lightrail.Guidance but {type(guidance).__name__}")
    require(guidance.population >= 1 and guidance.candidates >= 1, "population and candidates are at least 1")


def check_rejects_unknown_options(plugin: Any, options: Options) -> None:
    """An option that the signature lacks is an error."""
    refuses_unknown_options(plugin, options)


def check_treats_samples_apart(plugin: Any, options: Options) -> None:
    """A sample is the same alone (with its population) and beside any other, however far out."""
    setting = _setting(plugin, options)
    size = setting.guidance.population
    start = setting.draw(range(3 * size)).start
    far = torch.cat([start[: 2 * size], 30 * start[2 * size :]])
    together = setting.draw(range(3 * size), far).x
    for first in (0, size):
        rows = range(first, first + size)
        alone = setting.draw(rows, far[first : first + size]).x
        require_near(alone, together[first : first + size], "alone a sample is not what it is beside others", APART)


def check_keeps_nothing_on_itself(plugin: Any, options: Options) -> None:
    """One guidance that steers two batches in turn gives what it gives each time."""
    setting = _setting(plugin, options)
    size = setting.guidance.population
    first = setting.draw(range(2 * size)).x
    setting.draw(range(size, 2 * size))
    require_near(setting.draw(range(2 * size)).x, first, "the second time the same samples are others")


def check_counts_its_evaluations(plugin: Any, options: Options) -> None:
    """The network is asked as often for each sample as is counted."""
    setting = _setting(plugin, options)
    size = setting.guidance.population
    found = setting.draw(range(2 * size))
    asked = setting.model.rows / (2 * size)
    # Another network than the model is counted too, and not seen here.
    is_right = found.evaluations == asked if _asks_only_the_model(setting.guidance) else found.evaluations >= asked
    require(is_right, f"{found.evaluations} evaluations a sample are counted, and {asked:g} were made")


def _asks_only_the_model(guidance: Guidance) -> bool:
    return set(guidance.asks) <= {"cond", "uncond"}


def check_works_with_every_sampler(plugin: Any, options: Options) -> None:
    """With every installed sampler it ends at finite states of the right shape, or an error says that it cannot."""
    worked = []
    first = _setting(plugin, options)
    model, guidance = first.model, first.guidance
    for name, sampler in _samplers():
        try:
            setting = _Setting(guidance, model, sampler())
            found = setting.draw(range(2 * setting.guidance.population))
        except CompositionError:
            continue
        worked.append(name)
        require(found.x.shape == found.start.shape, f"with {name} the samples have another shape")
        require(bool(found.x.isfinite().all()), f"with {name} it ends at numbers that are not finite")
    require(worked, "it works with no installed sampler")


def check_works_in_a_chain(plugin: Any, options: Options) -> None:
    """Behind itself, and behind guidance that mixes two predictions, it ends at finite states, or is refused."""
    setting = _setting(plugin, options)
    try:
        found = _Setting(setting.guidance, setting.model, setting.sampler, [_Mixes()]).draw(
            range(setting.guidance.population)
        )
    except CompositionError as error:
        raise NotApplicable(f"it refuses: {error.what}") from error
    require(bool(found.x.isfinite().all()), "behind another guidance it ends at numbers that are not finite")


class _Mixes(Guidance):
    """uncond + 1.5 (cond − uncond)."""

    asks = ("uncond",)

    def mix(self, named: Mapping[str, Any], moment: Any) -> Any:
        cond, uncond = named["cond"], named["uncond"]
        return cond.with_data(1.5 * cond.data - 0.5 * uncond.data)


def check_works_in_half_precision(plugin: Any, options: Options) -> None:
    """In bfloat16 the states stay bfloat16, and finite."""
    setting = _setting(plugin, options, torch.bfloat16)
    found = setting.draw(range(setting.guidance.population)).x
    require(found.dtype == torch.bfloat16, f"bfloat16 states become {found.dtype}")
    require(bool(found.isfinite().all()), "in bfloat16 it ends at numbers that are not finite")


def check_measures_numbers(plugin: Any, options: Options) -> None:
    """What it measures of samples are finite numbers by name, of guided and of unguided ones alike."""
    setting = _setting(plugin, options)
    size = setting.guidance.population
    count = size * max(2, -(-24 // size))
    drawn = setting.draw(range(count))
    numbers = [index // size for index in range(count)]
    observed = setting.observed(numbers) if setting.guidance.needs_measurement else None
    condition = {"label": torch.tensor([number % 3 for number in numbers])}
    for samples in (drawn.x, drawn.start):
        generated = Generated(setting.model.decode(samples), drawn.start, condition, setting.grid, observed)
        measured = setting.guidance.measure(generated)
        bad = {name: value for name, value in measured.items() if not math.isfinite(float(value))}
        require(not bad, f"it measures {bad}")


CHECKS: tuple[Check, ...] = (
    check_is_documented,
    check_names_its_paper,
    check_builds_from_options,
    check_rejects_unknown_options,
    check_treats_samples_apart,
    check_keeps_nothing_on_itself,
    check_counts_its_evaluations,
    check_works_with_every_sampler,
    check_works_in_a_chain,
    check_works_in_half_precision,
    check_measures_numbers,
)


class GuidanceSuite(Suite):
    """Every check of a guidance."""

    kind: ClassVar[str] = "guidance"
    checks: ClassVar[tuple[Check, ...]] = (*CHECKS, known_exceptions(frozenset(map(name_of, CHECKS))))
