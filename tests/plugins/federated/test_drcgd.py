# pyright: reportArgumentType=false
"""Conjugate gradients over orthonormal matrices: they stay orthonormal, and the bound of β is what makes them fast."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.federated.local_model import Layout
from lightrail.run.execution import _quiet_lightning
from lightrail.testing.federated_runs import composed_rounds
from lightrail_federated.drcgd import DRCGD, conjugacy, polar, tangent
from lightrail_federated.topologies.ring import Ring


class PrincipalComponents:
    """8 nodes on a ring, f_i(x) = -½ tr xᵀ C_i x with x ``[20, 3]``."""

    layout = Layout(("x",), ((20, 3),))
    nodes = 8

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.W = Ring().mixing(8, generator)
        drawn = torch.randn(8, 100, 20, generator=generator, dtype=torch.float64)
        drawn = drawn * torch.linspace(1, 0.1, 20, dtype=torch.float64).sqrt()
        self.C = drawn.mT @ drawn / 100
        self.x = torch.randn(60, generator=generator, dtype=torch.float64)

    def mix(self, X):
        return self.W @ X

    def gradient(self, X, *, full=False):
        return (-self.C @ X.view(8, 20, 3)).reshape(8, -1)

    def rounds_until(self, gradient, most=400, **options):
        """How many, and the state then."""
        method = DRCGD(nodes=8, mixing=10, **options)
        state = method.start(self.x.repeat(8, 1), self)
        for k in range(most):
            state = method.step(state, self)
            x = method.joined(state).view(20, 3)
            if tangent(x, -self.C.mean(0) @ x).norm() < gradient:
                return k + 1, state
        return most, state


def test_a_bound_on_beta_makes_it_faster_than_gradient_descent():
    conjugate, state = PrincipalComponents().rounds_until(2e-2, lr=0.02)
    x = state["X"].view(8, 20, 3)
    assert (x.mT @ x - torch.eye(3, dtype=torch.float64)).abs().max() < 1e-13
    assert conjugate < 150
    assert PrincipalComponents().rounds_until(2e-2, lr=0.02, beta_cap=1e-12)[0] == 400
    assert PrincipalComponents().rounds_until(2e-2, lr=0.02, beta_cap=None)[0] == 400


def test_without_conjugacy_it_is_projected_gradient_descent():
    problem = PrincipalComponents()
    method = DRCGD(nodes=8, lr=0.1, beta_cap=1e-300)
    state = method.start(problem.x.repeat(8, 1), problem)
    x = polar(problem.x.view(20, 3)).repeat(8, 1, 1)
    for _ in range(5):
        state = method.step(state, problem)
        g = tangent(x, -problem.C @ x)
        x = polar((problem.W @ x.view(8, -1)).view_as(x) - 0.1 * g)
    torch.testing.assert_close(state["X"].view(8, 20, 3), x, rtol=0, atol=1e-13)


def test_projections():
    Y = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = polar(Y)
    torch.testing.assert_close(x.mT @ x, torch.eye(3, dtype=torch.float64).repeat(2, 1, 1))
    t = tangent(x, Y.flip(0))
    assert (x.mT @ t + t.mT @ x).abs().max() < 1e-14
    torch.testing.assert_close(tangent(x, t), t)


def test_beta():
    g, last = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[2.0, 1.0], [0.0, 0.0]])
    assert conjugacy(g, last, last, "fr", None).flatten().tolist() == [1.0, 0.0]
    assert conjugacy(g, last, last, "fr", 0.9).flatten().tolist() == [0.8999999761581421, 0.0]
    assert conjugacy(g, last, last, "pr", None).flatten().tolist() == pytest.approx([0.2, 0.0])


class Projected(LightningModule):
    """The distance of A from its projection on the rows of ``wide``, and a number beside it."""

    def __init__(self, matrices: int = 1) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.randn(2, 5, generator=torch.Generator().manual_seed(1)).double())
        self.other = nn.Parameter(torch.zeros(1).double())
        if matrices == 2:
            self.second = nn.Parameter(torch.eye(2).double())

    def training_step(self, batch, batch_idx):
        A, _ = batch
        x = self.wide.mT
        return {"loss": ((A - A @ x @ x.mT) ** 2).sum() + (self.other - 1).square().sum()}


def made(tmp_path, *overrides):
    where = [f"task={__name__}.Projected", "data.clients=4", "federated.nodes=4", "federated.lr=0.01"]
    return composed_rounds(tmp_path, "+federated=lightrail_federated.drcgd.DRCGD", *where, *overrides)[1]


def test_a_run_has_orthonormal_rows_at_the_end(tmp_path):
    rounds = made(tmp_path)
    losses = []
    with _quiet_lightning():
        for _ in range(6):
            losses.append(float(rounds.step()["loss"]))
    task = rounds.model.task
    torch.testing.assert_close(task.wide @ task.wide.mT, torch.eye(2).double())
    assert task.other > 0.05
    assert losses[-1] < losses[0]


def test_matrices_are_named_where_there_are_several(tmp_path):
    with pytest.raises(CompositionError, match="which matrices") as error:
        made(tmp_path, "+task.matrices=2").step()
    assert "wide, second" in str(error.value)
    with _quiet_lightning():
        made(tmp_path, "+task.matrices=2", "federated.parameters=[second]").step()


def test_bad_options():
    for options in ({"lr": 0.0}, {"mixing": 0}, {"beta": "hs"}, {"beta_cap": -1.0}):
        with pytest.raises(ConfigurationError):
            DRCGD(nodes=4, **options)
