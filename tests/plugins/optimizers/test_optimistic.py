"""Optimistic descent, Adam and online mirror descent: the bilinear game by hand, and what they reduce to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightrail import Closure
from lightrail.errors import ConfigurationError
from lightrail.run.checkpoint import load_checkpoint
from lightrail.step.players import Game
from lightrail.train import main
from lightrail_optimizers import OptimisticAdam, OptimisticOMD, OptimisticSGD, PastExtragradient

ETA = 0.1


def field(z):
    """Of the game min over x, max over y of x y: descent circles away from its solution."""
    return np.array([z[1], -z[0]])


def start():
    return [nn.Parameter(torch.ones((), dtype=torch.float64)) for _ in range(2)]


def by_player(x, y):
    return [{"params": [x], "player": "x"}, {"params": [y], "player": "y"}]


def played(optimizer: Any, x, y, steps):
    """The points of the game, from the start on."""
    losses = {"x": lambda: x * y, "y": lambda: -x * y}
    points = [(x.item(), y.item())]
    for _ in range(steps):
        optimizer.step(Closure(lambda player: losses[player](), [x, y], players={"x": [x], "y": [y]}))
        points.append((x.item(), y.item()))
    return np.array(points)


def gradients(steps, size=3):
    return np.random.default_rng(0).normal(size=(steps, size))


def path(make, given, start=(0.0, 0.0, 0.0)):
    """Where a method goes along given gradients; ``None`` leaves the gradient out."""
    x = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = make([x])
    points = []
    for g in given:
        x.grad = None if g is None else torch.tensor(g, dtype=torch.float64)
        optimizer.step()
        points.append(x.detach().numpy().copy())
    return np.array(points)


# Optimistic descent.


@pytest.mark.parametrize("grouped", [False, True])
def test_two_steps_of_the_bilinear_game(grouped):
    x, y = start()
    optimizer = OptimisticSGD(by_player(x, y) if grouped else [x, y], lr=ETA)
    _, first, second = played(optimizer, x, y, 2)
    assert first == pytest.approx((0.9, 1.1), abs=1e-9)
    assert second == pytest.approx((0.78, 1.18), abs=1e-9)


def test_descent_leaves_the_solution_and_optimism_comes_in_as_extragradient_does():
    x, y = start()
    descent = played(torch.optim.SGD([x, y], lr=ETA), x, y, 200)[-1]
    x, y = start()
    optimistic = played(OptimisticSGD([x, y], lr=ETA), x, y, 200)[-1]
    z = np.ones(2)
    for _ in range(200):
        z = z - ETA * field(z - ETA * field(z))
    assert np.linalg.norm(descent) == pytest.approx(np.sqrt(2) * 1.01**100, abs=1e-9)
    assert np.linalg.norm(descent) == pytest.approx(3.825, abs=5e-4)
    assert np.linalg.norm(optimistic) == pytest.approx(0.5176, abs=5e-5)
    assert np.linalg.norm(z) == pytest.approx(0.5229, abs=5e-5)


def test_it_is_its_formula_from_equal_first_gradients():
    expected, z, previous = [], np.zeros(3), None
    for g in gradients(6):
        previous = g if previous is None else previous
        z = z - 2 * ETA * g + ETA * previous
        previous = g
        expected.append(z)
    assert path(lambda p: OptimisticSGD(p, lr=ETA), gradients(6)) == pytest.approx(np.array(expected), abs=1e-12)


def test_without_optimism_it_is_descent():
    ours = path(lambda p: OptimisticSGD(p, lr=ETA, optimism=0.0), gradients(5), [1.0, 2.0, 3.0])
    assert ours == pytest.approx(path(lambda p: torch.optim.SGD(p, lr=ETA), gradients(5), [1.0, 2.0, 3.0]), abs=1e-12)


def test_its_decay_is_decoupled():
    start = [1.0, -2.0, 3.0]
    moved = path(lambda p: OptimisticSGD(p, lr=ETA, weight_decay=0.5), np.zeros((1, 3)), start)
    assert moved[0] == pytest.approx(np.array(start) * (1 - 0.05), abs=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: OptimisticSGD(p, lr=ETA),
        lambda p: OptimisticAdam(p, lr=ETA),
        lambda p: OptimisticOMD(p, diameter=ETA),
    ],
)
def test_a_missing_gradient_stops_nobody_else(make):
    first, missing, last = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = make([missing, first, last])
    for _ in range(2):
        first.grad, last.grad = torch.ones(2), -torch.ones(2)
        optimizer.step()
    assert torch.equal(missing, torch.ones(2))
    assert bool((first < 1).all())
    assert bool((last > 1).all())


def test_after_a_pause_it_goes_on_from_the_last_gradient():
    g = gradients(2)
    with_pause = path(lambda p: OptimisticSGD(p, lr=ETA), [g[0], None, g[1]])
    assert np.array_equal(with_pause[[0, 2]], path(lambda p: OptimisticSGD(p, lr=ETA), g))


# Adam.


def test_optimistic_adam_by_hand():
    b1, b2, eps = 0.5, 0.9, 1e-8
    z, m, v, previous, expected = np.zeros(3), 0.0, 0.0, 0.0, []
    for t, g in enumerate(gradients(6), start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        u = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        z = z - 2 * ETA * u + ETA * previous
        previous = u
        expected.append(z)
    ours = path(lambda p: OptimisticAdam(p, lr=ETA, betas=(b1, b2), eps=eps), gradients(6))
    assert ours == pytest.approx(np.array(expected), abs=1e-9)


def test_its_first_step_is_twice_that_of_adam():
    assert path(lambda p: OptimisticAdam(p, lr=ETA), [[3.0, -5.0, 7.0]])[0] == pytest.approx([-0.2, 0.2, -0.2])


def test_without_optimism_it_is_adamw():
    options = {"lr": ETA, "betas": (0.5, 0.9), "weight_decay": 0.1}
    start = [1.0, -2.0, 3.0]
    ours = path(lambda p: OptimisticAdam(p, optimism=0.0, **options), gradients(6), start)
    assert ours == pytest.approx(path(lambda p: torch.optim.AdamW(p, **options), gradients(6), start), abs=1e-12)


# Online mirror descent.


def by_two_sequences(steps, diameter, delta, learners):
    """The points ``x_t`` of the bilinear game, by the equations of the paper."""
    x, x_hat, hint = np.ones(2), np.ones(2), np.zeros(2)
    surprise = np.zeros(2)
    points = [x]
    for _ in range(steps):
        eta = diameter / np.sqrt(delta + surprise)
        g = field(x)
        change = (g - hint) ** 2
        surprise = surprise + (change if learners == 2 else change.sum())
        x_hat, hint = x_hat - eta * g, g
        x = x_hat - diameter / np.sqrt(delta + surprise) * hint
        points.append(x)
    return np.array(points)


@pytest.mark.parametrize("learners", [1, 2])
def test_mirror_descent_is_its_two_sequences(learners):
    x, y = start()
    params = by_player(x, y) if learners == 2 else [{"params": [x]}, {"params": [y]}]
    found = played(OptimisticOMD(params, diameter=0.3, delta=0.5), x, y, 200)
    assert found == pytest.approx(by_two_sequences(200, 0.3, 0.5, learners), abs=1e-9)
    assert np.linalg.norm(found[-1]) < 0.3 < 1.4 < np.linalg.norm(found[0])


def test_groups_of_one_player_are_one_learner():
    g = np.array([0.3, -0.4, 1.2])
    whole = path(lambda p: OptimisticOMD(p), [g, 2 * g, g])
    parts = [nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in g]
    optimizer = OptimisticOMD([{"params": [p]} for p in parts])
    for scale in (1, 2, 1):
        for p, value in zip(parts, g, strict=True):
            p.grad = torch.tensor([scale * value])
        optimizer.step()
    assert [p.item() for p in parts] == pytest.approx(whole[-1], abs=1e-12)


def test_gradients_that_do_not_change_keep_the_step_size():
    x = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = OptimisticOMD([x], diameter=0.5, delta=4.0)
    sizes = []
    for _ in range(4):
        sizes.append(optimizer.step_size(optimizer.param_groups[0]))
        x.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
        optimizer.step()
    assert sizes == pytest.approx([0.25, *[0.5 / 29**0.5] * 3], abs=1e-12)


def test_the_step_size_survives_a_checkpoint_and_holds_for_a_late_group():
    x, late = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = OptimisticOMD([x])
    x.grad = torch.ones(2)
    optimizer.step()
    optimizer.add_param_group({"params": [late]})
    first, second = optimizer.param_groups
    assert optimizer.step_size(first) == optimizer.step_size(second) == pytest.approx(3**-0.5)
    resumed = OptimisticOMD([{"params": [x]}, {"params": [late]}])
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.step_size(resumed.param_groups[1]) == optimizer.step_size(second)


@pytest.mark.parametrize("options", [{"diameter": 0.0}, {"delta": -1.0}])
def test_mirror_descent_refuses_what_is_out_of_range(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        OptimisticOMD([nn.Parameter(torch.zeros(1))], **options)


# Under Lightning.


class Numbers(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.linspace(0.5, 1.5, 24).reshape(-1, 1)), batch_size=4)


class Saddle(LightningModule):
    """min over a generator, max over a critic, at once."""

    moves = "at_once"

    def __init__(self):
        super().__init__()
        self.generator, self.critic = nn.Linear(1, 2), nn.Linear(2, 1)

    def players(self):
        return {"generator": self.generator.parameters(), "critic": self.critic.parameters()}

    def player_loss(self, player, batch):
        value = self.critic(self.generator(batch[0])).mean()
        return value if player == "generator" else -value


@pytest.mark.parametrize(
    ("name", "make", "options"),
    [
        ("optimistic_sgd", OptimisticSGD, {"lr": 0.05}),
        ("optimistic_adam", OptimisticAdam, {"lr": 0.05}),
        ("optimistic_omd", OptimisticOMD, {"diameter": 0.05}),
        ("past_extragradient", PastExtragradient, {"lr": 0.05}),
    ],
)
def test_a_game_under_lightning_is_the_loop_by_hand(tmp_path: Path, monkeypatch, name, make, options):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    task = Saddle()
    torch.save(task.state_dict(), tmp_path / "start.pt")
    monkeypatch.setattr(Saddle, "on_fit_start", lambda self: self.load_state_dict(torch.load("start.pt")))
    given = [f"optimizer.{key}={value}" for key, value in options.items()]
    places = [f"task={__name__}.Saddle", f"data={__name__}.Numbers"]
    common = ["logger=[csv]", "schedule=null", "trainer.max_epochs=1", "trainer.accelerator=cpu"]
    assert main([*places, f"optimizer={name}", *given, *common]) == 0
    found = load_checkpoint(next(tmp_path.glob("runs/*")) / "checkpoints" / "last.ckpt")["state_dict"]
    game = Game(task)
    optimizer: Any = game.optimizer(lambda params, _: make(params, **options), {})
    every = [p for own in game.players.values() for p in own]
    for batch in Numbers().train_dataloader():
        optimizer.step(Closure(task.player_loss, every, batch, players=game.players))
    if isinstance(optimizer, PastExtragradient):
        optimizer.eval()
    for key, value in task.state_dict().items():
        assert torch.equal(value, found[key]), key
