"""PSGD: the pairs that it fits to, when it fits, and what it asks of the closure."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightrail import Closure
from lightrail.errors import ClosureError
from lightrail.traits import traits_of
from lightrail_optimizers import PSGDLRA, PSGDDiag, PSGDXMat
from lightrail_optimizers.psgd_base import draw_uniforms

CLOSE = {"rtol": 0, "atol": 1e-9}
KINDS = (PSGDXMat, PSGDLRA, PSGDDiag)
CURVATURE = torch.tensor([1.0, 4.0, 0.25], dtype=torch.float64)


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def parameter(*values):
    return nn.Parameter(doubles(*values))


def quadratic(w, curvature=CURVATURE):
    return Closure(lambda: (curvature * w**2).sum() / 2, [w])


class Counting(Closure):
    asked = 0

    def hvp(self, vectors):
        self.asked += 1
        return super().hvp(vectors)


# Pairs.


@pytest.mark.parametrize("kind", KINDS)
def test_finite_differences_take_the_path_of_exact_products_and_put_the_parameters_back(kind):
    ends = []
    for hvp in ("exact", "finite_difference"):
        torch.manual_seed(0)
        w = parameter(1.0, -2.0, 0.5)
        optimizer = kind([w], lr=0.1, hvp=hvp)
        for _ in range(3):
            closure = quadratic(w)
            optimizer.step(closure)
            assert closure.evaluations == 2
        ends.append(w.detach())
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)


def test_a_finite_difference_goes_by_the_points_that_rounding_left():
    torch.manual_seed(0)
    w = nn.Parameter(torch.full((64,), 1000.0))  # where delta v is a few hundred roundings
    found = []
    optimizer = PSGDDiag([w], lr=0.0, hvp="finite_difference")
    optimizer._fit = lambda group, q, v, h: found.append((v, h))  # type: ignore[method-assign]
    optimizer.step(Closure(lambda: (w**2).sum(), [w]))
    ((v, h),) = found
    torch.testing.assert_close(h, 2 * v, rtol=1e-6, atol=0)
    assert torch.equal(w.detach(), torch.full((64,), 1000.0))


def test_whitening_takes_the_gradient_with_a_little_of_the_direction_and_asks_for_no_more():
    w, g = parameter(1.0, 1.0, 1.0), doubles(0.0, -3.0, 6.0)
    assert traits_of(PSGDDiag, {"hvp": "whitening"}).evaluates_again is False
    optimizer = PSGDDiag([w], hvp="whitening")
    found = []
    optimizer._fit = lambda group, q, v, h: found.append((v, h))  # type: ignore[method-assign]
    closure = Closure(lambda: (g * w).sum(), [w])
    optimizer.step(closure)
    ((v, h),) = found
    torch.testing.assert_close(h, g + 2.0**-13 * 3.0 * v, **CLOSE)
    assert closure.evaluations == 1


@pytest.mark.parametrize("hvp", ["exact", "finite_difference", "whitening"])
def test_ascent_on_the_negated_loss_is_descent(hvp):
    ends = []
    for maximize in (False, True):
        torch.manual_seed(0)
        w = parameter(1.0, -2.0, 0.5)
        optimizer = PSGDXMat([w], lr=0.1, momentum=0.5, hvp=hvp, maximize=maximize)
        for _ in range(3):
            optimizer.step(quadratic(w, -CURVATURE if maximize else CURVATURE))
        ends.append(w.detach())
    torch.testing.assert_close(*ends, **CLOSE)


@pytest.mark.parametrize("hvp", ["exact", "finite_difference", "whitening"])
def test_a_parameter_without_a_gradient_keeps_its_part_of_q_until_it_has_one(hvp):
    torch.manual_seed(0)
    early, late = parameter(1.0, 2.0), parameter(3.0, 4.0, 5.0)
    optimizer = PSGDDiag([late, early], hvp=hvp, initial_scale=2.0)
    for _ in range(3):
        optimizer.step(Closure(lambda: (early**4).sum(), [early]))
    assert torch.equal(late.detach(), doubles(3.0, 4.0, 5.0))
    d = optimizer.state[late]["d"]
    assert torch.equal(d[:3], doubles(2.0, 2.0, 2.0))
    assert (d[3:] != 2.0).all()
    optimizer.step(Closure(lambda: (early**4).sum() + (late**4).sum(), [early, late]))
    assert (late != doubles(3.0, 4.0, 5.0)).all()
    assert (d[:3] != 2.0).all()


# Chances, and what is asked.


def test_fits_come_by_chance_and_once_at_first():
    torch.manual_seed(0)
    w = parameter(1.0, 1.0, 1.0)
    optimizer = PSGDDiag([w], lr=0.0, update_probability=0.25)
    asked = []
    for _ in range(400):
        closure = Counting(lambda: (CURVATURE * w**2).sum(), [w])
        optimizer.step(closure)
        asked.append(closure.asked)
    assert asked[0] == 1
    assert 70 < sum(asked) < 130
    never = PSGDDiag([w], lr=0.0, update_probability=0.0)
    never.step(quadratic(w))  # to find its scale
    w.grad = doubles(1.0, 1.0, 1.0)
    never.step()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("closure", [None, lambda: torch.zeros(())])
def test_a_plain_closure_is_refused_before_anything_moves(kind, closure):
    w = parameter(1.0)
    w.grad = doubles(1.0)
    optimizer = kind([w])
    with pytest.raises(ClosureError, match=kind.__name__):
        optimizer.step(closure)
    assert w.item() == 1.0
    assert not optimizer.state


def test_what_it_needs_depends_on_its_options():
    exact = traits_of(PSGDLRA)
    assert (exact.needs_second_derivatives, exact.needs_closure, exact.extra_evaluations) == (True, False, 1)
    seldom = traits_of(PSGDLRA, {"hvp": "finite_difference", "update_probability": 0.1, "rank": 3, "momentum": 0.9})
    assert (seldom.needs_second_derivatives, seldom.needs_closure, seldom.extra_evaluations) == (False, True, 0.1)
    assert (exact.state, seldom.state) == (21, 8)
    assert traits_of(PSGDXMat, {"hvp": "whitening"}).extra_evaluations == 0


def test_chances_are_those_of_the_first_rank(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda seed, src: seed.fill_(5))
    found = []
    for own_seed in (0, 1):
        torch.manual_seed(own_seed)
        found.append(draw_uniforms(3, torch.device("cpu")))
    assert found[0] == found[1]


def test_uniforms_are_uniform():
    torch.manual_seed(0)
    found = torch.tensor(draw_uniforms(20_000, torch.device("cpu"))).histc(10, 0.0, 1.0) / 2000
    assert ((found - 1).abs() < 0.1).all()
