"""The contract of a sampler: one step at a time over an explicit state."""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.generation.noise import Noise
from lightrail.generation.noise_path import Level, NoisePath
from lightrail.generation.prediction import Prediction
from lightrail.generation.time_grid import Grid, TimeGrid
from lightrail.options import at_least
from lightrail.traits import Traits, traits_of

if TYPE_CHECKING:
    from lightrail.generation.denoiser import Denoiser

__all__ = ["Predict", "Sampler", "SamplerWrapper", "State", "mapped", "weighted_sum"]


class Predict(Protocol):
    """Asks the network, guided where the run has guidance; one call is one evaluation of each sample."""

    def __call__(self, x: Tensor, level: Level, *, network_time: Tensor | float | None = None) -> Prediction:
        """What the network sees in ``x`` at ``level``.

        Args:
            x: The state ``[B, …]``.
            level: Its level of noise: one for all, or one a sample (:meth:`NoisePath.levels`).
            network_time: The time that the network is told, where that is another: a number or ``[B]``.
        """
        ...


@dataclass(frozen=True)
class State:
    """All that a step needs: it can be saved, resampled by index and run backwards.

    Args:
        x: The samples as they are, ``[B, …]``.
        noise: Where random numbers come from, by step.
        index: How many steps were taken; ``grid[index]`` is the level of ``x``.
        history: Predictions of earlier steps, the newest first, as long as the sampler keeps them.
        memory: What else the sampler carries along, by name: tensors ``[B, …]``, predictions, or plain values.
    """

    x: Tensor
    noise: Noise
    index: int = 0
    history: tuple[Prediction, ...] = ()
    memory: Mapping[str, Any] = field(default_factory=dict)

    def next(self, x: Tensor, *, history: tuple[Prediction, ...] | None = None, **memory: Any) -> State:
        """The state after a step.

        Args:
            x: The samples at the next level.
            history: The predictions to keep; as they are by default.
            memory: What changes in the memory.
        """
        kept = self.history if history is None else history
        return State(x, self.noise, self.index + 1, kept, {**self.memory, **memory} if memory else self.memory)

    def normal(self, draw: int = 0) -> Tensor:
        """Fresh standard normal numbers of this step, ``[B, …]``, the same however often they are asked."""
        return self.noise.normal(self.index, draw)

    def map(self, function: Callable[[Tensor], Tensor]) -> State:
        """The state with a function applied to each tensor that has one row a sample."""
        return dataclasses.replace(
            self,
            x=function(self.x),
            history=tuple(each.map(function) for each in self.history),
            memory={name: mapped(value, function) for name, value in self.memory.items()},
        )

    def select(self, rows: Tensor) -> State:
        """The particles with these numbers, history and all; each goes on with the noise of its new place."""
        return self.map(lambda tensor: tensor[rows])


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A value of a memory with a function applied to each tensor in it."""
    if isinstance(value, Prediction):
        return value.map(function)
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple | list):
        return type(value)(mapped(each, function) for each in value)
    return value


class Sampler(ABC):
    """A solver of the generative process.

    Subclasses write :meth:`step`; the others have sensible defaults. Coefficients are numbers in double precision, read
    from the levels of the grid; the state keeps the network's type.

    Args:
        steps: How many steps are taken, at least :attr:`minimum_steps`.

    Attributes:
        minimum_steps: Fewer are refused.
        grid_name: The time grid where the user names none.
        needs_finite_start: Whether the first level must have α > 0; a solver that only reads times says no.
    """

    traits: ClassVar[Traits] = Traits()
    minimum_steps: int = 1
    grid_name: str = "uniform_lambda"
    needs_finite_start: bool = True

    def __init__(self, steps: int = 20) -> None:
        at_least(1, steps=steps)
        if steps < self.minimum_steps:
            raise ConfigurationError(
                f"{type(self).__name__} needs more steps",
                found=f"sampler.steps={steps}",
                allowed=f"at least {self.minimum_steps}",
                remedy=f"Set sampler.steps={self.minimum_steps} or more, or choose a one-step method such as ddim.",
            )
        self.steps = steps

    @property
    def solver(self) -> Sampler:
        """The sampler itself, without what is put around it."""
        return self

    @property
    def card(self) -> Traits:
        """Its traits under the options that it was built with, which a sampler keeps under their names."""
        names = inspect.signature(type(self)).parameters
        return traits_of(type(self), {name: getattr(self, name) for name in names if hasattr(self, name)})

    def prepare(self, denoiser: Denoiser) -> None:  # noqa: B027
        """Sees the model once, before anything is sampled: reads what was fitted for it, or refuses it.

        Args:
            denoiser: The network on its path.
        """

    def grid(self, path: NoisePath, times: TimeGrid) -> Grid:
        """The levels that it visits; a method that counts its steps differently overrides this.

        Args:
            path: The noise path.
            times: The spacing that was chosen.
        """
        return times.grid(path, self.steps, finite=self.needs_finite_start)

    def start(self, x: Tensor, noise: Noise, grid: Grid) -> State:
        """The state before the first step."""
        return State(x, noise)

    @abstractmethod
    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        """From ``grid[state.index]`` to ``grid[state.index + 1]``.

        Args:
            state: Where the samples are.
            predict: Asks the network.
            grid: The levels of the run; only those at and next to the state's are to be read.
        """

    def solve(
        self, state: State, predict: Predict, grid: Grid, after_step: Callable[[State], State] | None = None
    ) -> State:
        """Takes every step.

        Args:
            state: Where the samples are; its index may be beyond 0.
            predict: Asks the network.
            grid: The levels.
            after_step: Sees the state after each step and may change it.
        """
        while state.index < grid.steps:
            state = self.step(state, predict, grid)
            if after_step is not None:
                state = after_step(state)
        if grid.denoises_last:
            state = dataclasses.replace(state, x=predict(state.x, grid[-1]).data)
        return state

    def evaluations(self, grid: Grid) -> int | None:
        """How often the network is asked for one sample; ``None`` where that depends on what it says."""
        return grid.steps + grid.denoises_last

    def invert(self, state: State, predict: Predict, grid: Grid) -> State:
        """From data to noise: undoes :meth:`solve`.

        Args:
            state: The samples at ``grid[-1]``, with ``index == grid.steps``.
            predict: Asks the network.
            grid: The levels, as for :meth:`solve`.

        Raises:
            CompositionError: The method cannot be inverted.
        """
        raise CompositionError(
            f"{type(self).__name__} cannot be run backwards",
            found="generate.invert",
            allowed="a deterministic sampler with an inverse: ddim, bdia",
            remedy="Choose +sampler=bdia, which inverts exactly, or +sampler=ddim.",
        )


class SamplerWrapper(Sampler):
    """A sampler that holds another and changes how it starts, what it asks or what it does.

    By default everything is the held sampler's.

    Args:
        sampler: The one to put it around.
    """

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.minimum_steps = sampler.minimum_steps
        self.grid_name = sampler.grid_name
        self.needs_finite_start = sampler.needs_finite_start
        super().__init__(sampler.steps)

    @property
    def solver(self) -> Sampler:
        return self.sampler.solver

    @property
    def card(self) -> Traits:
        """That of the sampler that it holds."""
        return self.sampler.card

    def prepare(self, denoiser: Denoiser) -> None:
        self.sampler.prepare(denoiser)

    def grid(self, path: NoisePath, times: TimeGrid) -> Grid:
        return self.sampler.grid(path, times)

    def start(self, x: Tensor, noise: Noise, grid: Grid) -> State:
        return self.sampler.start(x, noise, grid)

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        return self.sampler.step(state, predict, grid)

    def evaluations(self, grid: Grid) -> int | None:
        return self.sampler.evaluations(grid)

    def invert(self, state: State, predict: Predict, grid: Grid) -> State:
        raise CompositionError(
            f"a run with {type(self).__name__} cannot be run backwards",
            found="generate.invert with a sampler_wrapper",
            allowed="a sampler alone",
            remedy="Leave sampler_wrapper out.",
        )


def weighted_sum(*terms: tuple[float, Tensor]) -> Tensor:
    """Σ w x over pairs (w, x), in as few passes over memory as eager torch allows; terms of weight 0 cost nothing.

    The weights are numbers in double precision; the sum has the tensors' type.
    """
    kept = [(weight, tensor) for weight, tensor in terms if weight != 0]
    if not kept:
        return torch.zeros_like(terms[0][1])
    weight, tensor = kept[0]
    total = tensor * weight
    for weight, tensor in kept[1:]:
        total = total.add_(tensor, alpha=weight)  # fresh, so that a gradient through it stays right
    return total
