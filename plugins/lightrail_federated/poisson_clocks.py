"""Clocks of nodes and edges that speak two at a time, and what their graph means for how fast they agree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["chi_1", "chi_2", "edge_laplacian", "ticks"]


def ticks(rates: Tensor, duration: float, generator: torch.Generator) -> list[tuple[float, int]]:
    """When which of several independent Poisson clocks ticks, in order.

    Args:
        rates: Of each clock, in ticks a unit of time, ``[m]``, at least 0, with a positive sum.
        duration: How long, in units of time.
        generator: Where random numbers come from.

    Returns:
        Times in [0, duration), rising, and the number of the clock.

    Example:
        >>> found = ticks(torch.tensor([0.0, 2.0]), 50.0, torch.Generator().manual_seed(0))
        >>> 60 < len(found) < 140, {clock for _, clock in found}, found == sorted(found)
        (True, {1}, True)
    """
    rates = rates.double()
    count = int(torch.poisson(rates.sum() * duration, generator=generator))
    if count == 0:
        return []
    times = torch.rand(count, generator=generator, dtype=torch.float64).mul(duration).sort().values
    clocks = torch.multinomial(rates, count, replacement=True, generator=generator)
    return list(zip(times.tolist(), clocks.tolist(), strict=True))


def edge_laplacian(nodes: int, edges: Sequence[tuple[int, int]], rate: float = 1.0) -> Tensor:
    """Λ = (rate / |E|) Σ_(i,j) (e_i - e_j)(e_i - e_j)ᵀ of edges that speak at the same rate.

    Args:
        nodes: n.
        edges: Pairs, each once.
        rate: Of all edges together.

    Returns:
        ``[n, n]``, float64.

    Example:
        >>> edge_laplacian(2, [(0, 1)]).tolist()
        [[1.0, -1.0], [-1.0, 1.0]]
    """
    L = torch.zeros(nodes, nodes, dtype=torch.float64)
    for i, j in edges:
        L[i, i] += 1
        L[j, j] += 1
        L[i, j] -= 1
        L[j, i] -= 1
    return L * (rate / len(edges))


def chi_1(laplacian: Tensor) -> float:
    """χ_1 = 1/λ⁺_min(Λ): the inverse of the algebraic connectivity.

    Example:
        >>> chi_1(edge_laplacian(2, [(0, 1)]))
        0.5
    """
    return 1 / float(torch.linalg.eigvalsh(laplacian)[1])


def chi_2(laplacian: Tensor, edges: Sequence[tuple[int, int]]) -> float:
    """χ_2 = max over edges of ½ (e_i - e_j)ᵀ Λ⁺ (e_i - e_j): half the greatest effective resistance; at most χ_1.

    Example:
        >>> round(chi_2(edge_laplacian(2, [(0, 1)]), [(0, 1)]), 12)
        0.5
    """
    R = torch.linalg.pinv(laplacian, hermitian=True)
    return max(0.5 * float(R[i, i] + R[j, j] - R[i, j] - R[j, i]) for i, j in edges)
