"""Evolution: keep the best, mutate, cross, draw afresh, never try the same twice."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from lightrail.errors import ConfigurationError
from lightrail.generation.search import Report
from lightrail.options import at_least

__all__ = ["Evolution", "evolve"]

Candidate = TypeVar("Candidate", bound=Hashable)

# How often a new candidate is drawn before a place is left empty: small spaces run out.
ATTEMPTS = 200


@dataclass(frozen=True)
class Evolution:
    """How large an evolution is.

    Args:
        epochs: Populations, at least 1.
        population: Candidates in each, at least 2.
        kept: The best of all so far, from which the next are made; from 1 to ``population``.
        mutations: Of each population after the first.
        crossings: Of each population after the first; what is left is drawn afresh.

    Raises:
        ConfigurationError: One is out of range.
    """

    epochs: int
    population: int
    kept: int
    mutations: int
    crossings: int

    def __post_init__(self) -> None:
        at_least(1, epochs=self.epochs, kept=self.kept)
        at_least(2, population=self.population)
        at_least(0, mutations=self.mutations, crossings=self.crossings)
        if self.kept > self.population:
            raise ConfigurationError(
                "more candidates would be kept than there are",
                found=f"search.kept={self.kept}, search.population={self.population}",
                allowed="search.kept of at most search.population",
                remedy=f"Set search.kept={self.population} or less.",
            )


def evolve(
    size: Evolution,
    first: Candidate,
    score: Callable[[Candidate], float],
    draw: Callable[[], Candidate],
    mutate: Callable[[Candidate], Candidate],
    cross: Callable[[Candidate, Candidate], Candidate | None],
    rng: np.random.Generator,
    report: Report,
) -> tuple[Candidate, float, list[float]]:
    """Minimises a score; what it returns is never worse than any candidate that it tried, the first among them.

    Args:
        size: How large it is.
        first: What it begins with; half of the first population are mutations of it.
        score: Of a candidate; smaller is better.
        draw: A random candidate.
        mutate: A candidate near another.
        cross: A candidate of two; ``None`` where they make none.
        rng: Chooses parents.
        report: Is told how far it is.

    Returns:
        The best candidate, its score, and the best score after each population.
    """
    scores: dict[Candidate, float] = {}

    def fresh(make: Callable[[], Candidate | None], count: int, into: list[Candidate]) -> None:
        for _ in range(count):
            for _ in range(ATTEMPTS):
                found = make()
                if found is not None and found not in scores and found not in into:
                    into.append(found)
                    break

    def parent() -> Candidate:
        best = sorted(scores, key=scores.__getitem__)[: size.kept]
        return best[int(rng.integers(len(best)))]

    history: list[float] = []
    for epoch in range(size.epochs):
        new: list[Candidate] = [first] if epoch == 0 else []
        if epoch == 0:
            fresh(lambda: mutate(first), (size.population - 1) // 2, new)
        else:
            fresh(lambda: mutate(parent()), min(size.mutations, size.population), new)
            fresh(lambda: cross(parent(), parent()), min(size.crossings, size.population - len(new)), new)
        fresh(draw, size.population - len(new), new)
        for place, candidate in enumerate(new):
            scores[candidate] = score(candidate)
            report(epoch * size.population + place + 1, size.epochs * size.population, min(scores.values()))
        history.append(min(scores.values()))
    best = min(scores, key=scores.__getitem__)
    return best, scores[best], history
