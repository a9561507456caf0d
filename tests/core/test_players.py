"""Games: each player follows its own loss, at once or in turn, by hand and under Lightning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightrail import Closure
from lightrail.errors import ClosureError
from lightrail.run.checkpoint import load_checkpoint
from lightrail.step.players import TurnsOptimizer
from lightrail.train import main

ETA = 0.1


class Numbers(LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.linspace(0.5, 1.5, 24).reshape(-1, 1)), batch_size=4)


class AtOnce(LightningModule):
    """min over the generator, max over the critic, of the mean of critic(generator(z))."""

    moves = "at_once"

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(1, 3), nn.Dropout(0.2), nn.Linear(3, 1))
        self.critic = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))

    def players(self) -> Mapping[str, Any]:
        return {"generator": self.generator.parameters(), "critic": self.critic.parameters()}

    def player_loss(self, player: str, batch: Any) -> Tensor:
        value = self.critic(self.generator(batch[0])).mean() - 0.1 * self.critic(batch[0]).square().mean()
        return value if player == "generator" else -value


class InTurn(AtOnce):
    moves = "in_turn"


class Extragradient(torch.optim.SGD):
    """Steps with the gradient of the whole game half a step ahead."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        params = [p for group in self.param_groups for p in group["params"]]
        loss = closure()
        with closure.at([p - ETA * p.grad for p in params]):
            closure()
        for p in params:
            p.sub_(ETA * p.grad)
        return loss


def bilinear(x: Tensor, y: Tensor, in_turn: bool) -> Closure:
    losses = {"x": lambda: (x * y).sum(), "y": lambda: -(x * y).sum()}
    return Closure(lambda player: losses[player](), [x, y], players={"x": [x], "y": [y]}, in_turn=in_turn)


def scalars() -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(torch.ones((), dtype=torch.float64)), nn.Parameter(torch.ones((), dtype=torch.float64))


def test_at_once_all_move_from_the_same_point() -> None:
    x, y = scalars()
    torch.optim.SGD([x, y], lr=ETA).step(bilinear(x, y, in_turn=False))
    assert (x.item(), y.item()) == pytest.approx((1 - ETA, 1 + ETA))


def test_in_turn_the_second_answers_the_first() -> None:
    x, y = scalars()
    optimizer = TurnsOptimizer({"x": torch.optim.SGD([x], lr=ETA), "y": torch.optim.SGD([y], lr=ETA)})
    closure = bilinear(x, y, in_turn=True)
    optimizer.step(closure)
    assert (x.item(), y.item()) == pytest.approx((1 - ETA, 1 + ETA * (1 - ETA)))
    assert closure.evaluations == 2


def test_a_method_that_looks_ahead_sees_the_whole_game() -> None:
    x, y = scalars()
    Extragradient([x, y], lr=ETA).step(bilinear(x, y, in_turn=False))
    assert (x.item(), y.item()) == pytest.approx((1 - ETA * (1 + ETA), 1 + ETA * (1 - ETA)))


def test_a_game_has_no_hessian() -> None:
    x, y = scalars()
    with pytest.raises(ClosureError, match="no Hessian"):
        bilinear(x, y, in_turn=False).hvp([x, y])
    assert bilinear(x, y, in_turn=False).loss() == 0


def by_hand(task: AtOnce, make: Callable[[Any], Optimizer], accumulate: int) -> AtOnce:
    players = {name: list(params) for name, params in task.players().items()}
    params = [p for own in players.values() for p in own]
    in_turn = task.moves == "in_turn"
    optimizer: Any = TurnsOptimizer({n: make(p) for n, p in players.items()}) if in_turn else make(params)
    loader = iter(Numbers().train_dataloader())
    for _ in range(6 // accumulate):
        window = [next(loader) for _ in range(accumulate)]
        optimizer.step(Closure(task.player_loss, params, *window, players=players, in_turn=in_turn))
    return task


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("game", [AtOnce, InTurn])
def test_lightning_equals_the_hand_written_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, game: type[AtOnce], accumulate: int
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(game, f"trainer.accumulate={accumulate}", "optimizer.lr=0.01", "optimizer.weight_decay=0") == 0
    pl.seed_everything(1, verbose=False)
    expected = by_hand(game(), lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0), accumulate)
    found = load_checkpoint(next(tmp_path.glob("runs/*")) / "checkpoints" / "last.ckpt")["state_dict"]
    for name, value in expected.state_dict().items():
        assert torch.equal(value, found[name]), name
    header = next(tmp_path.glob("runs/*/metrics.csv")).read_text().splitlines()[0]
    assert {"train_generator_loss", "train_critic_loss"} <= set(header.split(","))


def run(game: type[AtOnce], *overrides: str) -> int:
    return main(
        [
            f"task=test_players.{game.__name__}",
            "data=test_players.Numbers",
            "logger=[csv]",
            "optimizer=adamw",
            "schedule=null",
            "trainer.max_epochs=1",
            "trainer.accelerator=cpu",
            *overrides,
        ]
    )


@pytest.mark.parametrize("game", [AtOnce, InTurn])
def test_one_player_can_have_options_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], game: type[AtOnce]
) -> None:
    monkeypatch.chdir(tmp_path)
    pl.seed_everything(1, verbose=False)
    start = game().state_dict()
    assert run(game, "optimizer.lr=0.01", "optimizer.weight_decay=0", "optimizer.players.critic.lr=0.0") == 0
    found = load_checkpoint(next(tmp_path.glob("runs/*")) / "checkpoints" / "last.ckpt")["state_dict"]
    assert torch.equal(found["critic.0.weight"], start["critic.0.weight"])
    assert not torch.equal(found["generator.0.weight"], start["generator.0.weight"])
    for refused, named in (
        ("optimizer.players.judge.lr=1", "no player 'judge'"),
        ("optimizer.players.critic.wings=1", "no option 'wings'"),
        ("trainer.precision=16-mixed", "several players"),
    ):
        assert run(game, refused) == 2
        assert named in capsys.readouterr().err


def test_players_of_a_task_that_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["model=mlp", "optimizer.players.critic.lr=0.1"]) == 2
    assert "no players" in capsys.readouterr().err
