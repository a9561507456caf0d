# pyright: reportArgumentType=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportOptionalOperand=false, reportOptionalSubscript=false
"""UPGrad and instance-wise risk minimization: no step is against any objective, and nothing is lost on the way."""

from __future__ import annotations

import time

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lightrail import Closure, Transform, TransformedOptimizer
from lightrail.errors import ClosureError, ConfigurationError
from lightrail.traits import traits_of
from lightrail_optimizers import IWRM, ClipNorm, UPGrad
from lightrail_optimizers.dual_cone import project, projected_rows
from lightrail_optimizers.jacobian_descent import ObjectiveRows, SampleRows, gramian

SHEET = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]], dtype=torch.float64)
CALM = torch.tensor([[1.0, 0.5, 0.0], [0.2, 1.0, 3.0], [0.0, 0.1, 1.0]], dtype=torch.float64)


def direction(transforms, jacobian, loss=None):
    """What stands in ``.grad``, for objectives whose gradients are the rows; their mean is the loss."""
    w = nn.Parameter(torch.zeros(jacobian.shape[1], dtype=jacobian.dtype))
    chosen = (lambda values: values.mean()) if loss is None else loss
    closure = Closure(
        lambda x: chosen(x @ w), [w], jacobian, objectives_fn=lambda x: x @ w, sample_losses_fn=lambda x: x @ w
    )
    TransformedOptimizer(torch.optim.SGD([w], lr=1.0), transforms).step(closure)
    return w.grad


def random_jacobian(seed, rows, columns):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights_of(jacobian, preference=None):
    count = len(jacobian)
    u = torch.full((count,), 1 / count, dtype=torch.float64) if preference is None else preference
    return projected_rows(jacobian @ jacobian.T, u)


def by_least_squares(jacobian):
    """The same weights by another road: one non-negative least squares problem a row, in the space of the gradients."""
    matrix, count = jacobian.numpy().T, len(jacobian)
    total = np.zeros(count)
    for i in range(count):
        total += scipy.optimize.nnls(matrix, -matrix[:, i], maxiter=10_000)[0] / count
        total[i] += 1 / count
    return torch.from_numpy(total)


# The aggregator.


@pytest.mark.parametrize("transform", [UPGrad, IWRM])
def test_two_rows_worked_out_by_hand(transform):
    torch.testing.assert_close(
        weights_of(SHEET), torch.tensor([10 / 9, 15 / 19], dtype=torch.float64), rtol=0, atol=1e-9
    )
    d = direction([transform()], SHEET)
    expected = torch.tensor([50 / 171, 325 / 171, 325 / 171], dtype=torch.float64)  # (0.2923977, 1.9005848, 1.9005848)
    torch.testing.assert_close(d, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(SHEET @ d, torch.tensor([50 / 19, 50 / 9], dtype=torch.float64), rtol=0, atol=1e-8)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-3, 1e6])
def test_small_gradients_are_combined_like_large_ones(scale):
    torch.testing.assert_close(direction([UPGrad()], SHEET * scale) / scale, direction([UPGrad()], SHEET))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 12),
    columns=st.integers(1, 15),
    spread=st.sampled_from([0.0, 3.0]),
    kind=st.sampled_from(["plain", "twins", "opposites", "zero"]),
)
def test_no_objective_gets_worse_to_first_order(seed, rows, columns, spread, kind):
    jacobian = random_jacobian(seed, rows, columns)
    jacobian *= 10 ** (spread * random_jacobian(seed + 1, rows, 1))
    if kind != "plain":
        jacobian[-1] = {"twins": 2.0, "opposites": -0.5, "zero": 0.0}[kind] * jacobian[0]
    w = weights_of(jacobian)
    assert (w >= 1 / rows - 1e-15).all()
    lengths, d = jacobian.norm(dim=1), jacobian.T @ w
    # Relative to what was summed up: opposite rows cancel.
    size = (w * lengths).sum()
    assert (jacobian @ d >= -1e-8 * size * lengths).all()


@pytest.mark.parametrize(("seed", "rows", "columns"), [(0, 3, 8), (1, 10, 30), (2, 12, 5), (3, 40, 12)])
def test_agrees_with_least_squares_in_the_space_of_gradients(seed, rows, columns):
    jacobian = random_jacobian(seed, rows, columns)
    expected = jacobian.T @ by_least_squares(jacobian)
    torch.testing.assert_close(jacobian.T @ weights_of(jacobian), expected, rtol=1e-7, atol=1e-7)


def test_without_conflict_it_is_the_mean_bit_for_bit():
    assert torch.equal(weights_of(CALM), torch.full((3,), 1 / 3, dtype=torch.float64))
    torch.testing.assert_close(direction([UPGrad()], CALM), CALM.mean(0), rtol=0, atol=1e-15)


def test_scaling_an_objective_scales_its_part_alone():
    jacobian = random_jacobian(4, 5, 7)
    at = lambda c: (c[:, None] * jacobian).T @ weights_of(c[:, None] * jacobian)  # noqa: E731
    a, b = random_jacobian(5, 2, 5).abs() * torch.tensor([[1.0], [1e4]], dtype=torch.float64)
    torch.testing.assert_close(at(2 * a + 3 * b), 2 * at(a) + 3 * at(b), rtol=1e-9, atol=1e-9)


def test_a_preference_weighs_the_projections():
    u = torch.tensor([0.2, 0.0], dtype=torch.float64)
    d = direction([UPGrad(preference=[0.2, 0.0])], SHEET)
    # The second row is not pursued; the first gives up what is against it: g_1 + 22 / 38 g_2.
    torch.testing.assert_close(d, 0.2 * (SHEET[0] + 22 / 38 * SHEET[1]), rtol=0, atol=1e-9)
    torch.testing.assert_close(weights_of(SHEET, u), torch.tensor([0.2, 0.2 * 22 / 38]).double(), rtol=0, atol=1e-8)


def test_the_nearest_direction_without_conflict():
    jacobian = random_jacobian(6, 4, 6)
    u = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    d = jacobian.T @ project(jacobian @ jacobian.T, u)
    found = scipy.optimize.minimize(
        lambda x: ((x - (jacobian.T @ u).numpy()) ** 2).sum(),
        np.zeros(6),
        method="SLSQP",
        constraints={"type": "ineq", "fun": lambda x: jacobian.numpy() @ x},
        options={"ftol": 1e-14},
    )
    torch.testing.assert_close(d, torch.from_numpy(found.x), rtol=0, atol=1e-5)
    assert (jacobian @ d >= -1e-9).all()


def test_many_rows_are_quick():
    jacobian = random_jacobian(7, 256, 2000)
    begun = time.process_time()
    w = weights_of(jacobian)
    assert time.process_time() - begun < 5  # a fifth of a second; one least squares problem a row takes ten times that
    d = jacobian.T @ w
    assert (jacobian @ d >= -1e-8 * jacobian.norm(dim=1) * d.norm()).all()


def test_rows_that_surround_the_origin_fall_back_on_the_slower_method(monkeypatch):
    calls = []
    slow = scipy.optimize.nnls
    monkeypatch.setattr(scipy.optimize, "nnls", lambda *a, **o: calls.append(1) or slow(*a, **o))
    jacobian = random_jacobian(0, 64, 20)
    d = jacobian.T @ weights_of(jacobian)  # in no direction does all get better
    assert calls
    assert d.norm() < 1e-6


def test_a_gradient_that_is_not_finite_stays_so():
    broken = SHEET.clone()
    broken[1, 2] = float("nan")
    assert direction([UPGrad()], broken)[2].isnan()


# The Gramian.


def test_the_gramian_of_parameters_of_any_shape_is_that_of_the_flat_rows():
    shapes = [(3, 4), (), (0, 2), (70_000,)]
    rows = [[torch.randn(shape) for shape in shapes] for _ in range(3)]
    flat = torch.stack([torch.cat([t.flatten() for t in row]) for row in rows]).double()
    stacked = [torch.stack(column) for column in zip(*rows, strict=True)]
    for each in (ObjectiveRows(rows), SampleRows(stacked)):
        torch.testing.assert_close(gramian(each), flat @ flat.T, rtol=1e-12, atol=1e-9)
        w = [0.5, -2.0, 1.5]
        found = torch.cat([t.flatten() for t in each.combined(w)])
        torch.testing.assert_close(found.double(), torch.tensor(w).double() @ flat, rtol=1e-5, atol=1e-5)


def test_half_precision_rows_are_summed_in_single_precision():
    rows = [[torch.full((4,), 1.0).bfloat16()]] + [[torch.full((4,), 2**-9).bfloat16()] for _ in range(8)]
    assert ObjectiveRows(rows).combined([1.0] * 9)[0].tolist() == [1 + 8 * 2**-9] * 4
    huge = ObjectiveRows([[torch.full((1000,), 1e20)]])
    assert float(gramian(huge)) == pytest.approx(1e43, rel=1e-6)  # beyond single precision


# In a network.


class TwoHeads(nn.Module):
    """Two objectives over one trunk."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.3), nn.Tanh())
        self.kind, self.size = nn.Linear(8, 3), nn.Linear(8, 1)
        self.idle = nn.Parameter(torch.ones(2))

    def objectives(self, batch):
        x, y = batch
        hidden = self.trunk(x)
        size = F.mse_loss(self.size(hidden)[:, 0], -3 * y.float())
        return {"kind": F.cross_entropy(self.kind(hidden), y), "size": size}

    def loss(self, batch):
        return sum(self.objectives(batch).values())

    def sample_losses(self, batch):
        return F.cross_entropy(self.kind(self.trunk(batch[0])), batch[1], reduction="none")

    def closure(self, batches, task="objectives"):
        loss = self.loss if task == "objectives" else lambda batch: self.sample_losses(batch).mean()
        return Closure(
            loss,
            list(self.parameters()),
            *batches,
            module=self,
            objectives_fn=self.objectives,
            sample_losses_fn=self.sample_losses,
        )


def window(step, count):
    torch.manual_seed(100 + step)
    return [(torch.randn(6, 5), torch.randint(3, (6,))) for _ in range(count)]


def train(model, transforms, count, steps=3, task="objectives"):
    optimizer = TransformedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), transforms)
    for step in range(steps):
        batches = window(step, count)
        torch.manual_seed(step)
        optimizer.step(model.closure(batches, task))
    return model


def by_hand(model, count, rows_of, steps=3):
    params = list(model.parameters())
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    for step in range(steps):
        batches = window(step, count)
        torch.manual_seed(step)
        states = []  # the window runs once for the loss that is logged; then its masks are replayed
        for batch in batches:
            states.append(torch.get_rng_state())
            model.loss(batch)
        rows = rows_of(model, params, list(zip(batches, states, strict=True)))
        flat = [torch.cat([t.flatten() for t in row]).double() for row in rows]
        g = torch.stack(flat) @ torch.stack(flat).T
        w = projected_rows(g, torch.full((len(rows),), 1 / len(rows), dtype=torch.float64)).tolist()
        for k, p in enumerate(params):
            p.grad = rows[0][k] * w[0]
            for weight, row in zip(w[1:], rows[1:], strict=True):
                p.grad.add_(row[k], alpha=weight)
        model.idle.grad = None
        optimizer.step()
    return model


def rows_of_objectives(model, params, window):
    totals = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    for batch, state in window:
        torch.set_rng_state(state)
        for total, loss in zip(totals, model.objectives(batch).values(), strict=True):
            found = torch.autograd.grad(loss / len(window), params, retain_graph=True, materialize_grads=True)
            torch._foreach_add_(total, found)
    return totals


def rows_of_samples(model, params, window):
    rows = []
    for batch, state in window:
        torch.set_rng_state(state)
        for loss in model.sample_losses(batch):
            rows.append(torch.autograd.grad(loss, params, retain_graph=True, materialize_grads=True))
    return rows


@pytest.mark.parametrize("count", [1, 3])
def test_equals_the_loop_written_by_hand_bit_for_bit(count):
    ours, plain = train(TwoHeads(), [UPGrad()], count), train(TwoHeads(), [], count)
    theirs = by_hand(TwoHeads(), count, rows_of_objectives)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert not torch.equal(ours.size.weight, plain.size.weight)


@pytest.mark.parametrize("count", [1, 3])
def test_instances_equal_the_loop_written_by_hand(count):
    ours = train(TwoHeads(), [IWRM()], count, task="samples")
    theirs = by_hand(TwoHeads(), count, rows_of_samples)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_the_loss_may_be_a_sum_or_anything_else():
    for loss in (lambda values: values.sum(), lambda values: 3 * values[0] + 0 * values[1]):
        torch.testing.assert_close(direction([UPGrad()], SHEET, loss), direction([UPGrad()], SHEET), rtol=0, atol=0)


def test_gradients_of_parameters_that_no_objective_knows():
    used, unused, hidden, aside = (nn.Parameter(torch.ones(2)) for _ in range(4))
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    params = [used, unused, hidden, aside, frozen]
    closure = Closure(
        lambda x: (x * used).sum() + aside.sum(),
        params,
        torch.ones(2, 2),
        objectives_fn=lambda x: [used.sum(), hidden.sum()],
    )
    TransformedOptimizer(torch.optim.SGD(params, lr=0.1), [UPGrad()]).step(closure)
    assert unused.grad is None
    assert frozen.grad is None
    assert used.grad.tolist() == [0.5, 0.5]
    assert hidden.grad.tolist() == [0.5, 0.5]  # the loss does not depend on it; an objective does
    assert aside.grad.tolist() == [0.0, 0.0]  # the loss depends on it; no objective does


# After another transform.


class Add(Transform):
    """Adds a number to every gradient."""

    def __init__(self, number):
        self.number = number

    def before_step(self, params, closure):
        for p in params:
            p.grad.add_(self.number)


class Withhold(Transform):
    def before_step(self, params, closure):
        params[0].grad = None


@pytest.mark.parametrize("transform", [UPGrad, IWRM])
@pytest.mark.parametrize("loss", [None, lambda values: values.sum()])
def test_what_an_earlier_transform_added_is_kept(transform, loss):
    alone = direction([transform()], SHEET, loss)
    assert torch.equal(direction([Add(0.0), transform()], SHEET, loss), alone)
    torch.testing.assert_close(direction([Add(0.25), transform()], SHEET, loss), alone + 0.25, rtol=0, atol=1e-12)


def test_clipping_before_and_after():
    norm = CALM.mean(0).norm()
    torch.testing.assert_close(direction([ClipNorm(0.5), UPGrad()], CALM), CALM.mean(0) / norm * 0.5)
    found = direction([ClipNorm(0.5), UPGrad()], SHEET)
    g = SHEET.mean(0)
    torch.testing.assert_close(found, direction([UPGrad()], SHEET) + g * (0.5 / g.norm() - 1))
    assert direction([UPGrad(), ClipNorm(0.5)], SHEET).norm() == pytest.approx(0.5)


def test_a_parameter_that_was_withheld_stays_so():
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    rows = lambda x: [(x * params[0]).sum() + params[1].sum()]  # noqa: E731
    closure = Closure(lambda x: rows(x)[0], params, torch.ones(1, 2), objectives_fn=rows)
    TransformedOptimizer(torch.optim.SGD(params, lr=0.1), [Withhold(), UPGrad()]).step(closure)
    assert params[0].grad is None
    assert params[1].grad.tolist() == [1.0, 1.0]


def test_evaluations():
    w = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    for transforms, expected in (([UPGrad()], 2), ([IWRM()], 2), ([IWRM(groups=2)], 2), ([ClipNorm(), UPGrad()], 3)):
        closure = Closure(
            lambda x: (x @ w).mean(),
            [w],
            SHEET,
            objectives_fn=lambda x: x @ w,
            sample_losses_fn=lambda x: x @ w,
        )
        TransformedOptimizer(torch.optim.SGD([w], lr=0.1), transforms).step(closure)
        assert closure.evaluations == expected


# Instances.


def test_groups_are_objectives():
    jacobian = random_jacobian(8, 8, 3)
    parts = torch.stack([part.mean(0) for part in jacobian.chunk(4)])
    torch.testing.assert_close(direction([IWRM(groups=4)], jacobian), parts.T @ weights_of(parts))
    assert not traits_of(IWRM, {"groups": 4}).needs_sample_losses
    assert traits_of(IWRM, {"groups": 4}).needs_groups
    assert traits_of(IWRM, {"groups": None}) == traits_of(IWRM)
    with pytest.raises(ClosureError, match="divided into 9 parts"):
        direction([IWRM(groups=9)], jacobian)


def test_instances_without_conflict_are_plain_descent():
    torch.testing.assert_close(direction([IWRM()], CALM), CALM.mean(0), rtol=0, atol=1e-15)


# What is logged, and what is refused.


def test_logged():
    transform = UPGrad()
    assert transform.logged() == {}
    direction([transform], SHEET)
    assert transform.logged() == {
        "conflicting_pairs": 1.0,
        "smallest_cosine": pytest.approx(-22 / (18 * 38) ** 0.5),
        "smallest_weight": pytest.approx(15 / 19),
        "largest_weight": pytest.approx(10 / 9),
    }
    direction([transform], SHEET[:1])
    assert transform.logged() == {"smallest_weight": 1.0, "largest_weight": 1.0}
    direction([transform], SHEET * torch.tensor([[0.0], [1.0]]))
    assert transform.logged()["smallest_cosine"] == 0.0


def test_a_preference_for_more_objectives_than_there_are():
    with pytest.raises(ConfigurationError, match="3 numbers, and the task has 2 objectives") as raised:
        direction([UPGrad(preference=[1.0, 1.0, 1.0])], SHEET)
    assert "preference=[1.0, 1.0, 1.0]" in str(raised.value)
    assert "allowed: 2 numbers" in str(raised.value)


@pytest.mark.parametrize("preference", [[1.0, -1.0], [0.0, 0.0], [], [float("nan"), 1.0]])
def test_preferences_out_of_range(preference):
    with pytest.raises(ConfigurationError, match="preference"):
        UPGrad(preference=preference)


@pytest.mark.parametrize("groups", [0, 1, 2.5])
def test_groups_out_of_range(groups):
    with pytest.raises(ConfigurationError, match="groups"):
        IWRM(groups=groups)


def test_a_task_without_objectives_is_refused_by_name():
    w = nn.Parameter(torch.ones(2))
    optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=0.1), [UPGrad()])
    with pytest.raises(ClosureError, match="'objectives'"):
        optimizer.step(Closure(lambda: w.sum(), [w]))
    with pytest.raises(ClosureError, match="no objectives to combine"):
        optimizer.step(Closure(lambda: w.sum(), [w], objectives_fn=list))
    assert w.tolist() == [1.0, 1.0]


def test_sparse_and_complex_are_refused_by_name():
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = TransformedOptimizer(torch.optim.SGD(table.parameters(), lr=0.1), [UPGrad()])
    rows = lambda: [table(torch.tensor([0])).sum(), table(torch.tensor([1])).sum()]  # noqa: E731
    with pytest.raises(ConfigurationError, match="UPGrad does not take sparse gradients"):
        optimizer.step(Closure(lambda: sum(rows()), list(table.parameters()), objectives_fn=rows))
    z = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer = TransformedOptimizer(torch.optim.SGD([z], lr=0.1), [UPGrad()])
    with pytest.raises(ConfigurationError, match="UPGrad does not take complex parameters"):
        optimizer.step(Closure(lambda: z.abs().sum(), [z], objectives_fn=lambda: [z.abs().sum()]))


# Beside its authors' library.


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_torchjd(seed):
    pytest.importorskip("quadprog")
    pytest.importorskip("qpsolvers")
    aggregation = pytest.importorskip("torchjd.aggregation")
    for jacobian in (SHEET, random_jacobian(seed, 4, 9)):
        theirs = aggregation.UPGrad()(jacobian)
        # Theirs is regularised by 1e-4.
        torch.testing.assert_close(direction([UPGrad()], jacobian), theirs, rtol=0, atol=1e-3 * float(theirs.norm()))
