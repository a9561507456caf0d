"""One private run: its plan, its secret numbers, its ledger."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightrail.errors import CheckpointError
from lightrail.privacy.accounting import RunningEpsilon, calibrated
from lightrail.privacy.announcement import announce
from lightrail.privacy.continuation import all_spent
from lightrail.privacy.events import Event, joined, merged
from lightrail.privacy.ledger import ZERO_OUT, Ledger, check_delta, default_delta
from lightrail.privacy.method import PrivacyMethod, PrivateHorizon
from lightrail.privacy.noise import DeterministicNoise, SystemNoise
from lightrail.privacy.noise_source import NoiseSource
from lightrail.privacy.refusals import check_budget, check_continuation, check_finite, check_strategy, no_horizon
from lightrail.privacy.release import StepRelease
from lightrail.step.randomness import RandomState
from lightrail.step.sharded import shard_of

if TYPE_CHECKING:
    from lightrail.run.run import Run
    from lightrail.sample_gradients import Path

__all__ = ["PrivacyEngine"]

FILE = "privacy.json"


class PrivacyEngine:
    """Carries a method through a run.

    Args:
        method: Which gradients, how clipped, what noise, at what cost.
        run: The run that it makes private.
    """

    def __init__(self, method: PrivacyMethod, run: Run) -> None:
        self.method = method
        self.horizon: PrivateHorizon | None = None
        self.ledger: Ledger | None = None
        self.whole: list[Tensor] | None = None  # the parameters as operations see them
        self.path: Path | None = None  # where samples lie in the model's operations
        self.difference = 0.0  # how far gradients were from those of samples evaluated alone
        self.has_begun = False  # whether a first batch has shown that the model keeps nothing of it
        self._run = run
        self._resumed: dict[str, Any] | None = None
        self._since_order = 0  # where batches are fixed: steps since records were put in a new order
        self.order_is_new = False  # whether the next step begins to release all of them

    # The plan.

    def attach(self, trainer: Trainer) -> None:
        """Connects to the trainer before it runs."""
        self._trainer = trainer
        check_strategy(trainer.strategy, self.method)
        rank = trainer.global_rank
        seed = int(self._run.composition.config.seed or 0)
        if self.method.deterministic_noise:
            self.noise: NoiseSource = DeterministicNoise(seed, 2 * rank)
            self._coins: NoiseSource = DeterministicNoise(seed, 2 * rank + 1)
        else:
            self.noise = SystemNoise(trainer.strategy.root_device, source=self.method.noise_source)
            self._coins = SystemNoise()

    @property
    def ranks(self) -> int:
        """How many processes share the run."""
        return self._trainer.world_size

    def limited(self, steps_in_epoch: int) -> int:
        """Steps in an epoch, where the user limits them."""
        limit = self._trainer.limit_train_batches
        # Lightning would count the micro-batches.
        self._trainer.fit_loop.max_batches = math.inf
        return min(steps_in_epoch, limit) if type(limit) is int else steps_in_epoch

    def begin(self, records: int, batch: int, steps_in_epoch: int, most_steps: int | None = None) -> int:
        """Plans the run, now that the data is known, and says what it will cost.

        Args:
            records: How many there are, over all ranks.
            batch: Expected records a step.
            steps_in_epoch: Optimizer steps.
            most_steps: Where the run ends at the latest, if that was said.

        Returns:
            Optimizer steps of the whole run.
        """
        horizon = self.horizon = PrivateHorizon(records, batch, self._steps(steps_in_epoch, most_steps))
        self._steps_in_epoch = steps_in_epoch
        self._trainer.fit_loop.epoch_loop.max_steps = horizon.steps
        delta = check_delta(default_delta(records) if self.method.delta is None else self.method.delta, records)
        self.method.prepare(horizon)
        if self._resumed is None:
            noise = self._calibrated(horizon, delta) if self.method.noise is None else self.method.noise
            self.ledger = self._new_ledger(delta, noise, self._planned(noise, 0))
        else:
            self.ledger = self._continued(self._resumed, delta)
        self.running = RunningEpsilon(delta, self.method.accountant)
        if self.noise.is_secret:
            # Dropout masks of a public seed would tell which place in its batch a sample had.
            RandomState.forget_seed()
        if self._trainer.is_global_zero:
            self.announce()
        return horizon.steps

    def announce(self) -> None:
        """Says what the run will cost."""
        assert self.ledger is not None
        announce(self.ledger)

    def _steps(self, steps_in_epoch: int, most_steps: int | None) -> int:
        trainer = self._trainer
        ends = [end for end in (trainer.fit_loop.max_steps, most_steps) if end not in (-1, None)]
        if trainer.fit_loop.max_epochs not in (None, -1):
            ends.append(trainer.fit_loop.max_epochs * steps_in_epoch)
        if not ends:
            raise no_horizon(trainer.fit_loop.max_epochs)
        return max(1, min(ends))

    def _planned(self, noise: float, first: int) -> list[Event]:
        horizon = self.horizon
        assert horizon is not None
        if self.method.sampling == "shuffle":
            # An order that is under way has been accounted for.
            covered = -self._since_order % self._steps_in_epoch
            epochs = math.ceil(max(0, horizon.steps - first - covered) / self._steps_in_epoch)
            return [Event(noise, epochs, horizon.records, horizon.records)]
        return self.method.events(noise, horizon, first)

    def _calibrated(self, horizon: PrivateHorizon, delta: float) -> float:
        assert self.method.epsilon is not None
        return calibrated(
            lambda noise: self._planned(noise, 0), self.method.epsilon, delta, accountant=self.method.accountant
        )

    def _new_ledger(self, delta: float, noise: float, planned: Sequence[Event]) -> Ledger:
        method = self.method
        adjacency = ZERO_OUT if method.sampling == "shuffle" else method.adjacency
        return Ledger(
            delta=delta,
            noise=noise,
            planned=list(planned),
            accountant=method.accountant,
            target_epsilon=method.epsilon,
            clip=method.clipping,
            adjacency=adjacency,
            sampling=method.sampling,
            is_private=self.noise.is_secret and noise > 0,
            assumptions=[
                "The guarantee covers the training data; validation and test data, and figures of the training data "
                "that are logged, are not covered.",
                f"Noise: {self.noise.name}.",
                *method.assumptions,
            ],
        )

    # The records of a step.

    def expected(self, step: int) -> int:
        """How many records a step is to have, over all ranks."""
        assert self.horizon is not None
        # What is loaded ahead may lie beyond the last step.
        return self.method.batch_at(min(step, self.horizon.steps - 1), self.horizon)

    def drawn(self, count: int, step: int) -> Tensor:
        """Which of ``count`` records of this rank take part in a step: a mask ``[count]``."""
        assert self.horizon is not None
        return self._coins.bernoulli(count, self.expected(step), self.horizon.records)

    def shuffled(self, count: int) -> Tensor:
        """A new order of ``count`` records; the next step begins to release all of them."""
        self.order_is_new = True
        return self._coins.normal_like([torch.zeros(count, dtype=torch.float64)], 1.0)[0].argsort()

    # The release.

    def release(
        self,
        sums: list[Tensor],
        params: Sequence[Tensor],
        updated: Sequence[Tensor],
        drawn: int,
        sum_over_ranks: Callable[[Tensor], None],
    ) -> None:
        """Turns the sums of a step into its private gradient, in ``.grad``.

        Args:
            sums: What the micro-batches of this rank contributed.
            params: The parameters, whole.
            updated: What the optimizer updates: the same, or this rank's parts of them.
            drawn: How many records the step was expected to have when it was drawn.
            sum_over_ranks: Adds a tensor over all ranks, in place.
        """
        assert self.horizon is not None
        assert self.ledger is not None
        release = StepRelease(self, sum_over_ranks)
        if release.batch != drawn:
            raise RuntimeError(f"step {self.step} was drawn at {drawn} records and is accounted at {release.batch}")
        for p, gradient in zip(updated, self.method.gradient(sums, params, release), strict=True):
            p.grad = shard_of(gradient.to(p.dtype).view(p.shape), p)
        noise = merged(*release.noises) if release.noises else 0.0
        self._account(noise, release.batch)

    def _account(self, noise: float, batch: int) -> None:
        assert self.horizon is not None
        assert self.ledger is not None
        records = self.horizon.records
        if self.method.sampling != "shuffle":
            self.ledger.record(Event(noise, 1, batch, records))
            return
        # An epoch takes every record once: together its steps are one release of everything.
        if self.order_is_new:
            self.order_is_new, self._since_order = False, 0
            self.ledger.record(Event(noise, 1, records, records))
        self._since_order += 1

    @property
    def step(self) -> int:
        return self._trainer.fit_loop.epoch_loop.global_step

    def spent(self) -> float | None:
        """Epsilon so far, where it is cheap to say; ``None`` until it is again."""
        assert self.ledger is not None
        return self.running.value(self.ledger.events) if self.ledger.is_private else None

    def logged(self) -> dict[str, float]:
        return self.method.logged()

    # Saving.

    def state_dict(self) -> dict[str, Any]:
        """The ledger and the method's state; of the secret numbers nothing, except of those that are no secret."""
        assert self.ledger is not None
        check_finite(self._run.task.named_parameters())
        self.ledger.guards = self.guards()
        return {
            **self.ledger.to_dict(),
            "method": self.method.state_dict(),
            "step": self.step,
            "since_order": self._since_order,
            "sources": self._of_all_ranks([self.noise.state_dict(), self._coins.state_dict()]),
        }

    def _of_all_ranks(self, value: Any) -> list[Any]:
        found: list[Any] = [value] * self.ranks
        if self.ranks > 1:
            torch.distributed.all_gather_object(found, value)
        return found

    def guards(self) -> dict[str, dict[str, Any]]:
        """The budgets of callbacks that guard the validation."""
        found: dict[str, dict[str, Any]] = {}
        for each in self._run.callbacks:
            guards: Any = getattr(each, "guards", None)
            told: Any = guards() if callable(guards) else {}
            found |= told
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the ledger of a checkpoint, from which the plan will go on: what was spent stays spent.

        Args:
            state: From :meth:`state_dict`; empty where the checkpoint has none.

        Raises:
            CheckpointError: The checkpoint has no ledger.
        """
        if not state:
            raise CheckpointError(
                "the checkpoint was not trained privately",
                found="no ledger in it",
                allowed="a checkpoint of a run with privacy",
                remedy="Start a private run anew: what was trained without noise cannot be made private.",
            )
        self._resumed = state

    def _continued(self, state: dict[str, Any], delta: float) -> Ledger:
        """The ledger of all that the first part of a run spent, planned to the end with the noise of that part."""
        assert self.horizon is not None
        before = Ledger.from_dict(state)
        noise = before.noise if self.method.noise is None else self.method.noise
        assert noise is not None
        self._since_order = state["since_order"]
        ledger = self._new_ledger(delta, noise, self._planned(noise, state["step"]))
        check_continuation(before, ledger)
        folder = None if self._run.resumed is None else self._run.resumed.folder
        ledger.events, remarks = all_spent(before, None if folder is None else folder.path / FILE)
        ledger.planned = joined([*ledger.events, *ledger.planned])
        ledger.is_private = ledger.is_private and before.is_private
        ledger.assumptions = list(dict.fromkeys([*before.assumptions, *ledger.assumptions, *remarks]))
        check_budget(ledger, self.method.epsilon, self.horizon.steps)
        self.method.load_state_dict(state["method"])
        noise_state, coins = state["sources"][self._trainer.global_rank % len(state["sources"])]
        self.noise.load_state_dict(noise_state)
        self._coins.load_state_dict(coins)
        return ledger

    def write(self, folder: FilePath) -> dict[str, Any]:
        """Writes ``privacy.json``.

        Returns:
            What the summary of the run says: epsilon, delta, and whether it is private at all.
        """
        if self.ledger is None:
            return {}
        self.ledger.guards = self.guards()
        self.ledger.write(folder / FILE)
        return self.ledger.summary()
