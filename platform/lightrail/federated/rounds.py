"""A federated run carried out by the run's own trainer: its step is a round."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightrail.errors import CompositionError
from lightrail.federated.answers import Answer, Answers
from lightrail.federated.client_privacy import worst_ledger
from lightrail.federated.estimates import Estimates
from lightrail.federated.local_model import LocalModel
from lightrail.federated.method import FederatedMethod, Heard, ServerMethod, State
from lightrail.federated.randomness import generator_for
from lightrail.federated.record import FederatedRecord, rounds_written
from lightrail.federated.server_privacy import ClientHorizon
from lightrail.federated.transport import Failure, Order, Reply, SumTerms, Transport
from lightrail.federated.wire import nbytes, packed
from lightrail.privacy.ledger import Ledger

__all__ = ["NAMED", "Rounds", "ServerRounds"]

NAMED = 12  # clients that have curves of their own; of more, the report has one picture


class Rounds(Callback):
    """Carries a method through a run; what is validated, saved and tested is the run's own task.

    Args:
        method: The method.
        task: The run's task.
        seed: Of the run.
    """

    def __init__(self, method: FederatedMethod, task: LightningModule, seed: int) -> None:
        self.method, self.seed = method, seed
        method.seed = seed
        self.done = 0
        self.lr = 0.0  # that clients had last
        self.record = FederatedRecord()
        self.model = LocalModel(task)
        self.state: State = {}  # of the method; empty before the first round
        self._figures: dict[str, float] = {}

    @property
    def state_key(self) -> str:
        return "federated"

    def begin(self) -> None:
        """Called once, before the first round."""
        raise NotImplementedError

    def carry_out(self) -> dict[str, float]:
        """One round, from the state of the last.

        Returns:
            Figures of the round: the mean ``loss`` over clients, and others.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Called once, at the end or after an error."""

    def step(self) -> dict[str, Tensor]:
        """One round, as the step of a trainer."""
        if not self.state:
            self.begin()
        figures = self.carry_out()
        self.done += 1
        self.lr = figures.pop("lr", self.lr)
        kept = ("loss", "accuracy")
        self._figures = {name: value for name, value in figures.items() if name not in kept}
        return {name: torch.tensor(value) for name, value in figures.items() if name in kept}

    def logged(self) -> dict[str, float]:
        """Figures of the last round."""
        return {**self._figures, **self.method.logged()}

    # Hooks of the trainer.

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.close()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # The account of privacy is in the checkpoint, and takes seconds to compute as finely as it is written.
        self.record.write(Path(trainer.default_root_dir))

    def write(self, folder: Path) -> None:
        """Writes what is known of the rounds."""
        self.record.write(folder)

    def in_summary(self, folder: Path) -> dict[str, Any]:
        """What the summary of a run that has ended, however, says of its rounds.

        Args:
            folder: Of the run.
        """
        if self.state:
            self.write(folder)
        return {"rounds": self.done}

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "lr": self.lr, "state": self.state, "record": self.record.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.done, self.lr, self.state = state_dict["done"], state_dict["lr"], state_dict["state"]
        self.record.load_state_dict(state_dict["record"])


class ServerRounds(Rounds):
    """A server and its clients.

    Args:
        method: What they do.
        task: The server's.
        seed: Of the run.
        transport: Carries messages.
    """

    method: ServerMethod
    account_before: Path | None = None
    """The account of privacy that a run which goes on had written."""

    def __init__(self, method: ServerMethod, task: LightningModule, seed: int, transport: Transport) -> None:
        super().__init__(method, task, seed)
        self.transport = transport
        self._is_open = False
        self._worst = 0.0  # epsilon of the client whose own steps have spent most
        self._undone = 0  # rounds that were made after a checkpoint from which the run went on
        # Whether one client is left out must not depend on the others, where each is to be hidden; its norm is bounded.
        largest = method.largest_update if method.server_privacy is None else math.inf
        self._estimates = Estimates(is_used=method.compressor is not None and method.feedback == "ef21")
        self._answers = Answers(method.compressor, self.model.layout.size, self.model.dtype, largest)

    def begin(self) -> None:
        self._open()
        self.record.about |= {"clients": self.method.clients, **self.transport.about()}
        if self.method.server_privacy is not None:
            self.method.server_privacy.begin(self._horizon())
        self.state = self.method.start(self.model.weights().cpu())

    def _open(self) -> None:
        if not self._is_open:
            self.transport.open(self.method.clients)
            self._is_open = True

    def _horizon(self) -> ClientHorizon:
        method = self.method
        is_poisson = method.sampling == "poisson"
        return ClientHorizon(
            method.clients, method.per_round, is_poisson, method.rounds, self.seed, self.account_before
        )

    def carry_out(self) -> dict[str, float]:
        self._open()
        method, round_index = self.method, self.done
        chosen = self._chosen(round_index)
        message = {**method.message(self.state, round_index)}
        wire = packed({**({} if method.keeps_buffers else self.model.buffers()), **message})
        orders = [Order(client, round_index, self._estimates.told(client, wire)) for client in chosen]
        replies, mean = self._exchanged(orders)
        answers, failures = self._answers.accepted(replies)
        self._tell(round_index, failures, len(chosen))
        answers = self._estimates.updated(answers, chosen)
        mean = self._mean(answers) if mean is None else mean
        heard = Heard(
            round_index,
            method.clients,
            tuple(each.client for each in answers),
            tuple(each.samples for each in answers),
            generator_for(self.seed, "server", round_index),
        )
        buffers = {name: mean.pop(name) for name in ("buffers", "counts") if name in mean}
        self.state = method.server(self.state, mean, heard)
        self.model.load(self.state["weights"])
        self.model.load_buffers(buffers)
        up = {each.client: nbytes(each.message) for each in replies if not isinstance(each, Failure)}
        self.record.add(round_index, answers, failures, sent=nbytes(wire) * len(chosen), received=up)
        return self._figures_of(answers, failures)

    def _chosen(self, round_index: int) -> list[int]:
        privacy = self.method.server_privacy
        if privacy is not None and self.method.sampling == "poisson":
            return privacy.drawn()
        return self.method.chosen(round_index, generator_for(self.seed, "chosen", round_index))

    def _exchanged(self, orders: Sequence[Order]) -> tuple[list[Reply | Failure], State | None]:
        """The answers; and their mean, where that is all that the server may learn of what is in them."""
        method = self.method
        if not method.secure_aggregation:
            return self.transport.exchange(orders), None
        # More than half: of fewer, a server could ask two halves for both secrets of one client.
        threshold = max(2, len(orders) // 2 + 1)
        terms = SumTerms(threshold, method.weighting == "samples", method.secure_range)
        return self.transport.exchange_secretly(orders, terms)

    def _mean(self, answers: Sequence[Answer]) -> State:
        """The mean of the answers, as the server may see it."""
        method = self.method
        privacy = method.server_privacy
        vectors = [each.vectors for each in answers]
        if privacy is not None:
            like = self.state["weights"]
            return {"update": privacy.mean([v["update"] for v in vectors]) if vectors else privacy.nothing(like)}
        if not answers:
            return {}
        return method.averaged(vectors, [each.samples for each in answers])

    def _tell(self, round_index: int, failures: Sequence[Failure], asked: int) -> None:
        for each in failures:
            print(f"round {round_index}: client {each.client} is left out: {each.reason}", file=sys.stderr)
        if failures and len(failures) == asked:
            raise self._nobody(failures)

    def _nobody(self, failures: Sequence[Failure]) -> BaseException:
        first = failures[0]
        if first.error is not None:
            return first.error
        return CompositionError(
            "no client's answer could be used in this round",
            found="; ".join(f"client {each.client}: {each.reason}" for each in failures[:3]),
            allowed="at least one answer of those that were asked",
            remedy="Mend the clients, raise federated.timeout, and go on with run.resume.",
        )

    def _figures_of(self, answers: Sequence[Answer], failures: Sequence[Failure]) -> dict[str, float]:
        figures = _means([each.metrics for each in answers], [each.samples for each in answers])
        losses = {each.client: each.metrics["loss"] for each in answers if "loss" in each.metrics}
        if self.method.clients <= NAMED:
            figures |= {f"client_loss:{client}": loss for client, loss in losses.items()}
        elif losses:
            figures |= {"client_loss:least": min(losses.values()), "client_loss:greatest": max(losses.values())}
        if all("epsilon" in each.metrics for each in answers):
            self._worst = max([self._worst, *(each.metrics["epsilon"] for each in answers)])
        if self._worst:
            figures["epsilon"] = self._worst
        last = self.record.last
        figures |= {
            "answers:used": len(answers),
            "answers:left_out": len(failures),
            "megabytes:sent": last["sent"] / 1e6,
            "megabytes:received": sum(last["received"].values()) / 1e6,
        }
        if self.method.server_privacy is not None:
            figures |= {"epsilon": self.method.server_privacy.spent(), **self.method.server_privacy.logged()}
        return figures

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self.transport.close()

    def write(self, folder: Path) -> None:
        super().write(folder)
        ledger = self.account()
        if ledger is not None:
            ledger.write(folder / "privacy.json")

    def in_summary(self, folder: Path) -> dict[str, Any]:
        told, ledger = super().in_summary(folder), self.account()
        if ledger is not None:
            return {**told, "privacy": ledger.summary()}
        return told if self.method.server_privacy is None else {**told, "privacy": {}}

    def account(self) -> Ledger | None:
        """What the run has spent of privacy: the server's account, or that of the client that has spent most."""
        if self.method.server_privacy is not None and self.state:
            return self.method.server_privacy.ledger()
        ledger = worst_ledger(self.transport.state_dict().get("states", {}))
        if ledger is not None and self._undone:
            ledger.assumptions.append(
                "Conditional: the run went on from an earlier checkpoint, and what clients released in the "
                f"{self._undone} rounds that it had made after it is not in this account."
            )
        return ledger

    def state_dict(self) -> dict[str, Any]:
        privacy, account = self.method.server_privacy, self.account()
        return {
            **super().state_dict(),
            "account": None if account is None else account.to_dict(),
            "worst": self._worst,
            "undone": self._undone,
            "clients": self.transport.state_dict(),
            "estimates": self._estimates.state_dict(),
            "privacy": None if privacy is None or not self.state else privacy.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # First of all: where it does not suffice, there is no account, and nothing has been released.
        if self.method.server_privacy is not None and state_dict["privacy"] is not None:
            self.method.server_privacy.begin(self._horizon(), state_dict["privacy"])
        super().load_state_dict(state_dict)
        self._worst = state_dict["worst"]
        written = 0 if self.account_before is None else rounds_written(self.account_before.parent)
        self._undone = state_dict.get("undone", 0) + max(0, written - self.done)
        self._open()
        self.transport.load_state_dict(state_dict["clients"])
        self._estimates.load_state_dict(state_dict["estimates"])


def _means(metrics: Sequence[Mapping[str, float]], samples: Sequence[int]) -> dict[str, float]:
    """Means over clients, weighted by their samples, of what all of them say."""
    if not metrics:
        return {}
    names = [name for name in metrics[0] if all(name in each for each in metrics)]
    total = sum(samples)
    return {name: sum(n * each[name] for n, each in zip(samples, metrics, strict=True)) / total for name in names}
