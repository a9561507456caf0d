"""A client that answers messages: it builds its side itself, checks that it is the server's, works, keeps its state."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from lightrail import __version__
from lightrail.errors import CheckpointError, CompositionError, ConfigurationError, UserError, closest
from lightrail.federated.flower.records import Parcel, whole
from lightrail.federated.flower.states import StateFolder
from lightrail.federated.partition import Partition, Samples
from lightrail.federated.secret_mean import SecretPart
from lightrail.federated.transport import Failure, Order, Reply, Worker
from lightrail.federated.wire import Wire
from lightrail.step.randomness import RandomState

__all__ = ["Factory", "Participant", "Undivided", "Workshop", "check_own", "merged", "version_differences"]

Factory = Callable[[Sequence[str]], tuple[Worker, Mapping[str, Any]]]
"""Makes a worker from overrides, and says what it is made of: its lock, empty where nobody asks."""

_OF_SERVER = ("run.", "federated.engine", "federated.timeout")
_DEVICE = ("trainer.accelerator=", "trainer.devices=", "trainer.precision=")


class Workshop:
    """Makes the worker for a server's run, if what is installed here fits it; clients of one process share it.

    Args:
        own: Overrides that win over the server's: the client's data, its device.
        make: Makes the worker; from the catalogue by default.
        allow_targets: Whether the server may name classes by their path. With this, who controls the server decides
            what code runs here.

    Raises:
        ConfigurationError: An override of something that a client may not decide alone.
    """

    def __init__(self, own: Sequence[str] = (), make: Factory | None = None, *, allow_targets: bool = False) -> None:
        check_own(own)
        self._own = list(own)
        self._make = make or (lambda overrides: _from_catalogue(overrides, any(map(_is_data, own))))
        self._allow_targets = allow_targets
        self._worker: Worker | None = None
        self._built_from: str | None = None

    def worker_for(self, words: Mapping[str, str]) -> Worker:
        """The worker for a run; made once.

        Args:
            words: The run's ``overrides`` and ``lock``.

        Raises:
            UserError: It cannot be made here, or is made of something else than the server.
        """
        source = words["overrides"] + words["lock"]
        if self._worker is None or self._built_from != source:
            lock = json.loads(words["lock"])
            overrides = [str(each) for each in json.loads(words["overrides"])]
            _check_versions(lock)
            if not self._allow_targets:
                _check_targets(overrides)
            worker, own_lock = self._make(merged(overrides, self._own))
            if own_lock and lock:
                _check_plugins(lock, own_lock)
            self._worker, self._built_from = worker, source
        return self._worker


class Participant:
    """One client: what it is asked, it answers.

    Args:
        number: Which one, from 0.
        folder: Where it keeps its states.
        workshop: Makes its worker.
        masked_only: Whether it takes part only in runs whose server sees nothing of it but a sum.
    """

    def __init__(self, number: int, folder: Path, workshop: Workshop, *, masked_only: bool = False) -> None:
        self.number = number
        self.folder = folder
        self._workshop = workshop
        self._masked_only = masked_only
        self._secret: tuple[str, int, SecretPart] | None = None  # of which run and round

    def answer(self, kind: str, parcel: Parcel) -> Parcel:
        """The answer to a message; nothing that the message holds makes it raise.

        Args:
            kind: ``query`` for who it is and whether it fits the run, ``train`` for a round.
            parcel: What the server sent.
        """
        if self._masked_only and not _adds_up(parcel.words):
            return self._answer(
                words={
                    "refused": "this client takes part in masked sums alone",
                    "found": "federated.secure_aggregation=false",
                    "allowed": "federated.secure_aggregation=true",
                }
            )
        try:
            worker = self._workshop.worker_for(parcel.words)
        except UserError as error:
            print(f"client {self.number} does not take part: {error}", file=sys.stderr, flush=True)
            return self._answer(words={"refused": error.what, "found": error.found, "allowed": error.allowed})
        except Exception as error:
            return self._failed(error)
        if kind != "train":
            return self._answer()
        try:
            return self._phase(parcel) if "phase" in parcel.words else self._work(worker, parcel)
        except Exception as error:
            return self._failed(error)

    def _work(self, worker: Worker, parcel: Parcel) -> Parcel:
        if self._masked_only and "threshold" not in parcel.figures:
            raise ValueError("an answer in the open was asked for, and this client takes part in masked sums alone")
        round_, after = whole(parcel.figures, "round"), int(parcel.figures.get("after", -1))
        states = StateFolder(self.folder, parcel.words["run"])
        try:
            state = states.load(after) if after >= 0 else {}
        except LookupError as error:
            raise CheckpointError(
                f"client {self.number} no longer has its state after round {after}",
                found=str(error),
                allowed="the folder that the client had then",
                remedy="Start it with the same --folder, or start the run anew.",
            ) from error
        states.forget_after(after)
        with RandomState.kept():
            reply, state = worker.work(Order(self.number, round_, parcel.wire), state)
        if state:
            states.save(round_, state)
        if "threshold" in parcel.figures:
            part = SecretPart(self.number, reply.message, reply.samples, whole(parcel.figures, "threshold"))
            self._secret = parcel.words["run"], round_, part
            reply = replace(reply, message=part.begin())
        return self._answer(reply, kept=float(bool(state)))

    def _phase(self, parcel: Parcel) -> Parcel:
        """A further word in the masked sum of a round."""
        asked = parcel.words["run"], whole(parcel.figures, "round")
        if self._secret is None or self._secret[:2] != asked:
            raise ValueError("no masked sum of this round is under way here")
        part = self._secret[2]
        return self._answer(Reply(self.number, part.answer(parcel.words["phase"], parcel.wire), part.samples, {}))

    def _answer(self, reply: Reply | None = None, kept: float = 0.0, words: Mapping[str, str] | None = None) -> Parcel:
        figures: dict[str, float] = {"client": self.number}
        if reply is None:
            return Parcel(figures=figures, words=words or {})
        figures |= {"samples": int(reply.samples), "seconds": float(reply.seconds), "kept": kept}
        return Parcel(reply.message, figures, reply.metrics, words or {})

    def _failed(self, error: Exception) -> Parcel:
        traceback.print_exception(error, file=sys.stderr)
        said = error.what if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return self._answer(words={"failed": said})


class Undivided(Partition):
    """Every client has all samples: those that it alone has."""

    def datasets(self, samples: Samples, clients: int, generator: torch.Generator) -> list[Dataset[Any]]:
        return [samples.dataset] * clients


def merged(overrides: Sequence[str], own: Sequence[str]) -> list[str]:
    """A server's overrides with a client's own, which win; where a run goes and what it continues is the server's.

    Example:
        >>> merged(["data=csv", "data.path=all.csv", "run.root=runs", "seed=1"], ["data.path=mine.csv"])
        ['data=csv', 'seed=1', 'data.path=mine.csv']
    """
    keys = {_key(each) for each in own}
    kept = (each for each in overrides if not _key(each).startswith(_OF_SERVER))
    return [each for each in kept if _key(each) not in keys] + list(own)


def _adds_up(words: Mapping[str, str]) -> bool:
    """Whether the server's run has secure aggregation."""
    try:
        said = [str(each) for each in json.loads(words["overrides"])]
    except (KeyError, TypeError, ValueError):
        return False
    return any(_key(each) == "federated.secure_aggregation" and each.endswith("=true") for each in said)


def _is_data(override: str) -> bool:
    return override.lstrip("+").startswith(("data.", "data="))


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def check_own(own: Sequence[str]) -> None:
    """Refuses what a client may not decide alone.

    Raises:
        ConfigurationError: An override of something else than its data and its device.
    """
    for each in own:
        if not (_is_data(each) or each.lstrip("+").startswith(_DEVICE)):
            raise ConfigurationError(
                f"a client cannot set {_key(each)} alone",
                found=each,
                allowed="data=NAME, data.…, trainer.accelerator=…, trainer.devices=…, trainer.precision=…",
                remedy=f"{closest(_key(each), ['data', 'trainer.accelerator'])}Set it at the server.",
            )


def version_differences(lock: Mapping[str, Any]) -> list[str]:
    """Where what is installed here differs from what a run is made of, one sentence each.

    Args:
        lock: Of the run: its ``core`` and its ``plugins``.

    Example:
        >>> version_differences({"core": "0.0.0", "plugins": []})  # doctest: +ELLIPSIS
        ['lightrail is 0.0.0 at the server and ... here']
    """
    found = []
    if lock.get("core", __version__) != __version__:
        found.append(f"lightrail is {lock['core']} at the server and {__version__} here")
    for plugin in lock.get("plugins", ()):
        if plugin["distribution"] is None:
            continue
        try:
            here = version(plugin["distribution"])
        except PackageNotFoundError:
            here = "not installed"
        if here != plugin["version"]:
            name = f"{plugin['kind']} '{plugin['name']}' ({plugin['distribution']})"
            found.append(f"{name} is {plugin['version']} at the server and {here} here")
    return found


def _check_versions(lock: Mapping[str, Any]) -> None:
    if found := version_differences(lock):
        raise CompositionError(
            found[0],
            found="; ".join(found),
            allowed="the versions that the server has",
            remedy="Install the same versions at both ends.",
        )


def _check_targets(overrides: Sequence[str]) -> None:
    if named := [each for each in overrides if "_target_" in each]:
        raise CompositionError(
            "the server names a class by its path",
            found=", ".join(named),
            allowed="plugins that are installed here, by their names",
            remedy="Start the client with --allow-targets if you trust who controls the server with running code here.",
        )


def _check_plugins(lock: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    from lightrail.run.lock import check_lock

    try:
        check_lock(lock, own, accept_changes=False)
    except CheckpointError as error:
        raise CompositionError(
            "this client is made of other plugins than the server",
            found=error.found,
            allowed=error.allowed,
            remedy="Install the same plugins in the same versions at both ends.",
        ) from error


class FromCatalogue:
    """Works as the clients of a run in one process do.

    Args:
        overrides: What the run is composed of.
        has_own_data: Whether all its data is this client's.

    Raises:
        UserError: It cannot be composed here.
        CompositionError: It has no server.
    """

    def __init__(self, overrides: Sequence[str], *, has_own_data: bool) -> None:
        from lightrail.federated.rounds import ServerRounds
        from lightrail.run import compose
        from lightrail.run.lock import lock_of

        run = compose(overrides)
        rounds = next((each for each in run.callbacks if isinstance(each, ServerRounds)), None)
        if rounds is None:
            raise CompositionError(
                "the run has no server whose clients could be elsewhere",
                found=" ".join(overrides),
                allowed="a run with a federated method that has a server, such as fedavg",
                remedy="Start the server with +federated=fedavg.",
            )
        if has_own_data:
            rounds.method.partition = Undivided()
        self._transport = rounds.transport
        self._transport.open(rounds.method.clients)
        self.lock = lock_of(run.composition)

    def work(self, order: Order, state: Wire) -> tuple[Reply, Wire]:
        self._transport.load_state_dict({"states": {order.client: state}})
        answer = self._transport.exchange([order])[0]
        if isinstance(answer, Failure):
            raise answer.error or RuntimeError(answer.reason)
        return answer, self._transport.state_dict()["states"].get(order.client, {})

    def about(self) -> dict[str, Any]:
        return self._transport.about()


def _from_catalogue(overrides: Sequence[str], has_own_data: bool) -> tuple[Worker, Mapping[str, Any]]:
    made = FromCatalogue(overrides, has_own_data=has_own_data)
    return made, made.lock
