"""Clients that Flower carries messages to: the same numbers as in one process, and what goes wrong on the way."""

from __future__ import annotations

import multiprocessing
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr")

import numpy as np
from flower_client_program import take_part
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.federated.flower import Deployment, deployed
from lightrail.federated.flower.exchange import FlowerTransport
from lightrail.federated.flower.participant import FromCatalogue, Participant, Workshop, check_own, version_differences
from lightrail.federated.flower.records import Parcel, parcel_of, records_of
from lightrail.federated.flower.states import StateFolder
from lightrail.federated.flower.supernode import reply_to
from lightrail.federated.flower.terms import Terms
from lightrail.federated.rounds import ServerRounds
from lightrail.federated.transport import Failure, InProcess, Order, Reply, SumTerms
from lightrail.federated.wire import Wire
from lightrail.run import compose

RUN = ["+federated=fedavg", "federated.clients=2", "federated.rounds=3", "model=mlp", "logger=[]", "seed=3"]


class Adds:
    """Sends its number + 1 on top of what it got, and counts its rounds in its state."""

    def work(self, order: Order, state: Wire) -> tuple[Reply, Wire]:
        if order.message["w"].numel() == 0:
            raise ZeroDivisionError("nothing to add to")
        count = state.get("count", torch.zeros(())) + 1
        sent = {"w": order.message["w"] + order.client + 1}
        return Reply(order.client, sent, 3, {"loss": float(count)}, 0.5), {"count": count}

    def about(self) -> dict[str, Any]:
        return {}


class Nodes:
    """Flower's grid without the network: nodes by number, each of which answers a message or not."""

    def __init__(self) -> None:
        self.nodes: dict[int, Any] = {}
        self.answers: dict[str, Message] = {}
        self.pushed = 0

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        names = []
        for message in messages:
            self.pushed += 1
            message.metadata.__dict__["_message_id"] = name = f"message-{self.pushed}"
            answer = self.nodes[message.metadata.dst_node_id](message)
            if answer is not None:
                self.answers[name] = answer
            names.append(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.answers.pop(name) for name in message_ids if name in self.answers]


class Carried(FlowerTransport):
    def __init__(self, terms: Terms, nodes: Nodes) -> None:
        super().__init__(terms)
        self.nodes = nodes

    def connect(self, clients: int) -> Any:
        return self.nodes

    def disconnect(self) -> None: ...


def node(number: int, folder: Path, **options: Any) -> Any:
    participant = Participant(number, folder / str(number), Workshop(make=lambda overrides: (Adds(), {}), **options))
    return lambda message: reply_to(participant, message)


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Nodes:
    """Two clients, who are found at once."""
    monkeypatch.setattr("lightrail.federated.flower.exchange._LOOK", 0.0)
    monkeypatch.setattr("lightrail.federated.flower.exchange._PAUSE", 0.01)
    for name in ("task_id", "run_id", "node_id"):
        setattr(TaskIdentity, name, 1)
    found = Nodes()
    found.nodes = {70 + number: node(number, tmp_path) for number in range(2)}
    return found


def opened(nodes: Nodes, lock: dict[str, Any] | None = None, overrides: Sequence[str] = ()) -> Carried:
    transport = Carried(Terms(overrides, lock, timeout=0.4, patience=0.4), nodes)
    transport.open(2)
    return transport


def orders(round_index: int, message: torch.Tensor | None = None) -> list[Order]:
    sent = torch.zeros(2) if message is None else message
    return [Order(client, round_index, {"w": sent}) for client in range(2)]


def by_client(answers: Sequence[Reply | Failure]) -> dict[int, Any]:
    assert len(answers) == len({each.client for each in answers})
    return {each.client: each.reason if isinstance(each, Failure) else each for each in answers}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.uint8, torch.float16])
def test_tensors_arrive_as_they_were_sent(dtype: torch.dtype) -> None:
    sent = {
        "some": torch.tensor([[0, 1, 3], [1, 0, 2]]).to(dtype),
        "turned": torch.arange(6).reshape(2, 3).to(dtype).t(),
        "one:part": torch.ones((), dtype=dtype),
        "none": torch.zeros(0, 3, dtype=dtype),
    }
    arrived = parcel_of(records_of(Parcel(sent))).wire
    for name, tensor in sent.items():
        assert arrived[name].dtype == dtype
        assert torch.equal(arrived[name], tensor)
    arrived["some"].zero_()  # it may be written to


def nonsense() -> Iterator[Any]:
    good = records_of(Parcel({"w": torch.zeros(2)}, {"client": 0, "samples": 3, "seconds": 0.1}))
    yield RecordDict()
    for name, record in {
        "wire": ArrayRecord({"w": Array("float32", (2,), "numpy.ndarray", b"cos\nsystem\n(S'true'\ntR.")}),
        "types": ConfigRecord({"w": "bfloat16"}),
        "figures": MetricRecord({"client": 1, "samples": 3, "seconds": 0.1}),
        "metrics": MetricRecord({"loss": [1.0, 2.0]}),
    }.items():
        yield RecordDict({**good, name: record})
    yield RecordDict({**good, "types": ConfigRecord({"w": "object"})})
    yield RecordDict(
        {**good, "wire": ArrayRecord({"v": Array(np.zeros(2, "S3"))}), "types": ConfigRecord({"v": "int8"})}
    )
    for samples in (-1, 0.5, float("nan")):
        yield RecordDict({**good, "figures": MetricRecord({"client": 0, "samples": samples, "seconds": 0.1})})


@pytest.mark.parametrize("content", nonsense())
def test_nonsense_from_a_client_is_its_failure(nodes: Nodes, content: RecordDict) -> None:
    transport = opened(nodes)
    nodes.nodes[70] = lambda message: Message(content, reply_to=message)
    answers = by_client(transport.exchange(orders(0)))
    assert isinstance(answers[0], str)
    assert answers[1].message["w"].tolist() == [2.0, 2.0]


def test_a_round_goes_on_without_who_is_silent_and_with_who_comes_back(nodes: Nodes) -> None:
    transport = opened(nodes)
    kept = nodes.nodes[71]
    nodes.nodes[71] = lambda message: None
    answers = by_client(transport.exchange(orders(0)))
    assert answers[0].metrics == {"loss": 1.0}
    assert answers[1] == "no answer within 0.4 s"
    del nodes.nodes[71]
    began = time.monotonic()
    assert by_client(transport.exchange(orders(1)))[1] == "not connected"
    assert time.monotonic() - began < 0.3  # nobody waits for who is known to be gone
    nodes.nodes[99] = kept
    answers = by_client(transport.exchange(orders(2)))
    assert {client: reply.metrics["loss"] for client, reply in answers.items()} == {0: 3.0, 1: 1.0}


def test_what_a_client_raises_is_its_failure(nodes: Nodes) -> None:
    answers = by_client(opened(nodes).exchange(orders(0, torch.zeros(0))))
    assert set(answers.values()) == {"it failed: ZeroDivisionError: nothing to add to"}


TERMS = SumTerms(threshold=2, is_weighted=True, largest=8.0)


def test_the_mean_of_a_masked_sum_is_all_that_the_server_learns(nodes: Nodes, tmp_path: Path) -> None:
    transport = opened(nodes)
    answers, mean = transport.exchange_secretly(orders(0, torch.tensor([0.5, -1.0])), TERMS)
    torch.testing.assert_close(mean["w"], torch.tensor([2.0, 0.5]), rtol=0, atol=1e-6)
    assert {each.client: list(each.message) for each in answers if isinstance(each, Reply)} == {
        0: ["masked"],
        1: ["masked"],
    }
    again, _ = transport.exchange_secretly(orders(1), TERMS)  # states go on, round by round
    assert all(isinstance(each, Reply) and each.metrics == {"loss": 2.0} for each in again)


@pytest.mark.parametrize("phase", ["share", "mask"])
def test_of_who_falls_silent_in_a_masked_sum_the_others_tell_enough(nodes: Nodes, tmp_path: Path, phase: str) -> None:
    nodes.nodes[72] = node(2, tmp_path)
    kept = nodes.nodes[71]
    transport = Carried(Terms(timeout=0.4, patience=0.4), nodes)
    transport.open(3)
    nodes.nodes[71] = lambda message: None if parcel_of(message.content).words.get("phase") == phase else kept(message)
    three = [Order(client, 0, {"w": torch.zeros(2)}) for client in range(3)]
    answers, mean = transport.exchange_secretly(three, TERMS)
    torch.testing.assert_close(mean["w"], torch.tensor([2.0, 2.0]), rtol=0, atol=1e-6)  # of 1 and 3
    assert by_client(answers)[1] == "it did not come to the end of the masked sum"


def test_a_masked_sum_of_another_round_is_not_gone_on_with(nodes: Nodes) -> None:
    transport = opened(nodes)
    transport.exchange_secretly(orders(0), TERMS)
    answers = by_client(transport._carried(orders(1), words={"phase": "reveal"}))
    assert set(answers.values()) == {"it failed: ValueError: no masked sum of this round is under way here"}


def test_a_client_can_refuse_to_answer_in_the_open(nodes: Nodes, tmp_path: Path) -> None:
    workshop = Workshop(make=lambda overrides: (Adds(), {}))
    masked = Participant(0, tmp_path / "0", workshop, masked_only=True)
    nodes.nodes[70] = lambda message: reply_to(masked, message)
    with pytest.raises(CompositionError, match="takes part in masked sums alone"):
        opened(nodes)
    transport = opened(nodes, overrides=["federated.secure_aggregation=true"])
    assert isinstance(transport.exchange_secretly(orders(0), TERMS)[0][0], Reply)
    assert "an answer in the open was asked for" in by_client(transport.exchange(orders(1)))[0]


def test_states_are_those_after_the_last_round_that_counted(nodes: Nodes, tmp_path: Path) -> None:
    transport = opened(nodes)
    transport.exchange(orders(0))
    saved = transport.state_dict()
    lost = [by_client(transport.exchange(orders(1)))[0].metrics["loss"] for _ in range(2)]
    assert lost == [2.0, 3.0]
    again = opened(nodes)
    again.load_state_dict(saved)  # a server that goes on from the checkpoint after round 0
    assert by_client(again.exchange(orders(1)))[0].metrics["loss"] == 2.0
    (tmp_path / "0" / saved["run"] / "round-00000001.safetensors").unlink()
    answers = by_client(again.exchange(orders(2)))
    assert answers[0] == "it failed: client 0 no longer has its state after round 1"
    assert answers[1].metrics["loss"] == 3.0


def test_states_of_other_runs_are_apart_and_their_names_make_no_paths(tmp_path: Path) -> None:
    StateFolder(tmp_path, "a" * 32).save(0, {"c": torch.ones(1)})
    with pytest.raises(LookupError):
        StateFolder(tmp_path, "b" * 32).load(0)
    with pytest.raises(ValueError, match="32 hexadecimal"):
        StateFolder(tmp_path, "../../etc")


def test_a_client_with_another_version_of_a_plugin_is_refused_by_name(nodes: Nodes) -> None:
    plugin = {"kind": "federated", "name": "fedavg", "distribution": "lightrail", "version": "9.9"}
    with pytest.raises(CompositionError) as caught:
        opened(nodes, {"plugins": [plugin]})
    assert "client 0 does not fit this run: federated 'fedavg' (lightrail) is 9.9 at the server and" in str(
        caught.value
    )
    assert version_differences({"plugins": [{**plugin, "distribution": "lightrail-of-nobody"}]}) == [
        "federated 'fedavg' (lightrail-of-nobody) is 9.9 at the server and not installed here"
    ]


def test_a_server_cannot_choose_what_code_a_client_runs(nodes: Nodes) -> None:
    with pytest.raises(CompositionError, match="names a class by its path"):
        opened(nodes, overrides=["+callback._target_=os.abort"])


def test_clients_that_do_not_come_are_named(nodes: Nodes) -> None:
    nodes.nodes[70] = nodes.nodes[71]
    with pytest.raises(CompositionError, match=r"1 of 2 clients did not come within 0\.4 s") as caught:
        opened(nodes)
    assert "--client 0" in caught.value.remedy


def test_a_client_decides_only_over_its_data_and_device() -> None:
    check_own(["data.path=mine.csv", "+data.rows=3", "trainer.accelerator=gpu"])
    with pytest.raises(ConfigurationError, match=r"cannot set optimizer\.lr alone"):
        check_own(["optimizer.lr=1"])


def test_what_a_client_has_of_its_own_is_not_divided() -> None:
    whole, half = (FromCatalogue(RUN, has_own_data=own) for own in (True, False))
    order = Order(1, 0, {"weights": rounds_of().model.weights()})
    assert half.work(order, {})[0].samples == whole.work(order, {})[0].samples // 2


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rounds_of(*overrides: str) -> ServerRounds:
    run = compose([*RUN, *overrides])
    return next(each for each in run.callbacks if isinstance(each, ServerRounds))


def weights_after(rounds: ServerRounds, steps: int) -> torch.Tensor:
    for _ in range(steps):
        rounds.step()
    assert rounds.state is not None
    return rounds.state["weights"].clone()


def test_a_server_has_no_processes_for_its_clients(tmp_path: Path) -> None:
    with (
        deployed(Deployment(f"127.0.0.1:{free_port()}", folder=tmp_path)),
        pytest.raises(CompositionError, match="clients on machines of their own"),
    ):
        rounds_of("federated.engine=flower", "federated.processes=2")


def test_a_deployed_run_is_that_of_one_process_and_survives_a_client_that_is_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"127.0.0.1:{free_port()}"
    # Clients are forked from a process that has imported what they need, which takes longer than their rounds.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["lightrail.run.execution", "flower_client_program"])
    # Client 1 never comes to the end of its third round.
    clients = [processes.Process(target=take_part, args=(address, k, tmp_path, 2 if k == 1 else -1)) for k in (0, 1)]
    for process in clients:
        process.start()
    threading.Thread(target=kill_at, args=(tmp_path / "stalled-1", clients[1]), daemon=True).start()
    with deployed(Deployment(address, patience=90, folder=tmp_path)):
        there = rounds_of("federated.engine=flower", "federated.timeout=60")
        masked = rounds_of("federated.engine=flower", "federated.timeout=60", "federated.secure_aggregation=true")
    try:
        after_one = weights_after(masked, 1)
        masked.close()
        after_two = weights_after(there, 2)
        after_three = weights_after(there, 1)
    finally:
        masked.close()
        there.close()
        for process in clients:
            process.terminate()
            process.join(timeout=10)
    torch.testing.assert_close(after_one, weights_after(rounds_of(), 1), rtol=0, atol=1e-6)
    here = rounds_of()
    torch.testing.assert_close(after_two, weights_after(here, 2), rtol=1e-6, atol=1e-6)
    assert "round 2: client 1 is left out: the connection to it was lost" in capsys.readouterr().err
    here.transport = Without(here.transport, 1)
    torch.testing.assert_close(after_three, weights_after(here, 1), rtol=1e-6, atol=1e-6)


class Without(InProcess):
    """Carries as another does, but for one client."""

    def __init__(self, inner: Any, client: int) -> None:
        self.inner, self.client = inner, client

    def exchange(self, orders: Sequence[Order]) -> list[Reply | Failure]:
        return self.inner.exchange([order for order in orders if order.client != self.client])


def kill_at(marker: Path, process: Any) -> None:
    while not marker.exists():
        time.sleep(0.05)
    process.kill()
