# pyright: reportArgumentType=false
"""A penalty on the gradient's norm: the exact gradient by autograd, the differences by hand, their reductions."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightrail import Closure, TransformedOptimizer
from lightrail.errors import ClosureError, ConfigurationError
from lightrail.traits import traits_of
from lightrail_optimizers.transforms.clip_norm import ClipNorm
from lightrail_optimizers.transforms.gradient_regularization import GradientRegularization

DIFFERENCES = ["forward", "backward", "exact"]
CURVATURES = torch.tensor([1.0, 4.0], dtype=torch.float64)


def network(*extra, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), *extra, nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def window(step, count, dtype=torch.float32):
    torch.manual_seed(100 + step)
    return [(torch.randn(6, 5).to(dtype), torch.randint(3, (6,))) for _ in range(count)]


def loss_of(model):
    return lambda batch: F.cross_entropy(model(batch[0]), batch[1])


def train(model, transforms, count=1, steps=4):
    optimizer = TransformedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), transforms)
    for step in range(steps):
        batches = window(step, count)
        torch.manual_seed(step)
        closure = Closure(loss_of(model), list(model.parameters()), *batches, module=model)
        optimizer.step(closure)
    return model


def by_hand(model, count, gamma, epsilon, steps=4):
    """With ``epsilon`` below 0 for a backward difference."""
    params = list(model.parameters())
    optimizer = torch.optim.SGD(params, lr=0.1)

    def gradient(step):
        torch.manual_seed(step)
        optimizer.zero_grad()
        for batch in batches:
            (loss_of(model)(batch) / count).backward()
        return [p.grad.clone() for p in params]

    for step in range(steps):
        batches = window(step, count)
        x = [p.detach().clone() for p in params]
        g = gradient(step)
        with torch.no_grad():
            for p, g_i in zip(params, g, strict=True):
                p.add_(epsilon * g_i)
        elsewhere = gradient(step)
        with torch.no_grad():
            for p, x_i, a, b in zip(params, x, g, elsewhere, strict=True):
                p.copy_(x_i)
                p.grad = b if gamma == epsilon else a.lerp(b, gamma / epsilon)
        optimizer.step()
    return model


def gradient_after(model, transform, count=1, step=0):
    dtype = next(model.parameters()).dtype
    closure = Closure(loss_of(model), list(model.parameters()), *window(step, count, dtype))
    closure()
    with torch.no_grad():
        transform.before_step(closure.params, closure)
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def penalized_by_autograd(model, gamma, count=1):
    """The gradient of ``L + gamma/2 ||∇L||²``, L the mean over the micro-batches."""
    params = list(model.parameters())
    loss = torch.stack([loss_of(model)(b) for b in window(0, count, params[0].dtype)]).mean()
    g = torch.autograd.grad(loss, params, create_graph=True)
    objective = loss + gamma / 2 * sum((g_i**2).sum() for g_i in g)
    return torch.cat([each.flatten() for each in torch.autograd.grad(objective, params)])


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("difference", DIFFERENCES)
@pytest.mark.parametrize("epsilon", [0.01, 0.1, 0.5, 3.0])
def test_the_gradient_of_a_quadratic_whatever_the_distance(difference, epsilon):
    w = nn.Parameter(torch.ones(2, dtype=torch.float64))
    closure = Closure(lambda: (CURVATURES * w**2).sum() / 2, [w])
    transform = GradientRegularization(gamma=0.5, epsilon=epsilon, difference=difference)
    assert transform.logged() == {}
    closure()
    with torch.no_grad():
        transform.before_step([w], closure)
    torch.testing.assert_close(w.grad, torch.tensor([1.5, 12.0], dtype=torch.float64), rtol=0, atol=1e-12)
    assert closure.evaluations == 2
    figures = transform.logged()
    assert figures["gradient_norm"] == pytest.approx(17**0.5)
    assert figures["penalty"] == pytest.approx(0.25 * 17)
    assert figures["curvature"] == pytest.approx((1 + 4**3) / 17)  # gᵀHg / ||g||²


@pytest.mark.parametrize("count", [1, 2])
def test_the_exact_one_is_the_gradient_of_the_penalized_loss(count):
    model = network(dtype=torch.float64)
    found = gradient_after(model, GradientRegularization(gamma=0.3, difference="exact"), count)
    torch.testing.assert_close(found, penalized_by_autograd(model, 0.3, count), rtol=0, atol=1e-12)


def test_the_differences_approach_it_from_two_sides():
    model = network(dtype=torch.float64)
    exact = penalized_by_autograd(model, 0.3)
    errors = {}
    for epsilon in (1e-2, 1e-3):
        for difference in ("forward", "backward"):
            rule = GradientRegularization(gamma=0.3, epsilon=epsilon, difference=difference)
            errors[difference, epsilon] = gradient_after(model, rule) - exact
    for difference in ("forward", "backward"):
        ratio = errors[difference, 1e-3].norm() / errors[difference, 1e-2].norm()
        assert float(ratio) == pytest.approx(0.1, rel=0.05)  # first order
    cosine = F.cosine_similarity(errors["forward", 1e-3], errors["backward", 1e-3], dim=0)
    assert float(cosine) < -0.99


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("difference", "sign"), [("forward", 1), ("backward", -1)])
def test_equals_the_loop_written_by_hand(count, difference, sign):
    rule = GradientRegularization(gamma=0.05, epsilon=0.2, difference=difference)
    ours = train(network(nn.Dropout(0.3)), [rule], count)
    assert same(ours, by_hand(network(nn.Dropout(0.3)), count, 0.05, sign * 0.2))
    assert not same(ours, train(network(nn.Dropout(0.3)), [], count))


def test_with_one_distance_for_both_it_is_sam_with_an_unnormalized_step():
    ours = train(network(), [GradientRegularization(gamma=0.3, epsilon=0.3)], 2)
    assert same(ours, by_hand(network(), 2, 0.3, 0.3))


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_without_strength_it_is_the_optimizer_alone(difference):
    options = {"gamma": 0.0, "difference": difference}
    assert same(train(network(), [GradientRegularization(**options)], 2), train(network(), [], 2))
    w = nn.Parameter(torch.ones(2))
    closure = Closure(lambda: (w**2).sum(), [w])
    TransformedOptimizer(torch.optim.SGD([w], lr=0.1), [GradientRegularization(**options)]).step(closure)
    assert closure.evaluations == 1
    assert traits_of(GradientRegularization, options).extra_evaluations == 0
    assert not traits_of(GradientRegularization, options).evaluates_again


def test_only_the_exact_one_needs_second_derivatives():
    assert not traits_of(GradientRegularization).needs_second_derivatives
    assert not traits_of(GradientRegularization, {"difference": "backward"}).needs_second_derivatives
    assert traits_of(GradientRegularization, {"difference": "exact"}).needs_second_derivatives


def test_it_ends_where_gradients_are_smaller():
    norms = []
    for transforms in ([], [GradientRegularization(gamma=0.5, epsilon=0.1)]):
        torch.manual_seed(0)
        w = nn.Parameter(torch.tensor([1.5, 1.5]))

        # Every point of xy = 1 is a minimum; it is flattest where x = y, and steepest gradients are far from there.
        def noisy(batch):
            return (w[0] * w[1] - 1 + batch).square().mean() / 2  # noqa: B023

        with torch.no_grad():
            w.copy_(torch.tensor([3.0, 0.5]))
        optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=0.02), transforms)
        for _ in range(300):
            optimizer.step(Closure(noisy, [w], torch.randn(1)))
        norms.append(float(w.detach().square().sum()))  # the top eigenvalue on the valley's floor
    assert norms[1] < 0.8 * norms[0]


def test_missing_gradients_stay_missing():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    for difference in DIFFERENCES:
        rule = GradientRegularization(difference=difference)
        optimizer = TransformedOptimizer(torch.optim.SGD([unused, used], lr=0.1), [rule])
        optimizer.step(Closure(lambda: (used**2).sum(), [unused, used]))
        assert unused.grad is None
    assert unused.tolist() == [1.0, 1.0, 1.0]


def test_a_gradient_of_zero_stays_zero():
    w = nn.Parameter(torch.zeros(2))
    for difference in DIFFERENCES:
        rule = GradientRegularization(difference=difference)
        TransformedOptimizer(torch.optim.SGD([w], lr=0.1), [rule]).step(Closure(lambda: (w**2).sum(), [w]))
        assert w.tolist() == [0.0, 0.0]
        assert rule.logged()["curvature"] == 0.0


def test_differences_include_what_comes_before_them():
    w = nn.Parameter(torch.ones(2, dtype=torch.float64))
    closure = Closure(lambda: (CURVATURES * w**2).sum() / 2, [w])
    rule = GradientRegularization(gamma=0.1, epsilon=0.1)
    TransformedOptimizer(torch.optim.SGD([w], lr=1.0), [ClipNorm(0.5), rule]).step(closure)
    assert (1 - w.detach()).norm().item() == pytest.approx(0.5)


def test_options_out_of_range_and_what_it_cannot_take():
    for options in ({"gamma": -0.1}, {"epsilon": 0.0}, {"difference": "central"}):
        with pytest.raises(ConfigurationError, match=next(iter(options))):
            GradientRegularization(**options)
    w = nn.Parameter(torch.ones(2))
    w.grad = torch.ones(2)
    for difference in DIFFERENCES:
        rule = GradientRegularization(difference=difference)
        with pytest.raises(ClosureError, match="evaluates the loss again"):
            TransformedOptimizer(torch.optim.SGD([w], lr=0.1), [rule]).step()
    embedding = nn.Embedding(4, 2, sparse=True)
    closure = Closure(lambda: embedding(torch.tensor([1])).sum(), [embedding.weight])
    with pytest.raises(ConfigurationError, match="gradient_regularization does not take sparse"):
        TransformedOptimizer(torch.optim.SGD([embedding.weight], lr=0.1), [GradientRegularization()]).step(closure)
