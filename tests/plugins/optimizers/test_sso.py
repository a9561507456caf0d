"""SSO: the surrogate, the steps on it, and where the optimizer arrives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightrail import Closure, TransformedOptimizer
from lightrail.errors import ClosureError, ConfigurationError
from lightrail_optimizers import SSO
from lightrail_optimizers.transforms.sso import descend, descend_by_search, surrogate


class Task(nn.Module):
    def __init__(self, *extra):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 8), *extra, nn.Tanh(), nn.Linear(8, 3))
        self.double()

    def outputs(self, batch):
        return self.net(batch[0])

    def output_loss(self, outputs, batch):
        return F.cross_entropy(outputs, batch[1])

    def loss(self, batch):
        return self.output_loss(self.outputs(batch), batch)

    def closure(self, *batches):
        return Closure(
            self.loss,
            list(self.parameters()),
            *batches,
            module=self,
            outputs_fn=self.outputs,
            output_loss_fn=self.output_loss,
        )


def window(step, count):
    torch.manual_seed(100 + step)
    return [(torch.randn(6, 5).double(), torch.randint(3, (6,))) for _ in range(count)]


def train(task, transforms, count=1, steps=3, lr=0.2, optimizer_class=torch.optim.SGD):
    optimizer = TransformedOptimizer(optimizer_class(task.parameters(), lr=lr), transforms)
    for step in range(steps):
        batches = window(step, count)
        torch.manual_seed(step)
        optimizer.step(task.closure(*batches))
    return [p.detach().clone() for p in task.parameters()]


def by_hand(task, m, eta, lr, count, steps=3):
    """Inner steps on q with the parameters moved in place; SGD would arrive there."""
    params = list(task.parameters())
    for step in range(steps):
        batches = window(step, count)
        linear = []
        torch.manual_seed(step)
        for batch in batches:
            z = task.outputs(batch).detach().requires_grad_()
            linear.append((z.detach(), torch.autograd.grad(task.output_loss(z, batch), z)[0]))
        for _ in range(m):
            torch.manual_seed(step)  # the masks of dropout
            q = torch.zeros((), dtype=torch.float64)
            for batch, (z_t, d) in zip(batches, linear, strict=True):
                z = task.outputs(batch)
                q = q + ((d * z).sum() + (z - z_t).square().sum() / (2 * eta * len(z))) / count
            with torch.no_grad():
                for p, g in zip(params, torch.autograd.grad(q, params), strict=True):
                    p -= lr * g
    return [p.detach().clone() for p in params]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def close(a, b, atol=1e-12):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=atol)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("m", [2, 5])
def test_sgd_arrives_where_the_steps_written_by_hand_arrive(m, count):
    found = train(Task(nn.Dropout(0.3)), [SSO(steps=m, target_lr=0.7, inner_lr=0.2)], count)
    close(found, by_hand(Task(nn.Dropout(0.3)), m, 0.7, 0.2, count))


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_one_step_is_the_optimizer_alone(optimizer_class):
    plain = train(Task(nn.Dropout(0.3)), [], 2, optimizer_class=optimizer_class)
    found = train(Task(nn.Dropout(0.3)), [SSO(steps=1)], 2, optimizer_class=optimizer_class)
    assert same(found, plain)


def test_the_gradient_of_the_surrogate_where_it_begins_is_that_of_the_loss():
    task, (batch,) = Task(), window(0, 1)
    z = task.outputs(batch)
    z_t = z.detach().requires_grad_()
    (d,) = torch.autograd.grad(task.output_loss(z_t, batch), z_t)
    params = list(task.parameters())
    q = surrogate(z, z.detach(), d, 0.3)
    assert q.item() == 0.0
    close(torch.autograd.grad(q, params), torch.autograd.grad(task.loss(batch), params), atol=1e-15)


def test_the_surrogate_by_hand():
    z, z_t = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).double(), torch.tensor([[0.0, 2.0], [3.0, 2.0]]).double()
    d = torch.tensor([[0.5, 1.0], [0.0, -0.25]]).double()
    # <d, z - z_t> = 0.5 - 0.5 and ||z - z_t||² = 5, two samples.
    assert surrogate(z, z_t, d, 0.5).item() == pytest.approx(5 / (2 * 0.5 * 2), abs=1e-15)
    # A scalar output a sample; a text of four bytes has four samples.
    assert surrogate(z[0], z_t[0], d[0], 0.5).item() == pytest.approx(0.5 + 1 / (2 * 0.5 * 2), abs=1e-15)
    assert surrogate(z[None], z_t[None], d[None], 0.5).item() == surrogate(z, z_t, d, 0.5).item()


@pytest.mark.parametrize("eta", [1.0, 2.0])
def test_the_surrogate_bounds_the_loss_up_to_the_inverse_curvature(eta):
    torch.manual_seed(0)
    z_t, y = torch.randn(20, 3).double().requires_grad_(), torch.randint(3, (20,))
    (d,) = torch.autograd.grad(F.cross_entropy(z_t, y), z_t)
    for _ in range(20):
        z = z_t.detach() + torch.randn(20, 3).double()
        bound = F.cross_entropy(z_t, y) + surrogate(z, z_t.detach(), d, eta)
        assert F.cross_entropy(z, y) <= bound


def linear_problem():
    torch.manual_seed(1)
    features, targets = torch.randn(20, 4).double(), torch.randn(20).double()
    w = nn.Parameter(torch.randn(4).double())
    outputs = lambda batch: batch[0] @ w  # noqa: E731
    output_loss = lambda z, batch: F.smooth_l1_loss(z, batch[1])  # noqa: E731
    closure = Closure(
        lambda batch: output_loss(outputs(batch), batch),
        [w],
        (features, targets),
        outputs_fn=outputs,
        output_loss_fn=output_loss,
    )
    return w, features, targets, closure


def test_solved_exactly_a_linear_model_makes_a_projected_gradient_step_of_its_outputs():
    w, features, targets, closure = linear_problem()
    eta = 0.8
    z_t = (features @ w).detach()
    free = z_t - eta * (z_t - targets).clamp(-1, 1)  # every sample a step down its own loss
    reachable = features @ torch.linalg.pinv(features)
    sso = SSO(steps=400, target_lr=eta, inner_lr=0.4)
    TransformedOptimizer(torch.optim.SGD([w], lr=0.4), [sso]).step(closure)
    torch.testing.assert_close(features @ w.detach(), reachable @ free, rtol=0, atol=1e-9)


def test_the_same_with_a_line_search_whose_first_step_is_far_too_long():
    w, features, targets, closure = linear_problem()
    z_t = (features @ w).detach()
    free = z_t - 0.8 * (z_t - targets).clamp(-1, 1)
    sso = SSO(steps=300, target_lr=0.8, inner_lr=64.0, line_search=True)
    TransformedOptimizer(torch.optim.SGD([w], lr=64.0), [sso]).step(closure)
    expected = features @ torch.linalg.pinv(features) @ free
    torch.testing.assert_close(features @ w.detach(), expected, rtol=0, atol=1e-6)
    assert 0.1 < sso.logged()["inner_lr"] < 2.0


def test_every_step_of_the_search_decreases_as_armijo_asks():
    curvature = torch.tensor([1.0, 10.0]).double()
    seen = []

    def evaluate(x):
        q = (curvature * x[0].square()).sum() / 2 - 5.5
        seen.append(q.item())
        return q, [curvature * x[0]]

    x = torch.ones(2).double()
    u, s = descend_by_search([x], [curvature * x], evaluate, m=1, lr=1.0)
    # q falls from 0 by at least s ||g||² / 10: 101 s / 2 - 1001 s²/2 … holds from s = 1/8 on.
    assert s == 0.125
    torch.testing.assert_close(u[0], curvature * x * 0.125, rtol=0, atol=1e-15)
    assert len(seen) == 4


def test_a_search_that_finds_nothing_stays():
    uphill = lambda x: (torch.ones(()), [torch.ones(1)])  # noqa: E731
    u, s = descend_by_search([torch.zeros(1)], [torch.ones(1)], uphill, m=3, lr=1.0)
    assert u[0].tolist() == [0.0]
    assert s == 2.0**-21


def test_descent_by_hand():
    u = descend([torch.tensor([2.0])], [torch.tensor([4.0])], lambda x: (x[0].sum(), [2 * x[0]]), m=3, lr=0.25)
    assert u[0].tolist() == [4.0 + 2.0 + 1.0]  # at 2, 1 and 0.5


@pytest.mark.parametrize(("options", "spent"), [({"steps": 1}, 1), ({"steps": 2}, 3), ({}, 6)])
def test_evaluations(options, spent):
    task, sso = Task(), SSO(**options)
    closure = task.closure(*window(0, 2))
    TransformedOptimizer(torch.optim.SGD(task.parameters(), lr=0.1), [sso]).step(closure)
    assert closure.evaluations == spent
    assert SSO.traits_under({"steps": 5, **options}).extra_evaluations == spent - 1
    assert SSO.traits_under({"line_search": True}).extra_evaluations is None
    assert set(sso.logged()) == (set() if spent == 1 else {"surrogate"})


def test_the_loss_of_outputs_is_evaluated_once_however_many_steps_there_are():
    task, calls = Task(), []

    def output_loss(outputs, batch):
        calls.append(1)
        return task.output_loss(outputs, batch)

    closure = Closure(
        task.loss, list(task.parameters()), *window(0, 2), outputs_fn=task.outputs, output_loss_fn=output_loss
    )
    TransformedOptimizer(torch.optim.SGD(task.parameters(), lr=0.1), [SSO(steps=7)]).step(closure)
    assert len(calls) == 2  # two micro-batches


def test_parameters_without_gradient_and_half_precision():
    w, unused = nn.Parameter(torch.ones(3).bfloat16()), nn.Parameter(torch.ones(2).bfloat16())
    frozen = nn.Parameter(torch.ones(2).bfloat16(), requires_grad=False)
    outputs = lambda batch: batch * w  # noqa: E731
    output_loss = lambda z, batch: z.square().mean()  # noqa: E731
    closure = Closure(
        lambda batch: output_loss(outputs(batch), batch),
        [w, unused, frozen],
        torch.ones(4, 3).bfloat16(),
        outputs_fn=outputs,
        output_loss_fn=output_loss,
    )
    closure()
    assert w.grad is not None
    before = w.grad.clone()
    SSO(steps=3).before_step([w, unused, frozen], closure)
    assert w.grad.dtype == torch.bfloat16
    assert bool((w.grad.abs() > before.abs()).all())
    assert unused.grad is None
    assert frozen.grad is None
    assert w.tolist() == [1.0] * 3


def test_refusals():
    task = Task()
    optimizer = TransformedOptimizer(torch.optim.SGD(task.parameters(), lr=0.1), [SSO()])
    with pytest.raises(ClosureError, match="outputs"):
        optimizer.step(Closure(task.loss, list(task.parameters()), *window(0, 1)))
    wrong: list[dict[str, Any]] = [{"steps": 0}, {"target_lr": 0.0}, {"inner_lr": -1.0}]
    for options in wrong:
        with pytest.raises(ConfigurationError):
            SSO(**options)
