# pyright: reportArgumentType=false
"""What releases cost: against reference values, closed forms, and the traps of rounding."""

from __future__ import annotations

import math
import subprocess
import sys
from fractions import Fraction
from statistics import NormalDist

import pytest

from lightrail.errors import ConfigurationError, PluginError
from lightrail.privacy import accounting
from lightrail.privacy.accounting import RunningEpsilon, calibrated, delta_of, epsilon_of
from lightrail.privacy.events import Event, joined, merged, steps_per_epoch

pytest.importorskip("dp_accounting")

# noise, batch, records, steps, delta; epsilon by RDP and by PLD
TABLE = [
    (1.1, 256, 60000, 14062, 1e-5, 2.596556, 2.381686),
    (1.0, 1, 100, 1000, 1e-5, 2.101367, 1.828244),
    (0.6, 2, 100, 500, 1e-5, 11.845616, 10.280292),
    (3.0, 2048, 10000, 1220, 1e-5, 13.978190, 12.966606),
    (2.0, 10, 100, 100, 1e-6, 2.914174, 2.675036),
    (8.0, 10, 10, 100, 1e-5, 6.122758, 5.679587),
    (5.0, 10, 10, 1, 1e-5, 0.794522, 0.725522),
    (1.0, 5, 100, 200, 1e-4, 4.595007, 3.999309),
]


@pytest.mark.parametrize(("noise", "batch", "records", "steps", "delta", "rdp", "pld"), TABLE)
def test_epsilon_is_that_of_the_reference(noise, batch, records, steps, delta, rdp, pld):
    events = [Event(noise, steps, batch, records)]
    assert epsilon_of(events, delta, "rdp") == pytest.approx(rdp, rel=1e-6)
    assert epsilon_of(events, delta) == pytest.approx(pld, abs=1e-3)


def exact_delta(epsilon, mu):
    cdf = NormalDist().cdf
    return cdf(-epsilon / mu + mu / 2) - math.exp(epsilon) * cdf(-epsilon / mu - mu / 2)


def exact_epsilon(mu, delta):
    low, high = 0.0, 100.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if exact_delta(middle, mu) > delta else (low, middle)
    return high


@pytest.mark.parametrize(
    ("noise", "steps", "delta", "wanted"),
    [
        (8.0, 100, 1e-5, 5.67958686),
        (5.0, 1, 1e-5, 0.72552175),
        (1.0, 1, 1e-5, 4.3771781),
        (4.0, 16, 1e-6, 4.88655412),
    ],
)
def test_a_gaussian_that_sees_everything_has_a_closed_form(noise, steps, delta, wanted):
    exact = exact_epsilon(math.sqrt(steps) / noise, delta)
    assert exact == pytest.approx(wanted, abs=1e-7)
    found = epsilon_of([Event(noise, steps, 7, 7)], delta)
    assert exact - 1e-9 <= found <= exact + 1e-3
    assert delta_of([Event(noise, steps, 7, 7)], exact) == pytest.approx(delta, rel=1e-2)


def test_releases_of_different_noise_compose():
    events = [Event(10.5518197, 4, 5, 5), Event(73.8627380, 196, 5, 5)]
    assert epsilon_of(events, 1e-5) == pytest.approx(1.0, abs=1e-6)


def test_order_and_grouping_do_not_matter():
    whole = [Event(1.0, 300, 1, 100)]
    parts = [Event(1.0, 1, 1, 100)] * 100 + [Event(1.0, 0, 1, 100), Event(1.0, 200, 2, 200)]
    assert epsilon_of(parts, 1e-5, "rdp") == epsilon_of(whole, 1e-5, "rdp")
    mixed = [Event(2.0, 10, 1, 10), Event(1.0, 20, 1, 100)]
    assert epsilon_of(mixed, 1e-5, "rdp") == epsilon_of(mixed[::-1], 1e-5, "rdp")
    assert epsilon_of(mixed, 1e-5, "rdp") > max(epsilon_of([each], 1e-5, "rdp") for each in mixed)


def test_more_steps_records_seen_or_less_noise_cost_more():
    def cost(*values, delta=1e-5):
        return epsilon_of([Event(*values)], delta, interval=1e-3)

    base = cost(1.0, 100, 5, 100)
    for values in ((1.0, 110, 5, 100), (1.0, 100, 6, 100), (0.95, 100, 5, 100)):
        assert cost(*values) > base
    assert cost(1.0, 100, 5, 100, delta=1e-6) > base


def test_pld_is_never_above_rdp_and_a_coarse_grid_never_below_a_fine_one():
    for noise, batch, records, steps, delta, rdp, _ in TABLE:
        events = [Event(noise, steps, batch, records)]
        fine, coarse = epsilon_of(events, delta), epsilon_of(events, delta, interval=1e-3)
        assert fine <= coarse <= fine + 1e-2
        assert coarse < rdp


def test_nothing_costs_nothing_and_no_noise_everything():
    for accountant in ("pld", "rdp"):
        assert epsilon_of([], 1e-5, accountant) == 0
        assert delta_of([], 1.0, accountant) == 0
        bare = [Event(1.0, 1, 1, 10), Event(0.0, 1, 1, 10)]
        assert epsilon_of(bare, 1e-5, accountant) == math.inf
        assert delta_of(bare, 1.0, accountant) == 1
    assert epsilon_of([Event(0.0, 0, 1, 10)], 1e-5) == 0


@pytest.mark.parametrize("noise", [0.1, 0.02, 1e-4])
def test_next_to_no_noise_is_still_accounted(noise):
    events = [Event(noise, 500, 2, 100)]
    assert 100 < epsilon_of(events, 1e-5) <= epsilon_of(events, 1e-5, "rdp")


@pytest.mark.parametrize(
    ("epsilon", "batch", "records", "steps", "accountant", "wanted"),
    [
        (8, 256, 60000, 14062, "pld", 0.65589),
        (3, 1, 100, 1000, "pld", 0.81363),
        (1, 1, 100, 1000, "pld", 1.41577),
        (8, 256, 60000, 14062, "rdp", 0.67811),
        (3, 1, 100, 1000, "rdp", 0.86468),
        (1, 1, 100, 1000, "rdp", 1.51322),
    ],
)
def test_calibrated_noise_meets_its_target_and_hardly_more(epsilon, batch, records, steps, accountant, wanted):
    found = calibrated(lambda noise: [Event(noise, steps, batch, records)], epsilon, 1e-5, accountant)
    assert found == pytest.approx(wanted, abs=1e-4)
    assert epsilon_of([Event(found, steps, batch, records)], 1e-5, accountant) <= epsilon
    interval = 1e-3
    assert epsilon_of([Event(found - 2e-4, steps, batch, records)], 1e-5, accountant, interval) > epsilon - 1e-2


def test_calibration_of_full_batches_has_a_closed_form():
    found = calibrated(lambda noise: [Event(noise, 100, 3, 3)], 3, 1e-5)
    assert found == pytest.approx(math.sqrt(100) / 0.719117, abs=5e-4)


def test_a_large_target_is_met():
    found = calibrated(lambda noise: [Event(noise, 100, 1, 100)], 300.0, 1e-5, "rdp")
    assert epsilon_of([Event(found, 100, 1, 100)], 1e-5, "rdp") <= 300
    assert epsilon_of([Event(0.99 * found, 100, 1, 100)], 1e-5, "rdp") > 300


def test_a_target_that_no_noise_meets_is_refused():
    fixed = Event(1.0, 100, 1, 10)
    with pytest.raises(ConfigurationError, match="no noise keeps this run within") as caught:
        calibrated(lambda noise: [fixed, Event(noise, 100, 1, 10)], 0.5, 1e-5, "rdp")
    assert caught.value.found
    assert caught.value.allowed
    assert caught.value.remedy


@pytest.mark.parametrize("accountant", ["gdp", "clt", "prv", "PLD", ""])
def test_other_accountants_are_refused_with_a_reason(accountant):
    for ask in (
        lambda: epsilon_of([Event(1.0, 1, 1, 10)], 1e-5, accountant),
        lambda: calibrated(lambda noise: [Event(noise, 1, 1, 10)], 1.0, 1e-5, accountant),
        lambda: RunningEpsilon(1e-5, accountant),
    ):
        with pytest.raises(ConfigurationError, match="no accountant") as caught:
            ask()
        assert "accountant=pld" in caught.value.remedy
        assert ("understates" in caught.value.remedy) == (accountant in ("gdp", "clt"))


@pytest.mark.parametrize(
    "ask",
    [
        lambda: epsilon_of([], 0.0),
        lambda: epsilon_of([], 1.0),
        lambda: epsilon_of([], 1e-5, interval=0.0),
        lambda: delta_of([], -1.0),
        lambda: calibrated(lambda noise: [], 0.0, 1e-5),
        lambda: calibrated(lambda noise: [], math.inf, 1e-5),
        lambda: calibrated(lambda noise: [], 1.0, 1e-5, tolerance=0.0),
        lambda: RunningEpsilon(1e-5, share=0.0),
        lambda: Event(-1.0, 1, 1, 10),
        lambda: Event(math.nan, 1, 1, 10),
        lambda: Event(math.inf, 1, 1, 10),
        lambda: Event(1.0, -1, 1, 10),
        lambda: Event(1.0, 1, 0, 10),
        lambda: Event(1.0, 1, 11, 10),
        lambda: Event.from_dict({"noise": 1.0, "steps": 1, "batch": 1}),
        lambda: Event.from_dict({"noise": 1.0, "steps": 1.5, "batch": 1, "records": 2}),
        lambda: Event.from_dict({"noise": "1", "steps": 1, "batch": 1, "records": 2}),
        lambda: merged(1.0, -1.0),
        lambda: steps_per_epoch(0, 10),
    ],
)
def test_values_out_of_range_are_refused(ask):
    with pytest.raises(ConfigurationError) as caught:
        ask()
    assert caught.value.found
    assert caught.value.allowed
    assert caught.value.remedy


def test_rates_and_steps_come_from_integers():
    traps = [n for n in range(1, 5000) if int(1 / (1 / n)) != n]
    assert len(traps) == 312
    assert traps[:4] == [93, 99, 105, 117]
    for n in traps:
        assert Event(1.0, 1, 1, n).rate == Fraction(1, n)
        assert steps_per_epoch(1, n) == n
    assert Event(1.0, 1, 64, 1437).rate == Fraction(64, 1437)
    assert [steps_per_epoch(64, n) for n in (1437, 64, 10, 96, 95, 160)] == [22, 1, 1, 2, 1, 3]


def test_releases_on_one_batch_merge():
    assert merged(2.0, 2.0) == pytest.approx(math.sqrt(2), rel=1e-15)
    assert merged(1.0012523, 20.0) == pytest.approx(1.0, abs=1e-7)
    assert merged(3.0) == 3.0
    assert merged(3.0, math.inf) == 3.0
    assert merged() == math.inf
    assert merged(1.0, 0.0) == 0.0
    assert merged(1e-300, 1e-300) == pytest.approx(1e-300 / math.sqrt(2))
    # Both halves of one release cost what the whole does.
    pair = merged(2.0, 3.0)
    both = [Event(2.0, 10, 1, 1), Event(3.0, 10, 1, 1)]
    assert epsilon_of(both, 1e-5, "rdp") == pytest.approx(epsilon_of([Event(pair, 10, 1, 1)], 1e-5, "rdp"), rel=1e-12)


def test_only_neighbours_of_one_kind_are_joined():
    one, other = Event(1.0, 2, 1, 10), Event(1.0, 2, 2, 10)
    assert joined([one, one, other, one]) == [Event(1.0, 4, 1, 10), other, one]
    assert joined([Event(1.0, 0, 1, 10)]) == []


def test_an_event_survives_plain_values():
    event = Event(1.25, 3, 64, 1437)
    assert Event.from_dict(event.to_dict()) == event
    assert set(map(type, event.to_dict().values())) == {float, int}


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_the_running_epsilon_keeps_to_its_share_of_the_time(monkeypatch):
    clock, asked = Clock(), []

    def slow(events, delta, accountant, interval):
        clock.now += 0.5
        asked.append((list(events), interval))
        return float(len(events))

    monkeypatch.setattr(accounting, "epsilon_of", slow)
    running = RunningEpsilon(1e-5, share=0.1, clock=clock)
    events = [Event(1.0, 1, 1, 10)]
    assert running.value(events) == 1.0
    for clock.now in (0.6, 3.0, 5.49):
        assert running.value(events * 2) is None
    clock.now = 5.5
    assert running.value(events * 3) == 3.0
    assert [len(seen) for seen, _ in asked] == [1, 3]
    assert asked[0][1] == 1e-3


def test_without_the_extra_it_is_said_how_to_install_it(monkeypatch):
    accounting._epsilon.cache_clear()
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(PluginError, match="extra") as caught:
        epsilon_of([Event(1.0, 1, 1, 10)], 1e-5)
    assert "lightrail[privacy]" in caught.value.remedy


def test_the_library_is_imported_only_when_asked():
    program = (
        "import sys; import lightrail.privacy.ledger, lightrail.command.privacy; print('dp_accounting' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
