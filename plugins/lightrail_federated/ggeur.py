"""Federated averaging on embeddings that are augmented by the shape of all clients' classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightrail import Claim, Traits
from lightrail.errors import CompositionError
from lightrail.federated import Client, Heard, ServerMethod, State
from lightrail.federated.wire import Payload
from lightrail.options import at_least, between

__all__ = ["GGEUR", "augmented", "class_statistics", "covering", "factor", "pooled"]


def class_statistics(x: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    r"""Of every class how many samples there are, their mean, and their covariance with 1/n.

    Args:
        x: ``[n, d]``.
        y: Labels ``[n]``, from 0.
        classes: C.

    Returns:
        n_c ``[C]``, m_c ``[C, d]`` and Σ_c ``[C, d, d]`` in float64; zeros where a class has no samples.

    Example:
        >>> n, m, S = class_statistics(torch.tensor([[1.0], [3.0]]), torch.tensor([1, 1]), 2)
        >>> n.tolist(), m.flatten().tolist(), S.flatten().tolist()
        ([0.0, 2.0], [0.0, 2.0], [0.0, 1.0])
    """
    x = x.double()
    counts = torch.bincount(y, minlength=classes).double()
    means = torch.zeros(classes, x.shape[1], dtype=torch.float64).index_add_(0, y, x) / counts.clamp_min(1)[:, None]
    covariances = torch.zeros(classes, x.shape[1], x.shape[1], dtype=torch.float64)
    for c in counts.nonzero().flatten().tolist():
        away = x[y == c] - means[c]
        covariances[c] = away.T @ away / counts[c]
    return counts, means, covariances


def pooled(n: Tensor, m: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mean and covariance of a class over clients, exactly as from their joined samples.

    .. math:: m = \sum_k \tfrac{n_k}{N} m_k, \qquad
        Σ = \sum_k \tfrac{n_k}{N} Σ_k + \sum_k \tfrac{n_k}{N} (m_k - m)(m_k - m)^\top

    Args:
        n: n_k ``[K]``; not all zero.
        m: m_k ``[K, d]``.
        S: Σ_k ``[K, d, d]``, with 1/n_k.

    Returns:
        m ``[d]`` and Σ ``[d, d]``.

    Example:
        >>> m, S = pooled(torch.tensor([1.0, 1.0]), torch.tensor([[0.0], [2.0]]), torch.ones(2, 1, 1))
        >>> m.tolist(), S.tolist()
        ([1.0], [[2.0]])
    """
    share = n / n.sum()
    mean = share @ m
    away = m - mean
    return mean, torch.einsum("k,kij->ij", share, S) + torch.einsum("k,ki,kj->ij", share, away, away)


def covering(n: Tensor, cover: float) -> Tensor:
    """The fewest clients that together hold a share of a class.

    Args:
        n: n_k ``[K]``, how many samples of the class each has.
        cover: The share, in (0, 1].

    Returns:
        Numbers of clients, those with most samples first; none of them has no samples.

    Example:
        >>> covering(torch.tensor([1.0, 6.0, 3.0, 0.0]), 0.8).tolist()
        [1, 2]
    """
    order = n.argsort(descending=True, stable=True)
    held = n[order].cumsum(0)
    # The slack is for sums that rounding leaves a little short of a share that they reach.
    enough = int((held < cover * n.sum() * (1 - 1e-12)).sum()) + 1
    return order[:enough][n[order[:enough]] > 0]


def factor(S: Tensor) -> Tensor:
    """L with L Lᵀ = Σ, also where Σ is singular.

    Args:
        S: Σ ``[d, d]``, symmetric, without negative eigenvalues but for rounding.

    Example:
        >>> factor(torch.diag(torch.tensor([4.0, 0.0]))).abs().sum(1).tolist()
        [2.0, 0.0]
    """
    eigenvalues, directions = torch.linalg.eigh(S)
    return directions * eigenvalues.clamp_min(0).sqrt()


def augmented(x: Tensor, L: Tensor, count: int, generator: torch.Generator) -> Tensor:
    r"""More samples of a class: those there are, and x_i + L ξ around each of them in turn, ξ ~ N(0, I).

    Args:
        x: ``[n, d]``, at least one.
        L: A factor of the covariance, ``[d, d]``.
        count: M, how many there are to be; with n of them already, nothing is added.
        generator: Of ξ.

    Returns:
        ``[max(n, M), d]``, the samples themselves first.

    Example:
        >>> augmented(torch.tensor([[1.0], [2.0]]), torch.zeros(1, 1), 3, torch.Generator()).flatten().tolist()
        [1.0, 2.0, 1.0]
    """
    missing = max(0, count - len(x))
    noise = torch.randn(missing, x.shape[1], generator=generator, dtype=L.dtype) @ L.T
    return torch.cat([x, x[torch.arange(missing) % len(x)] + noise.to(x.dtype)])


class GGEUR(ServerMethod):
    r"""Federated averaging of a head, whose clients fill up their classes with samples of the global shape.

    The inputs of the run's model are embeddings of a frozen encoder, flattened, and the model is a head over them. In
    the first round each client sends, of each class, how many samples it has, their mean and their covariance; the
    server pools them exactly,

    Σ = Σ_k (n_k/N) Σ_k + Σ_k (n_k/N)(m_k - m)(m_k - m)ᵀ,   m = Σ_k (n_k/N) m_k,

    and sends the covariances in the second. From then on a client trains on its own samples x and, where a class of its
    own has fewer than M, on as many x + N(0, Σ_c) around them as are missing; the server averages. All clients are
    there in the first two rounds. Statistics cross once: C (d²/2 + 3d/2 + 1) numbers a client, with C classes.

    Means and covariances are statistics of raw data, and nothing here makes them private: of a class with one sample
    the mean is that sample.

    Args:
        classes: C; at least 2.
        samples_per_class: M; at least 1.
        cover: Only the fewest clients that hold this share of a class give its covariance; in (0, 1], 1 for all.

    Raises:
        ConfigurationError: An option is out of range.
        CompositionError: In a round, where batches are not inputs and labels below ``classes``.

    Deviations:
        The authors' code does not send the averaged head back to clients, applies a softmax before the cross entropy
        and picks the best round on the test set; this is federated averaging as it should be, with the run's loss, so
        that published figures are not its figures. Prototypes of other domains are left out. The mean is weighted by
        the clients' own samples.

    Example:
        >>> from lightrail import compose
        >>> run = ["+federated=ggeur", "federated.clients=4", "federated.samples_per_class=100", "logger=[]"]
        >>> compose(run).composition.config.federated.samples_per_class
        100

    Reference:
        Y. Ma, W. Dai, W. Huang and J. Chen, Geometric Knowledge-Guided Localized Global Distribution Alignment for
        Federated Learning, CVPR 2025. arXiv 2503.06457.
    """

    traits: ClassVar[Traits] = Traits(
        rule="Σ_c pooled over clients; train on x and x + N(0, Σ_c), M a class; federated averaging",
        paper="Ma et al. 2025, Geometric Knowledge-Guided Localized Global Distribution Alignment for "
        "Federated Learning, arXiv 2503.06457",
        is_stochastic=True,
        example={"clients": 4, "rounds": 4, "classes": 10, "samples_per_class": 20},
        claim=Claim(
            sentence="Better than FedAvg under skewed labels at equal rounds",
            baseline="fedavg",
            problems=("federated_digits",),
            options={"samples_per_class": 50},
        ),
    )

    def __init__(self, *, classes: int = 10, samples_per_class: int = 500, cover: float = 0.8, **common: Any) -> None:
        super().__init__(**common)
        at_least(2, classes=classes)
        at_least(1, samples_per_class=samples_per_class)
        between(0.0, 1.0, closed="right", cover=cover)
        self.classes, self.samples_per_class, self.cover = classes, samples_per_class, cover

    def chosen(self, round_index: int, generator: torch.Generator) -> list[int]:
        return list(range(self.clients)) if round_index < 2 else super().chosen(round_index, generator)

    def message(self, server: State, round_index: int) -> Payload:
        return server

    def client(self, client: Client, message: State, state: State) -> tuple[Payload, State]:
        theta = message["weights"]
        if client.round == 0:
            client.gradient(theta)
            return self.statistics(*self.samples_of(client)[:2]), state
        if "covariances" in message:
            state |= self._factors(message["covariances"], client)
        client.train(loader=self.loader(client, state))
        return {"update": client.compressed("update", client.weights() - theta, state)}, state

    def samples_of(self, client: Client) -> tuple[Tensor, Tensor, torch.Size]:
        """A client's inputs, flattened ``[n, d]``, their labels ``[n]``, and the shape that an input has."""
        batches = list(client.loader(shuffled=False))
        if not all(_is_labelled(batch, self.classes) for batch in batches):
            raise CompositionError(
                "federated 'ggeur' needs inputs and labels",
                found=f"batches of {type(batches[0]).__name__}, or labels that are not below {self.classes}",
                allowed=f"batches (inputs, labels) with inputs of floating point and labels from 0 to "
                f"{self.classes - 1}",
                remedy="Set federated.classes, or choose data with labels.",
            )
        x, y = (torch.cat([batch[i] for batch in batches]) for i in (0, 1))
        return x.flatten(1), y.long(), x.shape[1:]

    def statistics(self, x: Tensor, y: Tensor) -> State:
        """What a client sends in the first round; of a covariance the half with its diagonal."""
        counts, means, covariances = class_statistics(x, y, self.classes)
        rows, columns = torch.triu_indices(x.shape[1], x.shape[1])
        return {
            "class_samples": counts,
            "class_means": means.float(),
            "class_covariances": covariances[:, rows, columns].float(),
        }

    def averaged(self, answers: Sequence[Mapping[str, Tensor]], samples: Sequence[int]) -> State:
        if "class_samples" not in answers[0]:
            return super().averaged(answers, samples)
        n, m, halves = (
            torch.stack([each[name].double() for each in answers])
            for name in ("class_samples", "class_means", "class_covariances")
        )
        rows, columns = torch.triu_indices(m.shape[2], m.shape[2])
        found = torch.zeros_like(halves[0])
        for c in n.sum(0).nonzero().flatten().tolist():
            given = covering(n[:, c], self.cover)
            found[c] = pooled(n[given, c], m[given, c], _whole(halves[given, c], m.shape[2]))[1][rows, columns]
        return {"covariances": found.float()}

    def server(self, server: State, mean: State, heard: Heard) -> State:
        if "covariances" in mean:
            return {**server, **mean}
        return {"weights": server["weights"] + mean["update"]} if mean else server

    def _factors(self, halves: Tensor, client: Client) -> State:
        """Factors of the covariances of the client's classes, and a seed, so that it draws the same samples always."""
        x, y, _ = self.samples_of(client)
        own = y.unique()
        factors = torch.stack([factor(each) for each in _whole(halves[own].double(), x.shape[1])])
        seed = torch.randint(2**62, (1,), generator=client.generator)
        return {"classes": own, "factors": factors.float(), "seed": seed}

    def loader(self, client: Client, state: State) -> DataLoader[Any]:
        """A client's samples with those that were made; its own alone where it has not heard the covariances."""
        own = client.loader()
        if "factors" not in state:
            return own
        x, y, shape = self.samples_of(client)
        generator = torch.Generator().manual_seed(int(state["seed"]))
        made = [
            (augmented(x[y == c], L, self.samples_per_class, generator), c)
            for c, L in zip(state["classes"].tolist(), state["factors"], strict=True)
        ]
        inputs = torch.cat([each for each, _ in made]).reshape(-1, *shape)
        labels = torch.cat([torch.full((len(each),), c) for each, c in made])
        return DataLoader(TensorDataset(inputs, labels), batch_size=own.batch_size, shuffle=True)


def _is_labelled(batch: Any, classes: int) -> bool:
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not all(isinstance(each, Tensor) for each in batch):
        return False
    x, y = batch
    is_label = not y.is_floating_point() and y.dim() == 1 and bool(((y >= 0) & (y < classes)).all())
    return x.is_floating_point() and x.dim() >= 2 and is_label


def _whole(halves: Tensor, size: int) -> Tensor:
    """Symmetric matrices ``[n, d, d]`` from the halves ``[n, d(d+1)/2]`` that were sent."""
    rows, columns = torch.triu_indices(size, size)
    found = torch.zeros(len(halves), size, size, dtype=halves.dtype)
    found[:, rows, columns] = found[:, columns, rows] = halves
    return found
