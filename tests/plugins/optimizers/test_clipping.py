"""Clipping of the norm and of single coordinates."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightrail import Closure, TransformedOptimizer
from lightrail.errors import ConfigurationError
from lightrail.traits import traits_of
from lightrail_optimizers import ClipNorm, CoordinateClip
from lightrail_optimizers.tensor_lists import global_norm
from lightrail_optimizers.transforms.coordinate_clip import magnitude_quantile


def clipped(transform, *gradients):
    """The gradients after the transform, through a step of SGD at rate 1 from zero."""
    params = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    optimizer = TransformedOptimizer(torch.optim.SGD(params, lr=1.0), [transform])
    optimizer.step(
        Closure(lambda: torch.stack([(p * g).sum() for p, g in zip(params, gradients, strict=True)]).sum(), params)
    )
    return [-p.detach() for p in params]


# The norm.


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
def test_the_norm_is_kept_to_and_agrees_with_torch(norm_type):
    torch.manual_seed(0)
    gradients = [torch.randn(3, 4, dtype=torch.float64), torch.randn((), dtype=torch.float64), torch.zeros(0).double()]
    found = clipped(ClipNorm(0.5, norm_type), *gradients)
    flat = torch.cat([g.flatten() for g in found])
    assert torch.linalg.vector_norm(flat, norm_type).item() == pytest.approx(0.5, abs=1e-12)
    params = [nn.Parameter(torch.zeros_like(g)) for g in gradients[:2]]
    for p, g in zip(params, gradients, strict=False):
        p.grad = g.clone()
    nn.utils.clip_grad_norm_(params, 0.5, norm_type)
    for mine, p in zip(found, params, strict=False):
        torch.testing.assert_close(mine, p.grad, rtol=1e-5, atol=0)


def test_a_small_gradient_is_untouched_and_zero_stays_zero():
    g = torch.randn(50)
    assert torch.equal(clipped(ClipNorm(1e3), g)[0], g)
    assert torch.equal(clipped(ClipNorm(1.0), torch.zeros(3))[0], torch.zeros(3))


def test_the_norm_before_clipping_is_at_hand():
    transform = ClipNorm(1.0)
    assert transform.logged() == {}
    clipped(transform, torch.tensor([30.0, 40.0]))
    assert transform.logged() == {"gradient_norm": 50.0}


def test_norms_of_half_precision_do_not_overflow():
    assert global_norm([torch.full((1000,), 300.0, dtype=torch.float16)]).item() == pytest.approx(300 * 1000**0.5)
    assert global_norm([]).item() == 0.0


@pytest.mark.parametrize("options", [{"max_norm": 0.0}, {"norm_type": 0.0}, {"norm_type": float("nan")}])
def test_norm_options_out_of_range(options):
    with pytest.raises(ConfigurationError):
        ClipNorm(**options)


# Coordinates.


def test_a_threshold_clips_magnitudes():
    g = torch.tensor([-3.0, 0.5, 2.0, -0.1])
    assert clipped(CoordinateClip(threshold=1.0), g)[0].tolist() == pytest.approx([-1.0, 0.5, 1.0, -0.1])


def test_the_limits_are_the_gradient_and_its_sign():
    torch.manual_seed(0)
    g = torch.randn(4, 5, dtype=torch.float64)
    assert torch.equal(clipped(CoordinateClip(threshold=math.inf), g)[0], g)
    assert torch.equal(clipped(CoordinateClip(quantile=1.0), g)[0], g)
    tau = 1e-8
    assert torch.equal(clipped(CoordinateClip(threshold=tau), g)[0] / tau, g.sign())
    smallest = g.abs().min()
    assert torch.equal(clipped(CoordinateClip(quantile=0.0), g)[0], g.sign() * smallest)


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_nine_tenths_of_one_to_ten_clips_the_ten_alone(scope):
    g = torch.arange(1.0, 11.0, dtype=torch.float64) * torch.tensor([1.0, -1.0] * 5, dtype=torch.float64)
    expected = g.clone()
    expected[-1] = -9.1
    torch.testing.assert_close(clipped(CoordinateClip(quantile=0.9, scope=scope), g)[0], expected, rtol=0, atol=1e-9)


def test_scopes_differ_over_several_tensors():
    small, large = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 30.0])
    each = clipped(CoordinateClip(quantile=0.5), small, large)
    assert [g.tolist() for g in each] == [[1.0, 2.0, 2.0], [10.0, 20.0, 20.0]]
    together = clipped(CoordinateClip(quantile=0.5, scope="global"), small, large)
    assert [g.tolist() for g in together] == [[1.0, 2.0, 3.0], [6.5, 6.5, 6.5]]


@pytest.mark.parametrize("count", [1, 2, 10, 1001])
@pytest.mark.parametrize("q", [0.0, 0.1, 0.37, 0.5, 0.9, 1.0])
def test_the_quantile_is_torchs(count, q):
    torch.manual_seed(count)
    g = torch.randn(count, dtype=torch.float64)
    torch.testing.assert_close(magnitude_quantile(g, q), torch.quantile(g.abs(), q), rtol=0, atol=1e-12)


@pytest.mark.parametrize("q", [0.0, 0.25, 0.3, 0.5, 0.6, 0.75, 0.8, 0.99, 1.0])
def test_the_quantile_of_repeated_magnitudes_is_torchs(q):
    for values in ([1.0] * 7, [0.0, 0.0, 0.0, 5.0], [1.0, -1.0, 2.0, -2.0, 2.0], [3.0, -1.0, 3.0, 3.0, 9.0]):
        g = torch.tensor(values, dtype=torch.float64)
        torch.testing.assert_close(magnitude_quantile(g, q), torch.quantile(g.abs(), q), rtol=0, atol=1e-12)


def test_more_entries_than_torch_quantile_takes():
    count = 2**24 + 1
    g = torch.arange(count, dtype=torch.int32).float().neg_()
    with pytest.raises(RuntimeError):
        torch.quantile(g, 0.5)
    assert magnitude_quantile(g, 0.5).item() == pytest.approx((count - 1) / 2)


def test_odd_shapes_and_half_precision():
    assert clipped(CoordinateClip(threshold=1.0), torch.tensor(-5.0))[0].item() == -1.0
    assert clipped(CoordinateClip(quantile=0.5), torch.zeros(0, 3))[0].shape == (0, 3)
    assert clipped(CoordinateClip(quantile=0.5), torch.tensor([1.0, 8.0, 2.0]).bfloat16())[0].tolist() == [1, 2, 2]
    strided = torch.arange(1.0, 13.0).reshape(3, 4).t()
    assert clipped(CoordinateClip(threshold=5.0), strided)[0].tolist() == strided.clamp(max=5.0).tolist()


def test_without_options_a_tenth_is_clipped():
    assert CoordinateClip().quantile == 0.9


@pytest.mark.parametrize(
    "options",
    [{"threshold": 1.0, "quantile": 0.5}, {"threshold": 0.0}, {"quantile": 1.5}, {"quantile": 0.5, "scope": "layer"}],
)
def test_coordinate_options_out_of_range(options):
    with pytest.raises(ConfigurationError):
        CoordinateClip(**options)


def test_the_largest_threshold_is_at_hand():
    transform = CoordinateClip(quantile=0.5)
    assert transform.logged() == {}
    clipped(transform, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 30.0]))
    assert transform.logged() == {"largest_threshold": 20.0}


@pytest.mark.parametrize("transform", [ClipNorm(1.0), CoordinateClip(threshold=1.0), CoordinateClip(quantile=0.5)])
def test_complex_parameters_and_sparse_gradients_are_refused_by_name(transform):
    name = "clip_norm" if isinstance(transform, ClipNorm) else "coordinate_clip"
    w = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(ConfigurationError, match=f"{name} does not take complex"):
        transform.before_step([w], Closure(lambda: w.abs().sum(), [w]))
    table = nn.Embedding(4, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigurationError, match=f"{name} does not take sparse"):
        transform.before_step([table.weight], Closure(lambda: table.weight.sum(), [table.weight]))


def test_only_quantiles_need_whole_tensors():
    assert traits_of(CoordinateClip).needs_whole_tensors
    assert traits_of(CoordinateClip, {"quantile": 0.5}).needs_whole_tensors
    assert not traits_of(CoordinateClip, {"threshold": 0.5}).needs_whole_tensors


def test_parameters_without_gradient_are_passed_over():
    used, unused = nn.Parameter(torch.tensor([5.0])), nn.Parameter(torch.tensor([5.0]))
    for transform in (ClipNorm(1.0), CoordinateClip(threshold=1.0), CoordinateClip(quantile=0.5, scope="global")):
        optimizer = TransformedOptimizer(torch.optim.SGD([used, unused], lr=0.0), [transform])
        optimizer.step(Closure(lambda: used.sum(), [used, unused]))
    assert unused.grad is None
