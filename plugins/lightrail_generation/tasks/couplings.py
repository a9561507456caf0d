"""Which noise goes with which data within a batch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightrail.options import one_of

__all__ = [
    "COUPLINGS",
    "couple",
    "couple_by_class",
    "coupling",
    "exact_coupling",
    "sampled_coupling",
    "sinkhorn_plan",
    "squared_distances",
    "stable_coupling",
]

COUPLINGS = ("independent", "exact", "stable", "sinkhorn")
_SWEEPS, _TOLERANCE = 1000, 1e-6


def squared_distances(x0: Tensor, z: Tensor) -> Tensor:
    """C_ij = ‖x0_i − z_j‖², ``[B, B]`` in double precision on the CPU."""
    first, second = (each.detach().flatten(1).double().cpu() for each in (x0, z))
    products = first @ second.T
    return (first.square().sum(1)[:, None] + second.square().sum(1) - 2 * products).clamp(min=0)


def exact_coupling(cost: Tensor) -> Tensor:
    """The permutation π of least Σ C_{i π(i)}, ``[B]``."""
    from scipy.optimize import linear_sum_assignment

    _, columns = linear_sum_assignment(cost.numpy())
    return torch.from_numpy(columns).long()


def stable_coupling(cost: Tensor) -> Tensor:
    """The permutation in which no data and noise would both rather have each other, ``[B]``.

    Each prefers what is near. The data propose to the noise in the order of nearness, and noise keeps the nearest that
    proposed, as Gale and Shapley have it.
    """
    costs = cost.numpy()
    count = len(costs)
    preferred = np.argsort(costs, axis=1, kind="stable").tolist()
    asked, holder = [0] * count, [-1] * count
    free = list(range(count))
    while free:
        row = free.pop()
        column = preferred[row][asked[row]]
        asked[row] += 1
        rival = holder[column]
        if rival == -1 or costs[row, column] < costs[rival, column]:
            holder[column] = row
            row = rival
        if row != -1:
            free.append(row)
    found = torch.empty(count, dtype=torch.int64)
    found[torch.tensor(holder)] = torch.arange(count)
    return found


def sinkhorn_plan(cost: Tensor, regularisation: float) -> Tensor:
    """The plan P ≥ 0 of least Σ P C + ε Σ P log P with rows and columns that sum to 1/B, ``[B, B]``.

    Sinkhorn's iteration on the logarithms of the scalings.

    Args:
        cost: ``[B, B]``.
        regularisation: ε as a share of the mean cost, above 0; towards 0 the plan is that of :func:`exact_coupling`.
    """
    count = len(cost)
    kernel = -cost / (regularisation * cost.mean().clamp(min=1e-300))
    target = torch.full((count,), -np.log(count), dtype=cost.dtype)
    f, g = torch.zeros_like(target), torch.zeros_like(target)
    for _ in range(_SWEEPS):
        before, f = f, target - torch.logsumexp(kernel + g, 1)
        if float((f - before).abs().max()) < _TOLERANCE:  # by so much the rows were off, relative to their sum
            break
        g = target - torch.logsumexp(kernel + f[:, None], 0)
    return (kernel + f[:, None] + g).exp()


def sampled_coupling(plan: Tensor, u: Tensor) -> Tensor:
    """One noise for each data, drawn from its row of the plan, ``[B]``; noise may be drawn twice or not at all.

    Args:
        plan: ``[B, B]``.
        u: Numbers in [0, 1), ``[B]``, that decide.
    """
    heights = plan.cumsum(1)
    found = torch.searchsorted(heights, (u.to(plan) * heights[:, -1])[:, None], right=True)[:, 0]
    return found.clamp(max=len(plan) - 1)


def coupling(kind: str, cost: Tensor, u: Tensor, regularisation: float = 0.05) -> Tensor:
    """Which noise goes with each data, ``[B]``.

    Args:
        kind: ``exact``, ``stable`` or ``sinkhorn``.
        cost: ``[B, B]``.
        u: Numbers in [0, 1), ``[B]``; they decide for ``sinkhorn``.
        regularisation: ε of ``sinkhorn``.
    """
    if kind == "exact":
        return exact_coupling(cost)
    if kind == "stable":
        return stable_coupling(cost)
    return sampled_coupling(sinkhorn_plan(cost, regularisation), u.cpu())


def couple(x0: Tensor, z: Tensor, kind: str, u: Tensor, regularisation: float = 0.05) -> Tensor:
    """The noise in the order in which it goes with the data, ``[B, …]``.

    Args:
        x0: The data as states ``[B, …]``.
        z: The noise ``[B, …]``.
        kind: ``independent``, ``exact``, ``stable`` or ``sinkhorn``.
        u: Numbers in [0, 1), ``[B]``; they decide for ``sinkhorn``.
        regularisation: ε of ``sinkhorn``, as a share of the mean cost.

    Example:
        >>> x0, z = torch.tensor([[0.0], [5.0]]), torch.tensor([[4.0], [1.0]])
        >>> couple(x0, z, "exact", torch.zeros(2)).flatten().tolist()
        [1.0, 4.0]
    """
    one_of(COUPLINGS, coupling=kind)
    if kind == "independent" or len(x0) < 2:
        return z
    return z[coupling(kind, squared_distances(x0, z), u, regularisation).to(z.device)]


def couple_by_class(
    x0: Tensor, z: Tensor, label: Tensor | None, kind: str, u: Tensor, regularisation: float = 0.05
) -> Tensor:
    """As :func:`couple`, with each class among itself, so that noise tells nothing of the label.

    Args:
        x0: The data as states ``[B, …]``.
        z: The noise ``[B, …]``.
        label: The class of each data, ``[B]``; ``None`` for one class.
        kind: As for :func:`couple`.
        u: As there.
        regularisation: As there.
    """
    if label is None or kind == "independent":
        return couple(x0, z, kind, u, regularisation)
    coupled = z.clone()
    for each in label.unique().tolist():
        members = (label == each).nonzero()[:, 0]
        coupled[members] = couple(x0[members], z[members], kind, u[members.to(u.device)], regularisation)
    return coupled
