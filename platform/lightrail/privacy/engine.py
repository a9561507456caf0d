"""One private run: its plan, its secret numbers, its ledger."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightrail.errors import CheckpointError, CompositionError, NonFiniteLoss
from lightrail.privacy.accounting import RunningEpsilon, calibrated
from lightrail.privacy.events import Event, joined, merged
from lightrail.privacy.ledger import ZERO_OUT, Ledger, check_delta, default_delta, plan_table
from lightrail.privacy.method import PrivacyMethod, PrivateHorizon
from lightrail.privacy.noise import DeterministicNoise, SystemNoise
from lightrail.privacy.noise_source import NoiseSource

if TYPE_CHECKING:
    from lightrail.run.run import Run
    from lightrail.sample_gradients import Path

__all__ = ["PrivacyEngine"]

FILE = "privacy.json"
_SLACK = 1e-3  # relative: what a calibrated plan may exceed its target by, on a grid of privacy losses


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
        # Where samples lie in the model's operations, and how far that was from samples evaluated alone.
        self.path: Path | None = None
        self.difference = 0.0
        self._run = run

    # The plan.

    def attach(self, trainer: Trainer) -> None:
        """Connects to the trainer before it runs."""
        self._trainer = trainer
        rank = trainer.global_rank
        seed = int(self._run.composition.config.seed or 0)
        if self.method.deterministic_noise:
            self.noise: NoiseSource = DeterministicNoise(seed, 2 * rank)
            self._coins: NoiseSource = DeterministicNoise(seed, 2 * rank + 1)
        else:
            self.noise = SystemNoise(trainer.strategy.root_device, source=self.method.noise_source)
            self._coins = SystemNoise()

    def limited(self, steps_in_epoch: int) -> int:
        """Steps in an epoch, where the user limits them."""
        limit = self._trainer.limit_train_batches
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
        noise = self._calibrated(horizon, delta) if self.method.noise is None else self.method.noise
        self.ledger = self._new_ledger(delta, noise, self._planned(noise, 0))
        self.running = RunningEpsilon(delta, self.method.accountant)
        if self._trainer.is_global_zero and self._run.resumed is None:
            self._announce()
        return horizon.steps

    def _steps(self, steps_in_epoch: int, most_steps: int | None) -> int:
        trainer = self._trainer
        ends = [end for end in (trainer.fit_loop.max_steps, most_steps) if end not in (-1, None)]
        if trainer.fit_loop.max_epochs not in (None, -1):
            ends.append(trainer.fit_loop.max_epochs * steps_in_epoch)
        if not ends:
            raise CompositionError(
                "a private run must know how long it is: its noise is calibrated for all of its steps",
                found=f"trainer.max_epochs={trainer.fit_loop.max_epochs} trainer.max_steps=-1",
                allowed="a number of epochs or of steps",
                remedy="Set trainer.max_epochs or trainer.max_steps.",
            )
        return max(1, min(ends))

    def _planned(self, noise: float, first: int) -> list[Event]:
        assert self.horizon is not None
        horizon = self.horizon
        if self.method.sampling == "shuffle":
            epochs = -(-horizon.steps // self._steps_in_epoch) - -(-first // self._steps_in_epoch)
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

    def _announce(self) -> None:
        assert self.ledger is not None
        rows = plan_table(self.ledger)
        width = max(len(name) for name, _ in rows)
        print("\n".join(["privacy", *(f"  {name:<{width}}  {value}" for name, value in rows)]), file=sys.stderr)

    # The records of a step.

    def drawn(self, count: int, step: int) -> Tensor:
        """Which of ``count`` records of this rank take part in a step: a mask ``[count]``."""
        assert self.horizon is not None
        return self._coins.bernoulli(count, self.method.batch_at(step, self.horizon), self.horizon.records)

    def shuffled(self, count: int) -> Tensor:
        """A secret order of ``count`` records."""
        return self._coins.normal_like([torch.zeros(count, dtype=torch.float64)], 1.0)[0].argsort()

    # The release.

    def release(self, sums: list[Tensor], params: Sequence[Tensor], sum_over_ranks: Callable[[Tensor], None]) -> None:
        """Turns the sums of a step into its private gradient, in ``.grad``.

        Args:
            sums: What the micro-batches of this rank contributed.
            params: The parameters.
            sum_over_ranks: Adds a tensor over all ranks, in place.
        """
        assert self.horizon is not None and self.ledger is not None
        release = _Release(self, sum_over_ranks)
        for p, gradient in zip(params, self.method.gradient(sums, params, release), strict=True):
            p.grad = gradient.to(p.dtype).view(p.shape)
        noise = merged(*release.noises) if release.noises else 0.0
        self._account(release.step, noise, release.batch)

    def _account(self, step: int, noise: float, batch: int) -> None:
        assert self.horizon is not None and self.ledger is not None
        records = self.horizon.records
        if self.method.sampling == "shuffle":
            # An epoch takes every record once: together its steps are one release of everything.
            if step % self._steps_in_epoch == 0:
                self.ledger.record(Event(noise, 1, records, records))
            return
        self.ledger.record(Event(noise, 1, batch, records))

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
        broken = [name for name, p in self._run.task.named_parameters() if not bool(torch.isfinite(p).all())]
        if broken:
            raise NonFiniteLoss(
                "the parameters are not finite any more",
                found=f"{broken[0]} and {len(broken) - 1} others" if len(broken) > 1 else broken[0],
                allowed="finite parameters",
                remedy="Lower optimizer.lr; noise of high dimension asks for smaller steps than plain gradients do.",
            )
        self.ledger.guards = self.guards()
        return {
            **self.ledger.to_dict(),
            "method": self.method.state_dict(),
            "noise_state": self.noise.state_dict(),
            "coins": self._coins.state_dict(),
        }

    def guards(self) -> dict[str, dict[str, Any]]:
        """The budgets of callbacks that guard the validation."""
        found: dict[str, dict[str, Any]] = {}
        for each in self._run.callbacks:
            guards: Any = getattr(each, "guards", None)
            found |= guards() if callable(guards) else {}
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with the ledger of a checkpoint: what was spent stays spent.

        Raises:
            CheckpointError: The checkpoint has no ledger, or what is left of the target does not suffice.
        """
        assert self.ledger is not None and self.horizon is not None
        if not state:
            raise CheckpointError(
                "the checkpoint was not trained privately",
                found="no ledger in it",
                allowed="a checkpoint of a run with privacy",
                remedy="Start a private run anew: what was trained without noise cannot be made private.",
            )
        before, now = Ledger.from_dict(state), self.ledger
        noise = before.noise if self.method.noise is None else self.method.noise
        assert noise is not None
        steps_done = self._trainer.fit_loop.epoch_loop.global_step
        planned = joined([*before.events, *self._planned(noise, steps_done)])
        ledger = self._new_ledger(now.delta, noise, planned)
        ledger.events = list(before.events)
        ledger.is_private = ledger.is_private and before.is_private
        ledger.assumptions = list(dict.fromkeys([*before.assumptions, *ledger.assumptions]))
        self.ledger = ledger
        target = self.method.epsilon
        if target is not None and ledger.is_private and ledger.planned_epsilon > target * (1 + _SLACK):
            raise CheckpointError(
                "what is left of the privacy budget does not suffice for this run",
                found=f"epsilon {ledger.epsilon():.4g} spent, {ledger.planned_epsilon:.4g} after {self.horizon.steps:,} "
                f"steps, with the noise {noise:.4g} of the first part",
                allowed=f"epsilon {target:g}",
                remedy="Train for fewer steps, or raise privacy.epsilon knowingly.",
            )
        self.method.load_state_dict(state["method"])
        self.noise.load_state_dict(state["noise_state"])
        self._coins.load_state_dict(state["coins"])
        if self._trainer.is_global_zero:
            self._announce()

    def write(self, folder: FilePath) -> dict[str, Any]:
        """Writes ``privacy.json``.

        Returns:
            What the summary of the run says: epsilon, delta, and whether it is private at all.
        """
        if self.ledger is None:
            return {}
        self.ledger.guards = self.guards()
        self.ledger.write(folder / FILE)
        spent = self.ledger.epsilon()
        return {
            "epsilon": spent if self.ledger.is_private else None,
            "delta": self.ledger.delta,
            "target_epsilon": self.ledger.target_epsilon,
            "noise": self.ledger.noise,
            "private": self.ledger.is_private,
        }


class _Release:
    """The noise of one step; see :class:`lightrail.privacy.Release`."""

    def __init__(self, engine: PrivacyEngine, sum_over_ranks: Callable[[Tensor], None]) -> None:
        assert engine.horizon is not None and engine.ledger is not None and engine.ledger.noise is not None
        self.horizon = engine.horizon
        self.step = engine.step
        self.batch = engine.method.batch_at(self.step, engine.horizon)
        self.noise: float = engine.ledger.noise
        self.noises: list[float] = []
        self._engine = engine
        self._sum_over_ranks = sum_over_ranks

    def __call__(self, sums: Sequence[Tensor], *, sensitivity: float, noise: float) -> list[Tensor]:
        self.noises.append(noise)
        ranks = self._engine._trainer.world_size
        found = [each if each.dtype in (torch.float32, torch.float64) else each.float() for each in sums]
        # Independent shares on the ranks add up to the whole: no rank ever holds, or sends, a sum without noise.
        self._engine.noise.add_to(found, noise * sensitivity / ranks**0.5)
        return self.summed(found)

    def summed(self, sums: Sequence[Tensor]) -> list[Tensor]:
        for each in sums:
            self._sum_over_ranks(each)
        return list(sums)
