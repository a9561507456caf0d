"""Conformance of topologies: weights that average, on the edges alone, until nodes agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightrail.errors import UserError
from lightrail.federated.topology import Topology, check_mixing
from lightrail.testing.building import built, check_is_documented, refuses_unknown_options
from lightrail.testing.suite import Check, Suite, known_exceptions, name_of, require

__all__ = ["TopologySuite"]

Options = Mapping[str, Any]
COUNTS = (2, 3, 4, 5, 8, 9, 12)
ROUNDS = 8
ROUNDING = 1e-12


def _mixings(plugin: Any, options: Options) -> Iterator[tuple[Topology, int, Tensor]]:
    """It, the numbers of nodes that it does not refuse, and their weights."""
    made = 0
    for nodes in COUNTS:
        topology = built(plugin, options)
        try:
            mixing = topology.mixing(nodes, torch.Generator().manual_seed(0))
        except UserError:
            continue
        made += 1
        yield topology, nodes, mixing
    require(made, f"it refuses {COUNTS} nodes")


def check_builds_from_options(plugin: Any, options: Options) -> None:
    """``plugin(**options)`` is a topology that overrides edges or mixing."""
    topology = built(plugin, options)
    require(isinstance(topology, Topology), f"it is no Topology but {type(topology).__name__}")
    overrides = plugin.edges is not Topology.edges or plugin.mixing is not Topology.mixing
    require(overrides, "it overrides neither edges nor mixing")


def check_rejects_unknown_options(plugin: Any, options: Options) -> None:
    """An option that the signature lacks is an error."""
    built(plugin, options)
    refuses_unknown_options(plugin, options)


def check_averages(plugin: Any, options: Options) -> None:
    """W is float64, symmetric, connected and doubly stochastic to 1e-12."""
    for _, nodes, mixing in _mixings(plugin, options):
        require(mixing.dtype == torch.float64, f"W is {mixing.dtype}")
        require(mixing.shape == (nodes, nodes), f"W of {nodes} nodes has the shape {list(mixing.shape)}")
        try:
            check_mixing(mixing, plugin.__name__)
        except UserError as error:
            require(False, f"with {nodes} nodes it {error.what.split(' ', 2)[-1]}: {error.found}")
        off = max(float((mixing.sum(axis) - 1).abs().max()) for axis in (0, 1))
        require(off <= ROUNDING, f"with {nodes} nodes a sum of weights is off by {off:.3g}")


def check_names_each_edge_once(plugin: Any, options: Options) -> None:
    """Edges join two different nodes, each pair once, and weights are nonzero on them alone."""
    for topology, nodes, mixing in _mixings(plugin, options):
        if plugin.edges is Topology.edges:
            continue
        edges = topology.edges(nodes, torch.Generator().manual_seed(0))
        pairs = {frozenset(edge) for edge in edges}
        require(len(pairs) == len(edges), f"with {nodes} nodes an edge is named twice")
        ends = {i for edge in edges for i in edge}
        require(all(len(pair) == 2 for pair in pairs), f"with {nodes} nodes an edge joins a node to itself")
        require(ends <= set(range(nodes)), f"with {nodes} nodes an edge leads to {sorted(ends - set(range(nodes)))}")
        used = {frozenset(pair) for pair in mixing.nonzero().tolist() if pair[0] != pair[1]}
        require(used <= pairs, f"with {nodes} nodes weights are nonzero beside the edges")


def check_averages_in_every_round(plugin: Any, options: Options) -> None:
    """W of each round is doubly stochastic, nonzero where the first W is, and rounds bring nodes together."""
    for topology, nodes, mixing in _mixings(plugin, options):
        x = torch.randn(nodes, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        begun = x = x - x.mean()
        for round_index in range(ROUNDS * nodes):
            weights = topology.mixing_at(round_index, mixing)
            where = f"with {nodes} nodes, in round {round_index},"
            off = max(float((weights.sum(axis) - 1).abs().max()) for axis in (0, 1))
            require(off <= ROUNDING and float(weights.min()) >= -ROUNDING, f"{where} W does not average")
            require(not weights[mixing == 0].any(), f"{where} nodes speak that have no edge")
            x = weights @ x
        require(float(x.norm()) < 0.5 * float(begun.norm()), f"{nodes} nodes do not come together")


def check_draws_from_its_generator(plugin: Any, options: Options) -> None:
    """The same generator gives the same weights, and torch's own is left alone."""
    state = torch.get_rng_state()
    for (_, nodes, first), (_, _, second) in zip(_mixings(plugin, options), _mixings(plugin, options), strict=True):
        require(torch.equal(first, second), f"the same generator gives {nodes} nodes other weights")
    require(torch.equal(torch.get_rng_state(), state), "it draws from torch's own generator")


CHECKS: tuple[Check, ...] = (
    check_is_documented,
    check_builds_from_options,
    check_rejects_unknown_options,
    check_averages,
    check_names_each_edge_once,
    check_averages_in_every_round,
    check_draws_from_its_generator,
)


class TopologySuite(Suite):
    """Every check of a topology."""

    kind: ClassVar[str] = "topology"
    checks: ClassVar[tuple[Check, ...]] = (*CHECKS, known_exceptions(frozenset(map(name_of, CHECKS))))
