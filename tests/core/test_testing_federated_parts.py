"""The suites of compressors, partitions and topologies fail each check on the plugin that breaks it, and no other."""

from __future__ import annotations

import pytest
import torch

from lightrail.errors import CompositionError
from lightrail.federated.compressor import Compressor
from lightrail.federated.partition import Partition
from lightrail.federated.topology import Topology
from lightrail.testing.compressor import CompressorSuite
from lightrail.testing.partition import PartitionSuite
from lightrail.testing.suite import examine
from lightrail.testing.topology import TopologySuite


class Plain(Compressor):
    """Sends the vector."""

    is_unbiased = is_contractive = True

    def encode(self, x, generator):
        return {"values": x.clone()}

    def decode(self, parts, size, dtype):
        if set(parts) != {"values"} or parts["values"].shape != (size,) or not parts["values"].isfinite().all():
            raise ValueError("no such vector")
        return parts["values"].to(dtype)

    def variance(self, size):
        return 0.0

    def contraction(self, size):
        return 1.0


class Shrinks(Plain):
    """Says that half a vector is a vector."""

    def encode(self, x, generator):
        return {"values": x / 2}


class HalfIsEnough(Shrinks):
    """Says that half of it is lost."""

    is_unbiased = False

    def contraction(self, size):
        return 0.75


class Believes(Plain):
    """Decodes whatever comes."""

    def decode(self, parts, size, dtype):
        return torch.nn.functional.pad(parts["values"], (0, size - len(parts["values"]))).to(dtype)


class DrawsOutside(Plain):
    """Draws a number that nobody asked for."""

    def encode(self, x, generator):
        torch.rand(1)
        return super().encode(x, generator)


class Overwrites(Plain):
    """Keeps nothing of what it was given."""

    def encode(self, x, generator):
        values = x.clone()
        x.zero_()
        return {"values": values}


class InTurn(Partition):
    """Deals in turn."""

    def divide(self, samples, clients, generator):
        if clients > len(samples):
            raise CompositionError("too many", found=clients, allowed=len(samples), remedy="Take fewer.")
        return [torch.arange(k, len(samples), clients) for k in range(clients)]


class NeverRefuses(InTurn):
    """Deals nothing to some."""

    def divide(self, samples, clients, generator):
        return [torch.arange(k, len(samples), clients) for k in range(clients)]


class GivesTwice(InTurn):
    """Gives the first sample to everybody."""

    def divide(self, samples, clients, generator):
        return [torch.cat([torch.zeros(1).long(), part]) for part in super().divide(samples, clients, generator)]


class Path(Topology):
    """One behind the other."""

    def edges(self, nodes, generator):
        return [(i, i + 1) for i in range(nodes - 1)]


class Pairs(Topology):
    """Two and two."""

    def edges(self, nodes, generator):
        return [(i, i + 1) for i in range(0, nodes - 1, 2)]


class Twice(Path):
    """Names each edge both ways."""

    def edges(self, nodes, generator):
        return [pair for i, j in super().edges(nodes, generator) for pair in ((i, j), (j, i))]


class Leaves(Path):
    """Takes from one row in odd rounds."""

    def mixing_at(self, round_index, mixing):
        return mixing if round_index % 2 else mixing * torch.linspace(0.5, 1, len(mixing), dtype=torch.float64)[:, None]


@pytest.mark.parametrize(
    ("suite", "plugin", "expected"),
    [
        (CompressorSuite, Plain, set()),
        (CompressorSuite, Shrinks, {"has_the_right_mean", "contracts"}),
        (CompressorSuite, HalfIsEnough, set()),
        (CompressorSuite, Believes, {"refuses_lies"}),
        (CompressorSuite, DrawsOutside, {"draws_from_its_generator"}),
        (
            CompressorSuite,
            Overwrites,
            {"carries_a_vector", "draws_from_its_generator", "has_the_right_mean", "contracts"},
        ),
        (PartitionSuite, InTurn, set()),
        (PartitionSuite, NeverRefuses, {"refuses_more_clients_than_samples"}),
        (PartitionSuite, GivesTwice, {"gives_each_sample_to_one_client"}),
        (TopologySuite, Path, set()),
        (TopologySuite, Pairs, {"averages", "averages_in_every_round"}),
        (TopologySuite, Twice, {"names_each_edge_once"}),
        (TopologySuite, Leaves, {"averages_in_every_round"}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_each_fault_fails_its_check(suite, plugin, expected):
    outcomes = [examine(check, plugin) for check in suite.checks]
    assert {outcome.check for outcome in outcomes if outcome.state == "failed"} == expected
