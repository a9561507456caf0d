"""Who carries messages to clients and their answers back."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from lightrail.errors import UserError
from lightrail.federated.wire import Wire
from lightrail.step.randomness import RandomState

__all__ = ["Failure", "InProcess", "Order", "Reply", "SumTerms", "Transport", "Worker"]


@dataclass(frozen=True)
class Order:
    """What one client is asked to do in one round.

    Args:
        client: Its number.
        round: From 0.
        message: What the server sends it.
    """

    client: int
    round: int
    message: Wire


@dataclass(frozen=True)
class Reply:
    """What a client answers.

    Args:
        client: Its number.
        message: What it sends.
        samples: How many it has.
        metrics: Figures of its training by name, ``loss`` among them.
        seconds: How long it worked.
    """

    client: int
    message: Wire
    samples: int
    metrics: Mapping[str, float]
    seconds: float = 0.0


@dataclass(frozen=True)
class Failure:
    """Why there is no answer of a client.

    Args:
        client: Its number.
        reason: In a few words.
        error: What it raised, where it is known.
    """

    client: int
    reason: str
    error: BaseException | None = None


@dataclass(frozen=True)
class SumTerms:
    """How answers are added up where the server is to see their sum alone.

    Args:
        threshold: How many clients have to come to the end; at least 2, and more than half of those that are asked.
        is_weighted: Whether clients count by their samples, or all alike.
        largest: The greatest entry, up or down, that is not clipped; greater than 0.
    """

    threshold: int
    is_weighted: bool
    largest: float


class Worker(Protocol):
    """What does the work of clients: see :class:`lightrail.federated.client_side.ClientSide`."""

    def work(self, order: Order, state: Wire) -> tuple[Reply, Wire]:
        """The answer to an order, and the client's state after it; random generators are left anywhere."""
        ...

    def about(self) -> dict[str, Any]:
        """What a report says of the clients."""
        ...


class Transport(Protocol):
    """Carries a round to the clients, wherever they are."""

    def open(self, clients: int) -> None:
        """Called once, before the first round.

        Args:
            clients: How many there are; waits until so many are there.
        """
        ...

    def exchange(self, orders: Sequence[Order]) -> list[Reply | Failure]:
        """One round: every order has one answer, in any order."""
        ...

    def exchange_secretly(
        self, orders: Sequence[Order], terms: SumTerms
    ) -> tuple[list[Reply | Failure], dict[str, Tensor]]:
        """One round of which only the mean of the answers is learnt.

        Args:
            orders: As for :meth:`exchange`.
            terms: How they are added up.

        Returns:
            An answer for every order, with a masked vector for its message; and the mean over those that are no
            failures, by name: none where too few came to the end.
        """
        ...

    def about(self) -> dict[str, Any]:
        """What a report says of the clients, as far as it is known here."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What of the clients' states this process keeps: nothing, where clients keep their own."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        ...

    def close(self) -> None:
        """Called once, after the last round or an error."""
        ...


class InProcess:
    """Clients one after the other in this process: the same numbers every time, and nothing to install.

    Args:
        make: Makes what does their work.
    """

    def __init__(self, make: Callable[[], Worker]) -> None:
        self._make = make
        self._worker: Worker | None = None
        self._states: dict[int, Wire] = {}

    def open(self, clients: int) -> None:
        self._worker = self._worker or self._make()

    def exchange(self, orders: Sequence[Order]) -> list[Reply | Failure]:
        with RandomState.kept():
            return [self._answer(order) for order in orders]

    def exchange_secretly(
        self, orders: Sequence[Order], terms: SumTerms
    ) -> tuple[list[Reply | Failure], dict[str, Tensor]]:
        from lightrail.federated.secret_mean import SecretPart, summed

        parts: dict[int, SecretPart] = {}

        def begin(reply: Reply) -> Reply | Failure:
            try:
                part = SecretPart(reply.client, reply.message, reply.samples, terms.threshold)
            except ValueError as error:
                return Failure(reply.client, str(error))
            parts[reply.client] = part
            return replace(reply, message=part.begin())

        def ask(phase: str, messages: Mapping[int, Wire]) -> Mapping[int, Wire]:
            return {client: parts[client].answer(phase, wire) for client, wire in messages.items()}

        begun = [begin(each) if isinstance(each, Reply) else each for each in self.exchange(orders)]
        return summed(begun, ask, terms)

    def about(self) -> dict[str, Any]:
        return {} if self._worker is None else self._worker.about()

    def _answer(self, order: Order) -> Reply | Failure:
        assert self._worker is not None
        began = time.monotonic()
        try:
            reply, state = self._worker.work(order, self._states.get(order.client, {}))
        except Exception as error:
            said = error.what if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            return Failure(order.client, f"it failed after {time.monotonic() - began:.1f} s: {said}", error)
        self._states[order.client] = state
        return reply

    def state_dict(self) -> dict[str, Any]:
        return {"states": {client: dict(state) for client, state in self._states.items() if state}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._states = {int(client): dict(each) for client, each in state.get("states", {}).items()}

    def close(self) -> None:
        self._worker = None
