"""A round over Flower's grid: who is there, who is asked, who has answered, and who has not."""

from __future__ import annotations

import contextlib
import json
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from flwr.app import Message
from flwr.serverapp import Grid
from torch import Tensor

from lightrail.errors import CheckpointError, CompositionError
from lightrail.federated.flower.records import Parcel, parcel_of, records_of, whole
from lightrail.federated.flower.terms import Terms
from lightrail.federated.secret_mean import summed
from lightrail.federated.transport import Failure, Order, Reply, SumTerms
from lightrail.federated.wire import Wire

__all__ = ["FlowerTransport"]

# Between two looks for answers, and between two looks for nodes that have come or gone.
_PAUSE, _LOOK = 0.1, 1.0


@dataclass
class _Asked:
    """An order on its way."""

    order: Order
    node: int


class FlowerTransport:
    """Carries rounds over a grid; subclass it, and override :meth:`connect` and :meth:`disconnect`.

    A node says which client it is; orders go to the node that said so last. A node that comes late takes part from
    then on, and one that vanishes is asked again when it is back.

    Args:
        terms: What clients are told, and how long they are waited for.
    """

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._run = uuid.uuid4().hex
        self._grid: Grid | None = None
        self._clients, self._looked = 0, 0.0
        self._online: set[int] = set()
        self._introduced: dict[str, int] = {}  # nodes that were asked who they are, by message
        self._seen: set[int] = set()
        self._node_of: dict[int, int] = {}
        self._refused: dict[int, Parcel] = {}
        self._absent: set[int] = set()
        self._counted: dict[int, int] = {}  # the last round that counted, of clients that keep a state

    def connect(self, clients: int) -> Grid:
        """Starts what carries messages.

        Args:
            clients: How many there will be.
        """
        raise NotImplementedError

    def disconnect(self) -> None:
        """Stops what :meth:`connect` started."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises where what carries messages has stopped."""

    def open(self, clients: int) -> None:
        """Starts, and waits until every client is there and fits the run.

        Args:
            clients: How many.

        Raises:
            CompositionError: A client is made of something else than the server, or does not come.
        """
        self._clients = clients
        self._grid = self.connect(clients)
        deadline = time.monotonic() + self._terms.patience
        while len(self._node_of) < clients:
            self._look()
            self._hear(self._pull(self._introduced))
            if self._refused:
                raise _refusal(*next(iter(sorted(self._refused.items()))))
            if time.monotonic() > deadline:
                raise self._missing()
            time.sleep(_PAUSE)

    def exchange(self, orders: Sequence[Order]) -> list[Reply | Failure]:
        """One round; a client that has not answered after the time that the terms give has failed."""
        return self._carried(orders)

    def exchange_secretly(
        self, orders: Sequence[Order], terms: SumTerms
    ) -> tuple[list[Reply | Failure], dict[str, Tensor]]:
        """One round of which only the mean is learnt: four messages to each client."""
        if not orders:
            return [], {}
        begun = self._carried(orders, {"threshold": terms.threshold})
        round_index = orders[0].round

        def ask(phase: str, messages: Mapping[int, Wire]) -> dict[int, Wire]:
            further = [Order(client, round_index, wire) for client, wire in messages.items()]
            answers = self._carried(further, words={"phase": phase})
            for each in answers:
                if isinstance(each, Failure):
                    _warn(f"client {each.client} leaves the masked sum: {each.reason}")
            return {each.client: each.message for each in answers if isinstance(each, Reply)}

        return summed(begun, ask, terms)

    def _carried(
        self,
        orders: Sequence[Order],
        figures: Mapping[str, float] | None = None,
        words: Mapping[str, str] | None = None,
    ) -> list[Reply | Failure]:
        """What clients answer to orders, which hold these figures and words besides."""
        deadline = time.monotonic() + self._terms.timeout
        waiting = {order.client: order for order in orders}
        asked: dict[str, _Asked] = {}
        answers: list[Reply | Failure] = []
        while waiting:
            self._look()
            self._ask(waiting, asked, figures or {}, words or {})
            for message in self._hear(self._pull([*self._introduced, *asked])):
                sent = asked.pop(message.metadata.reply_to_message_id)
                if waiting.get(sent.order.client) is sent.order:
                    answers.append(self._answer(sent.order, message))
                    del waiting[sent.order.client]
            if waiting.keys() <= self._absent - {each.order.client for each in asked.values()} and answers:
                answers += [Failure(client, "not connected") for client in waiting]
                break
            if time.monotonic() > deadline:
                self._absent |= waiting.keys()
                answers += [Failure(client, f"no answer within {self._terms.timeout:g} s") for client in waiting]
                break
            if waiting:
                time.sleep(_PAUSE)
        return answers

    def about(self) -> dict[str, Any]:
        """Nothing: what clients have is theirs to tell."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The run's name among clients, and which of their states counted."""
        return {"run": self._run, "counted": dict(self._counted)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Clients go on from the states that counted when this was saved.

        Raises:
            CheckpointError: The run that was saved had its clients in one process.
        """
        if "run" not in state:
            raise CheckpointError(
                "the run that would be continued had its clients in one process",
                found="a checkpoint that holds the states of clients itself",
                allowed="a run of federated.engine=flower",
                remedy="Continue it with `train run.resume=FOLDER federated.engine=here`.",
            )
        self._run = str(state["run"])
        self._counted = {int(client): int(round_) for client, round_ in state["counted"].items()}

    def close(self) -> None:
        """Stops; the nodes stay, and wait for the next run."""
        if self._grid is not None:
            self._grid = None
            self.disconnect()

    def _words(self) -> dict[str, str]:
        return {
            "run": self._run,
            "overrides": json.dumps(list(self._terms.overrides)),
            "lock": json.dumps(self._terms.lock or {}, default=str),
        }

    def _push(self, node: int, kind: str, parcel: Parcel, group: str = "") -> str | None:
        assert self._grid is not None
        message = Message(records_of(parcel), node, kind, ttl=self._terms.timeout, group_id=group)
        with self._may_fail():
            return next(iter(self._grid.push_messages([message])), None)
        return None

    def _pull(self, asked: Iterable[str]) -> list[Message]:
        assert self._grid is not None
        asked = list(asked)
        with self._may_fail():
            return list(self._grid.pull_messages(asked)) if asked else []
        return []

    @contextlib.contextmanager
    def _may_fail(self) -> Iterator[None]:
        """A request that fails is made again with the next look, as long as what carries messages runs."""
        try:
            yield
        except httpx.HTTPError as error:
            self.check()
            _warn(f"a request failed and is made again: {type(error).__name__}: {error}")

    def _look(self) -> None:
        """Who is connected; whoever is new is asked who it is."""
        if time.monotonic() - self._looked < _LOOK:
            return
        self.check()
        assert self._grid is not None
        with self._may_fail():
            self._online = set(self._grid.get_node_ids())
        for node in self._online - self._seen:
            if (asked := self._push(node, "query", Parcel(words=self._words()))) is not None:
                self._introduced[asked] = node
                self._seen.add(node)
        self._looked = time.monotonic()

    def _hear(self, messages: Iterable[Message]) -> list[Message]:
        """Takes introductions in, and gives the other messages back."""
        others = []
        for message in messages:
            node = self._introduced.pop(message.metadata.reply_to_message_id, None)
            if node is None:
                others.append(message)
                continue
            try:
                parcel = _content(message)
                client = whole(parcel.figures, "client")
            except ValueError as error:
                # Whoever it was may have been cut off; it is asked again when it is seen again.
                self._seen.discard(node)
                _warn(f"a node did not say which client it is: {error}")
                continue
            if client >= self._clients:
                _warn(f"a node says that it is client {client}, but there are {self._clients}, from 0")
            elif "refused" in parcel.words or "failed" in parcel.words:
                self._refused[client] = parcel
                _warn(f"client {client} does not take part: {_reason(parcel)}")
            else:
                self._refused.pop(client, None)
                self._absent.discard(client)
                self._node_of[client] = node
        return others

    def _ask(
        self,
        waiting: Mapping[int, Order],
        asked: dict[str, _Asked],
        more_figures: Mapping[str, float],
        more_words: Mapping[str, str],
    ) -> None:
        """Sends each order to the node that is its client now, and again where that has changed."""
        on_the_way = {(each.order.client, each.node) for each in asked.values()}
        for client, order in waiting.items():
            node = self._node_of.get(client)
            if node is None or node not in self._online or (client, node) in on_the_way:
                continue
            figures = {"client": client, "round": order.round, "after": self._counted.get(client, -1), **more_figures}
            parcel = Parcel(order.message, figures, words={**self._words(), **more_words})
            if (sent := self._push(node, "train", parcel, str(order.round))) is not None:
                asked[sent] = _Asked(order, node)

    def _answer(self, order: Order, message: Message) -> Reply | Failure:
        """What a client answered; whatever it is, it becomes a reply or a failure."""
        if message.has_error():
            return Failure(order.client, f"the connection to it was lost: {message.error.reason}")
        try:
            parcel = _content(message)
            if "refused" in parcel.words or "failed" in parcel.words:
                return Failure(order.client, _reason(parcel))
            if whole(parcel.figures, "client") != order.client:
                return Failure(order.client, f"client {parcel.figures['client']:g} answered in its place")
            samples, seconds = whole(parcel.figures, "samples"), float(parcel.figures["seconds"])
            reply = Reply(order.client, parcel.wire, samples, dict(parcel.metrics), seconds)
            if parcel.figures.get("kept"):
                self._counted[order.client] = order.round
        except Exception as error:
            return Failure(order.client, f"its answer cannot be read: {type(error).__name__}: {error}")
        return reply

    def _missing(self) -> CompositionError:
        missing = [client for client in range(self._clients) if client not in self._node_of]
        return CompositionError(
            f"{len(missing)} of {self._clients} clients did not come within {self._terms.patience:g} s",
            found=f"clients {', '.join(map(str, sorted(self._node_of))) or 'none'}",
            allowed=f"clients 0 to {self._clients - 1}, each once",
            remedy=f"Start `lightrail federated client --client {missing[0]} …`, or ask for fewer with "
            "federated.clients; what a client says stands in its own terminal.",
        )


def _content(message: Message) -> Parcel:
    if message.has_error():
        raise ValueError(message.error.reason or f"Flower's error {message.error.code}")
    return parcel_of(message.content)


def _reason(parcel: Parcel) -> str:
    words = parcel.words
    if "refused" in words:
        return f"{words['refused']} ({words.get('found', '')})"
    return f"it failed: {words['failed']}"


def _refusal(client: int, parcel: Parcel) -> CompositionError:
    words = parcel.words
    return CompositionError(
        f"client {client} does not fit this run: {words.get('refused', words.get('failed', ''))}",
        found=words.get("found", words.get("failed", "")),
        allowed=words.get("allowed", "a client that is made of what the server is made of"),
        remedy="Install the same versions at both ends, and start that client again.",
    )


def _warn(text: str) -> None:
    print(f"federated: {text}", file=sys.stderr)
