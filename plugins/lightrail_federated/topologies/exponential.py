"""Neighbours at distances that are powers of two."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightrail.federated.topology import Topology
from lightrail.traits import Traits

__all__ = ["Exponential", "one_peer_mixing"]


def one_peer_mixing(round_index: int, nodes: int) -> Tensor:
    r"""W of one round in which every node hears one other.

    .. math:: W_{ii} = W_{i, (i + 2^k) \bmod n} = \tfrac12, \qquad k = r \bmod \lceil \log_2 n \rceil

    Args:
        round_index: r, from 0.
        nodes: n, at least 2.

    Returns:
        ``[n, n]`` in float64, doubly stochastic, not symmetric. Where n is a power of two, log₂ n rounds are the mean.

    Example:
        >>> (one_peer_mixing(0, 4) @ one_peer_mixing(1, 4))[0].tolist()
        [0.25, 0.25, 0.25, 0.25]

    Reference:
        B. Ying, K. Yuan, Y. Chen, H. Hu, P. Pan and W. Yin (2021), Exponential Graph is Provably Efficient for
        Decentralized Deep Training, NeurIPS, arXiv 2110.13363, equation 7 and lemma 1.
    """
    distance = 2 ** (round_index % (nodes - 1).bit_length())
    half = torch.eye(nodes, dtype=torch.float64) / 2
    return half + half.roll(distance, 1)


class Exponential(Topology):
    """Node i speaks with i ± 1, i ± 2, i ± 4, … mod n, or with one of them a round.

    Args:
        one_peer: Whether a node hears a single other in each round, at distance 1, 2, 4, … in turn, and speaks to a
            single other; then W is not symmetric, and a method must not need that.

    Deviations:
        The paper's static graph has edges in one direction; here they go both ways with Metropolis weights, so that W
        is symmetric.

    Example:
        >>> Exponential().edges(5, torch.Generator())
        [(0, 1), (0, 2), (0, 3), (0, 4), (1, 2), (1, 3), (1, 4), (2, 3), (2, 4), (3, 4)]
        >>> Exponential(one_peer=True).mixing_at(1, torch.eye(4))[0].tolist()
        [0.5, 0.0, 0.5, 0.0]

    Reference:
        B. Ying, K. Yuan, Y. Chen, H. Hu, P. Pan and W. Yin (2021), Exponential Graph is Provably Efficient for
        Decentralized Deep Training, NeurIPS, arXiv 2110.13363.
    """

    traits: ClassVar[Traits] = Traits(
        rule="i speaks with i ± 2^k mod n",
        paper="B. Ying, K. Yuan, Y. Chen, H. Hu, P. Pan, W. Yin, 2021, Exponential Graph is Provably Efficient for "
        "Decentralized Deep Training, arXiv 2110.13363",
    )

    def __init__(self, one_peer: bool = False) -> None:
        self.one_peer = self.changes = bool(one_peer)

    def edges(self, nodes: int, generator: torch.Generator) -> list[tuple[int, int]]:
        distances = [2**k for k in range((nodes - 1).bit_length())]
        pairs = ((i, (i + distance) % nodes) for i in range(nodes) for distance in distances)
        return sorted({(min(pair), max(pair)) for pair in pairs})

    def mixing_at(self, round_index: int, mixing: Tensor) -> Tensor:
        return one_peer_mixing(round_index, len(mixing)) if self.one_peer else mixing
