"""m-NGP is DP-SGD with flat clipping at 1 and full batches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightrail.errors import ConfigurationError
from lightrail.testing.privacy_runs import gradients_of, private_run
from lightrail_privacy.dp_sgd import DPSGD
from lightrail_privacy.ngp import NGP

DELTA = 1e-3


def test_it_is_dp_sgd_bit_for_bit():
    common = {"noise": 2.0, "delta": DELTA, "deterministic_noise": True}
    found = private_run(NGP(**common), epochs=6)
    expected = private_run(DPSGD(clip="flat", clip_norm=1.0, sampling="full", **common), epochs=6)
    assert all(torch.equal(a, b) for a, b in zip(found.params, expected.params, strict=True))
    assert found.ledger.events == expected.ledger.events
    assert [(e.steps, e.batch, e.records) for e in found.ledger.events] == [(6, 96, 96)]


def test_gradients_are_divided_by_the_larger_of_one_and_their_norm():
    params = [nn.Parameter(torch.zeros(3, dtype=torch.float64))]
    g = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = (g / g.norm(dim=1, keepdim=True).clamp(min=1.0)).sum(0)
    (found,) = NGP(noise=1.0).contribution(gradients_of(params, [g]), None)
    assert torch.allclose(found, expected, rtol=0, atol=1e-14)


def test_the_noise_is_that_of_unamplified_releases():
    """z = sqrt(T) / mu, with the mu of a Gaussian mechanism at epsilon 8 and delta 1e-5."""
    end = private_run(NGP(epsilon=8.0, delta=1e-5), epochs=16)
    assert end.ledger.noise == pytest.approx(math.sqrt(16) / 1.666031, rel=2e-4)


@pytest.mark.parametrize("sampling", ["poisson", "shuffle"])
def test_other_batches_are_refused(sampling):
    with pytest.raises(ConfigurationError, match="sampling"):
        NGP(sampling=sampling)


@pytest.mark.parametrize("option", ["clip", "clip_norm", "gamma"])
def test_it_has_no_options_of_clipping(option):
    with pytest.raises(TypeError, match=option):
        NGP(**{option: 1.0})
