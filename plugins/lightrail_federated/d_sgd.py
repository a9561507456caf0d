"""Decentralised stochastic gradient descent."""

from __future__ import annotations

from typing import ClassVar

from lightrail import Traits
from lightrail.federated import DecentralisedMethod, Gossip, State

__all__ = ["DSGD"]


class DSGD(DecentralisedMethod):
    """Decentralised SGD: every node takes a step on its own data, and averages with its neighbours.

    X ← W (X - α G): adapt, then combine; the step is that of the run's optimizer, whichever it is.

    Reference:
        Swenson, Murray, Poor, Kar, Distributed Stochastic Gradient Descent: Nonconvexity, Nonsmoothness, and
        Convergence to Local Minima, JMLR 2022. arXiv 2003.02818.
    """

    traits: ClassVar[Traits] = Traits(
        rule="X ← W (X - α G)",
        paper="Swenson et al. 2022, Distributed Stochastic Gradient Descent, arXiv 2003.02818",
        example={"nodes": 4, "rounds": 2},
    )

    def step(self, state: State, gossip: Gossip) -> State:
        return {"X": gossip.mix(gossip.local_step(state["X"]))}
