"""Sophia: when it estimates the curvature, and what it asks of the closure."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightrail import Closure
from lightrail.errors import ClosureError
from lightrail_optimizers import SophiaG, SophiaH


def parameter(*values):
    return nn.Parameter(doubles(*values))


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


class Counting(Closure):
    """Counts the questions."""

    asked = 0

    def hvp(self, vectors):
        self.asked += 1
        return super().hvp(vectors)

    def sampled(self):
        self.asked += 1
        return super().sampled()


def schedule_of_estimates(optimizer, w, steps=7):
    found = []
    for t in range(1, steps + 1):
        closure = Counting(lambda: (w**2).sum(), [w], sampled_loss_fn=lambda generator: (w**3).sum())
        optimizer.step(closure)
        found += [t] * closure.asked
    return found


def test_estimates_are_made_at_the_steps_of_the_paper_or_of_the_authors_code():
    w = parameter(1.0)
    assert schedule_of_estimates(SophiaH([w], update_every=3), w) == [1, 4, 7]
    assert schedule_of_estimates(SophiaG([w], update_every=3, batch_size=1), w) == [1, 4, 7]
    assert schedule_of_estimates(SophiaG([w], update_every=3, batch_size=1, form="official"), w) == [3, 6]


@pytest.mark.parametrize("make", [SophiaH, lambda p: SophiaG(p, batch_size=1)])
@pytest.mark.parametrize("closure", [None, lambda: torch.zeros(())])
def test_a_plain_closure_is_refused_before_anything_moves(make, closure):
    w = parameter(1.0)
    w.grad = doubles(1.0)
    optimizer = make([w])
    with pytest.raises(ClosureError, match=r"Sophia[GH]") as error:
        optimizer.step(closure)
    assert "lightrail.Closure" in error.value.remedy
    assert w.item() == 1.0
    assert not optimizer.state
    optimizer.param_groups[0]["step"] = 1
    optimizer.step(closure)  # between estimates any closure will do


def test_a_closure_over_other_parameters_is_refused():
    w, other = parameter(1.0), parameter(1.0)
    optimizer = SophiaH([w, other])
    w.grad, other.grad = doubles(1.0), doubles(1.0)
    with pytest.raises(ClosureError, match="does not know"):
        optimizer.step(Closure(lambda: (w * w).sum(), [w]))


def test_parameters_may_come_in_another_order():
    a, b = parameter(1.0), parameter(1.0, 1.0)
    optimizer = SophiaH([a, b], betas=(0.9, 0.0), distribution="rademacher")
    optimizer.step(Closure(lambda: 2 * (a**2).sum() + 3 * (b**2).sum(), [b, a]))
    assert optimizer.state[a]["hessian"].tolist() == [4.0]
    assert optimizer.state[b]["hessian"].tolist() == [6.0, 6.0]


def test_the_number_of_samples_is_counted_or_given_and_never_guessed():
    def estimate(*batches, batch_size=None, **options):
        w = parameter(1.0)
        optimizer = SophiaG([w], betas=(0.9, 0.0), batch_size=batch_size)
        optimizer.step(Closure(lambda *b: w.sum(), [w], *batches, sampled_loss_fn=lambda *b: (2 * w).sum(), **options))
        return optimizer.state[w]["hessian"].item()

    assert estimate(torch.zeros(3, 5), torch.zeros(4, 5)) == pytest.approx(7 * 4)
    assert estimate(torch.zeros(3, 5), num_samples_fn=torch.numel) == pytest.approx(15 * 4)
    assert estimate(batch_size=11) == pytest.approx(11 * 4)
    with pytest.raises(ClosureError, match="count the samples"):
        estimate()


def test_a_task_without_sampled_labels_is_named():
    w = parameter(1.0)
    with pytest.raises(ClosureError, match="sampled_loss"):
        SophiaG([w], batch_size=1).step(Closure(lambda: w.sum(), [w]))


def test_accumulation_gives_the_estimate_of_the_whole_window():
    torch.manual_seed(0)
    x = torch.randn(8, 3, dtype=torch.float64)
    results = []
    for batches in ([x], list(x.split(2))):
        torch.manual_seed(1)
        w = parameter(1.0, 2.0, 3.0)
        optimizer = SophiaH([w], lr=0.1, gamma=1.0)
        for _ in range(3):
            optimizer.step(Closure(lambda batch, w=w: ((batch @ w) ** 4).mean(), [w], *batches))
        results.append(w.detach())
    torch.testing.assert_close(*results, rtol=0, atol=1e-9)


def test_a_copy_keeps_what_no_checkpoint_holds():
    w = parameter(1.0)
    twin = copy.deepcopy(SophiaG([w], batch_size=12, form="official"))
    assert (twin.batch_size, twin._form) == (12, "official")
    assert copy.deepcopy(SophiaH([w], distribution="rademacher")).distribution == "rademacher"
