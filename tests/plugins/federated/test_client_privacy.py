"""Private steps on clients: an account each, kept from visit to visit, of which the worst is shown."""

from __future__ import annotations

import copy

import pytest
import torch

import lightrail.run.execution
from lightrail.errors import CompositionError
from lightrail.federated.client_privacy import ACCOUNT, _loaded
from lightrail.privacy.accounting import epsilon_of
from lightrail.privacy.events import Event
from lightrail.privacy.ledger import Ledger
from lightrail.testing.federated_runs import composed_rounds
from lightrail_federated.fedavg import FedAvg

HERE = "lightrail.testing.federated_runs"
RUN = [
    "+federated=fedavg", "federated.clients=2", "federated.rounds=3", "federated.local_steps=2",
    f"federated.partition={HERE}.InOrder", f"task={HERE}.Separation", f"data={HERE}.ClientClusters", "data.clients=4",
    "+privacy=dp_sgd", "privacy.accountant=rdp", "optimizer.lr=0.1",
]  # fmt: skip


def private_rounds(tmp_path, *options):
    return composed_rounds(tmp_path, *RUN, *options)[1]


def carried_out(rounds, count=1):
    with lightrail.run.execution._quiet_lightning():
        for _ in range(count):
            rounds.step()
    return rounds


def test_the_worst_account_recomputes_and_goes_on_where_a_run_is_resumed(tmp_path):
    first = carried_out(private_rounds(tmp_path, "privacy.noise=2.0"), 2)
    saved = first.state_dict()
    resumed = private_rounds(tmp_path, "privacy.noise=2.0")
    resumed.load_state_dict(saved)
    carried_out(resumed)
    resumed.write(tmp_path)
    ledger = Ledger.read(tmp_path / "privacy.json")
    # Three rounds of two steps each: what is taken is a batch of 8 of 16 samples.
    assert ledger.events == [Event(2.0, 6, 8, 16)]
    expected = epsilon_of([Event(2.0, 6, 8, 16)], ledger.delta, "rdp")
    assert ledger.epsilon() == pytest.approx(expected)
    assert resumed.logged()["epsilon"] == pytest.approx(expected)
    assert ledger.planned_epsilon == pytest.approx(expected)
    assert "client" in ledger.assumptions[0]


def test_what_was_released_after_an_earlier_checkpoint_is_said_to_be_missing(tmp_path):
    first = carried_out(private_rounds(tmp_path, "privacy.noise=2.0"), 1)
    saved = copy.deepcopy(first.state_dict())  # as a checkpoint holds it
    carried_out(first, 2).write(tmp_path)
    again = private_rounds(tmp_path, "privacy.noise=2.0")
    again.account_before = tmp_path / "privacy.json"
    again.load_state_dict(saved)
    said = [line for line in carried_out(again).account().assumptions if line.startswith("Conditional")]
    assert len(said) == 1
    assert "in the 2 rounds" in said[0]
    assert again.state_dict()["undone"] == 2
    carried_out(again, 1).write(tmp_path)
    on = private_rounds(tmp_path, "privacy.noise=2.0")
    on.account_before = tmp_path / "privacy.json"
    on.load_state_dict(again.state_dict())
    assert on.state_dict()["undone"] == 2


def test_the_end_of_a_run_says_what_the_worst_client_has_spent(tmp_path):
    run, rounds = composed_rounds(tmp_path, *RUN, "privacy.noise=2.0")
    told = run.execute(show_progress=False).summary["privacy"]
    assert told["epsilon"] == pytest.approx(rounds.account().epsilon())
    assert told["private"] is True


def test_each_client_has_noise_of_its_own_and_a_target_is_for_all_rounds(tmp_path):
    rounds = carried_out(private_rounds(tmp_path, "privacy.epsilon=1.0"))
    states = [_loaded(each[ACCOUNT]) for _, each in sorted(rounds.transport.state_dict()["states"].items())]
    ledgers = [Ledger.from_dict(each) for each in states]
    assert [each.planned[0].records for each in ledgers] == [16, 16]
    for ledger in ledgers:
        assert sum(event.steps for event in ledger.planned) == 6
        assert 0.95 < ledger.planned_epsilon <= 1.0
        assert ledger.epsilon() < ledger.planned_epsilon


def test_the_noise_moves_weights(tmp_path):
    full = "privacy.sampling=full"
    plain, again, noisy = (
        carried_out(private_rounds(tmp_path, f"privacy.noise={z}", full)).state["weights"] for z in (0.0, 0.0, 50.0)
    )
    assert torch.allclose(plain, again, atol=1e-12)
    assert (noisy - plain).norm() > 0.1


def test_a_fixed_order_is_accounted_for_every_visit(tmp_path):
    rounds = carried_out(private_rounds(tmp_path, "privacy.noise=4.0", "privacy.sampling=shuffle"), 2)
    ledgers = [Ledger.from_dict(_loaded(each[ACCOUNT])) for each in rounds.transport.state_dict()["states"].values()]
    # Each visit puts the records in a new order, and so begins to release all of them once more.
    assert [sum(event.steps for event in each.events) for each in ledgers] == [2, 2]
    assert [sum(event.steps for event in each.planned) for each in ledgers] == [3, 3]


def test_more_visits_than_were_planned_are_refused(tmp_path):
    rounds = carried_out(private_rounds(tmp_path, "privacy.noise=2.0"), 3)
    with pytest.raises(CompositionError, match="more steps than its privacy"):
        carried_out(rounds)
    assert torch.isfinite(rounds.state["weights"]).all()


class Looks(FedAvg):
    """FedAvg whose clients look at their samples once more."""

    def client(self, client, message, state):
        client.gradient(message["weights"])
        return super().client(client, message, state)


def test_a_method_that_looks_at_samples_by_itself_is_refused(tmp_path):
    method = f"federated={__name__}.Looks"
    rounds = private_rounds(tmp_path, method, "privacy.noise=2.0")
    with pytest.raises(CompositionError, match="outside of private steps"):
        carried_out(rounds)
