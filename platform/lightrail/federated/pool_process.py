"""A process beside that of a run, which does some of its clients' work: it is made of what the run is made of.

Started as ``python -m lightrail.federated.pool_process`` by :class:`lightrail.federated.pool.ClientPool`; it reads
orders from its standard input until that ends, and writes answers to its standard output.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lightrail.federated.transport import Failure, Order, Reply, Transport
from lightrail.federated.wire import Wire

__all__ = ["Setting", "Task", "flat", "main", "whole"]

Task = tuple[Order, Wire]
"""What a client is asked, and its state."""


@dataclass(frozen=True)
class Setting:
    """What a process is made from.

    Args:
        overrides: Of the run.
        threads: How many its arithmetic has.
    """

    overrides: Sequence[str]
    threads: int


def main() -> None:
    """Works until nothing more is asked, or nobody is there who asks."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed is not an answer
    setting = pickle.load(requests)
    torch.set_num_threads(setting.threads)
    try:
        transport = _transport(setting.overrides)
    except BaseException as error:
        _send(answers, f"{type(error).__name__}: {error}")
        return
    _send(answers, None)
    while True:
        try:
            tasks = pickle.load(requests)
        except EOFError:
            return
        _send(answers, [_answer(transport, whole(order), whole(state)) for order, state in tasks])


def _transport(overrides: Sequence[str]) -> Transport:
    from lightrail.federated.rounds import ServerRounds
    from lightrail.run import compose

    rounds = next(each for each in compose(overrides).callbacks if isinstance(each, ServerRounds))
    rounds.transport.open(rounds.method.clients)
    return rounds.transport


def _answer(transport: Transport, order: Order, state: Wire) -> tuple[Any, Any] | None:
    """Nothing where the client failed: it will fail again where the run is, which can say why."""
    transport.load_state_dict({"states": {order.client: state}})
    reply = transport.exchange([order])[0]
    if isinstance(reply, Failure):
        return None
    return flat(reply), flat(transport.state_dict()["states"].get(order.client, {}))


def _send(answers: Any, found: Any) -> None:
    pickle.dump(found, answers, protocol=pickle.HIGHEST_PROTOCOL)
    answers.flush()


def flat(found: Any) -> Any:
    """An order, a reply or a wire whose tensors are bytes: torch's own way of sending them shares memory or is slow."""
    if isinstance(found, Order | Reply):
        return replace(found, message=flat(found.message))
    return {name: (each.dtype, tuple(each.shape), _bytes(each)) for name, each in found.items()}


def whole(found: Any) -> Any:
    """The inverse of :func:`flat`.

    Example:
        >>> whole(flat({"a": torch.tensor([[1.0, 2.0]])}))
        {'a': tensor([[1., 2.]])}
    """
    if isinstance(found, Order | Reply):
        return replace(found, message=whole(found.message))
    return {name: _tensor(*each) for name, each in found.items()}


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _tensor(dtype: torch.dtype, shape: tuple[int, ...], data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)


if __name__ == "__main__":
    main()
