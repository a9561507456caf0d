# pyright: reportArgumentType=false
"""SAM: equal to the hand-written loop bit for bit, whatever else the loop does."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightrail import Closure, TransformedOptimizer
from lightrail.errors import ClosureError, ConfigurationError
from lightrail.traits import traits_of
from lightrail_optimizers import SAM, ClipNorm
from lightrail_optimizers.transforms.sam import climb


def network(*extra):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), *extra, nn.Tanh(), nn.Linear(8, 3))


def window(step, count):
    torch.manual_seed(100 + step)
    return [(torch.randn(6, 5), torch.randint(3, (6,))) for _ in range(count)]


def loss_of(model):
    return lambda batch: F.cross_entropy(model(batch[0]), batch[1])


def train(model, transforms, count=1, steps=4, optimizer_class=torch.optim.SGD, module=None):
    optimizer = TransformedOptimizer(optimizer_class(model.parameters(), lr=0.1), transforms)
    losses = []
    for step in range(steps):
        batches = window(step, count)
        torch.manual_seed(step)  # the masks of dropout
        losses.append(optimizer.step(Closure(loss_of(model), list(model.parameters()), *batches, module=module)))
    return losses


def by_hand(model, rho, count, steps=4, optimizer_class=torch.optim.SGD):
    params = list(model.parameters())
    optimizer = optimizer_class(params, lr=0.1)

    def backward(batches):
        optimizer.zero_grad()
        for batch in batches:
            (loss_of(model)(batch) / count).backward()

    for step in range(steps):
        batches = window(step, count)
        torch.manual_seed(step)
        backward(batches)
        with torch.no_grad():
            origin = [p.clone() for p in params]
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p.grad) for p in params]))
            for p in params:
                p.copy_(p + (rho / norm) * p.grad)
        torch.manual_seed(step)
        backward(batches)
        with torch.no_grad():
            for p, x in zip(params, origin, strict=True):
                p.copy_(x)
        optimizer.step()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_equals_the_loop_written_by_hand(count, optimizer_class):
    ours, theirs, plain = network(), network(), network()
    train(ours, [SAM(rho=0.2)], count, optimizer_class=optimizer_class)
    by_hand(theirs, 0.2, count, optimizer_class=optimizer_class)
    train(plain, [], count, optimizer_class=optimizer_class)
    assert same(ours, theirs)
    assert not same(ours, plain)


@pytest.mark.parametrize("count", [1, 3])
def test_dropout_masks_are_the_same_at_both_points(count):
    ours, theirs = network(nn.Dropout(0.4)), network(nn.Dropout(0.4))
    train(ours, [SAM(rho=0.2)], count, module=ours)
    by_hand(theirs, 0.2, count)
    assert same(ours, theirs)


@pytest.mark.parametrize("count", [1, 3])
def test_statistics_move_once_and_masks_are_replayed(count):
    seen: list[torch.Tensor] = []

    class Seeing(nn.Dropout):
        def forward(self, *inputs):
            mask = super().forward(torch.ones_like(inputs[0]))
            seen.append(mask)
            return inputs[0] * mask

    model = network(nn.BatchNorm1d(8), Seeing(0.5))
    once = network(nn.BatchNorm1d(8), nn.Dropout(0.5))
    train(model, [SAM(rho=0.2)], count, steps=1, module=model)
    for batch in window(0, count):
        once(batch[0])
    assert len(seen) == 2 * count
    assert all(torch.equal(a, b) for a, b in zip(seen[:count], seen[count:], strict=True))
    for mine, expected in zip(model[1].buffers(), once[1].buffers(), strict=True):
        assert torch.equal(mine, expected)


def test_radius_zero_is_the_optimizer_alone():
    ours, plain = network(nn.Dropout(0.4)), network(nn.Dropout(0.4))
    assert train(ours, [SAM(rho=0.0)], 2) == train(plain, [], 2)
    assert same(ours, plain)


def test_the_loss_returned_is_the_one_where_the_step_began():
    assert train(network(), [SAM(rho=0.5)], steps=1) == train(network(), [], steps=1)


def test_two_evaluations_a_step():
    w = nn.Parameter(torch.ones(2))
    closure = Closure(lambda: (w**2).sum(), [w])
    TransformedOptimizer(torch.optim.SGD([w], lr=0.1), [SAM()]).step(closure)
    assert closure.evaluations == 2


def test_after_clipping_and_before_it():
    w = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))

    def step(transforms):
        with torch.no_grad():
            w.copy_(torch.tensor([3.0, 4.0]))
        TransformedOptimizer(torch.optim.SGD([w], lr=1.0), transforms).step(Closure(lambda: (w**2).sum() / 2, [w]))
        return (torch.tensor([3.0, 4.0], dtype=torch.float64) - w).detach().norm().item()

    assert step([SAM(rho=1.0)]) == pytest.approx(6.0)
    assert step([SAM(rho=1.0), ClipNorm(2.0)]) == pytest.approx(2.0)
    assert step([ClipNorm(2.0), SAM(rho=1.0)]) == pytest.approx(2.0)


def test_adaptive_by_hand_and_its_invariance():
    x, g = torch.tensor([2.0, -1.0], dtype=torch.float64), torch.tensor([1.0, 3.0], dtype=torch.float64)
    norm = (4.0 + 9.0) ** 0.5  # || |x| g ||
    expected = x + 0.5 * torch.tensor([4.0, 3.0], dtype=torch.float64) / norm
    torch.testing.assert_close(climb([x], [g], 0.5, adaptive=True)[0], expected, rtol=0, atol=1e-12)
    # Parameters times c have gradients over c: the point moves along.
    c = torch.tensor([10.0, 0.1], dtype=torch.float64)
    torch.testing.assert_close(climb([x * c], [g / c], 0.5, adaptive=True)[0], expected * c, rtol=1e-12, atol=0)


def test_one_norm_over_all_parameters_and_missing_gradients_stay():
    x = [torch.zeros(1), torch.zeros(()), torch.ones(2), torch.zeros(0)]
    points = climb(x, [torch.tensor([3.0]), torch.tensor(4.0), None, torch.zeros(0)], 1.0)
    torch.testing.assert_close(points[0], torch.tensor([0.6]))
    torch.testing.assert_close(points[1], torch.tensor(0.8))
    assert torch.equal(points[2], x[2])


def test_a_gradient_of_zero_stays_where_it_is():
    x = torch.tensor([1.0, 2.0])
    assert torch.equal(climb([x], [torch.zeros(2)], 1e10)[0], x)


def test_a_plain_closure_is_refused_by_name():
    w = nn.Parameter(torch.ones(2))
    w.grad = torch.ones(2)
    optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=0.1), [SAM()])
    with pytest.raises(ClosureError, match="evaluates the loss again"):
        optimizer.step()
    assert w.tolist() == [1.0, 1.0]
    with pytest.raises(ConfigurationError, match="rho"):
        SAM(rho=-0.1)


@pytest.mark.parametrize("adaptive", [False, True])
def test_agrees_with_pytorch_optimizer(adaptive):
    theirs_module = pytest.importorskip("pytorch_optimizer")
    ours, theirs = network().double(), network().double()
    optimizer = theirs_module.SAM(theirs.parameters(), torch.optim.SGD, rho=0.2, adaptive=adaptive, lr=0.1)
    mine = TransformedOptimizer(torch.optim.SGD(ours.parameters(), lr=0.1), [SAM(rho=0.2, adaptive=adaptive)])
    for step in range(4):
        ((x, y),) = window(step, 1)
        batch = (x.double(), y)
        mine.step(Closure(loss_of(ours), list(ours.parameters()), batch))

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = loss_of(theirs)(batch)
            loss.backward()
            return loss

        closure()
        optimizer.step(closure)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_the_sharpness_is_logged_and_exact_on_a_quadratic():
    curvatures = torch.tensor([1.0, 4.0], dtype=torch.float64)
    for adaptive in (False, True):
        w = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        transform = SAM(rho=0.3, adaptive=adaptive)
        assert transform.logged() == {}
        g = curvatures * w.detach()
        e = climb([w], [g], 0.3, adaptive)[0] - w.detach()
        risen = (curvatures * ((w.detach() + e) ** 2 - w.detach() ** 2)).sum() / 2
        closure = Closure(lambda: (curvatures * w**2).sum() / 2, [w])  # noqa: B023
        TransformedOptimizer(torch.optim.SGD([w], lr=0.1), [transform]).step(closure)
        norm = (g * torch.tensor([1.0, 2.0])).norm() if adaptive else g.norm()
        assert transform.logged() == {
            "gradient_norm": pytest.approx(norm.item()),
            "sharpness": pytest.approx(risen.item(), rel=1e-12),
        }
        assert closure.evaluations == 2


def test_the_sharpness_is_that_of_the_losses_on_a_network():
    model = network().double()
    batch = (window(0, 1)[0][0].double(), window(0, 1)[0][1])
    for parts in (1, 2):
        transform = SAM(rho=0.05, parts=parts)
        closure = Closure(loss_of(model), list(model.parameters()), batch)
        gaps = []
        for j in range(parts):
            with closure.part(j, parts):
                loss, g = closure.gradient()
                with closure.at(climb(closure.params, g, 0.05)):
                    gaps.append(float(closure.loss() - loss))
        closure()
        with torch.no_grad():
            transform.before_step(closure.params, closure)
        assert transform.logged()["sharpness"] == pytest.approx(sum(gaps) / parts, rel=1e-3)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_each_part_climbs_by_its_own_gradient(count):
    """Two parts are the halves of a micro-batch, or of the micro-batches where these divide."""
    ours, theirs, together = network(), network(), network()
    params = list(theirs.parameters())
    optimizer = torch.optim.SGD(params, lr=0.1)

    def gradient(batches):
        losses = torch.stack([loss_of(theirs)(batch) for batch in batches])
        return torch.autograd.grad(losses.mean(), params)

    for step in range(4):
        batches = window(step, count)
        halves = [[(x[j], y[j]) for x, y in batches] for j in (slice(0, 3), slice(3, 6))]
        if count == 4:
            halves = [batches[:2], batches[2:]]
        x = [p.detach().clone() for p in params]
        total = [torch.zeros_like(p) for p in params]
        for half in halves:
            points = climb(x, gradient(half), 0.2)
            with torch.no_grad():
                torch._foreach_copy_(params, points)
            torch._foreach_add_(total, gradient(half), alpha=0.5)
            with torch.no_grad():
                torch._foreach_copy_(params, x)
        for p, g in zip(params, total, strict=True):
            p.grad = g
        optimizer.step()
    train(ours, [SAM(rho=0.2, parts=2)], count)
    train(together, [SAM(rho=0.2)], count)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert not all(
        torch.allclose(a, b, rtol=0, atol=1e-4) for a, b in zip(ours.parameters(), together.parameters(), strict=True)
    )


def test_parts_cost_a_third_evaluation_and_must_divide_the_batch():
    model = network()
    closure = Closure(loss_of(model), list(model.parameters()), *window(0, 1))
    TransformedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), [SAM(parts=3)]).step(closure)
    assert closure.evaluations == pytest.approx(3)
    assert traits_of(SAM, {"parts": 3}).extra_evaluations == 2
    assert traits_of(SAM, {"parts": 3}).needs_groups
    closure = Closure(loss_of(model), list(model.parameters()), *window(0, 1))
    with pytest.raises(ClosureError, match="divided"):
        TransformedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), [SAM(parts=7)]).step(closure)


def test_half_precision_climbs_as_far_as_single():
    g = torch.full((4096,), 1.0, dtype=torch.bfloat16)  # a reach of 1/3 / 64 has no short form
    (point,) = climb([torch.zeros(4096, dtype=torch.bfloat16)], [g], 1 / 3)
    assert point.dtype == torch.bfloat16
    exact = torch.tensor(1 / 3 / 64)
    assert torch.equal(point, exact.bfloat16().expand(4096))
    tiny = torch.full((4,), 6e-8, dtype=torch.float16)  # a reach beyond what half precision can hold
    (point,) = climb([torch.zeros(4, dtype=torch.float16)], [tiny], 0.5)
    assert point.tolist() == [0.25] * 4


def test_sparse_gradients_and_complex_parameters_are_refused_by_name():
    embedding = nn.Embedding(4, 2, sparse=True)
    closure = Closure(lambda: embedding(torch.tensor([1])).sum(), [embedding.weight])
    with pytest.raises(ConfigurationError, match="sam does not take sparse"):
        TransformedOptimizer(torch.optim.SGD([embedding.weight], lr=0.1), [SAM()]).step(closure)
    z = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(ConfigurationError, match="sam does not take complex"):
        TransformedOptimizer(torch.optim.SGD([z], lr=0.1), [SAM()]).step(Closure(lambda: z.abs().sum(), [z]))
    with pytest.raises(ConfigurationError, match="parts"):
        SAM(parts=0)
