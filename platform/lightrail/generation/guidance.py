"""The contract of guidance: what steers a sampler, in the places where it can be steered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightrail.generation.denoiser import Condition, Denoiser, Generated
from lightrail.generation.measurement import Observed
from lightrail.generation.noise import Noise
from lightrail.generation.noise_path import Level
from lightrail.generation.prediction import Prediction
from lightrail.generation.sampler import Sampler, State
from lightrail.generation.time_grid import Grid
from lightrail.traits import Traits

__all__ = ["Guidance", "Moment"]

Run = Callable[[Tensor], State]

# Random numbers of a step by draw: below, those of samplers; then a thousand for each guidance of a chain, and the same
# again for each time that the step is taken again.
GUIDANCE_DRAWS = 1000
VISIT_DRAWS = 1_000_000


def _uncounted(evaluations: int) -> None:
    pass


@dataclass
class Moment:
    """What one guidance of a chain sees of one evaluation.

    Args:
        denoiser: The network on its path.
        condition: What steers the samples, one row each.
        grid: The levels of the run.
        index: The step that is being taken.
        noise: Random numbers by sample and step; :meth:`normal` and :meth:`uniform` are guidance's own.
        x: The states that the network is asked about, ``[B, …]``.
        level: Their level of noise.
        memory: What this guidance carries from one evaluation to the next: tensors with one row a sample, or plain
            values. It is resampled with the samples.
        prediction: What the network said at the start of the step; with its graph to its own ``x`` where guidance asked
            for gradients.
        resample: Chooses rows of a state, and of all that guidance remembers: ``resample(state, rows)``.
        observed: What was measured of the samples that are sought, where something was.
        count: Adds to the number of evaluations of each sample.
        network_time: The time that the network is told at ``x``, where it is not the level's.
        first_draw: The first of the random numbers of this guidance at this visit of the step.
    """

    denoiser: Denoiser
    condition: Condition | None
    grid: Grid
    index: int
    noise: Noise
    x: Tensor
    level: Level
    memory: dict[str, Any] = field(default_factory=dict)
    prediction: Prediction | None = None
    resample: Callable[[State, Tensor], State] = State.select
    observed: Observed | None = None
    count: Callable[[int], None] = _uncounted
    network_time: Tensor | float | None = None
    first_draw: int = GUIDANCE_DRAWS

    def normal(self, draw: int = 0) -> Tensor:
        """Standard normal numbers of this step, ``[B, …]``, that no sampler and no other guidance uses.

        A step that is taken again has others.

        Args:
            draw: Which, from 0 to 999.
        """
        return self.noise.normal(self.index, self.first_draw + draw)

    def uniform(self, draw: int = 0, shape: Sequence[int] = ()) -> Tensor:
        """Numbers in [0, 1) of this step, ``[B, *shape]``, as :meth:`normal` has them."""
        return self.noise.uniform(self.index, self.first_draw + draw, shape)

    def predict(
        self,
        x: Tensor,
        level: Level,
        condition: Condition | None = None,
        *,
        denoiser: Denoiser | None = None,
    ) -> Prediction:
        """Asks the network once more, and counts it; a gradient goes through it where gradients are enabled.

        Args:
            x: States ``[B, …]``, or several rows for each sample, one after the other.
            level: Their level of noise.
            condition: What steers them; those of the batch are ``self.condition``.
            denoiser: Another network.
        """
        self.count(max(1, len(x) // len(self.x)))
        time = self.network_time if level is self.level and len(x) == len(self.x) else None
        return (denoiser or self.denoiser).predict(x, level, condition, time)

    def gradient(self, losses: Callable[[Prediction], Tensor]) -> tuple[Tensor, Tensor]:
        """The gradient of a loss of what the network says, through the network, at the state of this step.

        Args:
            losses: From a prediction to one number a sample, ``[B]``.

        Returns:
            The losses ``[B]``, and the gradient of each with respect to its own state, ``[B, …]``.
        """
        assert self.prediction is not None
        with torch.enable_grad():
            values = losses(self.prediction)
            (gradient,) = torch.autograd.grad(values.sum(), self.prediction.x, retain_graph=True)
        return values.detach(), gradient


class Guidance:
    """Steers a sampler; a chain of them acts in order. Each method is one place to act, and does nothing by default.

    Attributes:
        asks: The predictions that :meth:`mix` wants beside ``cond``: ``uncond``, which is asked in one call with it,
            and names of its own, which :meth:`evaluate` answers.
        needs_gradient: Whether :meth:`Moment.gradient` is asked for; the first evaluation of each step then keeps its
            graph.
        needs_every_gradient: Whether :meth:`mix` or :meth:`correct` take gradients at every evaluation; each then keeps
            its graph to ``prediction.x``.
        needs_measurement: Whether it steers towards what was measured, ``moment.observed``.
        population: How many samples, one after the other, are drawn together and share what they are steered by.
        candidates: How many states are carried along for each sample, one after the other; the first of them, when all
            steps are taken, is the sample.
    """

    traits: ClassVar[Traits] = Traits()
    asks: tuple[str, ...] = ()
    needs_gradient: bool = False
    needs_every_gradient: bool = False
    needs_measurement: bool = False
    population: int = 1
    candidates: int = 1

    def prepare(self, denoiser: Denoiser, sampler: Sampler) -> None:
        """Sees the model and the solver once, before anything is sampled; refuses those that it cannot steer.

        Args:
            denoiser: The network on its path.
            sampler: The solver, with its wrappers around it.
        """

    def is_active(self, moment: Moment) -> bool:
        """Whether it acts at this level; where it does not, what it asks is not evaluated."""
        return True

    def evaluate(self, name: str, moment: Moment) -> Prediction:
        """Answers a name of its own in :attr:`asks`, at ``moment.x``.

        Args:
            name: Which.
            moment: Where.
        """
        raise NotImplementedError(f"{type(self).__name__} asks for {name!r} and does not evaluate it")

    def mix(self, named: Mapping[str, Prediction], moment: Moment) -> Prediction:
        """One prediction from several.

        Args:
            named: ``cond``, as those before it in the chain left it, ``plain``, as the network said it, and what it
                asks.
            moment: Where.
        """
        return named["cond"]

    def correct(self, prediction: Prediction, moment: Moment) -> Prediction:
        """Edits the predicted data, before the sampler sees them.

        Args:
            prediction: What was mixed, :meth:`Prediction.with_data` replaces its data.
            moment: Where.
        """
        return prediction

    def after_step(self, state: State, moment: Moment) -> State:
        """Edits, weighs or resamples the states after a step.

        Args:
            state: At ``moment.grid[state.index]``; ``moment.resample(state, rows)`` chooses among its samples, and a
                smaller index repeats steps.
            moment: The step that was taken, with the prediction at its start.
        """
        return state

    def around(self, run: Run, start: Tensor, moment: Moment) -> State:
        """Chooses where the sampler starts, or runs it more than once.

        Args:
            run: From states at the first level to the state at the end.
            start: The states that sampling would start from.
            moment: Before the first step, at ``start``.
        """
        return run(start)

    def measure(self, generated: Generated) -> dict[str, float]:
        """What it is meant to move, by name: measured of the guided samples, and of unguided ones beside them.

        Args:
            generated: All samples of a generation, with what they were steered by.
        """
        return {}
