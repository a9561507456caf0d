"""Servers with a memory: their steps by hand, and what they reduce to."""

from __future__ import annotations

import pytest
import torch

from lightrail.errors import ConfigurationError
from lightrail.federated import Heard
from lightrail_federated.fedadagrad import FedAdagrad
from lightrail_federated.fedadam import FedAdam
from lightrail_federated.fedavg import FedAvg
from lightrail_federated.fedavgm import FedAvgM
from lightrail_federated.fedyogi import FedYogi

HEARD = Heard(0, 2, (0, 1), (1, 1), torch.Generator())


def after(method, updates, start=(1.0, -2.0)):
    state = method.start(torch.tensor(start, dtype=torch.float64))
    for each in updates:
        state = method.server(state, {"update": torch.tensor(each, dtype=torch.float64)}, HEARD)
    return state


UPDATES = ((0.5, -0.1), (0.25, 0.3))


def test_fedavgm_by_hand_and_without_momentum():
    # m = Δ₁, then 0.5 Δ₁ + Δ₂; θ moves by half of each.
    found = after(FedAvgM(lr=0.5, momentum=0.5), UPDATES)["weights"].tolist()
    assert found == pytest.approx([1 + 0.5 * 0.5 + 0.5 * 0.5, -2 - 0.5 * 0.1 + 0.5 * 0.25])
    plain, fedavg = (after(m, UPDATES)["weights"] for m in (FedAvgM(lr=1.0, momentum=0.0), FedAvg()))
    assert torch.equal(plain, fedavg)


@pytest.mark.parametrize(
    ("method", "v"),
    [
        (FedAdam(lr=0.1, beta1=0.5, beta2=0.75, tau=0.5), 0.75 * (0.75 * 0.25 + 0.25 * 0.25) + 0.25 * 0.0625),
        # v = 0.25 = Δ₁² has no sign, so it stays; then it falls by a quarter of Δ₂².
        (FedYogi(lr=0.1, beta1=0.5, beta2=0.75, tau=0.5), 0.25 - 0.25 * 0.0625),
        (FedAdagrad(lr=0.1, beta1=0.5, tau=0.5), 0.25 + 0.25 + 0.0625),
    ],
)
def test_adaptive_steps_by_hand(method, v):
    first, second = after(method, UPDATES[:1]), after(method, UPDATES)
    # m = Δ₁/2, then Δ₁/4 + Δ₂/2: nothing corrects the bias of the first rounds.
    assert first["m"][0].item() == pytest.approx(0.25)
    assert second["m"][0].item() == pytest.approx(0.25)
    assert second["v"][0].item() == pytest.approx(v, rel=1e-14)
    moved = second["weights"][0] - first["weights"][0]
    assert moved.item() == pytest.approx(0.1 * 0.25 / (v**0.5 + 0.5), rel=1e-12)


@pytest.mark.parametrize("method", [FedAdam, FedYogi, FedAdagrad])
def test_with_a_large_tau_it_is_a_step_of_lr_over_two_tau(method):
    # √v begins at τ, so that what divides is 2 τ.
    found = after(method(lr=2e6, beta1=0.0, tau=1e6), UPDATES[:1])["weights"]
    assert found == pytest.approx(after(FedAvg(), UPDATES[:1])["weights"], rel=2e-2)


@pytest.mark.parametrize("method", [FedAdam(), FedYogi(), FedAdagrad(), FedAvgM()])
def test_a_round_without_answers_changes_nothing(method):
    state = after(method, UPDATES)
    assert method.server(state, {}, HEARD) is state


@pytest.mark.parametrize(
    ("method", "options"),
    [(FedAdam, {"beta2": 1.0}), (FedYogi, {"beta1": -0.1}), (FedAdagrad, {"tau": 0.0}), (FedAvgM, {"momentum": 1.0})],
)
def test_options_out_of_range_are_refused(method, options):
    with pytest.raises(ConfigurationError) as error:
        method(**options)
    assert next(iter(options)) in error.value.found
