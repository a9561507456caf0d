"""Clients whose own steps are private: each has an account, which goes on from visit to visit."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightrail.errors import CompositionError
from lightrail.federated.randomness import seed_for
from lightrail.federated.wire import Wire
from lightrail.privacy.announcement import announce
from lightrail.privacy.engine import PrivacyEngine
from lightrail.privacy.events import Event
from lightrail.privacy.ledger import Ledger
from lightrail.privacy.noise import DeterministicNoise
from lightrail.run.run import Run
from lightrail.sample_gradients import Path

__all__ = ["ACCOUNT", "ClientEngine", "ClientPrivacy", "seen", "worst_ledger"]

ACCOUNT = "account of privacy"
"""Under which name a client's state has its account."""


class ClientEngine(PrivacyEngine):
    """Carries a private method through the visits of one client, of which it is made anew for each.

    Its records are the samples of the client, and its horizon that of all rounds, as if it took part in each.

    Args:
        run: The client's, with the privacy of the whole run.
        number: Of the client.
        rounds: Of the whole run.
        tell: Is told the ledger of a client that begins.
    """

    def __init__(self, run: Run, number: int, rounds: int, tell: Callable[[Ledger], None]) -> None:
        assert run.privacy is not None
        # Where the run goes on from is the business of each account, and not of the run's.
        super().__init__(copy.deepcopy(run.privacy.method), dataclasses.replace(run, resumed=None, privacy=None))
        self._number, self._rounds, self._announce = number, rounds, tell
        self._before = 0  # steps of this client's visits so far
        self._visit = 0  # steps of a visit

    def attach(self, trainer: Trainer) -> None:
        super().attach(trainer)
        if self.method.deterministic_noise:
            seed = seed_for(int(self._run.composition.config.seed or 0), "privacy", self._number)
            self.noise, self._coins = DeterministicNoise(seed, 0), DeterministicNoise(seed, 1)

    @property
    def step(self) -> int:
        return self._before + super().step

    def begin(self, records: int, batch: int, steps_in_epoch: int, most_steps: int | None = None) -> int:
        self._visit = super()._steps(steps_in_epoch, most_steps)
        self._in_epoch = steps_in_epoch
        self._before = 0 if self._resumed is None else self._resumed["step"]
        if self.ledger is not None or self._before + self._visit > self._visit * self._rounds:
            raise self._beyond()
        super().begin(records, batch, steps_in_epoch, most_steps)
        self._trainer.fit_loop.epoch_loop.max_steps = self._visit
        return self._visit

    def announce(self) -> None:
        assert self.ledger is not None
        if self._resumed is None:
            self._announce(self.ledger)

    def _steps(self, steps_in_epoch: int, most_steps: int | None) -> int:
        return self._visit * self._rounds

    def _planned(self, noise: float, first: int) -> list[Event]:
        if self.method.sampling != "shuffle":
            return super()._planned(noise, first)
        assert self.horizon is not None
        # Every visit puts the records in a new order.
        visits = (self.horizon.steps - first) // self._visit
        releases = visits * math.ceil(self._visit / self._in_epoch)
        return [Event(noise, releases, self.horizon.records, self.horizon.records)]

    def _beyond(self) -> CompositionError:
        return CompositionError(
            "a client trains for more steps than its privacy was planned for",
            found=f"client {self._number} begins again after {self.step} steps",
            allowed=f"one visit of {self._visit} steps in each of {self._rounds} rounds",
            remedy="Use a federated method that trains once a round, or leave privacy out.",
        )


class ClientPrivacy:
    """Makes the engine of a client for each of its visits, and keeps its account in the client's state.

    Args:
        run: The clients', with the privacy of the whole run.
        rounds: Of the whole run.
    """

    def __init__(self, run: Run, rounds: int) -> None:
        self._run, self._rounds = run, rounds
        self._path: Path | None = None  # all clients have the same model
        self._is_told = False

    def visited(self, number: int, account: Tensor | None) -> Run:
        """The run of a visit, with an engine of the client's own.

        Args:
            number: Of the client.
            account: What its state has under :data:`ACCOUNT`; ``None`` before its first visit.
        """
        engine = ClientEngine(self._run, number, self._rounds, self._tell)
        engine.path = self._path
        if account is not None:
            engine.load_state_dict(_loaded(account))
        return dataclasses.replace(self._run, privacy=engine)

    def accounted(
        self, metrics: Mapping[str, float], run: Run, state: Wire, account: Tensor | None
    ) -> tuple[dict[str, float], Wire]:
        """What a client tells of its training, and what it keeps until its next visit.

        Args:
            metrics: Figures of the visit.
            run: From :meth:`visited`.
            state: What its method keeps.
            account: What it had before the visit.

        Returns:
            Its epsilon and, where they are public, the other figures; the state with its account.
        """
        engine = run.privacy
        if engine is None or engine.ledger is None:
            return dict(metrics), state if account is None else {**state, ACCOUNT: account}
        self._path = engine.path or self._path
        kept = io.BytesIO()
        torch.save(engine.state_dict(), kept)
        told = {name: value for name, value in metrics.items() if name == "lr" or engine.method.public_metrics}
        if engine.ledger.is_private:
            told["epsilon"] = engine.ledger.epsilon(interval=1e-3)
        return told, {**state, ACCOUNT: torch.frombuffer(bytearray(kept.getvalue()), dtype=torch.uint8)}

    def _tell(self, ledger: Ledger) -> None:
        if not self._is_told:
            self._is_told = True
            announce(ledger)


def _loaded(account: Tensor) -> dict[str, Any]:
    return torch.load(io.BytesIO(account.numpy().tobytes()), weights_only=True)


def seen(run: Run, loader: DataLoader[Any]) -> DataLoader[Any]:
    """A client's samples, as its method sees them outside of training: not at all, where steps are private.

    Args:
        run: The client's.
        loader: Of its samples.

    Raises:
        CompositionError: Nothing would account for what the method makes of them.
    """
    if run.privacy is None:
        return loader
    raise CompositionError(
        "this federated method looks at a client's samples outside of private steps",
        found=f"privacy with {type(run.privacy.method).__name__}",
        allowed="methods whose clients train, and do nothing else with their samples",
        remedy="Use federated=fedavg, fedprox, scaffold or fedadam, or leave privacy out.",
    )


def worst_ledger(states: Mapping[int, Wire]) -> Ledger | None:
    """The account of the client that has spent most; ``None`` where clients keep none.

    Args:
        states: What each client keeps.
    """
    ledgers = {
        client: Ledger.from_dict(_loaded(state[ACCOUNT])) for client, state in states.items() if ACCOUNT in state
    }
    if not ledgers:
        return None
    worst = max(ledgers, key=lambda client: ledgers[client].epsilon(interval=1e-3))
    ledger = ledgers[worst]
    ledger.assumptions = [
        f"A record is a sample. This is the account of client {worst}, which has spent the most of the {len(ledgers)} "
        "that have taken part; no sample is on two clients. It is planned as if the client took part in every round.",
        *ledger.assumptions,
    ]
    return ledger
