"""SDAT: on a small domain-adversarial task, and equal to the loop written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightrail import Closure, TransformedOptimizer
from lightrail.errors import ClosureError, ConfigurationError
from lightrail_optimizers import SAM, SDAT, ClipNorm
from lightrail_optimizers.transforms.sdat import one_objective


class Reversed(torch.autograd.Function):
    """The identity, with the gradient turned round on its way back."""

    @staticmethod
    def forward(ctx, features):
        return features.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class DANN(nn.Module):
    """Features that tell classes apart, and that a discriminator cannot tell the domain from."""

    def __init__(self, *extra):
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Linear(5, 8), *extra, nn.Tanh())
        self.classifier = nn.Linear(8, 3)
        self.discriminator = nn.Linear(8, 1)
        self.double()

    def objectives(self, batch):
        (source, labels), target = batch
        found = self.features(torch.cat([source, target]))
        domain = torch.cat([torch.zeros(len(source)), torch.ones(len(target))]).double()
        told = self.discriminator(Reversed.apply(found)).squeeze(1)
        return {
            "task": F.cross_entropy(self.classifier(found[: len(source)]), labels),
            "domain": F.binary_cross_entropy_with_logits(told, domain),
        }

    def loss(self, batch):
        return torch.stack(list(self.objectives(batch).values())).sum()

    def closure(self, *batches):
        return Closure(self.loss, list(self.parameters()), *batches, module=self, objectives_fn=self.objectives)


def window(step, count):
    torch.manual_seed(100 + step)
    return [
        ((torch.randn(6, 5).double(), torch.randint(3, (6,))), torch.randn(6, 5).double() + 0.5) for _ in range(count)
    ]


def train(model, transforms, count=1, steps=4, optimizer_class=torch.optim.SGD):
    optimizer = TransformedOptimizer(optimizer_class(model.parameters(), lr=0.1), transforms)
    for step in range(steps):
        batches = window(step, count)
        torch.manual_seed(step)
        optimizer.step(model.closure(*batches))
    return [p.detach().clone() for p in model.parameters()]


def by_hand(model, rho, count=1, steps=4, optimizer_class=torch.optim.SGD):
    params = list(model.parameters())
    optimizer = optimizer_class(params, lr=0.1)

    def backward(fn, batches):
        torch.manual_seed(step)  # the masks of dropout
        optimizer.zero_grad()
        for batch in batches:
            (fn(batch) / count).backward()

    for step in range(steps):
        batches = window(step, count)
        backward(lambda batch: model.objectives(batch)["task"], batches)
        with torch.no_grad():
            origin = [p.clone() for p in params]
            climbing = [p for p in params if p.grad is not None]
            assert len(climbing) == len(params) - 2  # not the discriminator
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p.grad) for p in climbing]))
            for p in climbing:
                p.copy_(p + (rho / norm) * p.grad)
        backward(model.loss, batches)
        with torch.no_grad():
            for p, x in zip(params, origin, strict=True):
                p.copy_(x)
        optimizer.step()
    return [p.detach().clone() for p in params]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_equals_the_loop_written_by_hand(count, optimizer_class):
    found = train(DANN(nn.Dropout(0.3)), [SDAT(rho=0.2)], count, optimizer_class=optimizer_class)
    expected = by_hand(DANN(nn.Dropout(0.3)), 0.2, count, optimizer_class=optimizer_class)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_the_climb_differs_from_that_of_the_whole_loss():
    assert not same(train(DANN(), [SDAT(rho=0.2)]), train(DANN(), [SAM(rho=0.2)]))


def test_the_discriminator_stays_where_it_is_while_the_others_climb():
    model = DANN()
    here = [p.detach().clone() for p in model.discriminator.parameters()]
    elsewhere = []

    def loss(batch):
        moved = [torch.equal(p, x) for p, x in zip(model.discriminator.parameters(), here, strict=True)]
        elsewhere.append((moved, model.classifier.weight.detach().clone()))
        return model.loss(batch)

    closure = Closure(loss, list(model.parameters()), *window(0, 1), objectives_fn=model.objectives)
    TransformedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), [SDAT(rho=1.0)]).step(closure)
    (_, before), (stays, after) = elsewhere
    assert stays == [True, True]
    assert not torch.equal(before, after)


def test_the_radius_is_that_of_the_task_gradient_alone():
    w, v = nn.Parameter(torch.tensor([3.0, 4.0]).double()), nn.Parameter(torch.tensor(7.0).double())
    losses = lambda batch: [(w**2).sum() / 2, 100 * v**2]  # noqa: E731
    closure = Closure(lambda batch: sum(losses(batch)), [w, v], torch.zeros(1), objectives_fn=losses)
    closure()
    SDAT(rho=0.5).before_step([w, v], closure)
    # e = 0.5 (3, 4) / 5; the gradient of ||w||²/2 is w itself.
    torch.testing.assert_close(w.grad, torch.tensor([3.3, 4.4], dtype=torch.float64), rtol=0, atol=1e-12)
    assert v.grad is not None
    assert v.grad.item() == 1400.0
    assert (w.tolist(), v.item()) == ([3.0, 4.0], 7.0)


def test_radius_zero_is_the_optimizer_alone():
    model = DANN(nn.Dropout(0.3))
    plain = train(DANN(nn.Dropout(0.3)), [], 2)
    assert same(train(model, [SDAT(rho=0.0)], 2), plain)
    closure = model.closure(*window(0, 1))
    TransformedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), [SDAT(rho=0.0)]).step(closure)
    assert closure.evaluations == 1


def test_three_evaluations_a_step_and_the_task_loss_is_logged():
    model, sdat = DANN(), SDAT()
    assert sdat.logged() == {}
    (batch,) = window(0, 1)
    expected = model.objectives(batch)["task"].item()
    closure = model.closure(batch)
    TransformedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), [sdat]).step(closure)
    assert closure.evaluations == 3
    assert sdat.logged() == {"task_loss": pytest.approx(expected, abs=1e-12)}


def test_a_task_loss_by_name_or_by_place():
    by_place = train(DANN(), [SDAT(rho=0.3, objective=0)])
    assert same(train(DANN(), [SDAT(rho=0.3, objective="task")]), by_place)
    assert not same(train(DANN(), [SDAT(rho=0.3, objective="domain")]), by_place)
    losses = torch.tensor([1.0, 2.0])
    assert one_objective(losses, 1).item() == 2.0
    assert one_objective(tuple(losses), 1).item() == 2.0


@pytest.mark.parametrize("objective", ["tusk", 2])
def test_an_objective_that_there_is_not_is_refused_with_those_that_there_are(objective):
    with pytest.raises(ClosureError, match=rf"no objective '{objective}'") as caught:
        train(DANN(), [SDAT(objective=objective)])
    assert "task, domain" in str(caught.value)
    with pytest.raises(ClosureError, match="losses without names"):
        one_objective([torch.zeros(())], "task")
    with pytest.raises(ClosureError, match="returns 0"):
        one_objective([torch.zeros(())], 1)


def test_what_comes_before_acts_at_the_perturbed_point():
    model = DANN()
    optimizer = TransformedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), [ClipNorm(1e-3), SDAT(rho=0.5)])
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step(model.closure(*window(0, 1)))
    moved = torch.cat([(p - x).flatten() for p, x in zip(model.parameters(), before, strict=True)])
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-6)


def test_refusals():
    model = DANN()
    optimizer = TransformedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), [SDAT()])
    with pytest.raises(ClosureError, match="objectives"):
        optimizer.step(Closure(model.loss, list(model.parameters()), *window(0, 1)))
    wrong: list[dict[str, Any]] = [{"rho": -0.1}, {"objective": -1}, {"objective": 1.5}, {"objective": True}]
    for options in wrong:
        with pytest.raises(ConfigurationError):
            SDAT(**options)
