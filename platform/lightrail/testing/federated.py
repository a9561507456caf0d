"""Conformance of federated and decentralised methods: in a few rounds, on problems small enough to repeat."""

from __future__ import annotations

import contextlib
import inspect
import io
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from lightrail.federated.gossip_rounds import GossipRounds
from lightrail.federated.method import DecentralisedMethod, FederatedMethod, ServerMethod
from lightrail.federated.rounds import Rounds, ServerRounds
from lightrail.federated.transport import Failure, InProcess, Order, Reply
from lightrail.testing.building import (
    check_is_documented,
    check_names_its_paper,
    missing_options,
    refuses_unknown_options,
    require_refused,
)
from lightrail.testing.federated_runs import composed_rounds
from lightrail.testing.runs import require_close, require_equal, saved_and_loaded
from lightrail.testing.suite import Check, NotApplicable, Suite, known_exceptions, name_of, require
from lightrail.traits import traits_of

__all__ = ["FederatedSuite"]

Options = Mapping[str, Any]
HERE = "lightrail.testing.federated_runs"
CLIENTS, ROUNDS = 3, 4
_RULED = {"clients", "nodes", "rounds", "fraction", "sampling", "local_steps", "local_epochs", "evaluate_every"}


def _overrides(plugin: Any, options: Options, **changes: Any) -> list[str]:
    method = issubclass(plugin, DecentralisedMethod)
    given = {name: value for name, value in options.items() if name not in _RULED}
    given |= {"rounds": ROUNDS, "nodes" if method else "clients": CLIENTS, **changes}
    problem = ("Game", "ClientGames") if plugin.needs_game else ("Separation", "ClientClusters")
    own = [f"task={HERE}.{problem[0]}", f"data={HERE}.{problem[1]}", f"data.clients={CLIENTS}"]
    return [
        f"+federated={plugin.__module__}.{plugin.__qualname__}",
        f"federated.partition={HERE}.InOrder",
        *own,
        *([] if not plugin.runs_optimizer else ["optimizer=sgd", "optimizer.lr=0.05"]),
        *(f"federated.{name}={_written(value)}" for name, value in given.items()),
    ]


def _written(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _rounds(plugin: Any, options: Options, *overrides: str, **changes: Any) -> Rounds:
    folder = Path(tempfile.gettempdir())
    return composed_rounds(folder, *_overrides(plugin, options, **changes), *overrides)[1]


def _carried_out(rounds: Rounds, count: int = ROUNDS) -> list[Tensor]:
    """The model after each round."""
    found = []
    with contextlib.redirect_stderr(io.StringIO()):
        for _ in range(count):
            rounds.step()
            found.append(rounds.model.weights())
    return found


def check_builds_from_options(plugin: Any, options: Options) -> None:
    """``plugin(**options)`` is a lightrail.ServerMethod or DecentralisedMethod."""
    missing = missing_options(plugin, options, given=0)
    require(not missing, f"options without a default are not in traits.example: {missing}")
    method = plugin(**options)
    kinds = (ServerMethod, DecentralisedMethod)
    require(isinstance(method, kinds), f"it is no ServerMethod or DecentralisedMethod but {type(method).__name__}")


def check_rejects_unknown_options(plugin: Any, options: Options) -> None:
    """An option that the signature lacks is an error."""
    refuses_unknown_options(plugin, options)


def check_refuses_what_is_out_of_range(plugin: Any, options: Options) -> None:
    """Numbers below zero and numbers that are none are refused by an error in four parts."""
    common = inspect.signature(FederatedMethod.__init__).parameters
    wrong: list[dict[str, Any]] = [{"rounds": 0}, {"evaluate_every": 0}]
    for name, parameter in inspect.signature(plugin).parameters.items():
        if name in common or type(parameter.default) not in (int, float):
            continue
        wrong += [{name: math.nan}] if type(parameter.default) is float else [{name: -1}]
    for each in wrong:
        require_refused(plugin, {**options, **each}, ", ".join(f"{name}={value}" for name, value in each.items()))


def check_carries_out_rounds(plugin: Any, options: Options) -> None:
    """Rounds move the model, keep it finite, keep state as tensors by name, and count what is sent."""
    rounds = _rounds(plugin, options)
    before = rounds.model.weights()
    found = _carried_out(rounds)
    require(all(bool(x.isfinite().all()) for x in found), "the model is not finite after a few rounds")
    require(not torch.equal(found[-1], before), "rounds do not move the model")
    state = rounds.state
    require(state, "it keeps no state")
    require(all(isinstance(v, Tensor) for v in state.values()), "its state is not tensors by name")
    require(any(each["sent"] for each in rounds.record.rounds), "no bytes are counted in any round")
    for name, value in rounds.logged().items():
        require(isinstance(value, int | float), f"logged() holds {name!r}: {value!r}")


def check_is_deterministic(plugin: Any, options: Options) -> None:
    """Two runs from one seed are equal bit for bit."""
    first, second = (_carried_out(_rounds(plugin, options)) for _ in range(2))
    require_equal(second, first, "two runs from one seed differ")


def check_resumes_after_any_round(plugin: Any, options: Options) -> None:
    """Saved after a round and resumed, it goes on as the uninterrupted run."""
    whole = _rounds(plugin, options)
    expected = _carried_out(whole)
    for after in (1, ROUNDS - 1):
        stopped = _rounds(plugin, options)
        _carried_out(stopped, after)
        resumed = _rounds(plugin, options)
        resumed.load_state_dict(saved_and_loaded(stopped.state_dict()))
        resumed.model.load(stopped.model.weights())
        found = _carried_out(resumed, ROUNDS - after)
        require_close(found, expected[after:], f"resumed after round {after}, it ends elsewhere", 1e-6)


def check_does_not_mind_the_order_of_clients(plugin: Any, options: Options) -> None:
    """Clients numbered otherwise give the same model."""
    if traits_of(plugin).is_stochastic:
        raise NotApplicable("it draws random numbers, of which each client has its own")
    here = ["federated.topology=lightrail.testing.federated_runs.All"] if _has_nodes(plugin) else []
    first = _carried_out(_rounds(plugin, options, *here))
    second = _carried_out(_rounds(plugin, options, *here, "partition.backwards=true"))
    require_close(second, first, "the numbers of the clients matter", 1e-6)


def check_takes_identical_clients_as_one(plugin: Any, options: Options) -> None:
    """Clients that all have the same samples give the run of one client that has them."""
    if _has_nodes(plugin):
        raise NotApplicable("one node is no graph")
    if traits_of(plugin).is_stochastic:
        raise NotApplicable("it draws random numbers, of which each client has its own")
    several = _carried_out(_rounds(plugin, options, "data.identical=true"))
    one = _carried_out(_rounds(plugin, options, "data.identical=true", "data.clients=1", clients=1))
    require_close(several, one, "three clients with the same samples are not one client with them", 1e-6)


def check_goes_on_without_a_client(plugin: Any, options: Options) -> None:
    """A client that breaks, and one that sends what is no number, are left out and named; the round goes on."""
    if _has_nodes(plugin):
        raise NotApplicable("it has no server")
    for spoiled in (_break, _send_nan):
        rounds = _rounds(plugin, options)
        assert isinstance(rounds, ServerRounds)
        rounds.transport = cast(Any, _Spoiled(rounds.transport, spoiled))
        found = _carried_out(rounds)
        require(all(bool(x.isfinite().all()) for x in found), "one client breaks the model")
        named = {client for each in rounds.record.rounds for client in each["left_out"]}
        require(not named or named == {"1"}, f"clients {named} are left out, of which 1 is spoiled")
        asked = any("1" in each["clients"] for each in rounds.record.rounds)
        require(not asked, "what client 1 sent was used")


class _Spoiled:
    """A transport in which client 1 does not do well."""

    def __init__(self, inner: Any, spoil: Callable[[Reply], Reply | Failure]) -> None:
        self._inner, self._spoil = inner, spoil

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def exchange(self, orders: list[Order]) -> list[Reply | Failure]:
        assert isinstance(self._inner, InProcess)
        answers = self._inner.exchange(orders)
        return [self._spoil(each) if isinstance(each, Reply) and each.client == 1 else each for each in answers]


def _break(reply: Reply) -> Failure:
    return Failure(reply.client, "no answer")


def _send_nan(reply: Reply) -> Reply:
    wire = {name: x * math.nan if x.is_floating_point() else x for name, x in reply.message.items()}
    return Reply(reply.client, wire, reply.samples, reply.metrics)


def _has_nodes(plugin: Any) -> bool:
    return issubclass(plugin, DecentralisedMethod)


def check_counts_what_nodes_send(plugin: Any, options: Options) -> None:
    """The distance of nodes from their mean is a figure of every round, and finite."""
    if not _has_nodes(plugin):
        raise NotApplicable("it has a server")
    rounds = _rounds(plugin, options)
    assert isinstance(rounds, GossipRounds)
    _carried_out(rounds)
    distances = [each["figures"]["consensus_distance"] for each in rounds.record.rounds]
    require(all(map(math.isfinite, distances)), f"consensus distances are {distances}")


CHECKS: tuple[Check, ...] = (
    check_is_documented,
    check_names_its_paper,
    check_builds_from_options,
    check_rejects_unknown_options,
    check_refuses_what_is_out_of_range,
    check_carries_out_rounds,
    check_is_deterministic,
    check_resumes_after_any_round,
    check_does_not_mind_the_order_of_clients,
    check_takes_identical_clients_as_one,
    check_goes_on_without_a_client,
    check_counts_what_nodes_send,
)


class FederatedSuite(Suite):
    """Every check of a federated or decentralised method."""

    kind: ClassVar[str] = "federated"
    checks: ClassVar[tuple[Check, ...]] = (*CHECKS, known_exceptions(frozenset(map(name_of, CHECKS))))
