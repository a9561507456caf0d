"""perpGrad: nothing along the weights, and no round-off in its place."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightrail import Closure, TransformedOptimizer
from lightrail.errors import ConfigurationError
from lightrail_optimizers import PerpGrad
from lightrail_optimizers.problems.modular_addition import ModularAddition
from lightrail_optimizers.transforms.perp_grad import perpendicular_

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def stepped(w, g, lr=0.1, **options):
    """The weights after a step of SGD from ``w`` with the gradient ``g``."""
    p = nn.Parameter(w.clone())
    optimizer = TransformedOptimizer(torch.optim.SGD([p], lr=lr), [PerpGrad(**options)])
    optimizer.step(Closure(lambda: (p * g).sum(), [p]))
    return p.detach()


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def batches(count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(8, 5, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(3, (8,), generator=generator),
        )
        for _ in range(count)
    ]


# The numbers.


def test_a_step_from_3_4():
    w, g = torch.tensor([3.0, 4.0]).double(), torch.tensor([1.0, 0.0]).double()
    # g_perp = (0.64, -0.48) of norm 0.8; back at norm 1 it is (0.8, -0.6).
    assert stepped(w, g).tolist() == pytest.approx([2.92, 4.06], abs=1e-12)
    assert stepped(w, g, rescale=False).tolist() == pytest.approx([2.936, 4.048], abs=1e-12)


@pytest.mark.parametrize("rescale", [True, False])
def test_it_is_perpendicular_tensor_by_tensor(rescale):
    torch.manual_seed(0)
    w = [torch.randn(4, 3).double(), torch.randn(6).double(), torch.randn(2, 3, 3).double().transpose(0, 2)]
    g = [torch.randn_like(w_i) for w_i in w]
    before = [g_i.clone() for g_i in g]
    share = perpendicular_(w, g, rescale)
    along = torch.stack([(w_i * b).sum() ** 2 / (w_i * w_i).sum() for w_i, b in zip(w, before, strict=True)]).sum()
    assert share.item() == pytest.approx((along / sum(b.square().sum() for b in before)).item(), abs=1e-12)
    for w_i, g_i, b in zip(w, g, before, strict=True):
        assert (w_i * g_i).sum().abs() < 1e-14 * w_i.norm() * g_i.norm()
        if rescale:
            assert g_i.norm().item() == pytest.approx(b.norm().item(), rel=1e-14)
        else:
            torch.testing.assert_close(g_i, b - (w_i * b).sum() / (w_i * w_i).sum() * w_i, rtol=0, atol=1e-14)


def test_without_a_part_along_the_weights_the_gradient_stays():
    g = [torch.tensor([-4.0, 3.0])]
    assert perpendicular_([torch.tensor([3.0, 4.0])], g).item() == 0.0
    assert g[0].tolist() == [-4.0, 3.0]


def test_the_share_along_the_weights_is_at_hand():
    transform = PerpGrad()
    assert transform.logged() == {}
    p = nn.Parameter(torch.tensor([3.0, 4.0]))
    TransformedOptimizer(torch.optim.SGD([p], lr=0.1), [transform]).step(Closure(lambda: p[0], [p]))
    assert transform.logged() == pytest.approx({"gradient_along_weights": 0.36})


# Where nothing is perpendicular.


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_single_element_is_left_alone(shape):
    for value in (0.7, -1e-3, 3.3333):
        g = [torch.full(shape, value)]
        assert perpendicular_([torch.full(shape, 0.3)], g).item() == 0.0
        assert torch.equal(g[0], torch.full(shape, value))


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [2, 3, 100, 30_000])
def test_round_off_is_not_taken_for_a_direction(count, dtype, rescale):
    torch.manual_seed(count)
    for factor in (-3.1, 0.37, 1 / 3):
        w = (torch.randn(count, dtype=torch.float64) * 0.05 + 0.02).to(dtype)
        g = [(w.double() * factor).to(dtype)]
        perpendicular_([w], g, rescale)
        assert torch.equal(g[0], torch.zeros_like(w))


def test_round_off_over_a_million_entries():
    torch.manual_seed(0)
    w = torch.randn(1_000_000) * 0.05
    g = [-3.1 * w]
    assert perpendicular_([w], g).item() == pytest.approx(1.0, rel=1e-4)
    assert not g[0].any()


def test_a_small_angle_that_is_no_round_off_is_kept():
    torch.manual_seed(0)
    w, direction = torch.randn(1000), torch.randn(1000)
    direction -= (w @ direction) / (w @ w) * w
    direction /= direction.norm()
    g = [5 * w / w.norm() + 1e-3 * direction]
    perpendicular_([w], g)
    assert g[0].norm().item() == pytest.approx(5.0, rel=1e-3)
    assert (g[0] @ direction / g[0].norm()).item() > 0.999


def test_weights_of_zero_leave_the_gradient_as_it_is():
    torch.manual_seed(0)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        g = [torch.randn(5, 4).to(dtype)]
        expected = g[0].clone()
        assert perpendicular_([torch.zeros(5, 4, dtype=dtype)], g).item() == 0.0
        assert torch.equal(g[0], expected)


def test_a_gradient_of_zero_stays_zero_and_one_that_is_not_finite_stays_so():
    w = torch.tensor([1.0, 2.0, 3.0])
    g = [torch.zeros(3), torch.tensor([torch.nan, 1.0, 1.0]), torch.tensor([torch.inf, 1.0, 1.0])]
    share = perpendicular_([w, w, w], g)
    assert torch.equal(g[0], torch.zeros(3))
    assert not g[1].isfinite().any()
    assert not g[2].isfinite().all()
    assert share.isnan()
    assert perpendicular_([w], [torch.zeros(3)]).item() == 0.0


def test_half_precision_is_worked_out_in_single():
    torch.manual_seed(0)
    w, g = torch.randn(300).bfloat16(), torch.randn(300).bfloat16()
    wide, narrow, other = [g.float()], [g.clone()], [torch.randn(3).double()]
    perpendicular_([w.float()], wide)
    perpendicular_([w, torch.ones(3).double()], [narrow[0], other[0]])  # kinds may be mixed
    assert torch.equal(narrow[0], wide[0].bfloat16())
    assert abs(other[0].sum().item()) < 1e-15


# In a loop.


def test_two_steps_are_those_of_a_loop_by_hand():
    mine, hand = net(), net()
    optimizer = TransformedOptimizer(torch.optim.AdamW(mine.parameters(), lr=0.01), [PerpGrad()])
    by_hand = torch.optim.AdamW(hand.parameters(), lr=0.01)
    for x, y in batches(3):
        optimizer.step(
            Closure(lambda b: nn.functional.cross_entropy(mine(b[0]), b[1]), list(mine.parameters()), (x, y))
        )
        by_hand.zero_grad()
        nn.functional.cross_entropy(hand(x), y).backward()
        with torch.no_grad():
            for w in hand.parameters():
                assert w.grad is not None
                g = w.grad.clone()
                u = g.addcmul(w, (w * g).sum() / (w * w).sum(), value=-1)
                w.grad.copy_(u * (torch.linalg.vector_norm(g) / torch.linalg.vector_norm(u)))
        by_hand.step()
    for p, q in zip(mine.parameters(), hand.parameters(), strict=True):
        assert torch.equal(p, q)


def test_it_agrees_with_a_peer():
    peer = pytest.importorskip("pytorch_optimizer")
    mine, theirs = net(torch.float64), net(torch.float64)
    optimizer = TransformedOptimizer(torch.optim.SGD(mine.parameters(), lr=0.1), [PerpGrad()])
    reference = peer.OrthoGrad(torch.optim.SGD(theirs.parameters(), lr=0.1))
    for x, y in batches(4, torch.float64):
        optimizer.step(
            Closure(lambda b: nn.functional.cross_entropy(mine(b[0]), b[1]), list(mine.parameters()), (x, y))
        )
        reference.zero_grad()
        nn.functional.cross_entropy(theirs(x), y).backward()
        reference.step()
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


class _Task(LightningModule):
    def __init__(self, make):
        super().__init__()
        self.net, self._make = net(), make

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return self._make(list(self.net.parameters()))


@pytest.mark.parametrize("inner", [torch.optim.SGD, torch.optim.AdamW])
def test_under_lightning_it_is_not_the_optimizer_alone(inner):
    # Lightning's closure computes the gradient inside of `step`: an edit before `step` would be lost without a word.
    def trained(transforms):
        task = _Task(lambda params: TransformedOptimizer(inner(params, lr=0.05), transforms))
        trainer = Trainer(
            max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, accelerator="cpu",
        )  # fmt: skip
        loader: Any = DataLoader(batches(4), batch_size=None)  # type: ignore[arg-type]
        trainer.fit(task, loader)
        return [p.detach() for p in task.net.parameters()]

    alone, with_it = trained([]), trained([PerpGrad()])
    assert all((p - q).abs().max() > 1e-4 for p, q in zip(alone, with_it, strict=True))
    by_hand = net()
    optimizer = TransformedOptimizer(inner(by_hand.parameters(), lr=0.05), [PerpGrad()])
    for x, y in batches(4):
        optimizer.step(
            Closure(lambda b: nn.functional.cross_entropy(by_hand(b[0]), b[1]), list(by_hand.parameters()), (x, y))
        )
    assert all(torch.equal(p, q) for p, q in zip(with_it, by_hand.parameters(), strict=True))


def test_a_network_that_adds_modulo_47_generalises_with_it_only():
    accuracies = []
    for transforms in ([], [PerpGrad()]):
        torch.manual_seed(1)
        problem = ModularAddition()
        optimizer = TransformedOptimizer(torch.optim.AdamW(problem.groups(named=False), lr=1e-2), transforms)
        for step in range(100):
            optimizer.step(problem.closure(step))
        accuracies.append(1 - problem.merit())
    assert accuracies[0] < 0.05
    assert accuracies[1] > 0.5


# Refusals.


def test_complex_parameters_and_sparse_gradients_are_refused_by_name():
    w = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(ConfigurationError, match="perp_grad does not take complex"):
        PerpGrad().before_step([w], Closure(lambda: w.abs().sum(), [w]))
    table = nn.Embedding(4, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigurationError, match="perp_grad does not take sparse"):
        PerpGrad().before_step([table.weight], Closure(lambda: table.weight.sum(), [table.weight]))
