"""Federated runs without a trainer around them: round after round, on problems whose answers are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightrail.catalogue import import_target, load
from lightrail.federated.partition import Partition, Samples
from lightrail.federated.rounds import Rounds
from lightrail.federated.topology import Topology
from lightrail.run import Run, compose

__all__ = [
    "All",
    "ClientClusters",
    "ClientGames",
    "ClientPoints",
    "Game",
    "InOrder",
    "Quadratic",
    "Separation",
    "composed_rounds",
    "optimum_of",
    "quadratics",
]


def quadratics(clients: int = 10, size: int = 5, seed: int = 0, spread: float = 4.0) -> tuple[Tensor, Tensor]:
    """f_k(x) = ½ (x - c_k)ᵀ A_k (x - c_k), a different one for each client.

    Args:
        clients: How many.
        size: d.
        seed: Of the numbers.
        spread: The greatest eigenvalue of an A_k over the smallest, which is 1.

    Returns:
        A ``[K, d, d]`` and c ``[K, d]``, in float64.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(clients, size, size, generator=generator, dtype=torch.float64))[0]
    eigenvalues = 1 + (spread - 1) * torch.rand(clients, size, generator=generator, dtype=torch.float64)
    A = directions @ torch.diag_embed(eigenvalues) @ directions.transpose(1, 2)
    return A, torch.randn(clients, size, generator=generator, dtype=torch.float64)


def optimum_of(A: Tensor, c: Tensor) -> Tensor:
    """The minimiser of Σ_k f_k, ``[d]``."""
    return torch.linalg.solve(A.sum(0), torch.einsum("kij,kj->i", A, c))


class Quadratic(LightningModule):
    """The mean of ½ (x - c)ᵀ A (x - c) over a batch of (A, c), in float64.

    Args:
        size: d.
    """

    def __init__(self, size: int = 5) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        A, c = batch
        away = self.x - c
        return {"loss": 0.5 * torch.einsum("ki,kij,kj->k", away, A, away).mean()}


class ClientPoints(LightningDataModule):
    """One quadratic a client, in order.

    Args:
        clients: How many.
        size: d.
        seed: Of the numbers.
        spread: Of the eigenvalues.
        identical: Whether all clients have the first one.
    """

    def __init__(
        self, clients: int = 10, size: int = 5, seed: int = 0, spread: float = 4.0, identical: bool = False
    ) -> None:
        super().__init__()
        A, c = quadratics(clients, size, seed, spread)
        self.A, self.c = (A[:1].repeat(clients, 1, 1), c[:1].repeat(clients, 1)) if identical else (A, c)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(self.A, self.c), batch_size=1)


class Game(LightningModule):
    """A strongly monotone quadratic game: min over x, max over y of ½ xᵀAx + xᵀBy - ½ yᵀCy + aᵀx - bᵀy.

    Args:
        size: Of each player.
    """

    moves = "at_once"

    def __init__(self, size: int = 10) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(size, dtype=torch.float64))
        self.y = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def players(self) -> dict[str, list[nn.Parameter]]:
        return {"x": [self.x], "y": [self.y]}

    def player_loss(self, player: str, batch: Any) -> Tensor:
        A, B, C, a, b = (each.mean(0) for each in batch)
        x, y = self.x, self.y
        value = 0.5 * x @ A @ x + x @ B @ y - 0.5 * y @ C @ y + a @ x - b @ y
        return value if player == "x" else -value


class ClientGames(LightningDataModule):
    """One game a client; the field of all is F(z) = Mz + m, with the equilibrium M⁻¹(-m).

    Args:
        clients: How many.
        size: Of each player.
        seed: Of the numbers.
        identical: Whether all clients have the first one.
    """

    def __init__(self, clients: int = 10, size: int = 10, seed: int = 0, identical: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(clients, *shape, generator=generator, dtype=torch.float64)

        def positive() -> Tensor:
            root = drawn(size, size) / size**0.5
            return 0.1 * torch.eye(size, dtype=torch.float64) + root @ root.transpose(1, 2) / 4

        parts = (positive(), drawn(size, size) / size**0.5 / 2, positive(), drawn(size), drawn(size))
        self.parts = tuple(each[:1].expand_as(each).clone() for each in parts) if identical else parts

    @property
    def field(self) -> tuple[Tensor, Tensor]:
        """M ``[2s, 2s]`` and m ``[2s]`` of the mean game."""
        A, B, C, a, b = (each.mean(0) for each in self.parts)
        return torch.cat([torch.cat([A, B], 1), torch.cat([-B.T, C], 1)]), torch.cat([a, b])

    @property
    def equilibrium(self) -> Tensor:
        """Where the field is zero, ``[2s]``: x, then y."""
        M, m = self.field
        return torch.linalg.solve(M, -m)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(*self.parts), batch_size=1)


class Separation(LightningModule):
    """A linear classifier of points around four centres, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        x, y = batch
        return {"loss": nn.functional.cross_entropy(self(x), y)}


class ClientClusters(LightningDataModule):
    """Eight points a client, around four centres, each client's nearer to one of them.

    Args:
        clients: How many.
        identical: Whether all clients have the same points.
    """

    def __init__(self, clients: int = 3, identical: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        y = torch.arange(8).repeat(clients, 1) % 4
        noise = torch.randn(clients, 8, 4, generator=generator, dtype=torch.float64)
        own = 0 if identical else torch.eye(4, dtype=torch.float64)[torch.arange(clients) % 4][:, None]
        x = torch.eye(4, dtype=torch.float64)[y] + 0.3 * (noise[:1] if identical else noise) + 0.5 * own
        self.dataset = TensorDataset(x.reshape(-1, 4), y.reshape(-1))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset, batch_size=8)


class InOrder(Partition):
    """Equal parts in the order of the samples.

    Args:
        backwards: Whether the last part is the first client's.
    """

    def __init__(self, *, backwards: bool = False) -> None:
        self.backwards = backwards

    def divide(self, samples: Samples, clients: int, generator: torch.Generator) -> list[Tensor]:
        parts = list(torch.arange(len(samples)).tensor_split(clients))
        return parts[::-1] if self.backwards else parts


class All(Topology):
    """Every node speaks with every other."""

    def edges(self, nodes: int, generator: torch.Generator) -> list[tuple[int, int]]:
        return [(i, j) for i in range(nodes) for j in range(i + 1, nodes)]


def composed_rounds(folder: Path, *overrides: str) -> tuple[Run, Any]:
    """A federated run, ready for ``rounds.step()`` again and again.

    Args:
        folder: Where its runs would go.
        overrides: As typed after ``train``; the quadratics are there by default.

    Returns:
        The run and its rounds.
    """
    here = __name__
    defaults = [f"task={here}.Quadratic", f"data={here}.ClientPoints", "model=null", "schedule=null"]
    name = next(each.partition("=")[2] for each in overrides if each.lstrip("+").startswith("federated="))
    if (import_target(name) if "." in name else load("federated", name)).runs_optimizer:
        defaults.append("optimizer=sgd")
    common = ["logger=[]", f"run.root={folder}", "trainer.accelerator=cpu"]
    run = compose([*defaults, *common, *overrides])
    assert run.data is not None
    run.data.prepare_data()
    run.data.setup("fit")
    return run, next(each for each in run.callbacks if isinstance(each, Rounds))
