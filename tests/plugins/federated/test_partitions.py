# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""Partitions: every sample goes to one client, in the shares that were asked for."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.data import TensorDataset

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.federated.partition import Samples
from lightrail_federated.partitions.by_column import ByColumn
from lightrail_federated.partitions.dealing import filled_up
from lightrail_federated.partitions.dirichlet import Dirichlet
from lightrail_federated.partitions.iid import IID
from lightrail_federated.partitions.shards import Shards
from lightrail_federated.partitions.sources import Sources

LABELS = torch.arange(1000) % 10
SAMPLES = Samples(TensorDataset(torch.zeros(1000), LABELS, torch.arange(1000) // 100))


def divided(partition, clients, samples=SAMPLES, seed=0):
    return partition.divide(samples, clients, torch.Generator().manual_seed(seed))


def counts(parts, clients):
    """How many of each label each client has."""
    return torch.stack([torch.bincount(LABELS[part], minlength=10) for part in parts]).view(clients, 10)


@pytest.mark.parametrize(
    "partition", [IID(), Dirichlet(0.3), Dirichlet(1e-9), Dirichlet(1e300), Shards(2), Shards(7), ByColumn(2)]
)
@pytest.mark.parametrize("clients", [1, 7, 10])
def test_every_sample_goes_to_one_client(partition, clients):
    parts = divided(partition, clients)
    assert torch.cat(parts).sort().values.tolist() == list(range(1000))
    assert [part.dtype for part in parts] == [torch.int64] * clients
    assert all(len(part) for part in parts)
    assert all(torch.equal(a, b) for a, b in zip(parts, divided(partition, clients), strict=True))


@pytest.mark.parametrize("partition", [IID(), Dirichlet(0.3), Shards(2), ByColumn(2)])
def test_another_seed_divides_otherwise(partition):
    found = [divided(partition, 3, seed=seed) for seed in (0, 1)]
    assert any(not torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_iid_is_even():
    assert sorted({len(part) for part in divided(IID(), 7)}) == [142, 143]


def test_dirichlet_has_its_mean_and_spread():
    found = [counts(divided(Dirichlet(0.5), 5, seed=seed), 5).double() / 100 for seed in range(60)]
    shares = torch.stack(found).flatten(0, 1)
    assert float(shares.mean()) == pytest.approx(0.2)
    # Var p = (1/N)(1 - 1/N)/(N α + 1)
    assert float(shares.var()) == pytest.approx(0.2 * 0.8 / 3.5, rel=0.1)
    assert int((counts(divided(Dirichlet(1e-9), 4), 4) > 1).sum(0).max()) == 1
    assert counts(divided(Dirichlet(1e300), 4), 4).unique().tolist() == [25]


def test_dirichlet_gives_at_least_what_was_asked():
    parts = divided(Dirichlet(1e-3, least=80), 12)
    assert min(map(len, parts)) == 80
    assert filled_up([[1], [2, 3, 4], [5, 6, 7]], 2) == [[1, 4], [2, 3], [5, 6, 7]]
    with pytest.raises(CompositionError, match="more clients than samples") as caught:
        divided(Dirichlet(1.0, least=84), 12)
    assert caught.value.allowed == "at most 11 clients"


def test_shards_have_few_labels():
    parts = divided(Shards(2), 5)
    assert {len(part) for part in parts} == {200}
    assert int((counts(parts, 5) > 0).sum(1).max()) == 2
    assert divided(Shards(1), 10)[0].diff().unique().tolist() == [10]


def test_columns():
    parts = divided(ByColumn(2), 10)
    assert parts[3].tolist() == list(range(300, 400))
    found = [SAMPLES.dataset.tensors[2][part].unique().tolist() for part in divided(ByColumn(2), 4)]
    assert sorted(map(len, found)) == [2, 2, 3, 3]
    words = Samples([{"x": 0.0, "writer": name} for name in ("b", "a", "c", "a")])
    assert [part.tolist() for part in divided(ByColumn("writer"), 3, words)] == [[1, 3], [0], [2]]
    numbers = Samples([{"site": site} for site in (10, 9, 2.5, 9)])
    assert numbers.column("site").tolist() == [2, 1, 0, 1]


def test_sources():
    samples = Samples(TensorDataset(torch.zeros(3)), lambda path: TensorDataset(torch.zeros(int(path))))
    found = Sources("path", ["2", "4"]).datasets(samples, 2, torch.Generator())
    assert [len(each) for each in found] == [2, 4]
    for values, clients, of in (
        (["2"], 2, samples),
        (["1", "2", "3"], 2, samples),
        (["0", "1"], 2, samples),
        (["1"], 1, SAMPLES),
    ):
        with pytest.raises(CompositionError, match="sources"):
            Sources("path", values).datasets(of, clients, torch.Generator())


@pytest.mark.parametrize(
    ("partition", "samples", "clients", "message"),
    [
        (IID(), SAMPLES, 1001, "'iid' has more clients"),
        (Shards(3), SAMPLES, 334, "'shards' has more clients"),
        (ByColumn(2), SAMPLES, 11, "more clients than values"),
        (ByColumn(3), SAMPLES, 2, "no column 3"),
        (ByColumn("writer"), SAMPLES, 2, "writer"),
        (Dirichlet(), Samples(TensorDataset(torch.zeros(9))), 2, "no labels"),
        (Shards(), Samples(TensorDataset(torch.zeros(9), torch.zeros(9, 2))), 2, "no labels"),
        (Shards(), Samples(TensorDataset(torch.zeros(9), torch.rand(9))), 2, "no labels"),
        (Shards(), Samples([(0.0, math.nan), (0.0, 1)]), 1, "no labels"),
    ],
)
def test_bad_input_is_named(partition, samples, clients, message):
    with pytest.raises(CompositionError, match=message):
        divided(partition, clients, samples)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Dirichlet(0.0),
        lambda: Dirichlet(-1.0),
        lambda: Dirichlet(math.inf),
        lambda: Dirichlet(1.0, least=0),
        lambda: Shards(0),
        lambda: ByColumn(-1),
        lambda: ByColumn(None),
        lambda: Sources("path", []),
        lambda: Sources("path", "a.csv"),
    ],
)
def test_options_out_of_range(wrong):
    with pytest.raises(ConfigurationError):
        wrong()
