"""A graph of one's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lightrail.errors import CompositionError, DataError
from lightrail.federated.topology import Topology, check_mixing, metropolis
from lightrail.options import one_of
from lightrail.traits import Traits

__all__ = ["FromFile", "read_table"]

_SUFFIXES = (".csv", ".json", ".npy")


def read_table(path: Path) -> np.ndarray:
    """The numbers of a file, ``[rows, columns]`` in float64.

    Args:
        path: ``.csv`` (rows of numbers with commas between; ``#`` starts a comment), ``.json`` (a list of rows), or
            ``.npy``.

    Raises:
        ConfigurationError: The name has another ending.
        DataError: The file is missing, or holds no table of numbers.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "edges.csv"
        ...     _ = path.write_text("0,1\\n1,2\\n")
        ...     read_table(path).tolist()
        [[0.0, 1.0], [1.0, 2.0]]
    """
    one_of(_SUFFIXES, ending=path.suffix.lower())
    try:
        table = _rows(path)
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise _unreadable(path, str(error).splitlines()[0]) from error
    if table.ndim != 2 or not table.size:
        raise _unreadable(path, f"numbers of shape {list(table.shape)}")
    return table


def _rows(path: Path) -> np.ndarray:
    if path.suffix.lower() == ".npy":
        return np.load(path, allow_pickle=False).astype(np.float64)
    if path.suffix.lower() == ".json":
        return np.array(json.loads(path.read_text(encoding="utf-8")), dtype=np.float64)
    lines = path.read_text(encoding="utf-8").splitlines()
    texts = [line.split("#")[0].strip() for line in lines]
    return np.array([[float(each) for each in text.split(",")] for text in texts if text], dtype=np.float64)


def _unreadable(path: Path, found: str) -> DataError:
    return DataError(
        "the graph of topology 'from_file' cannot be read",
        found=f"{path}: {found}",
        allowed="a csv, json or npy file of rows of numbers: two nodes a row for edges, or n rows of n weights",
        remedy="Mend the file, or set federated.topology.path to another.",
    )


class FromFile(Topology):
    """The edges, or the weights, that a file lists.

    A table of two columns of whole numbers is a list of edges between nodes 0 to n−1, which get Metropolis weights; an
    n × n table is W.

    Args:
        path: A csv file (rows of numbers with commas between), json file (a list of rows) or npy file.

    Raises:
        ConfigurationError: The file has another ending.
        DataError: The file is missing, or holds no such table.
        CompositionError: The file is about another number of nodes, or its W is not symmetric, not doubly stochastic or
            not connected.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "path.json"
        ...     _ = path.write_text("[[0, 1], [1, 2]]")
        ...     FromFile(path=str(path)).edges(3, torch.Generator())
        [(0, 1), (1, 2)]
    """

    traits: ClassVar[Traits] = Traits(rule="as listed")

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.table = read_table(self.path)
        self.is_edge_list = self.table.shape[1] == 2 and bool((self.table == self.table.round()).all())
        if not self.is_edge_list and self.table.shape[0] != self.table.shape[1]:
            raise _unreadable(self.path, f"a table of {self.table.shape[0]} rows and {self.table.shape[1]} columns")

    def edges(self, nodes: int, generator: torch.Generator) -> list[tuple[int, int]]:
        if self.is_edge_list:
            return self._listed(nodes)
        i, j = np.nonzero(np.triu(self._weights(nodes).numpy(), 1))
        return list(zip(i.tolist(), j.tolist(), strict=True))

    def mixing(self, nodes: int, generator: torch.Generator) -> Tensor:
        found = metropolis(nodes, self._listed(nodes)) if self.is_edge_list else self._weights(nodes)
        check_mixing(found, "from_file")
        return found

    def _listed(self, nodes: int) -> list[tuple[int, int]]:
        pairs = {(int(min(pair)), int(max(pair))) for pair in self.table.tolist()}
        for i, j in sorted(pairs):
            if i < 0 or j >= nodes or i == j:
                raise self._misfit(f"an edge between {i} and {j}", f"edges between two of the nodes 0 to {nodes - 1}")
        return sorted(pairs)

    def _weights(self, nodes: int) -> Tensor:
        if len(self.table) != nodes:
            raise self._misfit(f"weights of {len(self.table)} nodes", f"{nodes} rows of {nodes} weights")
        return torch.from_numpy(self.table.copy())

    def _misfit(self, found: str, allowed: str) -> CompositionError:
        return CompositionError(
            "topology 'from_file' is about other nodes than the run has",
            found=f"{self.path}: {found}",
            allowed=allowed,
            remedy="Mend the file, or set the number of nodes to the file's.",
        )
