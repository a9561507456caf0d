"""CVaR: the closed form of one sample, the mean over a batch, and the threshold."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightrail import Closure, TransformedOptimizer
from lightrail.errors import ClosureError, ConfigurationError
from lightrail_optimizers import CVaR
from lightrail_optimizers.transforms.cvar import of_all_ranks, spl_plus, subgradient


def d(*values):
    return torch.tensor(values, dtype=torch.float64)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 3)).double()


def window(step, count):
    torch.manual_seed(100 + step)
    return [(torch.randn(6, 5).double(), torch.randint(3, (6,))) for _ in range(count)]


def losses_of(model):
    return lambda batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def train(model, transforms, count=1, steps=4, lr=0.1):
    optimizer = TransformedOptimizer(torch.optim.SGD(model.parameters(), lr=lr), transforms)
    spent = []
    for step in range(steps):
        fn = losses_of(model)
        closure = Closure(
            lambda batch, fn=fn: fn(batch).mean(), list(model.parameters()), *window(step, count), sample_losses_fn=fn
        )
        torch.manual_seed(step)  # the masks of dropout
        optimizer.step(closure)
        spent.append(closure.evaluations)
    return spent


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def close(a, b):
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


# One sample: beta 0.9, alpha 1, ||g||² 4, lambda 0.05.


@pytest.mark.parametrize(("loss", "coefficient", "threshold"), [(0.8, 0.0, 0.95), (2.0, 0.21, 1.16), (5.0, 0.5, 1.45)])
def test_the_three_cases_of_one_sample(loss, coefficient, threshold):
    u, alpha = spl_plus(d(loss), d(4.0), d(1.0)[0], beta=0.9, step=0.05, threshold_step=0.05)
    assert 0.05 * u.item() == pytest.approx(coefficient, abs=1e-9)
    assert alpha.item() == pytest.approx(threshold, abs=1e-9)


def test_between_the_cases_the_linear_model_ends_on_the_threshold():
    u, alpha = spl_plus(d(2.0), d(4.0), d(1.0)[0], beta=0.9, step=0.05, threshold_step=0.05)
    assert 2.0 - 0.05 * u.item() * 4.0 == pytest.approx(alpha.item(), abs=1e-9)


@pytest.mark.parametrize("loss", [0.2, 0.96, 1.2, 2.0, 2.9, 3.4, 7.0])
@pytest.mark.parametrize(("step", "threshold_step"), [(0.05, 0.05), (0.02, 0.3), (0.4, 0.01)])
def test_it_is_the_minimum_of_the_model(loss, step, threshold_step):
    """min over t along -g and a:  a + B (l + <g, t> - a)_+ + ||t||² / 2s + (a - alpha)² / 2s', by search."""
    beta, alpha, squared_norm = 0.9, 1.0, 4.0

    def model(u, a):
        moved = -step * u * squared_norm
        hinge = max(loss + moved - a, 0.0) / (1 - beta)
        return a + hinge + step * u * u * squared_norm / 2 + (a - alpha) ** 2 / (2 * threshold_step)

    best, threshold = spl_plus(
        d(loss), d(squared_norm), d(alpha)[0], beta=beta, step=step, threshold_step=threshold_step
    )
    u, a = best.item(), threshold.item()
    least = model(u, a)
    for du in (-1e-3, 0.0, 1e-3):
        for da in (-1e-3, -1e-4, 0.0, 1e-4, 1e-3):
            assert model(u + du, a + da) >= least - 1e-12


def test_sgd_takes_the_published_step():
    for loss, coefficient, threshold in ((0.8, 0.0, 0.95), (2.0, 0.21, 1.16), (5.0, 0.5, 1.45)):
        w = nn.Parameter(torch.zeros(4, dtype=torch.float64))
        fn = lambda batch, loss=loss, w=w: loss + w.sum() + torch.zeros(1, dtype=torch.float64)  # noqa: E731
        transform = CVaR(beta=0.9, threshold=1.0, threshold_step=0.05)
        optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=0.05), [transform])
        closure = Closure(lambda batch, fn=fn: fn(batch).mean(), [w], torch.zeros(1), sample_losses_fn=fn)
        optimizer.step(closure)
        assert w.tolist() == pytest.approx([-coefficient] * 4, abs=1e-9)
        assert transform.logged()["threshold"] == pytest.approx(threshold, abs=1e-9)


def test_its_step_is_the_learning_rate_of_the_moment():
    w = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    fn = lambda batch: 2.0 + w.sum() + torch.zeros(1, dtype=torch.float64)  # noqa: E731
    inner = torch.optim.SGD([w], lr=0.5)
    optimizer = TransformedOptimizer(inner, [CVaR(beta=0.9, threshold=1.0)])
    inner.param_groups[0]["lr"] = 0.05  # as a schedule does
    optimizer.step(Closure(lambda batch: fn(batch).mean(), [w], torch.zeros(1), sample_losses_fn=fn))
    assert w.tolist() == pytest.approx([-0.21] * 4, abs=1e-9)


# A batch.


@pytest.mark.parametrize("count", [1, 2])
def test_a_batch_takes_the_mean_of_the_steps_of_its_samples(count):
    ours, theirs = network(), network()
    transform = CVaR(beta=0.6, threshold_step=0.02)
    train(ours, [transform], count)
    alpha = None
    for step in range(4):
        batches = window(step, count)
        torch.manual_seed(step)
        losses = torch.cat([losses_of(theirs)(batch) for batch in batches])
        params = list(theirs.parameters())
        rows = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses]
        if alpha is None:
            alpha = torch.quantile(losses.detach(), 0.6).item()
        steps = []
        for loss, row in zip(losses.tolist(), rows, strict=True):
            squared_norm = sum(g.square().sum().item() for g in row)
            steps.append(min(max((loss - alpha + 0.02) / (0.1 * squared_norm + 0.02), 0.0), 2.5))
        alpha -= 0.02 * (1 - sum(steps) / len(steps))
        with torch.no_grad():
            for i, p in enumerate(params):
                p -= 0.1 * sum(u * row[i] for u, row in zip(steps, rows, strict=True)) / len(rows)
    close(ours, theirs)
    assert transform.logged()["threshold"] == pytest.approx(alpha, abs=1e-9)


@pytest.mark.parametrize("count", [1, 2])
def test_the_subgradient_equals_the_loop_written_by_hand(count):
    ours, theirs, plain = network(), network(), network()
    transform = CVaR(beta=0.6, method="subgradient", threshold_step=0.02)
    assert train(ours, [transform], count) == [3, 3, 3, 3]
    train(plain, [], count)
    alpha = None
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    for step in range(4):
        batches = window(step, count)
        torch.manual_seed(step)
        with torch.no_grad():
            losses = torch.cat([losses_of(theirs)(batch) for batch in batches])
        if alpha is None:
            alpha = torch.quantile(losses, 0.6)
        weights = (losses >= alpha).double() / (1 - 0.6)
        alpha = alpha - 0.02 * (1 - weights.mean())
        torch.manual_seed(step)
        optimizer.zero_grad()
        for batch, w in zip(batches, weights.chunk(count), strict=True):
            ((w * losses_of(theirs)(batch)).mean() / count).backward()
        optimizer.step()
    assert same(ours, theirs)
    assert not same(ours, plain)
    assert alpha is not None
    assert transform.logged()["threshold"] == alpha.item()


def test_a_beta_of_zero_is_the_mean_loss():
    ours, plain = network(), network()
    train(ours, [CVaR(beta=0.0, method="subgradient", threshold=-1.0)], 2)
    train(plain, [], 2)
    close(ours, plain)
    # The least loss of the first batch is not above its own quantile of order 0, and counts all the same.
    losses = d(0.5, 1.0, 2.0)
    w, alpha = subgradient(losses, torch.quantile(losses, 0.0), beta=0.0, threshold_step=0.1)
    assert w.tolist() == [1.0, 1.0, 1.0]
    assert alpha.item() == 0.5


def test_the_tail_counts_and_the_rest_does_not():
    losses = d(*range(1, 11))
    w, alpha = subgradient(losses, d(9.5)[0], beta=0.9, threshold_step=0.2)
    assert w.tolist() == pytest.approx([0.0] * 9 + [10.0])
    assert alpha.item() == pytest.approx(9.5, abs=1e-12)  # a tenth is above it: it stays
    assert subgradient(losses, d(8.5)[0], beta=0.9, threshold_step=0.2)[1].item() == pytest.approx(8.7)
    assert subgradient(losses, d(10.5)[0], beta=0.9, threshold_step=0.2)[1].item() == pytest.approx(10.3)


def test_the_threshold_finds_the_quantile_and_the_figures_say_what_is():
    torch.manual_seed(0)
    draws = torch.rand(20_000, dtype=torch.float64)
    alpha = d(0.2)[0]
    for losses in draws.split(20):
        _, alpha = subgradient(losses, alpha, beta=0.9, threshold_step=0.003)
    assert alpha.item() == pytest.approx(0.9, abs=0.03)

    w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    losses = d(1.0, 2.0, 3.0, 6.0)
    transform = CVaR(beta=0.5, method="subgradient")
    optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=0.1), [transform])
    fn = lambda batch: batch + 0 * w  # noqa: E731
    optimizer.step(Closure(lambda batch: fn(batch).mean(), [w], losses, sample_losses_fn=fn))
    # alpha 2.5; the mean of the worse half is 4.5.
    assert transform.logged() == pytest.approx({"threshold": 2.5, "tail_fraction": 0.5, "cvar": 4.5})


# Ranks, missing gradients, options.


def test_losses_of_all_ranks_stand_in_the_order_of_the_ranks(monkeypatch):
    everywhere = [d(1.0, 2.0, 3.0), d(4.0, 5.0)]

    def all_gather(found, mine):
        for each, values in zip(found, everywhere, strict=True):
            if mine.dim() == 0:
                each.fill_(len(values))
            else:
                each.copy_(torch.cat([values, values.new_zeros(len(mine) - len(values))]))

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    for rank, first in ((0, 0), (1, 3)):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        values, found = of_all_ranks(everywhere[rank])
        assert values.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
        assert found == first


def test_parameters_of_any_shape_and_without_a_gradient():
    used = nn.Parameter(torch.tensor(2.0))
    hollow = nn.Parameter(torch.zeros(0, 3))
    unused, frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False)
    params = [used, hollow, unused, frozen]
    fn = lambda batch: batch * used + hollow.sum() + frozen.sum()  # noqa: E731
    for method in ("spl_plus", "subgradient"):
        optimizer = TransformedOptimizer(torch.optim.SGD(params, lr=0.1, weight_decay=0.1), [CVaR(method=method)])
        before = used.item()
        optimizer.step(Closure(lambda b: fn(b).mean(), params, torch.tensor([1.0, 3.0]), sample_losses_fn=fn))
        assert used.item() != before
        assert unused.grad is None
        assert unused.tolist() == frozen.tolist() == [1.0, 1.0]


def test_a_task_without_losses_of_samples_is_refused_by_name():
    w = nn.Parameter(torch.ones(2))
    optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=0.1), [CVaR()])
    with pytest.raises(ClosureError, match="sample_losses"):
        optimizer.step(Closure(lambda: w.sum(), [w]))


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 1.0},
        {"beta": -0.1},
        {"method": "prox"},
        {"step": 0.0},
        {"threshold_step": 0.0},
    ],
)
def test_options_out_of_range(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        CVaR(**options)


def test_the_threshold_is_saved():
    first = CVaR(beta=0.6)
    train(network(), [first], steps=2)
    second = CVaR(beta=0.6)
    second.load_state_dict(first.state_dict())
    assert second.state_dict()["threshold"].item() == first.logged()["threshold"]
