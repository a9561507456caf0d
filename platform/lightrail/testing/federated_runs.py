"""Federated runs without a trainer around them: round after round, on problems whose answers are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightrail.federated.rounds import Rounds
from lightrail.run import Run, compose

__all__ = ["ClientGames", "ClientPoints", "Game", "Quadratic", "composed_rounds", "optimum_of", "quadratics"]


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
    """

    def __init__(self, clients: int = 10, size: int = 10, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(clients, *shape, generator=generator, dtype=torch.float64)

        def positive() -> Tensor:
            root = drawn(size, size) / size**0.5
            return 0.1 * torch.eye(size, dtype=torch.float64) + root @ root.transpose(1, 2) / 4

        self.parts = (positive(), drawn(size, size) / size**0.5 / 2, positive(), drawn(size), drawn(size))

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


def composed_rounds(folder: Path, *overrides: str) -> tuple[Run, Rounds]:
    """A federated run, ready for ``rounds.step()`` again and again.

    Args:
        folder: Where its runs would go.
        overrides: As typed after ``train``; the quadratics are there by default.

    Returns:
        The run and its rounds.
    """
    here = __name__
    defaults = [f"task={here}.Quadratic", f"data={here}.ClientPoints", "model=null", "optimizer=sgd", "schedule=null"]
    common = ["logger=[]", f"run.root={folder}", "trainer.accelerator=cpu"]
    run = compose([*defaults, *common, *overrides])
    assert run.data is not None
    run.data.prepare_data()
    run.data.setup("fit")
    return run, next(each for each in run.callbacks if isinstance(each, Rounds))
