"""What a process of clients holds: the run, its data divided, and the one model that all clients take turns with."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightrail.federated.client import ESTIMATE, Client
from lightrail.federated.client_data import ClientData
from lightrail.federated.client_privacy import ACCOUNT, ClientPrivacy, seen
from lightrail.federated.local_model import LocalModel
from lightrail.federated.method import FederatedMethod, ServerMethod
from lightrail.federated.plain_loop import NeedsTrainer
from lightrail.federated.randomness import generator_for, seed_for, seeded
from lightrail.federated.transport import Order, Reply
from lightrail.federated.visit import Visit, VisitingTrainer
from lightrail.federated.wire import FORGET, Wire, packed, unpacked
from lightrail.run.run import Run
from lightrail.step.randomness import RandomState

__all__ = ["ClientSide", "local_run"]


class ClientSide:
    """Does the work of clients, one order at a time.

    Args:
        run: As it was composed, before it became federated; its task is trained here and nowhere else.
        method: What clients do.
        train_dataloader: Gives the training loader of data that someone else prepares; ``None`` where it is prepared
            here.
    """

    def __init__(self, run: Run, method: FederatedMethod, train_dataloader: Callable[[], Any] | None = None) -> None:
        self.method = method
        self.run = run
        self._train_dataloader = train_dataloader
        self.seed = method.seed = int(run.composition.config.seed or 0)
        self.model = LocalModel(run.task)
        self._first_buffers = self.model.buffers()
        if self.model.game is not None:
            self.model.game.attach(run.task)
            self.run = dataclasses.replace(run, game=self.model.game)

    @cached_property
    def data(self) -> ClientData:
        """The training data, divided; prepared when it is first asked for."""
        run = self.run
        make = self._train_dataloader
        if make is None:
            source: Any = run.data if run.data is not None else run.task
            source.prepare_data()
            source.setup("fit")
            make = source.train_dataloader
        with seeded(seed_for(self.seed, "data")):
            loader = make()
        return ClientData(loader, self.method, self.seed, self._rebuilt if run.data is not None else None)

    @cached_property
    def _trainer(self) -> VisitingTrainer:
        return VisitingTrainer(self.run)

    def _rebuilt(self, **changes: Any) -> Dataset[Any]:
        """The training dataset of the run's data plugin with some options changed."""
        from lightrail.run.build import make
        from lightrail.run.resolve import resolve

        resolved = resolve(self.run.composition)
        chosen = resolved.one("data")
        assert chosen is not None
        data = make(resolved, dataclasses.replace(chosen, options={**chosen.options, **changes}))
        data.prepare_data()
        data.setup("fit")
        return data.train_dataloader().dataset

    def about(self) -> dict[str, Any]:
        """What a report says of the clients."""
        return {"clients": self.method.clients, "samples": self.data.counts()}

    def client(self, number: int, round_index: int, run: Run | None = None) -> Client:
        """One client in one round.

        Args:
            number: Of the client.
            round_index: From 0.
            run: That of its visits, where it is not the one of all clients.
        """
        run = self.run if run is None else run
        return Client(
            number,
            round_index,
            self.data.sizes[number],
            self.model,
            lambda steps, loader: self._visit(run, number, round_index, steps, loader),
            lambda shuffled: seen(run, self.data.loader(number, shuffled=shuffled)),
            generator_for(self.seed, "method", round_index, number),
            self.method.compressor,
            self.method.feedback if isinstance(self.method, ServerMethod) else "ef",
        )

    def _visit(
        self, run: Run, number: int, round_index: int, steps: int | None, loader: DataLoader[Any] | None
    ) -> Visit:
        method = self.method
        epochs = method.local_epochs if isinstance(method, ServerMethod) else 1
        own = method.local_steps if isinstance(method, ServerMethod) else 1
        return Visit(
            run,
            self.data.loader(number, shuffled=True) if loader is None else loader,
            epochs=epochs,
            steps=own if steps is None else steps,
            place=(round_index, method.rounds),
            trainer=self._trainer,
        )

    def work(self, order: Order, state: Wire) -> tuple[Reply, Wire]:
        """What a client answers to an order.

        Args:
            order: What it is asked.
            state: What this call returned when the client last took part; empty at first.

        Returns:
            Its answer, and its state.
        """
        try:
            return self._worked(order, state)
        except NeedsTrainer:
            # Everything that a client begins from is in the order and its state, so that it can begin again.
            self._trainer.is_plain = False
            return self._worked(order, state)

    def _worked(self, order: Order, state: Wire) -> tuple[Reply, Wire]:
        method = self.method
        assert isinstance(method, ServerMethod)
        began = time.monotonic()
        message = unpacked(order.message, method.compressor, self.model.layout.size, self.model.dtype)
        if message.pop(FORGET, None) is not None:
            state = {name: value for name, value in state.items() if not name.startswith(ESTIMATE)}
        RandomState.seed(seed_for(self.seed, "client", order.round, order.client))
        privacy, account = self._privacy, state.get(ACCOUNT)
        run = self.run if privacy is None else privacy.visited(order.client, account)
        client = self.client(order.client, order.round, run)
        self._receive(message, state)
        payload, state = method.client(client, message, {k: v for k, v in state.items() if k != ACCOUNT})
        payload, state = self._with_buffers(dict(payload), dict(state))
        metrics = dict(client.metrics)
        if privacy is not None:
            metrics, state = privacy.accounted(metrics, run, state, account)
        seconds = time.monotonic() - began
        return Reply(order.client, packed(payload), client.samples, metrics, seconds), state

    @cached_property
    def _privacy(self) -> ClientPrivacy | None:
        return None if self.run.privacy is None else ClientPrivacy(self.run, self.method.rounds)

    def _receive(self, message: dict[str, Tensor], state: Wire) -> None:
        """The model as the server sent it; statistics of layers are the client's own where the method keeps them."""
        if "weights" in message:
            self.model.load(message["weights"])
        assert isinstance(self.method, ServerMethod)
        self.model.load_buffers({**self._first_buffers, **(state if self.method.keeps_buffers else message)})

    def _with_buffers(self, payload: dict[str, Any], state: Wire) -> tuple[dict[str, Any], Wire]:
        assert isinstance(self.method, ServerMethod)
        found = self.model.buffers()
        if self.method.keeps_buffers:
            return payload, {**state, **found}
        return {**payload, **found}, state


def local_run(run: Run) -> Run:
    """A copy of a run for its clients: a task of their own, with the run's transforms around it.

    Args:
        run: As it was composed.
    """
    # Together, so that what a transform holds of the task is of the copy.
    task, transforms = copy.deepcopy((run.task, list(run.transforms)))
    return dataclasses.replace(run, task=task, transforms=transforms, callbacks=(), loggers=())
