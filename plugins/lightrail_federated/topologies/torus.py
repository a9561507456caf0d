"""A grid whose borders are joined."""

from __future__ import annotations

from typing import ClassVar

import torch

from lightrail.errors import CompositionError
from lightrail.federated.topology import Topology
from lightrail.options import at_least
from lightrail.traits import Traits

__all__ = ["Torus", "squarest_rows"]


def squarest_rows(nodes: int) -> int:
    """The rows of the grid of so many nodes that is nearest to a square, with no more rows than columns.

    Example:
        >>> squarest_rows(12), squarest_rows(16), squarest_rows(7)
        (3, 4, 1)
    """
    return max(rows for rows in range(1, int(nodes**0.5) + 1) if nodes % rows == 0)


class Torus(Topology):
    """Each node speaks with the four beside it in a grid of rows × columns, around its borders.

    A grid of one row is a ring, and in one of two rows a node has three neighbours.

    Args:
        rows: Rows, a divisor of the number of nodes; ``None``: as square as can be. A prime number of nodes is a ring.

    Raises:
        ConfigurationError: ``rows`` is not a whole number of at least 1.
        CompositionError: The nodes do not fill the rows.

    Example:
        >>> len(Torus().edges(9, torch.Generator())), len(Torus(rows=2).edges(8, torch.Generator()))
        (18, 12)
    """

    traits: ClassVar[Traits] = Traits(rule="(r, c) speaks with (r ± 1, c) and (r, c ± 1)")

    def __init__(self, rows: int | None = None) -> None:
        if rows is not None:
            at_least(1, rows=rows)
        self.rows = rows

    def edges(self, nodes: int, generator: torch.Generator) -> list[tuple[int, int]]:
        rows = squarest_rows(nodes) if self.rows is None else self.rows
        if nodes % rows:
            divisors = [str(each) for each in range(1, nodes + 1) if nodes % each == 0]
            raise CompositionError(
                "topology 'torus' has rows that its nodes do not fill",
                found=f"rows={rows} and {nodes} nodes",
                allowed="rows=" + ", ".join(divisors),
                remedy="Leave rows out for a grid that is as square as can be, or take another number of nodes.",
            )
        columns = nodes // rows
        found = set()
        for row in range(rows):
            for column in range(columns):
                here = row * columns + column
                for there in (row * columns + (column + 1) % columns, (row + 1) % rows * columns + column):
                    if there != here:
                        found.add((min(here, there), max(here, there)))
        return sorted(found)
