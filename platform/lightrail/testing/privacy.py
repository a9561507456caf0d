"""Conformance of private methods: what they promise, and that a run under the engine keeps it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightrail.errors import ConfigurationError
from lightrail.privacy.events import steps_per_epoch
from lightrail.privacy.method import PrivacyMethod
from lightrail.testing.building import (
    check_is_documented,
    check_names_its_paper,
    missing_options,
    refuses_unknown_options,
    require_refused,
)
from lightrail.testing.privacy_release import RELEASE_CHECKS, with_noise
from lightrail.testing.privacy_runs import PrivateEnd, clusters, private_run, solved
from lightrail.testing.runs import require_close, require_equal, saved_and_loaded
from lightrail.testing.suite import Check, NotApplicable, Suite, known_exceptions, name_of, require
from lightrail.traits import traits_of

__all__ = ["PrivacySuite"]

Options = Mapping[str, Any]
RECORDS, BATCH = 96, 16
DELTA = 1e-3
TARGET = 3.0
SAMPLINGS = ("poisson", "shuffle", "full")


def _steps(method: PrivacyMethod, epochs: int) -> int:
    return epochs * steps_per_epoch(RECORDS if method.sampling == "full" else BATCH, RECORDS)


def _epochs(method: PrivacyMethod) -> int:
    """For about a dozen steps."""
    return 12 if method.sampling == "full" else 2


def check_builds_from_options(plugin: Any, options: Options) -> None:
    """``plugin(**options)`` is a lightrail.PrivacyMethod that says how it clips and what its guarantee rests on."""
    missing = missing_options(plugin, options, given=0)
    require(not missing, f"options without a default are not in traits.example: {missing}")
    method = plugin(**options)
    require(isinstance(method, PrivacyMethod), f"it is no lightrail.PrivacyMethod but {type(method).__name__}")
    require(traits_of(plugin).needs_per_sample_gradients, "its traits do not say needs_per_sample_gradients")
    require(isinstance(method.clipping, str) and method.clipping, f"clipping is {method.clipping!r}, and no words")
    require(all(isinstance(each, str) for each in method.assumptions), "assumptions are not sentences")
    require(method.samplings, "samplings is empty")
    unknown = [each for each in method.samplings if each not in SAMPLINGS]
    require(not unknown, f"samplings names {unknown}; there are {', '.join(SAMPLINGS)}")


def check_rejects_unknown_options(plugin: Any, options: Options) -> None:
    """An option that the signature lacks is an error."""
    refuses_unknown_options(plugin, options)


def check_refuses_what_is_out_of_range(plugin: Any, options: Options) -> None:
    """A target beside a noise, and numbers below zero, are refused by an error in four parts."""
    wrong: list[dict[str, Any]] = [
        {"epsilon": 1.0, "noise": 1.0},
        {"epsilon": 0.0, "noise": None},
        {"epsilon": -1.0, "noise": None},
        {"epsilon": None, "noise": -1.0},
        {"epsilon": None, "noise": math.nan},
        {"delta": 0.0},
        {"delta": 1.0},
        {"max_physical_batch": 0},
        {"sampling": "sometimes"},
    ]
    common = inspect.signature(PrivacyMethod.__init__).parameters
    for name, parameter in inspect.signature(plugin).parameters.items():
        if name not in common and type(parameter.default) in (int, float):
            wrong += [{name: -1}, {name: math.nan}] if type(parameter.default) is float else [{name: -1}]
    for each in wrong:
        require_refused(plugin, {**options, **each}, ", ".join(f"{name}={value}" for name, value in each.items()))


def check_spends_what_it_plans(plugin: Any, options: Options) -> None:
    """Calibrated for a target, a run ends private, at the epsilon of its plan and within the target."""
    method = plugin(**{**options, "noise": None, "epsilon": TARGET, "delta": DELTA})
    end = private_run(method, epochs=_epochs(method))
    ledger = end.ledger
    require(ledger.is_private, "the run is not marked as private")
    require(ledger.noise is not None and ledger.noise > 0, f"the noise is calibrated to {ledger.noise}")
    spent = [(e.noise, e.batch, e.records) for e in ledger.events for _ in range(e.steps)]
    planned = [(e.noise, e.batch, e.records) for e in ledger.planned for _ in range(e.steps)]
    require(len(spent) == len(planned), f"{len(spent)} releases are in the ledger, {len(planned)} were planned")
    for step, (a, b) in enumerate(zip(spent, planned, strict=True)):
        same = a[1:] == b[1:] and math.isclose(a[0], b[0], rel_tol=1e-9)
        require(same, f"release {step} is (noise, batch, records) {a}; planned was {b}")
    cost = ledger.planned_epsilon
    require(cost <= TARGET * (1 + 1e-3), f"the plan for epsilon {TARGET} costs {cost:.5g}")
    require(cost >= TARGET * 0.9, f"the plan for epsilon {TARGET} costs only {cost:.5g}: it could do with less noise")
    require(abs(ledger.epsilon() - cost) <= 1e-3, f"the run spent {ledger.epsilon():.5g}, and the plan was {cost:.5g}")


def check_keeps_its_noise_secret(plugin: Any, options: Options) -> None:
    """Two runs from one seed differ; ``deterministic_noise`` repeats bit for bit, and is no privacy."""
    method = with_noise(plugin, options, 1.0, delta=DELTA)
    epochs = _epochs(method)
    first, second = (private_run(with_noise(plugin, options, 1.0, delta=DELTA), epochs=epochs) for _ in range(2))
    same = all(torch.equal(a, b) for a, b in zip(first.params, second.params, strict=True))
    require(not same, "two runs from one seed end at the same parameters: whoever knows the seed knows the noise")
    foretold = [
        private_run(with_noise(plugin, options, 1.0, delta=DELTA, deterministic_noise=True), epochs=epochs)
        for _ in range(2)
    ]
    require_equal(foretold[1].params, foretold[0].params, "two runs with deterministic noise differ")
    require(not foretold[0].ledger.is_private, "a run with deterministic noise is marked as private")
    require(foretold[0].ledger.epsilon() == math.inf, "a run with deterministic noise has a finite epsilon")


def check_drowns_in_huge_noise(plugin: Any, options: Options) -> None:
    """With a noise multiplier of a million, what a network knew is lost: the noise is in the gradient."""
    data = clusters()
    method = with_noise(plugin, options, 1e6, delta=DELTA, deterministic_noise=True)
    before = float((solved()(data[0]).argmax(1) == data[1]).float().mean())
    assert before == 1.0
    try:
        after = private_run(method, data, epochs=1, network=solved()).accuracy(data)
    except ConfigurationError as error:
        raise NotApplicable(f"it refuses so much noise: {error.what}") from error
    require(after < 0.6, f"with a noise multiplier of a million the accuracy is still {after:.2f}")


def check_survives_records_that_are_not_finite(plugin: Any, options: Options) -> None:
    """A record with an infinite gradient adds nothing to a run, whatever is wrong with it.

    Where every record can take part in every step, the first step is that of the data without it.
    """
    inputs, labels = clusters()
    sampling = {"sampling": "full"} if "full" in plugin.samplings else {}

    def end(data: tuple[Tensor, Tensor]) -> PrivateEnd:
        method = with_noise(plugin, options, 0.5, delta=DELTA, deterministic_noise=True, **sampling)
        return private_run(method, data, epochs=4 if sampling else 1, lr=0.02)

    ends = []
    for wrong in (math.inf, math.nan):
        spoiled = inputs.clone()
        spoiled[5, 0] = wrong
        ends.append(end((spoiled, labels)))
        require(all(bool(p.isfinite().all()) for p in ends[-1].params), f"one record of {wrong} breaks the parameters")
    require_equal(ends[1].params, ends[0].params, "it matters whether a record is infinite or not a number")
    if sampling:
        kept = [i for i in range(RECORDS) if i != 5]
        without = end((inputs[kept], labels[kept]))
        found = [g * RECORDS for g in ends[0].gradients[0]]
        expected = [g * len(kept) for g in without.gradients[0]]
        require_close(found, expected, "with a record that is left out, the first step is not that without it", 1e-4)


def check_steps_without_records(plugin: Any, options: Options) -> None:
    """A batch that happens to be empty is a step of noise, and is accounted for like any other."""
    if "poisson" not in plugin.samplings:
        raise NotApplicable("it does not cover Poisson batches, so none is empty")
    method = with_noise(plugin, options, 0.05, delta=DELTA, deterministic_noise=True, sampling="poisson")
    end = private_run(method, clusters(24), batch_size=1, epochs=1, lr=0.01)
    require(0 in end.sizes, "none of its batches of one record in expectation is empty")
    steps = sum(event.steps for event in end.ledger.events)
    require(steps == 24, f"{steps} steps are accounted for, of 24 of which some had no records")
    require(all(event.noise > 0 for event in end.ledger.events), "a batch without records is released without noise")
    require(len(end.gradients) == 24, f"{len(end.gradients)} steps were made, of 24 of which some had no records")
    require(all(bool(p.isfinite().all()) for p in end.params), "a batch without records breaks the parameters")


def check_resumes_with_its_ledger(plugin: Any, options: Options) -> None:
    """Saved in mid-run and resumed, it ends at the parameters, and at the epsilon, of the uninterrupted run."""

    def method(is_secret: bool) -> PrivacyMethod:
        return with_noise(plugin, options, 1.0, delta=DELTA, deterministic_noise=not is_secret)

    epochs = _epochs(method(True))
    middle = _steps(method(True), epochs) // 2 + 1
    whole = private_run(method(False), epochs=epochs, save_after=middle)
    resumed = private_run(method(False), epochs=epochs, checkpoint=whole.checkpoint)
    require_equal(resumed.params, whole.params, "a resumed run ends elsewhere than the uninterrupted one")
    require(len(resumed.gradients) < len(whole.gradients), "the resumed run began anew")
    state = whole.method.state_dict()
    require(set(saved_and_loaded(state)) == set(state), "its state does not survive a file")
    secret = private_run(method(True), epochs=epochs, save_after=middle)
    gone_on = private_run(method(True), epochs=epochs, checkpoint=secret.checkpoint)
    found, expected = gone_on.ledger.epsilon(), secret.ledger.epsilon()
    require(
        abs(found - expected) <= 1e-9 * expected,
        f"a resumed run says epsilon {found:.6g}, the uninterrupted one {expected:.6g}",
    )


def check_logs_numbers(plugin: Any, options: Options) -> None:
    """Its figures are numbers by name, after a run."""
    method = with_noise(plugin, options, 1.0, delta=DELTA)
    private_run(method, epochs=_epochs(method))
    for name, value in method.logged().items():
        require(isinstance(name, str) and isinstance(value, int | float), f"logged() holds {name!r}: {value!r}")


CHECKS: tuple[Check, ...] = (
    check_is_documented,
    check_names_its_paper,
    check_builds_from_options,
    check_rejects_unknown_options,
    check_refuses_what_is_out_of_range,
    *RELEASE_CHECKS,
    check_spends_what_it_plans,
    check_keeps_its_noise_secret,
    check_drowns_in_huge_noise,
    check_survives_records_that_are_not_finite,
    check_steps_without_records,
    check_resumes_with_its_ledger,
    check_logs_numbers,
)


class PrivacySuite(Suite):
    """Every check of a private method."""

    kind: ClassVar[str] = "privacy"
    checks: ClassVar[tuple[Check, ...]] = (*CHECKS, known_exceptions(frozenset(map(name_of, CHECKS))))
