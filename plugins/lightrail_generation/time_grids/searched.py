"""Times that a search found."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from lightrail.errors import ConfigurationError
from lightrail.generation import Grid, NoisePath, TimeGrid
from lightrail.generation.search import Artefact
from lightrail.traits import Traits

__all__ = ["Searched"]


class Searched(TimeGrid):
    """The times in the file of a search, ``lightrail search autodiffusion`` for one.

    They may serve another model on the same noise path: whether they suit it is for a score to say.

    Args:
        file: The ``.json`` that the search wrote.

    Raises:
        DataError: The file cannot be read.
        ConfigurationError: It holds no times.
        CompositionError: When the run starts: it is for another noise path or another number of steps.

    Example:
        >>> import tempfile, pathlib
        >>> from lightrail.generation import LinearFlow
        >>> from lightrail.generation.artefact import path_key
        >>> key = {"path": path_key(LinearFlow()), "steps": 2}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder) / "found.json"
        ...     Artefact("autodiffusion", key, {"times": [0.9, 0.3, 0.0]}).save(file)
        ...     [level.t for level in Searched(str(file)).grid(LinearFlow(), 2)]
        [0.9, 0.3, 0.0]
    """

    traits: ClassVar[Traits] = Traits(rule="t_i as a search found them")

    def __init__(self, file: str) -> None:
        super().__init__(end="minimum")
        self.file = file
        self.artefact = Artefact.load(file)
        if "times" not in self.artefact.values:
            raise ConfigurationError(
                f"the search '{self.artefact.search}' found no times",
                found=f"{file}: {', '.join(self.artefact.values)}",
                allowed="the file of a search for times: lightrail search autodiffusion",
                remedy="Name such a file in time_grid.file.",
            )

    def times(self, path: NoisePath, start: float, stop: float, count: int) -> np.ndarray:
        return np.array([float(t) for t in self.artefact.values["times"]])

    def grid(self, path: NoisePath, steps: int, *, finite: bool = True) -> Grid:
        times = [float(t) for t in self.artefact.values["times"]]
        times[0] = min(times[0], path.t_finite) if finite else times[0]
        self.artefact.check(path=path, steps=None if steps == len(times) - 1 else steps)
        self._check(path, times)
        levels = tuple(path.level(t) for t in times)
        return Grid(path, levels, denoises_last=bool(self.artefact.values.get("denoises_last")))
