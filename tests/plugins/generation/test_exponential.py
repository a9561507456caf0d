# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""Exponential integrators: φ functions and weights against integrals worked out otherwise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from lightrail.errors import ConfigurationError
from lightrail.generation import CosineVP, GaussianMixture, KarrasVE, LinearFlow, LinearVP
from lightrail_generation.samplers.exponential import (
    adams_weights,
    carried,
    divided_difference,
    kernel_moments,
    lagrange_basis,
    lagrange_coefficients,
    lagrange_weights,
    phi,
)

PATHS = {"linear": LinearVP(), "cosine": CosineVP(), "flow": LinearFlow(), "edm": KarrasVE()}


def levels(path, *shares):
    return [path.level(share * path.t_max) for share in shares]


@pytest.mark.parametrize("k", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("z", [-30.0, -2.5, -1.0, -1e-3, -1e-9, 0.0, 1e-6, 0.3, 1.999, 2.001, 12.0])
def test_phi_is_its_integral(k, z):
    wanted = math.exp(z) if k == 0 else quad(lambda s: math.exp(z * (1 - s)) * s ** (k - 1), 0, 1, epsrel=1e-13)[0]
    wanted /= math.factorial(max(k - 1, 0))
    assert phi(k, z) == pytest.approx(wanted, rel=1e-11)


def test_the_recursion_alone_loses_the_digits_of_small_steps():
    z = 1e-7
    by_recursion = ((math.expm1(z) / z - 1) / z - 0.5) / z
    assert abs(by_recursion * 6 - 1) > 1e-3
    assert phi(3, z) * 6 == pytest.approx(1 + z / 4, rel=1e-10)


def test_phi_of_a_tensor_and_at_minus_infinity():
    z = torch.tensor([-20.0, -2.0, -0.5, 0.0, 1.0, 5.0], dtype=torch.float64)
    for k in range(4):
        assert phi(k, z).tolist() == pytest.approx([phi(k, float(each)) for each in z], rel=1e-14)
    assert phi(2, -math.inf) == 0


@pytest.mark.parametrize("form", ["data", "noise"])
@pytest.mark.parametrize("h", [1e-6, 0.1, 1.99, 2.01, 20.0])
def test_moments(form, h):
    def kernel(u):
        return math.exp(u - h if form == "data" else -u)

    for k, moment in enumerate(kernel_moments(h, 4, form)):
        assert moment == pytest.approx(
            quad(lambda u, k=k: kernel(u) * u**k, 0, h, epsrel=1e-13, epsabs=0)[0], rel=1e-12
        )


def test_moments_of_a_step_to_the_data():
    assert kernel_moments(math.inf, 4, "noise") == [1, 1, 2, 6]
    assert kernel_moments(math.inf, 1, "data") == [1]
    assert kernel_moments(700.0, 3, "noise") == pytest.approx([1, 1, 2])


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("form", ["data", "noise"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_adams_weights_integrate_polynomials_in_lambda(path, form, count):
    there, *knots = levels(path, 0.4, 0.47, 0.6, 0.66, 0.8)
    here, knots = knots[0], knots[:count]
    weights = adams_weights(here, there, [knot.lam for knot in knots], form)
    for power in range(count):

        def integrand(lam, power=power):
            return math.exp(lam if form == "data" else -lam) * (lam - here.lam) ** power

        integral = quad(integrand, here.lam, there.lam, epsrel=1e-13, epsabs=0)[0]
        wanted = integral * (there.sigma if form == "data" else -there.alpha)
        assert sum(w * (k.lam - here.lam) ** power for w, k in zip(weights, knots, strict=True)) == pytest.approx(
            wanted, rel=1e-10, abs=1e-13
        )


@pytest.mark.parametrize("form", ["data", "noise"])
def test_a_prediction_that_never_changes_is_solved_exactly(form):
    here, there, older = levels(LinearVP(), 0.6, 0.2, 0.8)
    data, noise = 0.7, -1.3
    x = here.alpha * data + here.sigma * noise
    weights = adams_weights(here, there, [here.lam, older.lam], form)
    value = data if form == "data" else noise
    found = carried(here, there, form) * x + sum(weights) * value
    # With the data known for sure the noise is what is left, and it stays; and the other way round.
    assert found == pytest.approx(there.alpha * data + there.sigma * noise, rel=1e-12)


def test_with_the_level_ahead_among_the_knots_it_is_adams_moulton():
    here, there, older = levels(LinearVP(), 0.6, 0.5, 0.7)
    knots = [here.lam, there.lam, older.lam]
    weights = adams_weights(here, there, knots, "data")
    rows = lagrange_basis(knots, np.array([0.3, 0.4]))
    for j in range(3):
        basis = lambda lam, j=j: math.exp(lam) * float(lagrange_basis(knots, [lam])[j, 0])  # noqa: E731
        assert weights[j] == pytest.approx(there.sigma * quad(basis, here.lam, there.lam, epsrel=1e-13)[0], rel=1e-10)
    assert rows.sum(0).tolist() == pytest.approx([1, 1])


def test_to_the_data_and_from_pure_noise():
    path = LinearVP()
    older, here = levels(path, 0.3, 0.1)
    clean = path.level(0.0)
    assert adams_weights(here, clean, [here.lam, older.lam], "data") == [1.0, 0.0]
    weights = adams_weights(here, clean, [here.lam, older.lam], "noise")
    assert sum(weights) == pytest.approx(-here.rho, rel=1e-12)  # x − σ ε over α
    assert weights[1] == pytest.approx(here.rho / (here.lam - older.lam), rel=1e-12)
    flow = LinearFlow()
    noise, middle, end = flow.level(1.0), flow.level(0.5), flow.level(0.2)
    assert adams_weights(noise, middle, [noise.lam], "data") == [0.5]
    only = adams_weights(middle, end, [middle.lam], "data")[0]
    assert adams_weights(middle, end, [middle.lam, noise.lam], "data") == [only, 0.0]


@pytest.mark.parametrize("name", ["linear", "flow", "edm"])
@pytest.mark.parametrize("variable", ["rho", "t"])
@pytest.mark.parametrize("end", [0.1, 0.0])
def test_lagrange_weights_in_other_variables(name, variable, end):
    path = PATHS[name]
    knots = levels(path, 0.2, 0.3, 0.4)
    there = path.level(end * path.t_max)

    def place(rho):
        return rho if variable == "rho" else float(path.t_of_lam(-torch.tensor(rho, dtype=torch.float64).log()))

    places = [getattr(knot, variable) for knot in knots]
    weights = lagrange_weights(path, knots[0], there, knots, variable)
    for j, weight in enumerate(weights):
        basis = lambda rho, j=j: float(lagrange_basis(places, [place(rho)])[j, 0])  # noqa: E731
        wanted = quad(basis, knots[0].rho, max(there.rho, 1e-12), epsabs=1e-11, epsrel=1e-10, limit=100)[0]
        assert weight == pytest.approx(there.alpha * wanted, rel=1e-7, abs=1e-9)


def test_quadrature_agrees_with_the_closed_form():
    path = KarrasVE()  # where ρ is t
    there, *knots = [path.level(t) for t in (1.0, 2.0, 3.0, 5.0)]
    by_rho, by_t = (lagrange_weights(path, knots[0], there, knots, variable) for variable in ("rho", "t"))
    assert by_rho == pytest.approx(by_t, rel=1e-12)
    assert by_rho != pytest.approx(lagrange_weights(path, knots[0], there, knots, "lam"), rel=1e-2)
    data = lagrange_weights(path, knots[0], there, knots, "rho", "data")
    assert sum(data) == pytest.approx(adams_weights(knots[0], there, [knots[0].lam], "data")[0], rel=1e-12)


def test_a_table_with_kinks_keeps_the_integral_of_constants():
    path = GaussianMixture(path="ddpm").path
    there, *knots = [path.level(t) for t in (-1.0, 100.0, 200.0, 300.0)]
    assert sum(lagrange_weights(path, knots[0], there, knots)) == pytest.approx(-knots[0].rho, rel=1e-6)


def test_small_functions():
    assert lagrange_coefficients([0.0, -1.0, -2.0])[0] == pytest.approx([1, 1.5, 0.5])
    assert divided_difference([1.0, 3.0]) == [-0.5, 0.5]
    third = sum(w * x**3 for w, x in zip(divided_difference([0.0, 1.0, 2.5, 4.0]), [0.0, 1.0, 2.5, 4.0], strict=True))
    assert third == pytest.approx(1)


def test_what_is_no_form_or_variable_is_refused():
    here, there = levels(LinearVP(), 0.5, 0.4)
    with pytest.raises(ConfigurationError, match="form"):
        adams_weights(here, there, [here.lam], "velocity")
    with pytest.raises(ConfigurationError, match="variable"):
        lagrange_weights(LinearVP(), here, there, [here], "sigma")
