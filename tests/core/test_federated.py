"""Runs in rounds: what clients may do wrong, what a round costs, where a stopped run goes on, what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import lightrail
from lightrail.errors import CompositionError, ConfigurationError, UserError
from lightrail.federated.gossip_rounds import GossipRounds
from lightrail.federated.rounds import Rounds, ServerRounds
from lightrail.federated.transport import Failure, Order, Reply
from lightrail.privacy.audit import audited
from lightrail.run import Run
from lightrail.testing.federated_runs import Separation, composed_rounds, optimum_of

DIGITS = ("model=mlp", "trainer.accelerator=cpu", "logger=[csv]", "optimizer=sgd", "optimizer.lr=0.1")
Spoil = Callable[[Reply], Reply | Failure]


class Through:
    """Another transport, with what comes back changed on the way."""

    def __init__(self, inner: Any, change: Callable[[Sequence[Reply | Failure]], list[Reply | Failure]]) -> None:
        self._inner, self._change = inner, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def exchange(self, orders: Sequence[Order]) -> list[Reply | Failure]:
        return self._change(self._inner.exchange(orders))


def quadratic(folder: Path, *overrides: str) -> ServerRounds:
    rounds = composed_rounds(folder, "+federated=fedavg", "federated.clients=10", "optimizer.lr=0.1", *overrides)[1]
    assert isinstance(rounds, ServerRounds)
    return rounds


def spoiled(rounds: ServerRounds, client: int, spoil: Spoil) -> None:
    def change(answers: Sequence[Reply | Failure]) -> list[Reply | Failure]:
        return [spoil(each) if isinstance(each, Reply) and each.client == client else each for each in answers]

    rounds.transport = cast(Any, Through(rounds.transport, change))


def with_vectors(reply: Reply, change: Callable[[torch.Tensor], torch.Tensor]) -> Reply:
    return dataclasses.replace(reply, message={name: change(vector) for name, vector in reply.message.items()})


FAULTS: dict[str, tuple[Spoil, str]] = {
    "vanishes": (lambda r: Failure(r.client, "no answer within 5 s"), "no answer"),
    "nan": (lambda r: with_vectors(r, lambda x: x * float("nan")), "not finite"),
    "shape": (lambda r: with_vectors(r, lambda x: x[:-1]), "[4] float64, where update [5] float64 was expected"),
    "type": (lambda r: with_vectors(r, torch.Tensor.half), "float16"),
    "name": (lambda r: dataclasses.replace(r, message={"other": r.message["update"]}), "other [5]"),
    "huge": (lambda r: with_vectors(r, lambda x: 1e6 * x), "times as long as usual"),
    "samples": (lambda r: dataclasses.replace(r, samples=0), "says that it has 0 samples"),
    "parts": (lambda r: dataclasses.replace(r, message={"update:values": torch.ones(2)}), "compresses nothing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_round_goes_on_without_a_client_that_is_broken(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, said = FAULTS[fault]
    rounds, without = quadratic(tmp_path), quadratic(tmp_path)
    spoiled(rounds, 3, spoil)
    spoiled(without, 3, lambda r: Failure(r.client, "left out"))
    rounds.step()
    without.step()
    assert torch.equal(rounds.state["weights"], without.state["weights"])
    assert list(rounds.record.last["left_out"]) == ["3"]
    told = capsys.readouterr().err
    assert "client 3 is left out" in told
    assert said in told


def test_a_client_whose_training_fails_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, rounds = composed_rounds(tmp_path, "+federated=fedavg", "federated.clients=10")
    run.data.A[4, 0, 0] = float("inf")  # type: ignore[union-attr]
    for _ in range(2):
        rounds.step()
    assert len(rounds.record.last["left_out"]) == 1
    assert "is left out: " in capsys.readouterr().err


def test_a_round_without_any_answer_ends_the_run(tmp_path: Path) -> None:
    rounds = quadratic(tmp_path)
    rounds.transport = cast(
        Any, Through(rounds.transport, lambda answers: [Failure(each.client, "gone") for each in answers])
    )
    with pytest.raises(CompositionError, match="no client's answer"):
        rounds.step()


def test_the_error_of_the_users_own_code_is_what_is_raised(tmp_path: Path) -> None:
    run, rounds = composed_rounds(tmp_path, "+federated=fedavg", "federated.clients=10")
    run.data.c = run.data.c[:, :3]  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="size of tensor"):
        rounds.step()


def test_one_step_of_all_is_gradient_descent_and_more_are_biased(tmp_path: Path) -> None:
    ends = []
    for steps in (1, 20):
        run, rounds = composed_rounds(
            tmp_path, "+federated=fedavg", "federated.clients=4", "data.clients=4", f"federated.local_steps={steps}",
            "optimizer.lr=0.2",
        )  # fmt: skip
        for _ in range(60 if steps == 1 else 8):
            rounds.step()
        ends.append(float((rounds.state["weights"] - optimum_of(run.data.A, run.data.c)).norm()))  # type: ignore[union-attr]
    assert ends[0] < 1e-8
    assert ends[1] > 0.01


def test_bytes_are_those_of_the_wire(tmp_path: Path) -> None:
    plain = quadratic(tmp_path)
    compressed = quadratic(tmp_path, "federated.compressor=top_k", "federated.compressor.ratio=0.4")
    plain.step()
    compressed.step()
    assert plain.record.last["sent"] == 10 * 5 * 8
    assert set(plain.record.last["received"].values()) == {5 * 8}
    assert set(compressed.record.last["received"].values()) == {2 * (8 + 4)}


def test_what_compression_drops_is_kept_for_the_next_round(tmp_path: Path) -> None:
    rounds = quadratic(tmp_path, "federated.compressor=top_k", "federated.compressor.ratio=0.4")
    plain = quadratic(tmp_path)
    sent = {}

    def keep(answers: Sequence[Reply | Failure]) -> list[Reply | Failure]:
        for each in answers:
            assert isinstance(each, Reply)
            sent[each.client] = each.message
        return list(answers)

    plain.transport = cast(Any, Through(plain.transport, keep))
    rounds.step()
    plain.step()
    states = rounds.transport.state_dict()["states"]
    for client, message in sent.items():
        error = states[client]["error of update"]
        assert int((error == 0).sum()) == 2
        assert torch.equal(error[error != 0], message["update"][error != 0])


def test_with_ef21_client_and_server_keep_the_same_copy(tmp_path: Path) -> None:
    options = ("federated.compressor=top_k", "federated.compressor.ratio=0.4", "federated.feedback=ef21")
    rounds = quadratic(tmp_path, *options)
    for round_index in range(4):
        if round_index == 2:
            spoiled(rounds, 3, lambda r: Failure(r.client, "no answer"))
        if round_index == 3:
            rounds.transport = rounds.transport._inner  # type: ignore[attr-defined]
        rounds.step()
    known = rounds.state_dict()["estimates"]
    states = rounds.transport.state_dict()["states"]
    assert len(known) == 10
    for client, vectors in known.items():
        assert torch.equal(vectors["update"], states[client]["estimate of update"])


def test_secure_aggregation_gives_the_same_mean(tmp_path: Path) -> None:
    plain, secure = quadratic(tmp_path), quadratic(tmp_path, "federated.secure_aggregation=true")
    plain.step()
    secure.step()
    torch.testing.assert_close(secure.state["weights"], plain.state["weights"], rtol=0, atol=1e-6)
    assert not torch.equal(secure.state["weights"], plain.state["weights"])


# Runs as a user starts them.


def digits(folder: Path, *overrides: str) -> Run:
    return lightrail.compose(["+federated=fedavg", "federated.clients=3", *DIGITS, f"run.root={folder}", *overrides])


def test_a_stopped_run_goes_on_after_its_last_round(tmp_path: Path) -> None:
    options = ("federated.rounds=3", "federated.local_steps=2", "federated.compressor=top_k", "federated.fraction=0.7")
    whole = digits(tmp_path / "whole", *options).execute(show_progress=False)
    stopped = digits(tmp_path / "stopped", *options)
    rounds = next(each for each in stopped.callbacks if isinstance(each, Rounds))
    carry_out = rounds.carry_out

    def interrupted() -> dict[str, float]:
        if rounds.done == 2:
            raise KeyboardInterrupt
        return carry_out()

    rounds.carry_out = interrupted  # type: ignore[method-assign]
    with pytest.raises(BaseException):  # noqa: B017
        stopped.execute(show_progress=False)
    folder = next(tmp_path.glob("stopped/*"))
    resumed = lightrail.compose([f"run.resume={folder}"]).execute(show_progress=False)
    a, b = (torch.load(each.last_checkpoint, weights_only=True)["state_dict"] for each in (whole, resumed))  # type: ignore[arg-type]
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-6, atol=1e-6)
    assert resumed.summary["steps"] == 3
    record = json.loads((folder / "federated.json").read_text())
    assert [each["round"] for each in record["rounds"]] == [0, 1, 2]
    assert "client loss" in (folder / "report.html").read_text().lower()


def test_statistics_of_layers_are_averaged_and_counts_are_not(tmp_path: Path) -> None:
    run = digits(
        tmp_path, "model=cnn", "federated.rounds=1", "federated.local_steps=1", "federated.partition=dirichlet"
    )
    result = run.execute(show_progress=False)
    state = torch.load(result.last_checkpoint, weights_only=True)["state_dict"]  # type: ignore[arg-type]
    counts = [value for name, value in state.items() if name.endswith("num_batches_tracked")]
    assert counts
    assert all(value.dtype == torch.int64 and int(value) == 1 for value in counts)
    means = [value for name, value in state.items() if name.endswith("running_mean")]
    assert all(bool(value.any()) for value in means)
    assert any("statistics of layers" in note for note in result.summary["notes"])


def test_nodes_end_near_each_other_and_near_the_data(tmp_path: Path) -> None:
    run, rounds = composed_rounds(tmp_path, "+federated=d_sgd", "federated.nodes=10", "optimizer.lr=0.05")
    assert isinstance(rounds, GossipRounds)
    for _ in range(150):
        rounds.step()
    assert (rounds.model.weights() - optimum_of(run.data.A, run.data.c)).norm() < 0.1  # type: ignore[union-attr]
    assert rounds.record.about["spectral_gap"] == pytest.approx(0.12732, abs=1e-4)
    assert rounds.record.last["sent"] == 10 * 2 * 5 * 8


class OwnBatches(Separation):
    """A task that changes its batches itself."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        return 2 * x, y


def test_what_a_task_does_to_batches_happens_at_clients(tmp_path: Path) -> None:
    ends = []
    for task in ("Separation", "test_federated.OwnBatches"):
        place = task if "." in task else f"lightrail.testing.federated_runs.{task}"
        run = lightrail.compose(
            [f"task={place}", "data=lightrail.testing.federated_runs.ClientClusters", "model=null", "optimizer=sgd",
             "optimizer.lr=0.1", "+federated=fedavg", "federated.clients=3", "federated.rounds=1", "logger=[]",
             "trainer.accelerator=cpu", f"run.root={tmp_path}"]
        )  # fmt: skip
        run.execute(show_progress=False)
        ends.append(next(run.task.parameters()).detach().clone())
    assert not torch.equal(ends[0], ends[1])


class AsksItsTrainer(Separation):
    """A task whose loss depends on what only a trainer knows."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        found = super().training_step(batch, batch_idx)
        return {"loss": found["loss"] * (1 + self.trainer.accumulate_grad_batches)}


class AsksItsTrainerLate(Separation):
    """A task that does so in the middle of a visit, when it has moved already."""

    def __init__(self) -> None:
        super().__init__()
        torch.nn.init.zeros_(self.head.weight)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        found = super().training_step(batch, batch_idx)
        has_moved = bool(self.head.weight.any())
        return {"loss": found["loss"] * (1 + (self.trainer.accumulate_grad_batches if has_moved else 0))}


def _repeated(step: Any) -> Any:
    def decorated(*args: Any) -> Any:
        assert len(args) == 3  # the task, the batch and its number, as a trainer hands them to such a step
        return step(*args)

    return decorated


class Decorated(Separation):
    """A task whose step does not say what it takes."""

    training_step = _repeated(Separation.training_step)


CLUSTERS = ("data=lightrail.testing.federated_runs.ClientClusters", "+federated=fedavg", "federated.clients=3")


@pytest.mark.parametrize(
    "options",
    [
        ("federated.local_epochs=2",),
        ("federated.local_steps=3", "+federated=fedprox", "federated.mu=0.1"),
        ("+transform=[clip_norm]", "schedule=cosine"),
        ("task=test_federated.AsksItsTrainer",),
        ("task=test_federated.AsksItsTrainerLate", "federated.local_steps=3", "+federated=scaffold"),
        ("task=test_federated.Decorated",),
    ],
)
def test_the_plain_loop_gives_what_the_trainer_gives(options: tuple[str, ...], tmp_path: Path) -> None:
    ends = []
    for is_plain in (True, False):
        overrides = ["task=lightrail.testing.federated_runs.Separation", *CLUSTERS, "federated.rounds=3", *options]
        rounds = composed_rounds(tmp_path, *overrides)[1]
        side = rounds.transport._make()
        assert side._trainer.is_plain
        side._trainer.is_plain = is_plain
        for _ in range(3):
            rounds.step()
        assert side._trainer.is_plain == (is_plain and "AsksItsTrainer" not in options[0])
        ends.append((rounds.model.weights(), rounds.lr))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def test_who_listens_to_every_optimizer_hears_each_step_of_a_client(tmp_path: Path) -> None:
    heard: list[str] = []
    overrides = ["task=lightrail.testing.federated_runs.Separation", *CLUSTERS, "federated.rounds=2"]
    rounds = composed_rounds(tmp_path, *overrides, "federated.local_steps=3")[1]
    rounds.step()
    listener = register_optimizer_step_pre_hook(lambda optimizer, *rest: heard.append(type(optimizer).__name__))
    try:
        rounds.step()
    finally:
        listener.remove()
    assert heard == ["SGD"] * 9  # three clients of three steps


# What is refused, before the first round.

REFUSED = {
    "more clients than samples": ["+federated=fedavg", "federated.clients=5000"],
    "no such horizon": ["+federated=fedavg", "trainer.max_epochs=3"],
    "several devices": ["+federated=fedavg", "trainer.devices=2"],
    "topology with a server": ["+federated=fedavg", "federated.topology=ring"],
    "server privacy without a server": ["+federated=d_sgd", "+privacy=dp_sgd"],
    "a masked sum of one": ["+federated=fedavg", "federated.fraction=0.1", "federated.secure_aggregation=true"],
    "a masked sum in a simulation": [
        "+federated=fedavg",
        "federated.engine=flower",
        "federated.secure_aggregation=true",
    ],
    "secure and compressed": ["+federated=fedavg", "federated.compressor=sign", "federated.secure_aggregation=true"],
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_carried_out_in_rounds_is_refused(what: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        lightrail.compose([*DIGITS, f"run.root={tmp_path}", *REFUSED[what]]).execute(show_progress=False)
    error = refused.value
    assert all((error.what, error.found, error.allowed, error.remedy))


@pytest.mark.parametrize("part", ["partition=dirichlet", "compressor=top_k", "topology=ring"])
def test_a_part_of_a_federated_run_needs_one(part: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="federated"):
        lightrail.compose([f"+{part}", *DIGITS])


def test_an_option_that_is_out_of_range_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="fraction"):
        lightrail.compose(["+federated=fedavg", "federated.fraction=1.5", *DIGITS])


def test_parts_are_chosen_inside_and_outside(tmp_path: Path) -> None:
    inside = lightrail.compose(["+federated=fedavg", "federated.partition=dirichlet", "federated.partition.alpha=0.3"])
    outside = lightrail.compose(["+federated=fedavg", "+partition=dirichlet", "partition.alpha=0.3"])
    assert inside.composition.config == outside.composition.config
    assert inside.composition.config.partition.alpha == 0.3


def test_a_task_that_is_run_in_rounds_is_its_own_class_to_others(tmp_path: Path) -> None:
    run = digits(tmp_path)
    plain = lightrail.compose([*DIGITS])
    assert type(run.task).__name__ == type(plain.task).__name__
    assert isinstance(run.task, type(plain.task))
    assert [name for name, _ in run.task.named_parameters()] == [name for name, _ in plain.task.named_parameters()]
    assert isinstance(run.task, nn.Module)


def test_what_clients_have_spent_is_audited(tmp_path: Path) -> None:
    options = ("federated.server_privacy=dp_fedavg", "federated.server_privacy.accountant=rdp", "federated.rounds=2")
    run = digits(tmp_path, *options, "federated.local_steps=1", "federated.clients=20", "federated.fraction=0.5")
    folder = run.execute(show_progress=False).folder
    audit = audited(str(folder))
    assert audit.said == pytest.approx(8.0, rel=1e-2)
    assert [(each.steps, each.records) for each in audit.ledger.events] == [(2, 20)]
