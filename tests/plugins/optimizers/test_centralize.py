"""Gradient centralization: which means are taken, and from what."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightrail import Closure, TransformedOptimizer
from lightrail.errors import ConfigurationError
from lightrail_optimizers import Centralize
from lightrail_optimizers.transforms.centralize import centralize_


def centralized(g, **options):
    """The gradient after the transform."""
    p = nn.Parameter(torch.zeros_like(g))
    p.grad = g.clone()
    with torch.no_grad():
        Centralize(**options).before_step([p], Closure(lambda: p.sum(), [p]))
    return p.grad


def test_each_row_loses_its_own_mean():
    g = torch.tensor([[1.0, 2.0, 6.0], [0.0, -1.0, 1.0]], dtype=torch.float64)
    assert centralized(g).tolist() == [[-2.0, -1.0, 3.0], [0.0, -1.0, 1.0]]


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 5, 5), (4, 3, 2, 2, 2)])
def test_filters_of_any_number_of_axes(shape):
    torch.manual_seed(0)
    g = torch.randn(shape, dtype=torch.float64)
    found = centralized(g)
    for unit, before in zip(found, g, strict=True):
        torch.testing.assert_close(unit, before - before.sum() / before.numel(), rtol=0, atol=1e-12)
    torch.testing.assert_close(centralized(found), found, rtol=0, atol=1e-12)  # a projection


@pytest.mark.parametrize("shape", [(), (1,), (5,), (5, 1), (5, 1, 1), (0, 3), (3, 0)])
def test_vectors_and_units_with_one_weight_are_left_alone(shape):
    torch.manual_seed(0)
    g = torch.randn(shape)
    assert torch.equal(centralized(g), g)


def test_only_weights_of_enough_axes():
    torch.manual_seed(0)
    matrix, kernel = torch.randn(3, 4), torch.randn(3, 4, 3, 3)
    assert torch.equal(centralized(matrix, min_axes=4), matrix)
    assert torch.equal(centralized(kernel, min_axes=4), centralized(kernel))
    assert not torch.equal(centralized(kernel), kernel)


def test_the_mean_of_half_precision_is_not_rounded():
    torch.manual_seed(0)
    g = (torch.randn(3, 500) + 20).bfloat16()
    wide = g.float()
    assert torch.equal(centralized(g), (wide - wide.mean(1, keepdim=True)).bfloat16())


def test_means_of_weights_stay_where_they_began():
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).double()
    start = layer.weight.detach().mean(1).clone()
    optimizer = TransformedOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9), [Centralize()])
    x = torch.randn(6, 4).double() + 1
    for _ in range(20):
        optimizer.step(Closure(lambda: (layer(x) - 3).square().mean(), list(layer.parameters())))
    torch.testing.assert_close(layer.weight.detach().mean(1), start, rtol=0, atol=1e-12)


def test_it_agrees_with_a_peer():
    pytest.importorskip("pytorch_optimizer")
    from pytorch_optimizer.optimizer.gradient_centralization import centralize_gradient

    torch.manual_seed(0)
    for shape in ((5,), (5, 4), (5, 4, 3, 3)):
        g = torch.randn(shape, dtype=torch.float64)
        theirs = g.clone()
        centralize_gradient(theirs, gc_conv_only=False)
        torch.testing.assert_close(centralized(g), theirs, rtol=0, atol=1e-9)


def test_two_steps_are_those_of_a_loop_by_hand():
    def problem():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2))

    mine, hand = problem(), problem()
    optimizer = TransformedOptimizer(torch.optim.AdamW(mine.parameters(), lr=0.01), [Centralize()])
    by_hand = torch.optim.AdamW(hand.parameters(), lr=0.01)
    x = torch.randn(6, 2, 4, 4)
    for _ in range(3):
        optimizer.step(Closure(lambda: mine(x).square().mean(), list(mine.parameters())))
        by_hand.zero_grad()
        hand(x).square().mean().backward()
        for p in hand.parameters():
            if p.dim() > 1:
                assert p.grad is not None
                p.grad = p.grad - p.grad.mean(dim=tuple(range(1, p.dim())), keepdim=True)
        by_hand.step()
    assert all(torch.equal(p, q) for p, q in zip(mine.parameters(), hand.parameters(), strict=True))


def test_the_norm_of_what_is_removed_is_at_hand():
    transform = Centralize()
    assert transform.logged() == {}
    p = nn.Parameter(torch.zeros(2, 2))
    p.grad = torch.tensor([[1.0, 5.0], [4.0, 4.0]])
    with torch.no_grad():
        transform.before_step([p], Closure(lambda: p.sum(), [p]))
    assert transform.logged() == pytest.approx({"norm_of_removed_means": (2 * 9 + 2 * 16) ** 0.5})


def test_complex_gradients_have_means_too():
    g = torch.tensor([[1 + 1j, 3 - 1j]])
    assert centralize_(g).item() == 2
    assert g.tolist() == [[-1 + 1j, 1 - 1j]]


@pytest.mark.parametrize("axes", [1, 2.5, "2"])
def test_options_out_of_range(axes):
    with pytest.raises(ConfigurationError, match="min_axes"):
        Centralize(min_axes=axes)


def test_sparse_gradients_are_refused_by_name():
    table = nn.Embedding(4, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigurationError, match="centralize does not take sparse"):
        Centralize().before_step([table.weight], Closure(lambda: table.weight.sum(), [table.weight]))
