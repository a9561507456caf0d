"""Clients in several processes give what one gives; batches that are cut from tensors are those of the loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, Subset, TensorDataset

from lightrail.errors import CompositionError
from lightrail.federated.indexed_batches import batches_of
from lightrail.federated.pool import ClientPool
from lightrail.federated.pool_process import flat, whole
from lightrail.federated.rounds import ServerRounds
from lightrail.testing.federated_runs import composed_rounds

ROWS = TensorDataset(torch.arange(22.0).reshape(11, 2), torch.arange(11))


def doubled(samples: list[Any]) -> Any:
    return 2 * torch.stack([x for x, _ in samples])


LOADERS = {
    "in order": lambda: DataLoader(ROWS, batch_size=4),
    "shuffled": lambda: DataLoader(ROWS, batch_size=4, shuffle=True),
    "whole batches": lambda: DataLoader(ROWS, batch_size=4, shuffle=True, drop_last=True),
    "a part": lambda: DataLoader(Subset(ROWS, [9, 2, 5, 7, 0]), batch_size=2, shuffle=True),
    "drawn again": lambda: DataLoader(ROWS, batch_size=4, sampler=RandomSampler(ROWS, replacement=True)),
    "other batches": lambda: DataLoader(ROWS, batch_size=4, shuffle=True, collate_fn=doubled),
    "other samples": lambda: DataLoader(Squares(), batch_size=3, shuffle=True),
    "a generator": lambda: DataLoader(ROWS, batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(3)),
}


class Squares(Dataset[Any]):
    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> int:
        return index**2


@pytest.mark.parametrize("name", LOADERS)
def test_batches_are_those_of_the_loader_from_the_same_random_numbers(name: str) -> None:
    found: list[Any] = []
    for passes in (iter, batches_of):
        torch.manual_seed(0)
        loader = LOADERS[name]()
        # A step draws as well, while a pass goes on.
        found.append([(batch, torch.rand(())) for _ in range(2) for batch in passes(loader)])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    assert len(found[0]) == 2 * len(LOADERS[name]())


@pytest.mark.parametrize(
    "tensor",
    [torch.tensor(2), torch.zeros(0, 3), torch.tensor([True, False]), torch.rand(2, 3).bfloat16(), torch.rand(4, 2).T],
)
def test_tensors_go_to_another_process_as_they_are(tensor: torch.Tensor) -> None:
    found = whole(flat({"a": tensor}))["a"]
    assert found.dtype == tensor.dtype
    assert torch.equal(found, tensor)


def rounds_of(folder: Path, *overrides: str) -> ServerRounds:
    compressed = ("federated.compressor=top_k", "federated.compressor.ratio=0.4")
    own = ("+federated=fedavg", "federated.clients=10", "federated.fraction=0.8", *compressed, "optimizer.lr=0.1")
    rounds = composed_rounds(folder, *own, *overrides)[1]
    assert isinstance(rounds, ServerRounds)
    return rounds


def test_two_processes_give_what_one_gives_and_so_does_one_that_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = rounds_of(tmp_path), rounds_of(tmp_path, "federated.processes=2")
    pool: Any = two.transport
    assert isinstance(pool, ClientPool)
    two.step()
    pool.wait()
    other = pool._others[0]
    asked: list[Any] = []
    answers = other._answers
    other._answers = lambda tasks: asked.append(len(tasks)) or answers(tasks)
    for _ in range(3):
        two.step()
    assert other._is_proved
    assert sum(asked) > 1  # the first is the proof
    other._process.kill()
    two.step()
    two.step()
    assert pool._others == []
    assert "it has ended" in capsys.readouterr().err
    for _ in range(6):
        one.step()
    assert torch.equal(two.state["weights"], one.state["weights"])
    kept, same = (each.transport.state_dict()["states"] for each in (two, one))
    assert kept.keys() == same.keys()
    assert all(torch.equal(kept[client][name], same[client][name]) for client in same for name in same[client])
    received = [[each["clients"] for each in rounds.record.rounds] for rounds in (one, two)]
    assert received[0] == received[1]
    two.close()


def test_a_process_that_is_made_of_something_else_is_not_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = []
    for processes in (1, 2):
        run, rounds = composed_rounds(
            tmp_path, "+federated=fedavg", "federated.clients=10", f"federated.processes={processes}"
        )
        run.data.c *= 2  # type: ignore[union-attr]
        rounds.step()
        if processes == 2:
            rounds.transport.wait()  # type: ignore[attr-defined]
        rounds.step()
        ends.append(rounds.model.weights())
        rounds.close()
    assert torch.equal(ends[0], ends[1])
    assert "its numbers are not those of this process" in capsys.readouterr().err


@pytest.mark.parametrize("other", ["trainer.accelerator=auto", "+privacy=dp_sgd"])
def test_several_processes_are_refused_where_they_would_not_give_the_same(
    other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: other.endswith("auto"))
    with pytest.raises(CompositionError, match="2 processes"):
        composed_rounds(tmp_path, "+federated=fedavg", "federated.clients=10", "federated.processes=2", other)
