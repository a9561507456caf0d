"""Effective sample size and systematic resampling: by hand, on average, and with weights far apart."""

from __future__ import annotations

import math

import torch

from lightrail_generation.guidance.resampling import effective_sample_size, systematic_resampling


def test_effective_sample_size_by_hand():
    weights = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.5, 0.5, 0.0, 0.0], [0.7, 0.1, 0.1, 0.1]])
    found = effective_sample_size(weights.log())
    torch.testing.assert_close(found, torch.tensor([4.0, 2.0, 1 / 0.52]).double(), rtol=1e-6, atol=0)
    assert found.dtype == torch.float64


def test_a_common_factor_changes_nothing_however_large():
    logs = torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64)
    for shift in (-5000.0, 5000.0):
        torch.testing.assert_close(effective_sample_size(logs + shift), effective_sample_size(logs))
        torch.testing.assert_close(
            systematic_resampling(logs + shift, torch.tensor(0.4)), systematic_resampling(logs, torch.tensor(0.4))
        )


def test_each_is_drawn_floor_or_ceiling_of_its_share_and_its_share_on_average():
    logs = torch.randn(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares = 7 * logs.softmax(0)
    uniforms = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    drawn = systematic_resampling(logs.expand(1000, 7), uniforms)
    counts = torch.nn.functional.one_hot(drawn, 7).sum(1)
    assert bool((counts >= shares.floor()).all() and (counts <= shares.ceil()).all())
    torch.testing.assert_close(counts.double().mean(0), shares, rtol=0, atol=7e-3)


def test_equal_weights_keep_everyone():
    for uniform in (2**-24, 0.5, 1 - 2**-24):
        assert systematic_resampling(torch.zeros(5), torch.tensor(uniform)).tolist() == list(range(5))


def test_weights_of_zero_are_never_drawn():
    logs = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf])
    for uniform in (0.0, 0.3, 1 - 2**-24):
        assert set(systematic_resampling(logs, torch.tensor(uniform)).tolist()) == {1, 3}


def test_populations_are_apart():
    logs = torch.tensor([[0.0, -50.0], [-50.0, 0.0]])
    assert systematic_resampling(logs, torch.tensor([0.2, 0.9])).tolist() == [[0, 0], [1, 1]]
