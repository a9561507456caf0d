"""Local descent-ascent and local extragradient: by hand, and where they end."""

from __future__ import annotations

import pytest
import torch
from federated_games import client_fields, game_rounds

from lightrail.errors import ConfigurationError
from lightrail_federated.local_eg import LocalEG, extragradient
from lightrail_federated.local_sgda import LocalSGDA, descended

M, m = client_fields()


def fields(x):
    return torch.einsum("kij,kj->ki", M, x) + m


def looked_ahead_and_stepped(x):
    return extragradient(x, fields, fields, 0.3, 0.2)


@pytest.mark.parametrize(
    ("method", "step", "options"),
    [
        ("local_sgda.LocalSGDA", lambda x: descended(x, fields, 0.2), []),
        ("local_eg.LocalEG", looked_ahead_and_stepped, ["federated.lookahead_lr=0.3"]),
        ("local_eg.LocalEG", looked_ahead_and_stepped, ["federated.lookahead_lr=0.3", "federated.full_gradients=true"]),
    ],
)
def test_rounds_are_local_steps_and_means(tmp_path, method, step, options):
    common = ["federated.lr=0.2", "federated.local_steps=3", *options]
    rounds = game_rounds(tmp_path, f"lightrail_federated.{method}", 2, *common)
    x = torch.zeros(10, 20, dtype=torch.float64)
    for _ in range(2):
        for _ in range(3):
            x = step(x)
        x = x.mean(0).expand(10, 20)
    assert torch.allclose(rounds.state["weights"], x[0], rtol=0, atol=1e-15)


def test_on_a_bilinear_game_descent_and_ascent_leave_and_extragradient_arrives():
    def turning(z):
        return torch.stack([z[1], -z[0]])

    x = y = torch.ones(2)
    for _ in range(50):
        x, y = descended(x, turning, 0.5), extragradient(y, turning, turning, 0.5, 0.5)
    # |1 + iγ|² = 1 + γ², and |1 - γ² + iγ|² = 1 - γ² + γ⁴.
    assert float(x.norm() ** 2) == pytest.approx(2 * 1.25**50, rel=1e-4)
    assert float(y.norm() ** 2) == pytest.approx(2 * 0.8125**50, rel=1e-4)


def test_refused_options():
    with pytest.raises(ConfigurationError):
        LocalSGDA(lr=0.0)
    with pytest.raises(ConfigurationError):
        LocalEG(lookahead_lr=-1.0)
