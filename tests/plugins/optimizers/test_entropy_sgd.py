"""Entropy-SGD: the walk by hand, what it costs, which samples it sees, and its limits."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightrail import Closure, TransformedOptimizer
from lightrail.errors import ClosureError, ConfigurationError
from lightrail.traits import traits_of
from lightrail_optimizers import ClipNorm, EntropySGD
from lightrail_optimizers.sophia_rule import draw_directions
from lightrail_optimizers.transforms.entropy_sgd import langevin_displacement, scope


def network(*extra, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), *extra, nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def batch(step, size=12):
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(size, 5, generator=generator), torch.randint(3, (size,), generator=generator)


def closure_of(model, *batches, module=None):
    return Closure(lambda b: F.cross_entropy(model(b[0]), b[1]), list(model.parameters()), *batches, module=module)


def around_sgd(params, lr=0.1, **options):
    return TransformedOptimizer(torch.optim.SGD(params, lr=lr), [EntropySGD(**options)])


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def walk_in_numpy(h, x, *, steps, lr, gamma, alpha, momentum=0.0, nesterov=True):
    """The published algorithm on h x² / 2, in x' and mu."""
    y, mu, buffer = x.copy(), x.copy(), np.zeros_like(x)
    for _ in range(steps):
        g = h * y
        if momentum:
            buffer = momentum * buffer + g
            g = g + momentum * buffer if nesterov else buffer
        y = y - lr * (g + gamma * (y - x))
        mu = alpha * mu + (1 - alpha) * y
    return x - mu


# The walk.


def test_two_steps_by_hand():
    # x' = 0.8, 0.8 - 0.1 (1.6 - 0.1) = 0.65; mu = 0.95, 0.875.
    x = torch.tensor([1.0], dtype=torch.float64)
    options = {"steps": 2, "lr": 0.1, "gamma": 0.5, "alpha": 0.75}
    (found,) = langevin_displacement(lambda _, u: [2 * (x + u[0])], [x], **options)
    assert found.item() == pytest.approx(0.125, abs=1e-12)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": False}])
def test_the_walk_in_numpy(options):
    h, x = np.array([1.0, 4.0, -0.5]), np.array([1.0, -2.0, 30.0])
    options = {"steps": 20, "lr": 0.1, "gamma": 0.03, "alpha": 0.75, **options}
    start, curvature = torch.from_numpy(x), torch.from_numpy(h)
    (found,) = langevin_displacement(lambda _, u: [curvature * (start + u[0])], [start], **options)
    torch.testing.assert_close(found, torch.from_numpy(walk_in_numpy(h, x, **options)), rtol=0, atol=1e-9)


def test_without_momentum_the_walk_is_geometric():
    h, lr, gamma = 1.5, 0.1, 0.4
    x = torch.tensor([2.0], dtype=torch.float64)
    (found,) = langevin_displacement(
        lambda _, u: [h * (x + u[0])], [x], steps=30, lr=lr, gamma=gamma, alpha=0.0
    )  # with alpha = 0, mu is where the walk ends
    shrink = 1 - lr * (h + gamma)
    assert found.item() == pytest.approx(2 * h / (h + gamma) * (1 - shrink**30), abs=1e-9)


def test_a_long_walk_gives_the_gradient_of_the_envelope():
    w = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    h, gamma = 1.5, 0.4
    optimizer = around_sgd(
        [w], lr=1.0, steps=400, inner_lr=0.3, gamma0=gamma, noise=0.0, multiply_by_gamma=True, batch="window"
    )
    optimizer.step(Closure(lambda: h * (w**2).sum() / 2, [w]))
    # of min over y of h y²/2 + gamma (y - x)²/2
    assert w.item() == pytest.approx(2 - 2 * h * gamma / (h + gamma), abs=1e-9)


@pytest.mark.parametrize("factor", [False, True])
def test_the_pull_ends_where_one_step_undoes_all_before_it(factor):
    assert scope(0, 0.5, 0.0, 10.0) == scope(99, 0.5, 0.0, 10.0) == 0.5
    assert scope(2, 0.03, 1e-3, 10.0) == pytest.approx(0.03 * 1.001**2, rel=1e-15)
    assert scope(10**9, 0.03, 1e-3, 10.0) == 10.0
    assert scope(10**9, 0.0, 1e-3, 10.0) == 0.0
    # There the walk stays at x - η' g, and the gradient is one of SGD's.
    w = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
    optimizer = around_sgd([w], lr=1.0, steps=6, inner_lr=0.5, gamma0=2.0, noise=0.0, multiply_by_gamma=factor)
    optimizer.step(Closure(lambda: 7 * w.sum(), [w]))
    expected = 0.5 * 7 * (1 - 0.75**6) * (2.0 if factor else 1.0)
    assert 3 - w.item() == pytest.approx(expected, abs=1e-12)


def test_the_pull_grows_with_the_steps_and_is_resumed():
    def made():
        w = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
        return w, around_sgd([w], steps=3, gamma0=0.5, gamma1=1.0, noise=0.0)

    w, optimizer = made()
    x = np.array([1.0])
    for t in range(3):
        assert w.item() == pytest.approx(x.item(), abs=1e-12)
        optimizer.step(Closure(lambda: (w**2).sum(), [w]))
        x = x - 0.1 * walk_in_numpy(2.0, x, steps=3, lr=0.1, gamma=0.5 * 2**t, alpha=0.75)
        assert optimizer.transforms[0].logged()["gamma"] == 0.5 * 2**t
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    v, resumed = made()
    with torch.no_grad():
        v.copy_(w)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    optimizer.step(Closure(lambda: (w**2).sum(), [w]))
    resumed.step(Closure(lambda: (v**2).sum(), [v]))
    assert torch.equal(v, w)


def test_the_noise_is_as_strong_as_it_says():
    w = nn.Parameter(torch.zeros(40_000))
    torch.manual_seed(0)
    optimizer = around_sgd([w], lr=1.0, steps=1, inner_lr=0.1, noise=0.01)
    optimizer.step(Closure(lambda: (0 * w).sum(), [w]))
    deviation = 0.25 * 0.01 * math.sqrt(0.2)
    assert w.std().item() == pytest.approx(deviation, rel=4 / math.sqrt(2 * 40_000))
    assert abs(w.mean().item()) < 4 * deviation / 200


def test_small_steps_are_not_lost_in_half_precision():
    w = nn.Parameter(torch.tensor([256.0], dtype=torch.bfloat16))  # its neighbours are 2 away
    optimizer = around_sgd([w], lr=0.0, steps=400, gamma0=0.0, noise=0.0, batch="window")
    optimizer.step(Closure(lambda: w.sum(), [w]))
    assert w.grad is not None
    assert w.grad.item() == pytest.approx(0.1 * (400 - 3), rel=2**-8)  # 0.75 / 0.25 steps behind the end of the walk


# The step.


@pytest.mark.parametrize(("count", "steps"), [(1, 4), (4, 4), (2, 3)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_equals_the_loop_written_by_hand(count, steps, momentum):
    ours, theirs, plain = network(), network(), network()
    optimizer = TransformedOptimizer(
        torch.optim.AdamW(ours.parameters(), lr=0.01),
        [EntropySGD(steps, gamma0=0.5, gamma1=0.1, noise=0.01, momentum=momentum)],
    )
    params = list(theirs.parameters())
    other = torch.optim.AdamW(params, lr=0.01)
    for t in range(3):
        window = [batch(10 * t + i) for i in range(count)]
        torch.manual_seed(t)
        optimizer.step(closure_of(ours, *window))

        torch.manual_seed(t)
        gamma = 0.5 * 1.1**t
        x = [p.detach().clone() for p in params]
        u, nu, buffer = ([torch.zeros_like(p) for p in params] for _ in range(3))
        for step in range(steps):
            seen = [window[step]] if count == steps else [_part(each, step, steps) for each in window]
            for p, x_i, u_i in zip(params, x, u, strict=True):
                p.data = x_i + u_i
                p.grad = None
            for inputs, targets in seen:
                (F.cross_entropy(theirs(inputs), targets) / len(seen)).backward()
            xi = draw_directions(u, "gaussian")
            for i, p in enumerate(params):
                assert p.grad is not None
                g = p.grad.clone()
                if momentum:
                    buffer[i].mul_(momentum).add_(g)
                    g = g.add(buffer[i], alpha=momentum)
                u[i].mul_(1 - 0.1 * gamma).add_(g, alpha=-0.1).add_(xi[i], alpha=-0.01 * math.sqrt(0.2))
                nu[i].lerp_(u[i], 0.25)
        for p, x_i, nu_i in zip(params, x, nu, strict=True):
            p.data = x_i
            p.grad = -nu_i
        other.step()
    assert same(values(ours), [p.detach() for p in params])
    assert not same(values(ours), values(plain))


def _part(whole, index, count):
    return tuple(tensor.tensor_split(count)[index] for tensor in whole)


def test_zero_steps_are_the_optimizer_alone_at_one_evaluation():
    ours, plain = network(nn.Dropout(0.4)), network(nn.Dropout(0.4))
    optimizer = around_sgd(ours.parameters(), steps=0)
    other = TransformedOptimizer(torch.optim.SGD(plain.parameters(), lr=0.1))
    for step in range(3):
        torch.manual_seed(step)
        closure = closure_of(ours, batch(step))
        optimizer.step(closure)
        assert closure.evaluations == 1
        torch.manual_seed(step)
        other.step(closure_of(plain, batch(step)))
    assert same(values(ours), values(plain))


class Watched:
    """A loss that notes which samples it saw."""

    def __init__(self):
        self.w = nn.Parameter(torch.tensor([0.5]))
        self.seen = []

    def step(self, *batches, **options):
        def loss(samples):
            self.seen.append(samples.tolist())
            return (samples * self.w).mean()

        closure = Closure(loss, [self.w], *batches)
        around_sgd([self.w], **options).step(closure)
        return closure.evaluations


def test_each_inner_step_sees_samples_of_its_own_and_all_of_them_cost_one_evaluation():
    watched = Watched()
    assert watched.step(torch.arange(10.0), steps=5) == pytest.approx(2)
    assert watched.seen == [list(range(10)), *([2 * i, 2 * i + 1] for i in range(5))]


def test_micro_batches_are_the_inner_steps_where_there_are_as_many():
    watched = Watched()
    assert watched.step(*torch.arange(8.0).reshape(4, 2), steps=4) == pytest.approx(2)
    assert watched.seen[4:] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    watched = Watched()
    assert watched.step(*torch.arange(4.0).reshape(4, 1), steps=2) == pytest.approx(2)
    assert watched.seen[4:] == [[0], [1], [2], [3]]  # two micro-batches a step


def test_a_small_batch_has_fewer_parts_which_take_turns():
    watched = Watched()
    assert watched.step(torch.arange(5.0), steps=5) == pytest.approx(1 + 5 / 2)
    assert watched.seen[1:] == [[0, 1, 2], [3, 4], [0, 1, 2], [3, 4], [0, 1, 2]]
    watched = Watched()
    assert watched.step(torch.arange(1.0), steps=3) == pytest.approx(4)
    w = nn.Parameter(torch.tensor([0.5]))
    closure = Closure(lambda: (w**2).sum(), [w])
    around_sgd([w], steps=3).step(closure)
    assert closure.evaluations == pytest.approx(4)


def test_the_whole_window_at_each_inner_step():
    watched = Watched()
    assert watched.step(torch.arange(4.0), torch.arange(4.0, 8.0), steps=3, batch="window") == 4
    assert watched.seen == [[0, 1, 2, 3], [4, 5, 6, 7]] * 4
    traits = traits_of(EntropySGD, {"steps": 3, "batch": "window"})
    assert traits.extra_evaluations == 3
    assert not traits.needs_groups


def test_traits_follow_the_options():
    assert EntropySGD.traits.extra_evaluations == 1
    assert EntropySGD.traits.is_stochastic
    assert not traits_of(EntropySGD, {"noise": 0}).is_stochastic
    assert not traits_of(EntropySGD, {"steps": 0}).evaluates_again


@pytest.mark.parametrize("size", [2, 7, 12])
def test_batch_norm_moves_once_and_gets_two_samples_at_least(size):
    model, once = (network(nn.BatchNorm1d(8), nn.Dropout(0.3)) for _ in range(2))
    around_sgd(model.parameters(), steps=5).step(closure_of(model, batch(0, size), module=model))
    once(batch(0, size)[0])
    for mine, expected in zip(model.buffers(), once.buffers(), strict=True):
        assert torch.equal(mine, expected)


def test_in_a_chain_the_walk_sees_what_transforms_before_it_made():
    w = nn.Parameter(torch.tensor([0.0], dtype=torch.float64))
    entropy = EntropySGD(steps=3, gamma0=0.0, noise=0.0, alpha=0.0)
    optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=1.0), [ClipNorm(1.0), entropy])
    optimizer.step(Closure(lambda: 100 * w.sum(), [w]))
    assert w.item() == pytest.approx(-0.3, abs=1e-12)
    assert entropy.logged() == {"gamma": 0.0, "distance": pytest.approx(0.3)}


def test_missing_gradients_and_frozen_parameters_stay():
    used, unused, frozen = (nn.Parameter(torch.ones(3)) for _ in range(3))
    frozen.requires_grad_(False)
    params = [unused, used, frozen]
    optimizer = around_sgd(params, noise=1.0)
    optimizer.step(Closure(lambda b: (b * used * frozen).mean(), params, torch.randn(8, 3)))
    assert unused.grad is None
    assert frozen.grad is None
    assert unused.tolist() == frozen.tolist() == [1.0] * 3
    assert bool((used != 1).all())


def test_a_seed_repeats_the_noise_and_another_does_not():
    def path(seed):
        model = network()
        torch.manual_seed(seed)
        around_sgd(model.parameters(), noise=0.1).step(closure_of(model, batch(0)))
        return values(model)

    assert same(path(1), path(1))
    assert not same(path(1), path(2))


def test_what_it_cannot_do_is_refused_by_name():
    w = nn.Parameter(torch.ones(2))
    w.grad = torch.ones(2)
    with pytest.raises(ClosureError, match="evaluates the loss again"):
        around_sgd([w]).step()
    assert w.tolist() == [1.0, 1.0]
    table = nn.Embedding(4, 2, sparse=True)
    with pytest.raises(ConfigurationError, match="entropy_sgd does not take sparse"):
        around_sgd(table.parameters()).step(
            Closure(lambda b: table(b).sum(), list(table.parameters()), torch.arange(4))
        )


@pytest.mark.parametrize(
    "options",
    [
        {"steps": -1},
        {"inner_lr": 0.0},
        {"gamma0": 11.0},
        {"gamma0": -1.0},
        {"gamma1": -0.1},
        {"alpha": 1.0},
        {"noise": -1.0},
        {"momentum": 1.0},
        {"batch": "half"},
        {"multiply_by_gamma": True, "gamma0": 0.0},
    ],
)
def test_options_out_of_range(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        EntropySGD(**options)
