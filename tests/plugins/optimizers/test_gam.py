# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false, reportOptionalOperand=false
"""GAM: the published numbers, its reductions, and the loop written by hand, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightrail import Closure, TransformedOptimizer
from lightrail.errors import ClosureError, ConfigurationError
from lightrail.traits import traits_of
from lightrail_optimizers.first_order_flatness import first_order_flatness
from lightrail_optimizers.transforms.clip_norm import ClipNorm
from lightrail_optimizers.transforms.fad import FAD
from lightrail_optimizers.transforms.gam import GAM, gam_gradient
from lightrail_optimizers.transforms.sam import SAM

CURVATURES = torch.tensor([1.0, 4.0], dtype=torch.float64)


def quadratic():
    """``½ (x² + 4 y²)`` at (1, 1)."""
    w = nn.Parameter(torch.ones(2, dtype=torch.float64))
    return w, Closure(lambda: (CURVATURES * w**2).sum() / 2, [w])


def gradient_after(transform, closure):
    closure()
    with torch.no_grad():
        transform.before_step(closure.params, closure)
    return closure.params[0].grad


def four_by_numpy(rho, rho_prime):
    h = np.array([1.0, 4.0])
    unit = lambda v: v / np.linalg.norm(v)  # noqa: E731
    x = np.ones(2)
    g0 = h * x
    g1 = h * (x + rho_prime * unit(g0))
    y = x + rho * unit(g1 - g0)
    g2 = h * y
    return g0, g1, g2, h * (y + rho_prime * unit(g2))


def network(*extra, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), *extra, nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def window(step, count):
    torch.manual_seed(100 + step)
    return [(torch.randn(6, 5), torch.randint(3, (6,))) for _ in range(count)]


def loss_of(model):
    return lambda batch: F.cross_entropy(model(batch[0]), batch[1])


def train(model, transforms, count=1, steps=4, optimizer_class=torch.optim.SGD):
    optimizer = TransformedOptimizer(optimizer_class(model.parameters(), lr=0.1), transforms)
    for step in range(steps):
        batches = window(step, count)
        torch.manual_seed(step)
        optimizer.step(Closure(loss_of(model), list(model.parameters()), *batches, module=model))
    return model


def by_hand(model, count, rho, rho_prime, alpha, beta, gamma, steps=4, optimizer_class=torch.optim.SGD):
    params = list(model.parameters())
    optimizer = optimizer_class(params, lr=0.1)

    def gradient(batches, step):
        torch.manual_seed(step)
        optimizer.zero_grad()
        for batch in batches:
            (loss_of(model)(batch) / count).backward()
        return [p.grad.clone() for p in params]

    def norm(tensors):
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t) for t in tensors]))

    def dot(a, b):
        return torch.stack([torch.dot(s.flatten(), t.flatten()) for s, t in zip(a, b, strict=True)]).sum()

    def go(points):
        with torch.no_grad():
            for p, point in zip(params, points, strict=True):
                p.copy_(point)

    def towards(points, direction, radius):
        reach = radius / norm(direction)
        return [p.detach() + reach * d for p, d in zip(points, direction, strict=True)]

    for step in range(steps):
        batches = window(step, count)
        x = [p.detach().clone() for p in params]
        g0 = gradient(batches, step)
        go(towards(x, g0, rho_prime))
        g1 = gradient(batches, step)
        y = towards(x, [a - b for a, b in zip(g1, g0, strict=True)], rho)
        go(y)
        g2 = gradient(batches, step)
        go(towards(y, g2, rho_prime))
        g3 = gradient(batches, step)
        go(x)
        a = [s.lerp(t, 1 - alpha) for s, t in zip(g1, g3, strict=True)]
        p = [s.clone().add_(t, alpha=1 - beta) for s, t in zip(g0, g2, strict=True)]
        k = 1 + gamma * (dot(p, a) / dot(a, a))
        for parameter, s, t in zip(params, a, p, strict=True):
            parameter.grad = (s * k).add_(t, alpha=-gamma)
        optimizer.step()
    return model


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_the_numbers_of_the_published_code_with_its_bare_weights():
    w, closure = quadratic()
    closure()
    found = first_order_flatness(closure, [w], rho=0.2, rho_prime=0.02)
    for mine, expected in zip((found.g0, found.g1, found.g2, found.g3), four_by_numpy(0.2, 0.02), strict=True):
        np.testing.assert_allclose(mine[0].numpy(), expected, rtol=0, atol=1e-12)
    (direction,) = gam_gradient(found.g0, found.g1, found.g2, found.g3, (1.0, 1.0, 1.0, 1.0), gamma=0.03)
    torch.testing.assert_close(
        direction, torch.tensor([2.0207072406, 8.9544988630], dtype=torch.float64), rtol=0, atol=1e-9
    )
    # Weights that sum to two make a gradient twice as long.
    assert float(direction.norm() / closure.params[0].grad.norm()) == pytest.approx(2.2, abs=0.05)


def test_one_step_of_the_defaults_by_numpy():
    w, closure = quadratic()
    TransformedOptimizer(torch.optim.SGD([w], lr=0.1), [GAM()]).step(closure)
    g0, g1, g2, g3 = four_by_numpy(0.2, 0.02)
    a, p = 0.6 * g1 + 0.4 * g3, g0 + 0.5 * g2
    expected = 1 - 0.1 * (a - 0.03 * (p - (p @ a) / (a @ a) * a))
    np.testing.assert_allclose(w.detach().numpy(), expected, rtol=0, atol=1e-12)


def test_the_difference_is_the_gradient_of_the_norm_at_the_worst_point():
    w, closure = quadratic()
    closure()
    found = first_order_flatness(closure, [w], rho=0.2, rho_prime=0.02)
    g2, g3 = found.g2[0], found.g3[0]
    torch.testing.assert_close((g3 - g2) / 0.02, CURVATURES * g2 / g2.norm(), rtol=0, atol=1e-12)
    assert found.figures["flatness"].item() == pytest.approx(0.2 * g2.norm().item())
    e = 0.02 * found.g0[0] / found.g0[0].norm()
    risen = (CURVATURES * ((1 + e) ** 2 - 1)).sum() / 2
    assert found.figures["sharpness"].item() == pytest.approx(risen.item(), rel=1e-12)


def test_what_is_climbed_is_orthogonal_to_what_is_descended():
    torch.manual_seed(0)
    g = [[torch.randn(3, 4, dtype=torch.float64), torch.randn((), dtype=torch.float64)] for _ in range(4)]
    a = gam_gradient(*g, (1.0, 0.6, 0.5, 0.4), gamma=0.0)
    whole = gam_gradient(*g, (1.0, 0.6, 0.5, 0.4), gamma=0.3)
    sideways = [s - t for s, t in zip(whole, a, strict=True)]
    inner = sum((s * t).sum() for s, t in zip(sideways, a, strict=True))
    assert float(inner) == pytest.approx(0, abs=1e-12)
    assert sum(float(s.norm()) for s in sideways) > 0.01
    p = [s + 0.5 * t for s, t in zip(g[0], g[2], strict=True)]
    assert float(sum((s * t).sum() for s, t in zip(sideways, p, strict=True))) < 0


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_equals_the_loop_written_by_hand(count, optimizer_class):
    options = {"rho": 0.3, "rho_prime": 0.1, "alpha": 0.7, "beta": 0.25, "gamma": 0.2}
    ours = train(network(nn.Dropout(0.3)), [GAM(**options)], count, optimizer_class=optimizer_class)
    theirs = by_hand(network(nn.Dropout(0.3)), count, **options, optimizer_class=optimizer_class)
    assert same(ours, theirs)
    assert not same(ours, train(network(nn.Dropout(0.3)), [], count, optimizer_class=optimizer_class))


@pytest.mark.parametrize("adaptive", [False, True])
def test_without_first_order_flatness_it_is_sam(adaptive):
    ours = train(network(), [GAM(rho_prime=0.1, alpha=1.0, gamma=0.0, adaptive=adaptive)], 2)
    assert same(ours, train(network(), [SAM(rho=0.1, adaptive=adaptive)], 2))
    assert not same(ours, train(network(), [], 2))


@pytest.mark.parametrize(
    ("options", "spent"),
    [({}, 4), ({"alpha": 1.0}, 3), ({"alpha": 1.0, "beta": 1.0}, 2), ({"alpha": 1.0, "gamma": 0.0}, 2)],
)
def test_only_what_has_a_weight_is_evaluated(options, spent):
    w, closure = quadratic()
    TransformedOptimizer(torch.optim.SGD([w], lr=0.1), [GAM(**options)]).step(closure)
    assert closure.evaluations == spent
    assert traits_of(GAM, options).extra_evaluations == spent - 1


def test_normalized_it_has_the_length_of_the_gradient_and_its_own_direction():
    plain, normalized = (quadratic()[1] for _ in range(2))
    free, held = gradient_after(GAM(), plain), gradient_after(GAM(normalize=True), normalized)
    assert held.norm().item() == pytest.approx(17**0.5, rel=1e-12)
    torch.testing.assert_close(held / held.norm(), free / free.norm(), rtol=0, atol=1e-12)


def test_the_stretch_is_logged_before_it_is_taken_out():
    figures = []
    for normalize in (False, True):
        transform = GAM(normalize=normalize)
        assert transform.logged() == {}
        gradient = gradient_after(transform, quadratic()[1])
        figures.append(transform.logged())
    assert figures[0] == figures[1]
    assert figures[0]["gradient_norm"] == pytest.approx(17**0.5)
    assert figures[0]["stretch"] > 1.01
    assert gradient.norm().item() == pytest.approx(17**0.5)
    assert set(figures[0]) == {"gradient_norm", "sharpness", "flatness", "stretch"}


@pytest.mark.parametrize(
    ("make", "radii"),
    [
        (lambda r, **o: GAM(rho=r[0], rho_prime=r[1], **o), (0.4, 0.1)),
        (lambda r, **o: FAD(rho=r[0], rho_prime=r[1], **o), (0.4, 0.1)),
        (lambda r, **o: SAM(rho=r[0], **o), (0.4,)),
    ],
)
@pytest.mark.parametrize("is_resumed", [False, True])
def test_radii_follow_the_learning_rate(make, radii, is_resumed):
    def step_at(transform, share):
        w, closure = quadratic()
        optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=0.2), [transform])
        if is_resumed:  # loading replaces the groups
            optimizer.load_state_dict(optimizer.state_dict())
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: share)
        optimizer.step(closure)
        return w.detach()

    following = step_at(make(radii, radius_follows_lr=True), 0.25)
    smaller = make([radius / 4 for radius in radii])
    assert torch.equal(following, step_at(smaller, 0.25))
    assert not torch.equal(following, step_at(make(radii), 0.25))
    assert torch.equal(step_at(make(radii, radius_follows_lr=True), 1.0), step_at(make(radii), 1.0))


def test_a_rate_that_a_schedule_has_moved_already_counts_from_its_start():
    w, closure = quadratic()
    inner = torch.optim.SGD([w], lr=0.2)
    torch.optim.lr_scheduler.LambdaLR(inner, lambda _: 0.5)
    transform = SAM(rho=0.4, radius_follows_lr=True)
    TransformedOptimizer(inner, [transform]).step(closure)
    other, closure = quadratic()
    TransformedOptimizer(torch.optim.SGD([other], lr=0.1), [SAM(rho=0.2)]).step(closure)
    assert torch.equal(w, other)


def test_at_a_radius_of_zero_nothing_breaks():
    w, closure = quadratic()
    transform = GAM(radius_follows_lr=True)
    optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=0.2), [transform])
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step(closure)
    assert w.tolist() == [1.0, 1.0]
    assert transform.logged()["stretch"] == pytest.approx(1.0)


def test_a_gradient_of_zero_stays_zero():
    w = nn.Parameter(torch.zeros(2))
    for transform in (GAM(), GAM(normalize=True), FAD()):
        TransformedOptimizer(torch.optim.SGD([w], lr=0.1), [transform]).step(Closure(lambda: (w**2).sum(), [w]))
        assert w.tolist() == [0.0, 0.0]


def test_one_norm_over_all_parameters_and_missing_gradients_stay_missing():
    parts = [nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2)]
    unused = nn.Parameter(torch.ones(3))

    def loss():
        return (parts[0] ** 2 + 4 * parts[1] ** 2).sum() / 2

    closure = Closure(loss, [parts[0], unused, parts[1]])
    TransformedOptimizer(torch.optim.SGD(closure.params, lr=0.1), [GAM()]).step(closure)
    w, other = quadratic()
    TransformedOptimizer(torch.optim.SGD([w], lr=0.1), [GAM()]).step(other)
    torch.testing.assert_close(torch.cat(parts), w, rtol=0, atol=1e-12)
    assert unused.grad is None
    assert unused.tolist() == [1.0, 1.0, 1.0]


def test_every_evaluation_passes_through_the_transforms_before_it():
    w, closure = quadratic()
    TransformedOptimizer(torch.optim.SGD([w], lr=1.0), [ClipNorm(0.5), GAM(alpha=0.5, gamma=0.0)]).step(closure)
    # The mean of two clipped gradients is no longer than either.
    assert 0.45 < (1 - w.detach()).norm().item() <= 0.5


def test_half_precision_is_combined_in_single():
    ours, exact = network(dtype=torch.bfloat16), network()
    with torch.no_grad():
        for p, q in zip(exact.parameters(), ours.parameters(), strict=True):
            p.copy_(q)
    x, y = window(0, 1)[0]
    found = []
    for model, inputs in ((ours, x.bfloat16()), (exact, x)):
        closure = Closure(loss_of(model), list(model.parameters()), (inputs, y))
        gradient_after(GAM(rho=0.5, rho_prime=0.5), closure)
        found.append(torch.cat([p.grad.flatten().float() for p in model.parameters()]))
    assert all(p.grad.dtype == torch.bfloat16 for p in ours.parameters())
    assert F.cosine_similarity(found[0], found[1], dim=0) > 0.999


def test_options_out_of_range_and_what_it_cannot_take():
    for options in ({"rho": 0.0}, {"rho_prime": -1.0}, {"alpha": 1.1}, {"beta": -0.1}, {"gamma": -1.0}):
        with pytest.raises(ConfigurationError, match=next(iter(options))):
            GAM(**options)
    w = nn.Parameter(torch.ones(2))
    w.grad = torch.ones(2)
    with pytest.raises(ClosureError, match="evaluates the loss again"):
        TransformedOptimizer(torch.optim.SGD([w], lr=0.1), [GAM()]).step()
    z = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(ConfigurationError, match="gam does not take complex"):
        TransformedOptimizer(torch.optim.SGD([z], lr=0.1), [GAM()]).step(Closure(lambda: z.abs().sum(), [z]))
