# pyright: reportArgumentType=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportOptionalOperand=false, reportOptionalSubscript=false
"""MGDA, PCGrad and CAGrad: weights worked out by hand, the problems that they solve, and the library they come from."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightrail import Closure, TransformedOptimizer
from lightrail.errors import ConfigurationError
from lightrail.run.loops import install_loops
from lightrail.testing.quiet_trainer import quiet_trainer
from lightrail_optimizers import CAGrad, OrthogonalPair, UPGrad
from lightrail_optimizers.transforms.cagrad import cagrad_weights

aggregation = pytest.importorskip("torchjd.aggregation")

from lightrail_optimizers import MGDA, PCGrad  # noqa: E402

PAIR = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
CALM = torch.tensor([[1.0, 0.5, 0.0], [0.2, 1.0, 3.0], [0.0, 0.1, 1.0]], dtype=torch.float64)


def direction(transform, jacobian):
    """What stands in ``.grad``, for objectives whose gradients are the rows."""
    w = nn.Parameter(torch.zeros(jacobian.shape[1], dtype=jacobian.dtype))
    closure = Closure(lambda: (jacobian @ w).mean(), [w], objectives_fn=lambda: jacobian @ w)
    TransformedOptimizer(torch.optim.SGD([w], lr=1.0), [transform]).step(closure)
    return w.grad


def random_jacobian(seed, rows, columns):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# MGDA.


def test_mgda_of_two_rows_by_hand():
    # The point of the segment from (1, 0) to (0, 2) that is nearest to the origin.
    d = direction(MGDA(), torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64))
    torch.testing.assert_close(d, torch.tensor([0.8, 0.4], dtype=torch.float64), rtol=0, atol=1e-12)
    # A short row that the other lies beyond is the nearest itself.
    d = direction(MGDA(), torch.tensor([[1.0, 0.0], [3.0, 1.0]], dtype=torch.float64))
    torch.testing.assert_close(d, torch.tensor([1.0, 0.0], dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-12, 1.0])
def test_mgda_gains_as_much_for_every_objective(scale):
    for seed in range(5):
        jacobian = scale * (random_jacobian(seed, 4, 10) + 1)
        d = direction(MGDA(epsilon=1e-6, max_iterations=1000), jacobian)
        assert (jacobian @ d >= 0.99 * d @ d).all()
        assert (d.norm() <= jacobian.norm(dim=1) + 1e-12).all()


# PCGrad.


def test_pcgrad_of_two_rows_by_hand():
    # g_1 + 1/2 g_2 and g_2 + g_1, in whatever order.
    expected = 2 * PAIR[0] + 1.5 * PAIR[1]
    torch.testing.assert_close(direction(PCGrad(), PAIR), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(direction(PCGrad("mean"), PAIR), expected / 2, rtol=0, atol=1e-12)
    torch.testing.assert_close(direction(PCGrad(), 1e-9 * PAIR), 1e-9 * expected, rtol=1e-9, atol=0)


def test_pcgrad_without_conflict_is_the_sum():
    torch.testing.assert_close(direction(PCGrad(), CALM), CALM.sum(0), rtol=0, atol=1e-12)


def surgery(jacobian, orders):
    """Algorithm 1 on the gradients themselves."""
    total = torch.zeros_like(jacobian[0])
    for i, order in enumerate(orders):
        p = jacobian[i].clone()
        for j in order:
            if j != i and p @ jacobian[j] < 0:
                p -= (p @ jacobian[j]) / (jacobian[j] @ jacobian[j]) * jacobian[j]
        total += p
    return total


def test_pcgrad_draws_its_orders_from_the_global_generator():
    jacobian = random_jacobian(1, 4, 3)
    found = []
    for seed in range(6):
        torch.manual_seed(seed)
        found.append(direction(PCGrad(), jacobian))
        torch.manual_seed(seed)
        orders = [torch.randperm(4).tolist() for _ in range(4)]
        torch.testing.assert_close(found[-1], surgery(jacobian, orders), rtol=0, atol=1e-12)
    assert any(not torch.equal(found[0], each) for each in found[1:])
    assert PCGrad.traits.is_stochastic


def test_pcgrad_agrees_with_pytorch_optimizer():
    library = pytest.importorskip("pytorch_optimizer")
    w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    surgeon = library.PCGrad(torch.optim.SGD([w], lr=1.0), reduction="sum")
    surgeon.pc_backward(list(PAIR @ w))
    torch.testing.assert_close(direction(PCGrad(), PAIR), w.grad, rtol=0, atol=1e-12)


# CAGrad.


def least_gain(jacobian, d):
    return float((jacobian @ d).min())


@pytest.mark.parametrize("jacobian", [PAIR, CALM, random_jacobian(2, 5, 4)])
def test_cagrad_of_radius_zero_is_the_mean_bit_for_bit(jacobian):
    w = cagrad_weights(jacobian @ jacobian.T, 0.0)
    assert torch.equal(w, torch.full((len(jacobian),), 1 / len(jacobian), dtype=torch.float64))


def test_cagrad_of_orthogonal_rows_by_hand():
    # Of equal length: by symmetry d lies along the mean, as far out as the radius lets it.
    d = direction(CAGrad(c=0.5), torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(d, torch.tensor([0.75, 0.75], dtype=torch.float64), rtol=0, atol=1e-8)
    # Opposite rows, g_0 = (1/4, 0): the worse one gains most where d has come back by c ||g_0||.
    d = direction(CAGrad(c=0.4), torch.tensor([[1.0, 0.0], [-0.5, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(d, torch.tensor([0.15, 0.0], dtype=torch.float64), rtol=0, atol=1e-8)


@pytest.mark.parametrize("c", [0.1, 0.5, 0.9, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_cagrad_solves_its_problem(c, seed):
    """Against the problem itself, in the space of the gradients: the largest least gain within the ball."""
    jacobian = random_jacobian(seed, 3, 4)
    d, mean = direction(CAGrad(c=c), jacobian), jacobian.mean(0)
    radius = c * float(mean.norm())
    assert float((d - mean).norm()) <= radius * (1 + 1e-9)
    rows, centre = jacobian.numpy(), mean.numpy()
    best = scipy.optimize.minimize(
        lambda x: -x[-1],
        np.append(centre, (rows @ centre).min()),
        method="SLSQP",
        constraints=[
            {"type": "ineq", "fun": lambda x: rows @ x[:-1] - x[-1]},
            {"type": "ineq", "fun": lambda x: radius**2 - ((x[:-1] - centre) ** 2).sum()},
        ],
        options={"ftol": 1e-12, "maxiter": 500},
    )
    assert least_gain(jacobian, d) == pytest.approx(-best.fun, abs=2e-6)
    assert least_gain(jacobian, d) >= least_gain(jacobian, mean) - 1e-9


def test_cagrad_of_a_large_radius_points_where_mgda_points():
    jacobian = random_jacobian(3, 3, 8)
    near, far = direction(CAGrad(c=1e4), jacobian), direction(MGDA(epsilon=1e-6, max_iterations=2000), jacobian)
    torch.testing.assert_close(near / near.norm(), far / far.norm(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e6])
def test_cagrad_scales_with_the_gradients(scale):
    jacobian = random_jacobian(4, 4, 6)
    expected = direction(CAGrad(), jacobian)
    torch.testing.assert_close(direction(CAGrad(), scale * jacobian) / scale, expected, rtol=1e-6, atol=1e-8)


def test_cagrad_where_the_least_favourable_combination_vanishes():
    # Rows around the origin, and a radius that reaches it: nothing is better for all, so nothing moves along them.
    angles = torch.tensor([0.0, 2.0, 4.0], dtype=torch.float64)
    around = torch.stack([angles.cos(), angles.sin(), torch.zeros(3, dtype=torch.float64)], 1)
    d = direction(CAGrad(c=5.0), around)
    torch.testing.assert_close(d, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-5)
    assert torch.equal(direction(CAGrad(), torch.zeros(2, 3)), torch.zeros(3))
    assert torch.equal(direction(CAGrad(), CALM[:1]), CALM[0])


@pytest.mark.parametrize("seed", range(3))
def test_cagrad_agrees_with_torchjd(seed):
    pytest.importorskip("cvxpy")
    pytest.importorskip("clarabel")
    jacobian = random_jacobian(seed, 4, 9)
    theirs = aggregation.CAGrad(c=0.5)(jacobian)
    torch.testing.assert_close(
        direction(CAGrad(c=0.5), jacobian), theirs, rtol=0, atol=1e-4
    )  # theirs is found to about 1e-5


# All of them.


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(MGDA(), "MGDA"), (MGDA(0.1, 3), ("MGDA", {"epsilon": 0.1, "max_iters": 3})), (PCGrad(), "PCGrad")],
)
def test_agrees_with_torchjd(ours, theirs, seed):
    name, options = theirs if isinstance(theirs, tuple) else (theirs, {})
    jacobian = random_jacobian(seed, 4, 9)
    torch.manual_seed(5)
    expected = getattr(aggregation, name)(**options)(jacobian)
    torch.manual_seed(5)
    torch.testing.assert_close(direction(ours, jacobian), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (MGDA, {"epsilon": 0.0}),
        (MGDA, {"max_iterations": 0}),
        (PCGrad, {"reduction": "max"}),
        (CAGrad, {"c": -0.1}),
        (CAGrad, {"c": float("inf")}),
    ],
)
def test_options_out_of_range(kind, options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        kind(**options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("make", [UPGrad, MGDA, PCGrad, CAGrad])
def test_a_gradient_that_is_not_finite_stays_so(make, value):
    broken = random_jacobian(0, 4, 5)
    broken[1, 2] = value
    d = direction(make(), broken)
    assert not d[2].isfinite()
    assert d[0].isfinite()


class Task(LightningModule):
    """A task with two named losses; what it trains on is their sum."""

    def __init__(self, transforms):
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.kind, self.size = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, 1)
        self.transforms = transforms

    def objectives(self, batch):
        x, y = batch
        hidden = self.trunk(x).tanh()
        kind = F.cross_entropy(self.kind(hidden), y)
        return {"kind": kind, "size": F.mse_loss(self.size(hidden)[:, 0], -3 * y.float())}

    def training_step(self, batch, batch_idx):
        losses = self.objectives(batch)
        return {"loss": losses["kind"] + losses["size"], **losses}

    def configure_optimizers(self):
        return TransformedOptimizer(torch.optim.SGD(self.parameters(), lr=0.1), self.transforms)


def batches():
    torch.manual_seed(9)
    targets = torch.randint(3, (12, 16))
    return [(torch.randn(16, 5) + 2 * F.one_hot(y, 5), y) for y in targets]


METHODS = [UPGrad, MGDA, PCGrad, CAGrad, OrthogonalPair, lambda: OrthogonalPair(main="size")]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("make", METHODS)
def test_a_task_of_two_losses_under_lightning(make, count):
    ours, theirs, plain = Task([make()]), Task([make()]), Task([])
    with torch.no_grad():
        before = {name: float(loss) for name, loss in ours.objectives(batches()[0]).items()}
    for task in (ours, plain):
        with quiet_trainer(max_epochs=1, accumulate_grad_batches=count) as trainer:
            install_loops(trainer, window=True, skips_non_finite=False)
            torch.manual_seed(3)
            trainer.fit(task, DataLoader(batches(), batch_size=None))
    optimizer = theirs.configure_optimizers()
    torch.manual_seed(3)
    torch.randint(2**62, ())  # what the loader draws
    for window in _windows(batches(), count):
        optimizer.step(
            Closure(
                lambda batch: theirs.training_step(batch, 0),
                list(theirs.parameters()),
                *window,
                objectives_fn=theirs.objectives,
            )
        )
    for a, b, c in zip(ours.parameters(), theirs.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    with torch.no_grad():
        after = {name: float(loss) for name, loss in ours.objectives(batches()[0]).items()}
    assert all(after[name] < before[name] for name in before)


def _windows(values, count):
    return [values[first : first + count] for first in range(0, len(values), count)]
