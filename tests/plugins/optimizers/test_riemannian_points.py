"""What Riemannian optimizers keep for a point, that it stays on its manifold, and what they refuse."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightrail import Closure
from lightrail.catalogue import plugin as catalogue_plugin
from lightrail.errors import ConfigurationError, PluginError
from lightrail.run.checkpoint import load_checkpoint
from lightrail.train import main
from lightrail_optimizers import RiemannianAdagrad, RiemannianAdam, RiemannianAMSGrad, RiemannianSGD

geoopt = pytest.importorskip("geoopt")

OURS = [RiemannianAdam, RiemannianAMSGrad, RiemannianAdagrad, RiemannianSGD]


def on(manifold, *shape, seed=0, scale=1.0, dtype=torch.float64):
    """A random point."""
    start = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale
    return geoopt.ManifoldParameter(manifold.projx(start), manifold)


def path(make, p, steps, seed=1, scale=1.0):
    """Where it goes along gradients drawn by seed."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = make([p])
    for _ in range(steps):
        p.grad = scale * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        optimizer.step()
    return p.detach().as_subclass(Tensor).clone(), optimizer


MANIFOLDS = {
    "sphere": (geoopt.Sphere, (4, 3)),
    "ball": (geoopt.PoincareBall, (4, 3)),
    "stiefel": (geoopt.EuclideanStiefel, (2, 5, 3)),
    "canonical": (geoopt.CanonicalStiefel, (5, 3)),
    "lorentz": (geoopt.Lorentz, (4, 3)),
    "positive": (geoopt.SymmetricPositiveDefinite, (2, 3, 3)),
    "product": (lambda: geoopt.ProductManifold((geoopt.Sphere(), 3), (geoopt.Euclidean(), 2)), (4, 5)),
}


# What it keeps, and where it stays.


def test_a_point_keeps_one_second_moment_a_factor():
    rows, euclidean = on(geoopt.PoincareBall(), 6, 3, scale=0.1), nn.Parameter(torch.ones(6, 3))
    optimizer = RiemannianAMSGrad([rows, euclidean])
    for p in (rows, euclidean):
        p.grad = torch.ones_like(p)
    optimizer.step()
    for name in ("second_moment", "largest_second_moment"):
        assert optimizer.state[rows][name].shape == (6, 1)
        assert optimizer.state[euclidean][name].shape == (6, 3)
    assert optimizer.state[rows]["momentum"].shape == (6, 3)


@pytest.mark.parametrize("make", OURS)
def test_a_resumed_run_takes_the_same_path_bit_for_bit(make):
    manifold = geoopt.Sphere()
    _, optimizer = path(lambda p: make(p, lr=0.1), p := on(manifold, 4, 3, dtype=torch.float32), 5)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    q = geoopt.ManifoldParameter(p.detach().clone(), manifold)
    resumed = make([q])
    resumed.load_state_dict(torch.load(file, weights_only=True))
    expected, _ = path(lambda _: optimizer, p, 12, seed=2)
    found, _ = path(lambda _: resumed, q, 12, seed=2)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", MANIFOLDS)
@pytest.mark.parametrize("make", OURS)
def test_it_stays_on_the_manifold_in_single_precision(make, name):
    build, shape = MANIFOLDS[name]
    manifold = build()
    p = geoopt.ManifoldParameter(on(manifold, *shape, scale=0.3).detach().float(), manifold)
    path(lambda q: make(q, lr=0.05), p, 30)
    assert bool(p.isfinite().all())
    assert manifold.check_point_on_manifold(p.detach(), atol=1e-4, rtol=1e-4)


def test_rounding_does_not_add_up():
    """The tangent part of a gradient along the outer normal is not zero where a point is off the sphere: it grows."""

    def distance(stabilize_every):
        p = geoopt.ManifoldParameter(torch.tensor([0.6, 0.8]), geoopt.Sphere())
        optimizer = RiemannianSGD([p], lr=0.1, stabilize_every=stabilize_every)
        for _ in range(60):
            x, y = p.tolist()
            p.grad = torch.tensor([3 * x - y, 3 * y + x])
            optimizer.step()
        return abs(float(p.detach().norm()) - 1)

    assert distance(10) < 1e-6 < 0.1 < distance(None)


@pytest.mark.parametrize("manifold", [geoopt.PoincareBall(), geoopt.PoincareBallExact()])
@pytest.mark.parametrize("make", OURS)
def test_steps_that_are_far_too_long_end_inside_the_ball(make, manifold):
    p = on(manifold, 5, 3, scale=0.5, dtype=torch.float32)
    path(lambda q: make(q, lr=100.0), p, 20, scale=1e3)
    assert bool(p.isfinite().all())
    assert float(p.detach().norm(dim=-1).max()) < 1


@pytest.mark.parametrize("make", [RiemannianAdam, RiemannianAMSGrad])
def test_a_row_that_was_never_used_stays_without_eps(make):
    p = on(geoopt.PoincareBall(), 3, 2, scale=0.3)
    before = p.detach().clone()
    optimizer = make([p], lr=0.1, eps=0.0)
    for _ in range(3):
        p.grad = torch.tensor([[1.0, 2.0], [0.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
        optimizer.step()
    assert torch.equal(p.detach()[1], before[1])
    assert bool((p.detach()[[0, 2]] != before[[0, 2]]).any())


def test_half_precision_points_move():
    p = geoopt.ManifoldParameter(torch.tensor([[1.0, 0.0, 0.0]]), geoopt.Sphere())
    p.data = p.data.bfloat16()
    p.grad = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.bfloat16)
    optimizer = RiemannianAdam([p], lr=0.1)
    optimizer.step()
    assert p.dtype == optimizer.state[p]["momentum"].dtype == torch.bfloat16
    assert p.tolist()[0] == pytest.approx([0.995, -0.0998, 0.0], abs=5e-3)


@pytest.mark.parametrize("make", OURS)
def test_a_copy_and_its_original_part_ways(make):
    _, optimizer = path(lambda q: make(q, lr=0.1), on(geoopt.Sphere(), 2, 3), 2)
    twin = copy.deepcopy(optimizer)
    q = twin.param_groups[0]["params"][0]
    assert type(q) is geoopt.ManifoldParameter
    p = optimizer.param_groups[0]["params"][0]
    before = p.detach().clone()
    path(lambda _: twin, q, 1)
    assert torch.equal(p.detach(), before)
    assert not torch.equal(q.detach(), before)


class Pairs(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.arange(8).reshape(-1, 2)), batch_size=2)


class Embedding(LightningModule):
    """Rows in the ball, and a Euclidean scale."""

    def __init__(self):
        super().__init__()
        self.ball = geoopt.PoincareBall()
        self.rows = geoopt.ManifoldParameter(torch.linspace(-0.3, 0.3, 16).reshape(8, 2), self.ball)
        self.scale = nn.Parameter(torch.ones(()))

    def training_step(self, batch, batch_idx):
        a, b = batch[0].unbind(1)
        return (self.scale * self.ball.dist(self.rows[a], self.rows[b]) - 1).square().mean()


def test_points_under_lightning_go_where_the_loop_by_hand_takes_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = [f"task={__name__}.Embedding", f"data={__name__}.Pairs", "logger=[csv]", "schedule=null"]
    options = ["optimizer=riemannian_adam", "optimizer.lr=0.1", "trainer.max_epochs=2", "trainer.accelerator=cpu"]
    assert main([*places, *options]) == 0
    found = load_checkpoint(next(tmp_path.glob("runs/*")) / "checkpoints" / "last.ckpt")["state_dict"]
    task = Embedding()
    optimizer = RiemannianAdam(task.parameters(), lr=0.1)
    for batch in [*Pairs().train_dataloader()] * 2:
        optimizer.step(Closure(lambda each: task.training_step(each, 0), list(task.parameters()), batch))
    for name, value in task.state_dict().items():
        assert torch.equal(found[name], value), name


# What it refuses.


def test_a_manifold_without_exponential_map_is_named():
    p = geoopt.ManifoldParameter(geoopt.UpperHalf().random(2, 2, dtype=torch.complex64), geoopt.UpperHalf())
    with pytest.raises(ConfigurationError, match="complex"):
        RiemannianAdam([p])

    class Bare(geoopt.Euclidean):
        def expmap(self, x, u):
            raise NotImplementedError

    q = geoopt.ManifoldParameter(torch.ones(1), Bare())
    q.grad = torch.ones_like(q)
    with pytest.raises(ConfigurationError, match="Bare") as caught:
        RiemannianAdagrad([q]).step()
    assert "retraction=True" in caught.value.remedy
    RiemannianAdagrad([q], retraction=True).step()
    assert q.item() == pytest.approx(0.99)


@pytest.mark.parametrize("make", OURS)
def test_sparse_gradients_of_points_are_refused(make):
    p = on(geoopt.PoincareBall(), 3, 2, scale=0.1)
    p.grad = torch.ones(3, 2, dtype=torch.float64).to_sparse()
    with pytest.raises(ConfigurationError, match="sparse"):
        make([p]).step()


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (RiemannianAdam, {"stabilize_every": 0}),
        (RiemannianAdam, {"eps": -1.0}),
        (RiemannianAdagrad, {"eps": 0.0}),
        (RiemannianSGD, {"nesterov": True}),
        (RiemannianSGD, {"momentum": 1.0}),
    ],
)
def test_options_out_of_range(make, options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        make([nn.Parameter(torch.zeros(1))], **options)


def test_a_missing_extra_is_named_by_the_catalogue(monkeypatch):
    ours = [each for each in catalogue_plugin.registered("optimizer") if each.name.startswith("riemannian_")]
    assert len(ours) == 4
    monkeypatch.setattr(catalogue_plugin, "requirements", lambda location, extra: [f"{extra}-library"])
    for each in ours:
        with pytest.raises(PluginError, match=each.name) as caught:
            each.load()
        assert caught.value.remedy == "Run `pip install 'lightrail[manifold]'`."
