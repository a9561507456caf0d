"""User-level privacy: the bound, the noise, the divisor, the account, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from scipy import stats

import lightrail.run.execution
from lightrail.errors import CheckpointError, CompositionError, ConfigurationError
from lightrail.federated import ClientHorizon
from lightrail.privacy.ledger import Ledger
from lightrail.privacy.noise import DeterministicNoise, SystemNoise
from lightrail.report.result import ResultTable
from lightrail.testing.federated_runs import composed_rounds
from lightrail_federated.dp_fedavg import DPFedAvg, clipped_sum, private_mean

HORIZON = ClientHorizon(100, 5, is_poisson=True, rounds=200, seed=0)


def begun(horizon=HORIZON, resumed=None, **options):
    method = DPFedAvg(**{"noise": 1.0, "delta": 1e-4, **options})
    method.begin(horizon, resumed)
    return method


@pytest.mark.parametrize("scale", [0.0, 1e-30, 0.3, 1.0, 40.0, 1e30, float("inf"), float("nan")])
def test_no_client_moves_the_sum_by_more_than_the_norm(scale):
    torch.manual_seed(0)
    others, one = [torch.randn(50) for _ in range(3)], torch.randn(50) * scale
    moved = clipped_sum([*others, one], 0.7) - clipped_sum(others, 0.7)
    assert float(moved.norm()) <= 0.7 * (1 + 1e-12)


def test_clients_count_alike_over_a_divisor_that_is_fixed():
    short, long = torch.tensor([0.3, 0.0]), torch.tensor([0.0, 8.0])
    assert private_mean([short, long], 1.0, 0.0, 4, SystemNoise()).tolist() == pytest.approx([0.075, 0.25])
    # One client less, or many more: what each adds stays what it is.
    assert private_mean([short], 1.0, 0.0, 4, SystemNoise()).tolist() == pytest.approx([0.075, 0.0])
    assert private_mean([short] * 8, 1.0, 0.0, 4, SystemNoise()).tolist() == pytest.approx([0.6, 0.0])


def test_the_noise_is_normal_at_its_scale_and_at_no_other():
    method = begun(noise=2.0, clip_norm=0.5)
    found = torch.cat([method.nothing(torch.zeros(5000, dtype=torch.float64)) for _ in range(4)]).numpy() * 5
    p = [stats.kstest(found, "norm", (0.0, scale * 2.0 * 0.5)).pvalue for scale in (0.9, 1.0, 1.1)]
    assert p[0] < 1e-6
    assert p[1] > 1e-4
    assert p[2] < 1e-6


def test_the_noise_does_not_follow_from_the_seed():
    a, b = (begun().nothing(torch.zeros(4)) for _ in range(2))
    assert not (a == b).any()
    a, b = (begun(deterministic_noise=True) for _ in range(2))
    assert torch.equal(a.nothing(torch.zeros(4)), b.nothing(torch.zeros(4)))
    assert not a.ledger().is_private
    assert a.spent() == float("inf")


def test_an_empty_round_costs_as_much_as_any():
    method = begun()
    method.nothing(torch.zeros(3))
    method.mean([torch.ones(3)])
    assert [(e.noise, e.steps, e.batch, e.records) for e in method.ledger().events] == [(1.0, 2, 5, 100)]


@pytest.mark.parametrize(("accountant", "epsilon"), [("pld", 3.999309), ("rdp", 4.595007)])
def test_the_account_is_that_of_sampled_gaussians(accountant, epsilon):
    assert begun(accountant=accountant).ledger().planned_epsilon == pytest.approx(epsilon, abs=1e-5)


def test_a_fixed_number_of_clients_amplifies_nothing():
    ledger = begun(ClientHorizon(100, 5, is_poisson=False, rounds=20, seed=0), accountant="rdp").ledger()
    assert [(e.steps, e.batch, e.records) for e in ledger.planned] == [(20, 100, 100)]
    assert ledger.adjacency == "zero out one record"


def test_coins_are_secret_and_fair():
    method = begun()
    drawn = [method.drawn() for _ in range(400)]
    count = sum(map(len, drawn))
    assert abs(count - 2000) < 6 * (2000 * 0.95) ** 0.5
    assert drawn != [begun().drawn() for _ in range(400)]


def test_a_target_is_met_and_a_resumed_run_keeps_its_account():
    horizon = ClientHorizon(100, 5, is_poisson=True, rounds=30, seed=0)
    options = {"noise": None, "epsilon": 3.0, "accountant": "rdp"}
    first = begun(horizon, **options)
    assert 2.9 < first.ledger().planned_epsilon <= 3.0
    for _ in range(10):
        first.nothing(torch.zeros(2))
    state = first.state_dict()
    second = begun(horizon, state, **options)
    assert second.ledger().noise == first.ledger().noise
    assert second.spent() == first.spent()
    for _ in range(20):
        second.nothing(torch.zeros(2))
    assert 2.9 < second.spent() <= 3.0
    with pytest.raises(CheckpointError, match="budget"):
        begun(ClientHorizon(100, 5, is_poisson=True, rounds=90, seed=0), state, **options)
    with pytest.raises(CheckpointError, match="accounted together"):
        begun(ClientHorizon(100, 5, is_poisson=False, rounds=30, seed=0), state, **options)


def test_rounds_beyond_the_checkpoint_count_too(tmp_path):
    method = begun(accountant="rdp")
    method.nothing(torch.zeros(2))
    state = method.state_dict()
    method.nothing(torch.zeros(2))
    method.ledger().write(tmp_path / "privacy.json")
    horizon = ClientHorizon(100, 5, is_poisson=True, rounds=200, seed=0, written=tmp_path / "privacy.json")
    assert begun(horizon, state, accountant="rdp").ledger().events[0].steps == 2


def test_a_run_writes_an_account_that_recomputes(tmp_path):
    chosen = ["federated.server_privacy=lightrail_federated.dp_fedavg.DPFedAvg", "federated.server_privacy.noise=1.5"]
    more = ["federated.server_privacy.accountant=rdp", "federated.sampling=poisson", "federated.fraction=0.5"]
    _, rounds = composed_rounds(tmp_path, "+federated=fedavg", "federated.rounds=3", *chosen, *more)
    with lightrail.run.execution._quiet_lightning():
        for _ in range(3):
            rounds.step()
    rounds.write(tmp_path)
    ledger = Ledger.read(tmp_path / "privacy.json")
    assert [(e.noise, e.steps, e.batch, e.records) for e in ledger.events] == [(1.5, 3, 5, 10)]
    assert json.loads((tmp_path / "privacy.json").read_text())["epsilon"] == pytest.approx(ledger.epsilon())
    assert rounds.logged()["epsilon"] == pytest.approx(ledger.epsilon())
    saved = rounds.state_dict()
    rounds.load_state_dict(saved)
    rounds.step()
    assert rounds.method.server_privacy.ledger().events[0].steps == 4


def test_the_end_of_a_run_says_what_was_spent(tmp_path):
    chosen = ["federated.server_privacy=lightrail_federated.dp_fedavg.DPFedAvg", "federated.server_privacy.noise=1.5"]
    run, _ = composed_rounds(tmp_path, "+federated=fedavg", "federated.rounds=2", *chosen)
    result = run.execute(show_progress=False)
    ledger = Ledger.read(result.folder / "privacy.json")
    assert result.summary["privacy"] == ledger.summary()
    assert result.summary["privacy"]["epsilon"] == pytest.approx(ledger.epsilon())
    assert "privacy  epsilon" in str(ResultTable(result.summary, result.folder))


def test_a_run_that_ends_before_it_is_planned_says_why_and_that_nothing_is_known(tmp_path):
    chosen = ["federated.server_privacy=lightrail_federated.dp_fedavg.DPFedAvg", "federated.server_privacy.delta=0.5"]
    run, _ = composed_rounds(tmp_path, "+federated=fedavg", "federated.rounds=2", *chosen)
    with pytest.raises(ConfigurationError, match="delta"):
        run.execute(show_progress=False)
    (folder,) = tmp_path.iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["privacy"] == {}
    assert "not known" in ResultTable(summary, folder).privacy


def test_a_budget_that_is_spent_is_said_and_the_run_ends(tmp_path):
    chosen = ["federated.server_privacy=lightrail_federated.dp_fedavg.DPFedAvg", "federated.server_privacy.epsilon=1"]
    run, _ = composed_rounds(tmp_path, "+federated=fedavg", "federated.rounds=2", "run.name=spent", *chosen)
    run.execute(show_progress=False)
    longer = lightrail.run.compose([f"run.resume={tmp_path / 'spent'}", "federated.rounds=40"])
    with pytest.raises(CheckpointError, match="budget"):
        longer.execute(show_progress=False)


def test_secure_aggregation_beside_it_is_refused(tmp_path):
    chosen = "federated.server_privacy=lightrail_federated.dp_fedavg.DPFedAvg"
    with pytest.raises(CompositionError, match="secure aggregation"):
        composed_rounds(tmp_path, "+federated=fedavg", chosen, "federated.secure_aggregation=true")


@pytest.mark.parametrize(
    "options",
    [{"clip_norm": 0.0}, {"noise": -1.0}, {"epsilon": 0.0}, {"delta": 1.0}, {"epsilon": 1.0, "noise": 1.0},
     {"accountant": "gdp"}],
)  # fmt: skip
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigurationError) as error:
        DPFedAvg(**options)
    assert error.value.remedy


def test_a_delta_that_hides_nobody_is_refused():
    with pytest.raises(ConfigurationError, match="delta"):
        begun(delta=0.02)


def test_deterministic_coins_and_noise_are_two_streams():
    assert DeterministicNoise(0, 0).name == DeterministicNoise(0, 1).name
    method = begun(deterministic_noise=True)
    before = method.nothing(torch.zeros(3))
    again = begun(deterministic_noise=True)
    again.drawn()
    assert torch.equal(before, again.nothing(torch.zeros(3)))
