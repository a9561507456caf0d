"""Topologies: who speaks with whom, and the weights with which a node averages its neighbours."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lightrail.errors import CompositionError

__all__ = ["Topology", "check_mixing", "is_connected", "metropolis", "spectral_gap"]

_ROUNDING = 1e-9


class Topology:
    """A graph over nodes; subclass it, and override :meth:`edges`, or :meth:`mixing` for weights of its own.

    Example:
        >>> class Path(Topology):
        ...     def edges(self, nodes, generator):
        ...         return [(i, i + 1) for i in range(nodes - 1)]
        >>> Path().mixing(3, torch.Generator())[0].tolist()
        [0.6666666666666667, 0.3333333333333333, 0.0]
    """

    changes: bool = False
    """Whether :meth:`mixing_at` differs from round to round."""

    def edges(self, nodes: int, generator: torch.Generator) -> list[tuple[int, int]]:
        """The pairs that speak with each other, each once, in any order.

        Args:
            nodes: How many nodes, at least 2.
            generator: Where random numbers come from; seeded by the run.

        Raises:
            CompositionError: There is no such graph over so many nodes.
        """
        raise NotImplementedError

    def mixing(self, nodes: int, generator: torch.Generator) -> Tensor:
        """W ``[n, n]`` in float64: symmetric, doubly stochastic, nonzero on edges and the diagonal only.

        By default the Metropolis weights of :meth:`edges`.
        """
        return metropolis(nodes, self.edges(nodes, generator))

    def mixing_at(self, round_index: int, mixing: Tensor) -> Tensor:
        """W of one round, for a topology that changes over time; doubly stochastic, not always symmetric.

        Args:
            round_index: From 0.
            mixing: What :meth:`mixing` gave.
        """
        return mixing


def metropolis(nodes: int, edges: Iterable[tuple[int, int]]) -> Tensor:
    """W_ij = 1 / (1 + max(deg_i, deg_j)) on edges, and the rest on the diagonal.

    Args:
        nodes: How many.
        edges: Pairs of different nodes; each counts once.

    Returns:
        ``[n, n]`` in float64, symmetric and doubly stochastic.

    Example:
        >>> metropolis(2, [(0, 1)]).tolist()
        [[0.5, 0.5], [0.5, 0.5]]
    """
    adjacency = torch.zeros(nodes, nodes, dtype=torch.float64)
    for i, j in edges:
        adjacency[i, j] = adjacency[j, i] = 1
    degree = adjacency.sum(1)
    weights = adjacency / (1 + torch.maximum(degree[:, None], degree[None, :]))
    return weights + torch.diag(1 - weights.sum(1))


def spectral_gap(mixing: Tensor) -> float:
    """1 - |λ_2|: how much of a disagreement one round of averaging takes away; 0 where nodes never agree.

    Args:
        mixing: W ``[n, n]``, doubly stochastic.

    Example:
        >>> round(spectral_gap(metropolis(4, [(0, 1), (1, 2), (2, 3), (3, 0)])), 6)
        0.666667
    """
    nodes = len(mixing)
    return float(1 - torch.linalg.matrix_norm(mixing - torch.full_like(mixing, 1 / nodes), 2))


def check_mixing(mixing: Tensor, name: str) -> None:
    """Refuses weights with which nodes would not agree on their mean.

    Args:
        mixing: W ``[n, n]``.
        name: Of the topology, for the error.

    Raises:
        CompositionError: W is not square, not symmetric, not doubly stochastic, has negative entries, is not connected,
            or only swaps what two halves of the nodes have.
    """
    fault = _shape_fault(mixing) or _weight_fault(mixing) or _path_fault(mixing)
    if fault is not None:
        what, found, allowed = fault
        raise CompositionError(
            f"topology '{name}' {what}", found=found, allowed=allowed, remedy="Choose another, or mend its edges."
        )


def is_connected(mixing: Tensor) -> bool:
    """Whether there is a path between any two nodes.

    Args:
        mixing: ``[n, n]``, symmetric, nonzero on edges.

    Example:
        >>> is_connected(torch.eye(2)), is_connected(torch.ones(2, 2))
        (False, True)
    """
    return len(_reached(mixing)) == len(mixing)


def _shape_fault(mixing: Tensor) -> tuple[str, str, str] | None:
    if mixing.ndim != 2 or mixing.shape[0] != mixing.shape[1]:
        return "is not square", f"weights of shape {list(mixing.shape)}", "a row and a column for each node"
    if not bool(mixing.isfinite().all()):
        i, j = divmod(int((~mixing.isfinite()).int().argmax()), len(mixing))
        return "does not average", f"W[{i}, {j}] = {float(mixing[i, j])}", "weights that are finite"
    return None


def _weight_fault(mixing: Tensor) -> tuple[str, str, str] | None:
    asymmetry = (mixing - mixing.T).abs()
    if float(asymmetry.max()) > _ROUNDING:
        i, j = divmod(int(asymmetry.argmax()), len(mixing))
        found = f"W[{i}, {j}] = {float(mixing[i, j]):.6g}, W[{j}, {i}] = {float(mixing[j, i]):.6g}"
        return "is not symmetric", found, "edges that go both ways, with one weight"
    rows = (mixing.sum(1) - 1).abs()
    if float(rows.max()) > _ROUNDING or float(mixing.min()) < -_ROUNDING:
        i = int(rows.argmax())
        found = f"row {i} has the sum {float(mixing[i].sum()):.6g}; the smallest weight is {float(mixing.min()):.6g}"
        return "does not average", found, "weights of at least 0 whose rows have the sum 1"
    return None


def _path_fault(mixing: Tensor) -> tuple[str, str, str] | None:
    apart = sorted(set(range(len(mixing))) - _reached(mixing))
    if apart:
        shown = ", ".join(map(str, apart[:5])) + (", …" if len(apart) > 5 else "")
        return "is not connected", f"no path from node 0 to {shown}", "a path between any two nodes"
    # The one connected graph whose rounds never shrink a disagreement: two halves that only hear each other.
    if spectral_gap(mixing) <= _ROUNDING:
        found = "no node keeps a part of its own, and two halves of them only hear each other"
        return "never agrees", found, "weights above 0 on the diagonal"
    return None


def _reached(mixing: Tensor) -> set[int]:
    reached, waiting = {0}, [0]
    while waiting:
        for j in mixing[waiting.pop()].nonzero().flatten().tolist():
            if j not in reached:
                reached.add(j)
                waiting.append(j)
    return reached
