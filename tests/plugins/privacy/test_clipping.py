"""Factors of clipping: what they bound, on ordinary gradients and on absurd ones."""

from __future__ import annotations

import math

import pytest
import torch

from lightrail.errors import ConfigurationError
from lightrail.privacy.events import merged
from lightrail_privacy.clipping import (
    adapted_norm,
    automatic_factors,
    centred_count,
    flat_factors,
    gradient_noise,
    per_layer_factors,
)

ABSURD = [0.0, 1e-45, 1e-38, 1e-30, 1e-10, 1.0 - 1e-7, 1.0, 1.0 + 1e-7, 3.0, 1e10, 1e30, 3e38]


def norms(dtype):
    drawn = torch.randn(2000, generator=torch.Generator().manual_seed(0)).mul(4).exp()
    return torch.cat([torch.tensor(ABSURD, dtype=torch.float64), drawn.double()]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("C", [1e-30, 1e-3, 1.0, 7.0, 1e20])
@pytest.mark.parametrize("factors", [flat_factors, lambda n, C: automatic_factors(n, C, 0.01)])
def test_no_contribution_is_longer_than_the_norm(factors, C, dtype):
    n = norms(dtype)
    c = factors(n, C)
    assert c.dtype == dtype
    assert bool(torch.isfinite(c).all())
    assert bool((c >= 0).all())
    assert bool(((c * n).double() <= C * (1 + 1e-6)).all())


@pytest.mark.parametrize("C", [1e-3, 1.0, 7.0])
def test_layers_together_are_not_longer_than_the_norm(C):
    layers = norms(torch.float32).unfold(0, 5, 1).T  # [5, B]: each sample has absurd and ordinary layers
    c = per_layer_factors(layers, C)
    each = (c * layers).double()
    assert bool((each <= C / math.sqrt(5) * (1 + 1e-6)).all())
    assert bool((each.square().sum(0).sqrt() <= C * (1 + 1e-6)).all())


def test_one_layer_is_flat():
    n = norms(torch.float32)
    assert torch.equal(per_layer_factors(n[None], 2.0)[0], flat_factors(n, 2.0))


def test_what_is_short_stays_as_it_is():
    c = flat_factors(torch.tensor([0.0, 1e-30, 0.5, 1.0, 4.0]), 1.0)
    assert c.tolist() == [1, 1, 1, 1, 0.25]


def test_automatic_forgets_the_length():
    c = automatic_factors(torch.tensor([0.0, 1.0, 1e6]), 3.0, 0.01)
    assert c.tolist() == pytest.approx([300, 3 / 1.01, 3e-6], rel=1e-6)


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_what_is_not_finite_counts_for_nothing(norm):
    n = torch.tensor([norm, 2.0])
    assert flat_factors(n, 1.0).tolist() == [0, 0.5]
    assert automatic_factors(n, 1.0, 0.5)[0] == 0
    assert per_layer_factors(n[None], 1.0)[0, 0] == 0


def test_one_sample_moves_the_count_by_a_half():
    n = torch.tensor([0.1, 0.9, 5.0, 1.0])
    whole = centred_count(n, 1.0)
    assert whole == 1.0
    for i in range(4):
        assert abs(whole - centred_count(torch.cat([n[:i], n[i + 1 :]]), 1.0)) == 0.5
    assert centred_count(n[:0], 1.0) == 0


def test_the_norm_rises_where_too_many_are_clipped():
    assert adapted_norm(2.0, fraction=0.0, quantile=0.5, lr=0.2) == pytest.approx(2 * math.exp(0.1))
    assert adapted_norm(2.0, fraction=1.0, quantile=0.5, lr=0.2) == pytest.approx(2 * math.exp(-0.1))
    assert adapted_norm(2.0, fraction=0.5, quantile=0.5, lr=0.2) == pytest.approx(2.0)


def test_the_norm_finds_the_quantile():
    n = torch.rand(4000, generator=torch.Generator().manual_seed(1)) * 10
    for start in (1e-3, 1e3):
        C = start
        for _ in range(300):
            C = adapted_norm(C, float(centred_count(n, C)) / len(n) + 0.5, 0.7, 0.2)
        assert pytest.approx(7.0, rel=0.03) == C, start


def test_the_norm_stays_a_number_whatever_the_noise():
    for fraction in (-1e12, 1e12):
        C = adapted_norm(1.0, fraction, 0.5, 0.2)
        assert 0 < torch.tensor(C).item() < math.inf


def test_sum_and_count_together_cost_what_was_planned():
    assert gradient_noise(1.0, 10.0) == pytest.approx(1.0012523, abs=1e-7)
    for z, sigma_b in ((1.0, 10.0), (3.0, 1.6), (0.1, 5.0), (5.4, 7.2)):
        assert merged(gradient_noise(z, sigma_b), 2 * sigma_b) == pytest.approx(z, rel=1e-12)
    assert gradient_noise(0.0, 0.0) == 0.0


@pytest.mark.parametrize(("z", "sigma_b"), [(2.0, 1.0), (5.0, 1.0), (1.0, 0.0)])
def test_a_count_that_costs_too_much_is_refused(z, sigma_b):
    with pytest.raises(ConfigurationError, match="counting how many gradients") as error:
        gradient_noise(z, sigma_b)
    assert f"count_noise above {z / 2:g}" in str(error.value)
    assert "privacy.count_noise=" in error.value.remedy
    value = float(error.value.remedy.split("privacy.count_noise=")[1].split()[0])
    assert gradient_noise(z, value) > z
