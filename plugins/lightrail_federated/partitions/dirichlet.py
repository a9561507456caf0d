"""Clients that have more of some labels than of others."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lightrail.federated.partition import Partition, Samples
from lightrail.options import at_least, positive
from lightrail.traits import Traits
from lightrail_federated.partitions.dealing import as_indices, filled_up, require_samples, seed_of

__all__ = ["Dirichlet", "label_shares"]


def label_shares(alpha: float, labels: int, clients: int, rng: np.random.Generator) -> np.ndarray:
    r"""How much of each label each client has.

    .. math:: p_c \sim \mathrm{Dir}(\alpha 1_N)

    Args:
        alpha: α, greater than 0; below 10⁻⁶ as 10⁻⁶, which gives each label to one client.
        labels: How many labels.
        clients: N.
        rng: Where random numbers come from.

    Returns:
        ``[labels, N]``, rows of the sum 1.

    Example:
        >>> label_shares(1e9, 2, 4, np.random.default_rng(0)).round(3)[0].tolist()
        [0.25, 0.25, 0.25, 0.25]
    """
    # Numbers beyond these only meet the limits of floating point.
    return rng.dirichlet(np.full(clients, min(max(alpha, 1e-6), 1e12)), size=labels)


class Dirichlet(Partition):
    """Divides each label among the clients in shares from a Dirichlet distribution.

    Samples of a label are shuffled, and cut where the running sums of its shares, times its number, round to. Clients
    that then have fewer than ``least`` samples take some, one by one, of whoever has the most.

    Args:
        alpha: α, greater than 0: large ones make clients alike, small ones give each label to few clients.
        least: How many samples each client has at least, at least 1.

    Raises:
        ConfigurationError: An option is out of range.
        CompositionError: The samples have no labels, or there are too few of them.

    Example:
        >>> labels = torch.arange(100) % 2
        >>> samples = Samples(torch.utils.data.TensorDataset(torch.zeros(100), labels))
        >>> parts = Dirichlet(alpha=1e9).divide(samples, 5, torch.Generator())
        >>> [int(labels[part].sum()) for part in parts]
        [10, 10, 10, 10, 10]

    Reference:
        M. Yurochkin, M. Agarwal, S. Ghosh, K. Greenewald, N. Hoang and Y. Khazaeni (2019), Bayesian Nonparametric
        Federated Learning of Neural Networks, ICML, arXiv 1905.12022, section 4; with a distribution for each client in
        T.-M. H. Hsu, H. Qi and M. Brown (2019), arXiv 1909.06335.
    """

    traits: ClassVar[Traits] = Traits(
        rule="of each label shares p ~ Dir(α 1)",
        paper="M. Yurochkin, M. Agarwal, S. Ghosh, K. Greenewald, N. Hoang, Y. Khazaeni, 2019, Bayesian Nonparametric "
        "Federated Learning of Neural Networks, arXiv 1905.12022",
        is_stochastic=True,
    )

    def __init__(self, alpha: float = 0.5, least: int = 1) -> None:
        positive(alpha=alpha)
        at_least(1, least=least)
        self.alpha, self.least = float(alpha), int(least)

    def divide(self, samples: Samples, clients: int, generator: torch.Generator) -> list[Tensor]:
        require_samples("dirichlet", len(samples), clients, self.least)
        labels = samples.labels.numpy()
        rng = np.random.default_rng(seed_of(generator))
        distinct = np.unique(labels)
        parts: list[list[int]] = [[] for _ in range(clients)]
        for label, shares in zip(distinct, label_shares(self.alpha, len(distinct), clients, rng), strict=True):
            its = rng.permutation(np.flatnonzero(labels == label))
            cuts = np.rint(shares.cumsum()[:-1] * len(its)).astype(int)
            for part, dealt in zip(parts, np.split(its, cuts), strict=True):
                part.extend(dealt.tolist())
        return as_indices(filled_up(parts, self.least))
