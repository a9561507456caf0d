"""Games: a task with several players, each with parameters and a loss of its own (a GAN, a bilevel problem).

The task names them and says how they move:

    def players(self) -> Mapping[str, Iterable[Parameter]]
    def player_loss(self, player: str, batch) -> Tensor
    moves = "at_once"    # or "in_turn"

At once, one optimizer sees the whole game, a group a player, so that extragradient and optimistic methods are exact. In
turn, each player has an optimizer of its own and answers what the players before it did in the same step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from lightrail.errors import CompositionError
from lightrail.step.closure import Closure
from lightrail.step.transform import CombinedOptimizer

__all__ = ["Game", "TurnsOptimizer", "game_of"]

MOVES = ("at_once", "in_turn")


class Game:
    """The players of a task.

    Args:
        task: A task with ``players`` and ``player_loss``.

    Raises:
        CompositionError: A parameter has two players, a player has none, or the moves are unknown.
    """

    def __init__(self, task: Any) -> None:
        self._task = task
        named: Mapping[str, Iterable[Tensor]] = task.players()
        self.players: dict[str, list[Tensor]] = {
            name: [p for p in params if p.requires_grad] for name, params in named.items()
        }
        self.moves: str = getattr(task, "moves", "at_once")
        seen = [id(p) for params in self.players.values() for p in params]
        if len(set(seen)) < len(seen) or not all(self.players.values()) or self.moves not in MOVES:
            raise CompositionError(
                f"the players of {type(task).__name__} do not make a game",
                found=", ".join(f"{name}: {len(p)} parameters" for name, p in self.players.items()) + f"; {self.moves}",
                allowed=f"parameters of its own for every player, and moves = {' or '.join(map(repr, MOVES))}",
                remedy="Mend players() and moves of the task.",
            )
        self._losses: dict[str, Tensor] = {}

    @property
    def in_turn(self) -> bool:
        return self.moves == "in_turn"

    @property
    def moving_first(self) -> list[str]:
        """Whose losses the step's first evaluation gives."""
        return list(self.players)[: 1 if self.in_turn else None]

    def attach(self, task: LightningModule) -> None:
        """Gives the task the ``training_step`` and ``backward`` of a game."""

        def training_step(batch: Any, batch_idx: int) -> dict[str, Tensor]:
            self._losses = {name: self._task.player_loss(name, batch) for name in self.moving_first}
            total = torch.stack(list(self._losses.values())).sum()
            return {"loss": total, **{f"{name}_loss": loss.detach() for name, loss in self._losses.items()}}

        def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            for name, own in self._losses.items():
                (own / task.trainer.accumulate_grad_batches).backward(inputs=self.players[name])

        task.training_step = training_step  # type: ignore[method-assign]
        task.backward = backward  # type: ignore[method-assign]

    def optimizer(
        self, make: Callable[[Sequence[Any], Mapping[str, Any]], Optimizer], overrides: Mapping[str, Mapping[str, Any]]
    ) -> Optimizer:
        """The optimizer of the game.

        Args:
            make: ``make(params, options)``: an optimizer, with options beyond the common ones.
            overrides: Options of single players, by name.

        Raises:
            CompositionError: Options for a player that there is not.
        """
        unknown = set(overrides) - set(self.players)
        if unknown:
            raise CompositionError(
                f"there is no player '{min(unknown)}'",
                found=f"optimizer.players.{min(unknown)}",
                allowed=", ".join(self.players),
                remedy="Name a player of the task.",
            )
        if self.in_turn:
            return TurnsOptimizer({n: make(params, overrides.get(n, {})) for n, params in self.players.items()})
        groups = [{"params": params, "player": n, **overrides.get(n, {})} for n, params in self.players.items()]
        return make(groups, {})


def game_of(task: Any) -> Game | None:
    """The game that a task describes; ``None`` for a task with one loss."""
    described = callable(getattr(task, "players", None)) and callable(getattr(task, "player_loss", None))
    return Game(task) if described else None


class TurnsOptimizer(CombinedOptimizer):
    """One optimizer a player; each moves on the gradient that it has after the others moved.

    Args:
        players: The optimizers, in the order of the moves.
    """

    def __init__(self, players: Mapping[str, Optimizer]) -> None:
        super().__init__(list(players.values()))
        self._players = dict(players)
        self.losses: dict[str, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """One move of every player.

        Args:
            closure: A :class:`lightrail.Closure` over players.

        Returns:
            The sum of the losses that the players met.
        """
        assert isinstance(closure, Closure)
        for name, optimizer in self._players.items():
            with closure.turn(name):
                self.losses[name] = optimizer.step(closure)  # type: ignore[arg-type,assignment]
        return sum(self.losses.values())
