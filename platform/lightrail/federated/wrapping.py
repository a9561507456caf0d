"""A run made federated: its trainer's step becomes a round, its task the server's, its training the clients'."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightrail.federated.client_side import ClientSide, local_run
from lightrail.federated.gossip_rounds import GossipRounds
from lightrail.federated.method import DecentralisedMethod, FederatedMethod, ServerMethod
from lightrail.federated.refusals import check_engine, check_method, check_trainer
from lightrail.federated.rounds import Rounds, ServerRounds
from lightrail.federated.transport import InProcess, Transport

if TYPE_CHECKING:
    from lightrail.run.run import Run

__all__ = ["made_federated"]


def made_federated(method: FederatedMethod, run: Run) -> Run:
    """A run whose step is a round.

    Args:
        method: What clients, and a server or their neighbours, do.
        run: As it was composed.

    Raises:
        CompositionError: Something in it cannot be carried out in rounds.
    """
    check_method(method, run)
    check_trainer(run)
    side = ClientSide(local_run(run), method, None if run.data is None else run.data.train_dataloader)
    rounds = _rounds(method, run, side)
    _give_rounds(run.data if run.data is not None else run.task, method.evaluate_every)
    notes = [*run.notes]
    if side.model.has_buffers and isinstance(method, ServerMethod) and not method.keeps_buffers:
        notes.append("federated: statistics of layers are averaged over clients; whole numbers among them are not")
    return dataclasses.replace(
        run,
        task=_as_server(run.task, rounds),
        optimizer=None,
        schedule=None,
        transforms=(),
        batching=None,
        privacy=None,
        game=None,
        method_traits=(),
        callbacks=[*run.callbacks, rounds],
        names={**run.names, type(rounds): "federated"},
        trainer=_of_server(run, method),
        notes=notes,
    )


def _rounds(method: FederatedMethod, run: Run, side: ClientSide) -> Rounds:
    if isinstance(method, DecentralisedMethod):
        return GossipRounds(method, run.task, side)
    assert isinstance(method, ServerMethod)
    rounds = ServerRounds(method, run.task, side.seed, _transport(method, run, side))
    if run.resumed is not None and run.resumed.folder is not None:
        rounds.account_before = run.resumed.folder.path / "privacy.json"
    return rounds


def _transport(method: ServerMethod, run: Run, side: ClientSide) -> Transport:
    if method.engine == "here":
        if method.processes == 1:
            return InProcess(lambda: side)
        from lightrail.federated.pool import ClientPool

        return ClientPool(lambda: side, run.composition.overrides, method.processes)
    from lightrail.federated.flower import transport_for

    check_engine(method)
    return transport_for(run.composition.overrides, timeout=method.timeout, processes=method.processes)


# What of the trainer's options is about a step of training, which clients do and the server does not.
_OF_CLIENTS = ("accumulate", "gradient_clip_val", "gradient_clip_algorithm", "limit_train_batches", "max_samples")


def _of_server(run: Run, method: FederatedMethod) -> dict[str, Any]:
    kept = {key: value for key, value in run.trainer.items() if key not in _OF_CLIENTS}
    return {**kept, "max_epochs": -1, "max_steps": method.rounds, "log_every_n_steps": 1}


def _give_rounds(source: Any, count: int) -> None:
    """The training batches of the server are rounds; the run's own loader is what clients divide among themselves."""
    source.train_dataloader = lambda: DataLoader([_Round(i) for i in range(count)], batch_size=None)  # type: ignore[arg-type]


class _Round(int):
    """What stands in the place of a batch; what a task or its data does to batches is not meant for it."""


class _Server(LightningModule):
    """What a task does in the trainer of a federated run: its validation is its own, its training step a round.

    What it does before and after a step of training belongs to clients, and happens there.
    """

    rounds: Rounds
    step_unit = "rounds"

    def training_step(self, *args: Any) -> dict[str, Tensor]:
        found = self.rounds.step()
        optimizer: Any = self.optimizers()
        optimizer.param_groups[0]["lr"] = self.rounds.lr
        optimizer.step()
        return found

    def configure_optimizers(self) -> Any:
        # It moves nothing, and counts rounds.
        return torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.0)

    def _apply_batch_transfer_handler(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        is_round = isinstance(batch, _Round)
        return batch if is_round else super()._apply_batch_transfer_handler(batch, *args, **kwargs)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None: ...
    def on_train_start(self) -> None: ...
    def on_train_end(self) -> None: ...
    def on_train_epoch_start(self) -> None: ...
    def on_train_epoch_end(self) -> None: ...
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None: ...
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None: ...
    def on_before_optimizer_step(self, optimizer: Any) -> None: ...
    def on_before_zero_grad(self, optimizer: Any) -> None: ...


def _as_server(task: LightningModule, rounds: Rounds) -> LightningModule:
    """The task itself, as the server's: its weights, its validation and its test stay what they are."""
    own = type(task)
    for name in ("training_step", "backward", "configure_optimizers"):
        vars(task).pop(name, None)
    task.__class__ = type(own.__name__, (_Server, own), {"__module__": own.__module__, "__doc__": own.__doc__})
    task.rounds = rounds  # type: ignore[assignment]
    task.automatic_optimization = False
    return task
