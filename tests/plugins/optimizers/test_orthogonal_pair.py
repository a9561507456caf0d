# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportOptionalOperand=false
"""The pair of a main objective and what of an auxiliary one is orthogonal to it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightrail import Closure, TransformedOptimizer
from lightrail.errors import ClosureError, ConfigurationError
from lightrail_optimizers import OrthogonalPair
from lightrail_optimizers.transforms.orthogonal_pair import pair_weights

SHEET = torch.tensor([[1.0, 0.0], [-2.0, 3.0]], dtype=torch.float64)


def step(transform, jacobian, names=None, with_batch=True):
    """What stands in ``.grad``, and the closure, for objectives whose gradients are the rows."""
    w = nn.Parameter(torch.zeros(jacobian.shape[1], dtype=jacobian.dtype))

    def objectives(rows=jacobian):
        values = rows @ w
        return dict(zip(names, values, strict=True)) if names else values

    batches = [jacobian] if with_batch else []
    closure = Closure(lambda *batch: (jacobian @ w).sum(), [w], *batches, objectives_fn=objectives)
    TransformedOptimizer(torch.optim.SGD([w], lr=1.0), [transform]).step(closure)
    return w.grad, closure


def test_the_pair_worked_out_by_hand():
    assert step(OrthogonalPair(eta=1.0), SHEET)[0].tolist() == [1.0, 3.0]
    assert step(OrthogonalPair(eta=0.5), SHEET)[0].tolist() == [1.0, 1.5]
    # The other way round: g_f = (-2, 3), g_b = (1, 0), overlap -2 / 13.
    expected = SHEET[1] + SHEET[0] + 2 / 13 * SHEET[1]
    torch.testing.assert_close(step(OrthogonalPair(main=1), SHEET)[0], expected, rtol=0, atol=1e-12)


def test_without_the_auxiliary_part_it_is_the_main_gradient_bit_for_bit():
    torch.manual_seed(0)
    jacobian = torch.randn(2, 9)
    assert torch.equal(step(OrthogonalPair(eta=0.0), jacobian)[0], jacobian[0])
    assert torch.equal(step(OrthogonalPair(eta=0.0, main=1), jacobian)[0], jacobian[1])


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e3])
def test_what_is_added_is_orthogonal_whatever_the_scale(scale):
    torch.manual_seed(1)
    jacobian = torch.randn(2, 20, dtype=torch.float64) * torch.tensor([[scale], [1.0]])
    g, _ = step(OrthogonalPair(eta=3.0), jacobian)
    added = g - jacobian[0]
    assert float(added @ jacobian[0]) == pytest.approx(0.0, abs=1e-14 * float(g.norm() * jacobian[0].norm()))
    assert float(added @ jacobian[1]) > 0


def test_one_inner_product_over_all_parameters():
    a, b = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
    # g_f = (1, 1), g_b = (1, -1): orthogonal as vectors, parallel tensor by tensor.
    rows = lambda: [(a + b).sum(), (a - b).sum()]  # noqa: E731
    closure = Closure(lambda: sum(rows()), [a, b], objectives_fn=rows)
    TransformedOptimizer(torch.optim.SGD([a, b], lr=1.0), [OrthogonalPair()]).step(closure)
    assert (a.grad.item(), b.grad.item()) == (2.0, 0.0)


def test_the_main_objective_by_name():
    transform = OrthogonalPair(main="value")
    expected, _ = step(OrthogonalPair(main=1), SHEET)
    found, first = step(transform, SHEET, names=("policy", "value"))
    assert torch.equal(found, expected)
    found, second = step(transform, SHEET, names=("policy", "value"))
    assert torch.equal(found, expected)
    assert (first.evaluations, second.evaluations) == (3, 2)  # it looks at the names once


def test_a_main_gradient_of_zero_leaves_the_auxiliary_one():
    assert step(OrthogonalPair(eta=0.5), SHEET * torch.tensor([[0.0], [1.0]]))[0].tolist() == [-1.0, 1.5]
    assert pair_weights(torch.zeros(2, 2), 0.5).tolist() == [1.0, 0.5]


def test_names_that_are_not_there():
    with pytest.raises(ConfigurationError, match="no objective 'valeu'") as raised:
        step(OrthogonalPair(main="valeu"), SHEET, names=("policy", "value"))
    assert "allowed: policy, value" in str(raised.value)
    assert "Did you mean 'value'?" in str(raised.value)
    with pytest.raises(ConfigurationError, match="no objective 'value'") as raised:
        step(OrthogonalPair(main="value"), SHEET)
    assert "have no names" in str(raised.value)
    with pytest.raises(ClosureError, match="given its batch"):
        step(OrthogonalPair(main="value"), SHEET, names=("policy", "value"), with_batch=False)


@pytest.mark.parametrize("count", [1, 3])
def test_any_other_number_of_objectives_is_refused(count):
    with pytest.raises(ClosureError, match="a main and an auxiliary objective") as raised:
        step(OrthogonalPair(), torch.ones(count, 2))
    assert f"{count} objective" in str(raised.value)


@pytest.mark.parametrize("options", [{"eta": -1.0}, {"main": 2}, {"main": -1}, {"main": 0.5}])
def test_options_out_of_range(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        OrthogonalPair(**options)


def test_logged():
    transform = OrthogonalPair()
    step(transform, SHEET)
    assert transform.logged() == {
        "conflicting_pairs": 1.0,
        "smallest_cosine": pytest.approx(-2 / 13**0.5),
        "smallest_weight": 1.0,
        "largest_weight": 3.0,
    }
