"""Adaptive gradient clipping: units, their norms and what is left out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightrail import Closure, TransformedOptimizer
from lightrail.errors import ConfigurationError
from lightrail.traits import traits_of
from lightrail_optimizers import AGC
from lightrail_optimizers.transforms.agc import clip_by_weights_, unit_norms


def clipped(w, g, **options):
    """The gradient after the transform."""
    p = nn.Parameter(w.clone())
    p.grad = g.clone()
    with torch.no_grad():
        AGC(**options).before_step([p], Closure(lambda: p.sum(), [p]))
    return p.grad


def test_each_row_by_the_norm_of_its_own_weights():
    w = torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    g = torch.tensor([[6.0, 8.0], [0.5, 0.0], [3.0, 4.0]], dtype=torch.float64)
    # 0.5 · 5 / 10 = 1/4; 0.5 · 2 / 0.5 > 1; 0.5 · 0.001 / 5 = 1e-4, as if weights of zero were 0.001 long.
    expected = torch.tensor([[1.5, 2.0], [0.5, 0.0], [3e-4, 4e-4]], dtype=torch.float64)
    torch.testing.assert_close(clipped(w, g, clipping=0.5), expected, rtol=0, atol=1e-12)


def test_the_defaults():
    w, g = torch.tensor([[3.0, 4.0]]).double(), torch.tensor([[6.0, 8.0]]).double()
    torch.testing.assert_close(clipped(w, g), g * 0.01 * 5 / 10, rtol=0, atol=1e-15)
    assert clipped(torch.zeros(1, 2).double(), g).norm().item() == pytest.approx(1e-5, rel=1e-12)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 5, 5)])
def test_units_lie_along_the_first_axis(shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    norms = unit_norms(x)
    assert norms.shape == (4, *[1] * (len(shape) - 1))
    torch.testing.assert_close(norms.flatten(), torch.stack([unit.norm() for unit in x]))


@pytest.mark.parametrize("shape", [(), (1,), (5,), (5, 1), (1, 5), (5, 1, 1), (1, 1)])
def test_vectors_are_one_unit(shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    assert unit_norms(x).dim() == 0
    assert unit_norms(x).item() == pytest.approx(x.norm().item())


def test_a_unit_within_the_bound_is_untouched_and_an_infinite_bound_clips_nothing():
    torch.manual_seed(0)
    w, g = torch.randn(6, 4), torch.randn(6, 4)
    assert torch.equal(clipped(w, g, clipping=math.inf), g)
    assert torch.equal(clipped(w, g, clipping=50.0), g)
    assert torch.equal(clipped(w, 0 * g), 0 * g)
    found = clipped(w, g, clipping=1.0)
    is_within = g.norm(dim=1) <= w.norm(dim=1)
    assert 0 < is_within.sum() < 6
    assert torch.equal(found[is_within], g[is_within])
    torch.testing.assert_close(found[~is_within].norm(dim=1), w[~is_within].norm(dim=1))


def test_a_unit_that_is_not_finite_stays_so_and_others_are_clipped():
    w = torch.ones(3, 2)
    found = clipped(w, torch.tensor([[torch.nan, 1.0], [torch.inf, 1.0], [3.0, 4.0]]))
    assert not found[0].isfinite().any()
    assert not found[1].isfinite().all()
    assert found[2].norm().item() == pytest.approx(0.01 * 2**0.5)


def test_norms_of_half_precision_do_not_overflow():
    w, g = torch.full((2, 1000), 3000.0).half(), torch.full((2, 1000), 300.0).half()
    torch.testing.assert_close(clipped(w, g), torch.full((2, 1000), 30.0).half())


@pytest.mark.parametrize("shape", [(7,), (5, 4), (5, 4, 3, 3)])
def test_it_agrees_with_a_peer(shape):
    pytest.importorskip("pytorch_optimizer")
    from pytorch_optimizer.optimizer.agc import agc

    torch.manual_seed(0)
    for scale in (1e-3, 0.02, 1.0):
        w, g = torch.randn(shape, dtype=torch.float64), scale * torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(clipped(w, g), agc(w, g), rtol=0, atol=1e-9)


def _net():
    torch.manual_seed(0)
    model = nn.Module()
    model.body, model.head = nn.Linear(4, 5), nn.Linear(5, 3)
    return model


def _loss(model, x):
    return model.head(model.body(x).tanh()).square().mean()


@pytest.mark.parametrize("exclude", [(), ("head",), ("head.*",), ("h*", "body.bias")])
def test_two_steps_are_those_of_a_loop_by_hand(exclude):
    mine, hand = _net(), _net()
    transform = AGC(exclude=exclude)
    transform.attach(mine)
    optimizer = TransformedOptimizer(torch.optim.SGD(mine.parameters(), lr=0.5, momentum=0.9), [transform])
    by_hand = torch.optim.SGD(hand.parameters(), lr=0.5, momentum=0.9)
    left_out = {"head.weight", "head.bias"} if exclude else set()
    left_out |= {"body.bias"} if "body.bias" in exclude else set()
    x = torch.randn(6, 4)
    for _ in range(3):
        optimizer.step(Closure(lambda: _loss(mine, x), list(mine.parameters())))
        by_hand.zero_grad()
        _loss(hand, x).backward()
        for name, p in hand.named_parameters():
            if name not in left_out:
                assert p.grad is not None
                axes = 1 if p.dim() > 1 else 0
                longest = 0.01 * torch.linalg.vector_norm(p.detach(), dim=axes, keepdim=True).clamp(min=1e-3)
                length = torch.linalg.vector_norm(p.grad, dim=axes, keepdim=True)
                p.grad = p.grad * torch.where(length > longest, longest / length, 1.0)
        by_hand.step()
    assert all(torch.equal(p, q) for p, q in zip(mine.parameters(), hand.parameters(), strict=True))


def test_the_share_of_clipped_units_is_at_hand():
    transform = AGC(clipping=0.5)
    assert transform.logged() == {}
    w, g = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[6.0, 8.0], [0.5, 0.0]])
    p = nn.Parameter(w)
    p.grad = g
    with torch.no_grad():
        transform.before_step([p], Closure(lambda: p.sum(), [p]))
    assert transform.logged() == {"clipped_units": 0.5}


def test_names_that_match_nothing_are_refused():
    transform = AGC(exclude=["heads"])
    transform.attach(_net())
    with pytest.raises(ConfigurationError, match="'heads'") as caught:
        TransformedOptimizer(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1), [transform])
    assert "head.weight" in caught.value.found
    with pytest.raises(ConfigurationError, match="'head'") as caught:  # without `attach` there are no names
        TransformedOptimizer(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1), [AGC(exclude=["head"])])
    assert "attach" in caught.value.remedy


def test_it_needs_the_module_only_to_leave_names_out():
    assert not traits_of(AGC).needs_module
    assert not traits_of(AGC, {"clipping": 0.1}).needs_module
    assert traits_of(AGC, {"exclude": ["head"]}).needs_module


@pytest.mark.parametrize("options", [{"clipping": 0.0}, {"clipping": -1.0}, {"eps": 0.0}, {"eps": math.inf}])
def test_options_out_of_range(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        AGC(**options)


def test_complex_parameters_and_sparse_gradients_are_refused_by_name():
    w = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(ConfigurationError, match="agc does not take complex"):
        AGC().before_step([w], Closure(lambda: w.abs().sum(), [w]))
    table = nn.Embedding(4, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigurationError, match="agc does not take sparse"):
        AGC().before_step([table.weight], Closure(lambda: table.weight.sum(), [table.weight]))


def test_factors_are_one_a_unit():
    w, g = torch.ones(3, 4), torch.ones(3, 4)
    assert clip_by_weights_(w, g, 0.5, 1e-3).flatten().tolist() == pytest.approx([0.5] * 3)
