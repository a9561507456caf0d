"""Subspaces of the matrices of one shape: how they are chosen, and the way down into them and back up.

FRUGAL (Zmushko et al., 2024, arXiv:2411.07837, section 3) and GaLore (Zhao et al., 2024, arXiv:2403.03507).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightrail_optimizers.sophia_rule import draw_directions

__all__ = [
    "SELECTIONS",
    "Entries",
    "Lines",
    "LowRank",
    "draw",
    "how_many",
    "leading_basis",
    "random_subset",
    "subspace",
    "tall",
]

SELECTIONS = ("columns", "rows", "randk", "svd", "random")


def tall(g: Tensor) -> Tensor:
    """A matrix with its longer side first, in single precision at least: bases are of the shorter side."""
    g = g if g.shape[0] >= g.shape[1] else g.t()
    return g.to(torch.promote_types(g.dtype, torch.float32))


@dataclass(frozen=True)
class Lines:
    """Some rows (``dim`` 0) or columns (``dim`` 1)."""

    index: Tensor
    dim: int

    def down(self, g: Tensor) -> Tensor:
        return g.index_select(self.dim, self.index)

    def add_(self, x: Tensor, r: Tensor) -> None:
        """``x += up(r)``."""
        x.index_add_(self.dim, self.index, r)

    def rest(self, g: Tensor, r: Tensor) -> Tensor:
        """``g - up(r)`` for ``r = down(g)``, as a new tensor."""
        return g.index_fill(self.dim, self.index, 0.0)


@dataclass(frozen=True)
class Entries:
    """Some entries, counted in the order of rows."""

    index: Tensor

    def down(self, g: Tensor) -> Tensor:
        return g.reshape(-1).index_select(0, self.index)

    def add_(self, x: Tensor, r: Tensor) -> None:
        """``x += up(r)``."""
        if x.is_contiguous():
            x.view(-1).index_add_(0, self.index, r)
        else:
            x.copy_(x.flatten().index_add(0, self.index, r).view_as(x))

    def rest(self, g: Tensor, r: Tensor) -> Tensor:
        """``g - up(r)`` for ``r = down(g)``, as a new tensor."""
        return g.flatten().index_add(0, self.index, r, alpha=-1).view_as(g)


@dataclass(frozen=True)
class LowRank:
    """The matrices ``R Pᵀ``, or ``P Rᵀ`` where there are fewer rows than columns; P has orthonormal columns."""

    basis: Tensor

    def down(self, g: Tensor) -> Tensor:
        g_tall = tall(g)
        return (g_tall @ self.basis.to(g_tall.dtype)).to(g.dtype)

    def up(self, r: Tensor, like: Tensor) -> Tensor:
        """The matrix in the shape of ``like``, in single precision at least."""
        wide = torch.promote_types(r.dtype, torch.float32)
        full = r.to(wide) @ self.basis.to(wide).t()
        return full if like.shape[0] >= like.shape[1] else full.t()

    def add_(self, x: Tensor, r: Tensor) -> None:
        """``x += up(r)``."""
        x.add_(self.up(r, x))

    def rest(self, g: Tensor, r: Tensor) -> Tensor:
        """``g - up(r)`` for ``r = down(g)``, as a new tensor; zero where it would be rounding error alone.

        A sign would make steps of full length of that error, where a gradient lies in the subspace.
        """
        if self.basis.shape[0] == self.basis.shape[1]:
            return torch.zeros_like(g)
        rest = g - self.up(r, g)
        rounding = 4 * torch.finfo(rest.dtype).eps * torch.linalg.vector_norm(g, dim=1, keepdim=True, dtype=rest.dtype)
        return rest.masked_fill_(rest.abs() <= rounding, 0.0).to(g.dtype)


def how_many(size: int, density: float) -> int:
    """A fraction of ``size`` things, rounded; one at least where the fraction is not 0.

    Example:
        >>> how_many(8, 0.25), how_many(1, 0.25), how_many(8, 0.0)
        (2, 1, 0)
    """
    return max(1, round(size * density)) if density else 0


def leading_basis(g: Tensor, rank: int) -> Tensor:
    """The leading singular vectors of the shorter side, one a column, in the dtype of ``g``.

    The largest entry of each is positive. A decomposition leaves the signs open, and moments that are kept from one
    basis to the next depend on them.
    """
    basis = torch.linalg.svd(tall(g), full_matrices=False).Vh[:rank].t().contiguous()
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return basis.mul_(largest.sign()).to(g.dtype)


def _random_basis(g: Tensor, rank: int) -> Tensor:
    like = torch.empty(min(g.shape), rank, dtype=tall(g).dtype, device=g.device)
    return torch.linalg.qr(draw_directions([like], "gaussian")[0]).Q.to(g.dtype)


def random_subset(size: int, count: int, device: torch.device) -> Tensor:
    """``count`` of the numbers below ``size``, in order, each subset as likely; the same on every rank."""
    (scores,) = draw_directions([torch.empty(size, device=device)], "gaussian")
    return scores.topk(count).indices.sort().values


def draw(selection: str, g: Tensor, density: float) -> Tensor:
    """What describes a new subspace for a matrix: the numbers of lines or entries, or a basis.

    Args:
        selection: One of :data:`SELECTIONS`.
        g: The gradient.
        density: The fraction of the matrix, in (0, 1].
    """
    if selection in ("svd", "random"):
        rank = how_many(min(g.shape), density)
        return leading_basis(g, rank) if selection == "svd" else _random_basis(g, rank)
    size = {"rows": g.shape[0], "columns": g.shape[1], "randk": g.numel()}[selection]
    index = random_subset(size, how_many(size, density), g.device)
    # Half the bytes where there is one for each entry.
    return index.to(torch.int32) if selection == "randk" and size < 2**31 else index


def subspace(selection: str, description: Tensor) -> Lines | Entries | LowRank:
    """The subspace that :func:`draw` described."""
    if selection in ("svd", "random"):
        return LowRank(description)
    return Entries(description) if selection == "randk" else Lines(description, 0 if selection == "rows" else 1)
