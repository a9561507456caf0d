"""Topologies: doubly stochastic weights, the rate at which they bring nodes together, and graphs that are refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from lightrail.errors import CompositionError, ConfigurationError, DataError
from lightrail.federated.topology import check_mixing, spectral_gap
from lightrail_federated.topologies.complete import Complete
from lightrail_federated.topologies.erdos_renyi import ErdosRenyi
from lightrail_federated.topologies.exponential import Exponential, one_peer_mixing
from lightrail_federated.topologies.from_file import FromFile
from lightrail_federated.topologies.ring import Ring
from lightrail_federated.topologies.star import Star
from lightrail_federated.topologies.torus import Torus

ALL = [Ring(), Torus(), Complete(), Star(), Exponential(), Exponential(one_peer=True), ErdosRenyi(0.4)]
COUNTS = (2, 3, 4, 5, 8, 12, 16, 25)


def mixing(topology, nodes):
    return topology.mixing(nodes, torch.Generator().manual_seed(0))


def second_eigenvalue(weights):
    return float(torch.linalg.eigvalsh(weights).abs().sort().values[-2])


@pytest.mark.parametrize("nodes", COUNTS)
@pytest.mark.parametrize("topology", ALL, ids=lambda each: type(each).__name__)
def test_weights_average(topology, nodes):
    W = mixing(topology, nodes)
    check_mixing(W, "this one")
    x = torch.randn(nodes, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    edges = {*topology.edges(nodes, torch.Generator().manual_seed(0))}
    for round_index in range(5):
        at = topology.mixing_at(round_index, W)
        assert float((at.sum(0) - 1).abs().max()) < 1e-12
        assert float((at.sum(1) - 1).abs().max()) < 1e-12
        assert float(at.min()) >= -1e-15
        assert torch.allclose((at @ x).mean(0), x.mean(0), atol=1e-14)
        used = {(min(i, j), max(i, j)) for i, j in at.nonzero().tolist() if i != j}
        assert used <= edges
    assert all(i < j for i, j in edges)


@pytest.mark.parametrize(
    ("topology", "nodes", "wanted"),
    [
        (Ring(), 4, 1 / 3),
        (Ring(), 8, 0.8047378541),
        (Ring(), 2, 0.0),
        (Star(), 10, 0.9),
        (Complete(), 7, 0.0),
        (Torus(), 9, 0.4),  # (1 + 2 + 2 cos(2π/3)) / 5
        (Torus(rows=1), 8, (1 + 2 * math.cos(math.pi / 4)) / 3),
        (Exponential(), 8, 1 / 3),  # (1 + 2 cos φ + 2 cos 2φ + cos 4φ) / 6 at φ = π: 2/6
    ],
)
def test_contraction_of_a_round_is_the_second_eigenvalue(topology, nodes, wanted):
    W = mixing(topology, nodes)
    assert second_eigenvalue(W) == pytest.approx(wanted, abs=1e-9)
    assert spectral_gap(W) == pytest.approx(1 - wanted, abs=1e-9)
    x = torch.randn(nodes, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x -= x.mean(0)
    for _ in range(40):
        before, x = x.norm(), W @ x
        if x.norm() < 1e-12:
            break
    else:
        assert float(x.norm() / before) == pytest.approx(wanted, rel=1e-3)


def test_neighbours():
    assert mixing(Ring(), 2).tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert mixing(Ring(), 5)[0].tolist() == pytest.approx([1 / 3, 1 / 3, 0, 0, 1 / 3])
    assert (mixing(Torus(), 12) > 0).sum(1).unique().tolist() == [5]  # 3 × 4
    assert (mixing(Torus(), 6) > 0).sum(1).unique().tolist() == [4]  # 2 × 3
    assert (mixing(Exponential(), 16) > 0).sum(1).unique().tolist() == [8]  # ± 1, 2, 4 and 8
    with pytest.raises(CompositionError, match="do not fill") as caught:
        mixing(Torus(rows=5), 12)
    assert caught.value.allowed == "rows=1, 2, 3, 4, 6, 12"


@pytest.mark.parametrize("nodes", [2, 4, 8, 16])
def test_one_peer_is_the_mean_after_each_neighbour_once(nodes):
    rounds = int(math.log2(nodes))
    for start in (0, 1, 5):
        product = torch.eye(nodes, dtype=torch.float64)
        for round_index in range(start, start + rounds):
            product = one_peer_mixing(round_index, nodes) @ product
        assert torch.equal(product, torch.full_like(product, 1 / nodes))


def test_erdos_renyi():
    W = [ErdosRenyi(0.2).mixing(20, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(W[0], W[1])
    assert not torch.equal(W[0], W[2])
    edges = [len(ErdosRenyi(0.3).edges(30, torch.Generator().manual_seed(seed))) for seed in range(20)]
    assert sum(edges) / 20 == pytest.approx(0.3 * 435, rel=0.06)
    with pytest.raises(CompositionError, match="no connected graph") as caught:
        mixing(ErdosRenyi(0.01), 50)
    assert "ln(n)/n = 0.0782" in caught.value.allowed
    with pytest.raises(ConfigurationError):
        ErdosRenyi(0.0)


def written(folder, name, content):
    path = folder / name
    if name.endswith("npy"):
        np.save(path, np.array(content))
    else:
        rows = "\n".join(",".join(map(str, row)) for row in content)
        path.write_text(json.dumps(content) if name.endswith("json") else "# a graph\n" + rows + "\n\n")
    return FromFile(path=str(path))


@pytest.mark.parametrize("name", ["graph.csv", "graph.json", "graph.npy"])
def test_files(tmp_path, name):
    topology = written(tmp_path, name, [[0, 1], [1, 2], [2, 1], [2, 3], [3, 0]])
    assert torch.equal(mixing(topology, 4), mixing(Ring(), 4))
    weights = [[0.7, 0.3, 0.0], [0.3, 0.4, 0.3], [0.0, 0.3, 0.7]]
    topology = written(tmp_path, name, weights)
    assert mixing(topology, 3).tolist() == weights
    assert topology.edges(3, torch.Generator()) == [(0, 1), (1, 2)]
    assert mixing(written(tmp_path, name, [[0.5, 0.5], [0.5, 0.5]]), 2).tolist() == [[0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize(
    ("content", "nodes", "message"),
    [
        ([[0, 1], [2, 3]], 4, "is not connected"),
        ([[0, 1], [1, 2]], 2, "about other nodes"),
        ([[0, 1], [1, 1]], 3, "about other nodes"),
        ([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]], 3, "is not connected"),
        ([[0.5, 0.5, 0], [0.2, 0.5, 0.3], [0.3, 0, 0.7]], 3, "is not symmetric"),
        ([[0.5, 0.5, 0], [0.5, 0.5, 0.5], [0, 0.5, 0.5]], 3, "does not average"),
        ([[1.5, -0.5, 0], [-0.5, 1, 0.5], [0, 0.5, 0.5]], 3, "does not average"),
        ([[float("nan"), 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]], 3, "does not average"),
        ([[0, 0.5, 0, 0.5], [0.5, 0, 0.5, 0], [0, 0.5, 0, 0.5], [0.5, 0, 0.5, 0]], 4, "never agrees"),
        ([[0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]], 5, "about other nodes"),
    ],
)
def test_graphs_that_are_refused(tmp_path, content, nodes, message):
    with pytest.raises(CompositionError, match=message):
        mixing(written(tmp_path, "graph.npy", content), nodes)


def test_files_that_are_refused(tmp_path):
    for name, text in (("a.csv", "0,1\n2\n"), ("b.json", "{"), ("c.csv", "from,to\n0,1\n"), ("d.json", "[[0, 1, 2]]")):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match="cannot be read"):
            FromFile(path=str(tmp_path / name))
    with pytest.raises(DataError, match="cannot be read"):
        FromFile(path=str(tmp_path / "missing.npy"))
    with pytest.raises(ConfigurationError, match="no choice"):
        FromFile(path="graph.txt")
    with pytest.raises(CompositionError, match="is not square"):
        check_mixing(torch.ones(2, 3), "this one")
