"""``lightrail privacy``: what a private run will cost, and what one has cost."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from lightrail.errors import ConfigurationError, closest
from lightrail.options import positive

if TYPE_CHECKING:
    from lightrail.privacy.audit import Audit
    from lightrail.privacy.events import Event
    from lightrail.privacy.ledger import Ledger

__all__ = ["main"]

_HELP = """\
Usage: lightrail privacy plan KEY=VALUE … [--json]
       lightrail privacy audit RUN [RUN …] [--json]

plan: the noise that an epsilon needs, or the epsilon of a noise, by both accountants
  epsilon=3 or noise=1.1               the target, or the noise multiplier
  delta=1e-5                           by default 1/(10 n), rounded down to a power of ten, where records are given
  rate=0.01 (or 1/100, or 64/1437)     how likely a record is to be in a batch; or batch=64 records=1437
  steps=5000 or epochs=20              how many batches
  accountant=pld or rdp                whose noise is taken; pld is tighter

audit: computes epsilon anew from what a run released, and compares it with what the run says
  RUN    a run folder, its privacy.json, a checkpoint, or 'latest' for the newest run under ./runs;
         of several runs on the same data also the total

  lightrail privacy plan epsilon=3 batch=64 records=1437 epochs=20
  lightrail privacy plan noise=1.1 delta=1e-5 rate=0.01 steps=5000
  lightrail privacy audit latest
"""
_KEYS = ("epsilon", "noise", "delta", "rate", "batch", "records", "steps", "epochs", "accountant")
_SHARES = (10, 25, 50, 100)


def main(words: Sequence[str]) -> int:
    """Plans or audits.

    Args:
        words: The words after ``lightrail privacy``.

    Returns:
        The exit status.

    Raises:
        UserError: Something that the user can mend.
    """
    parser = argparse.ArgumentParser(prog="lightrail privacy", add_help=False, allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--json", action="store_true")
    options, others = parser.parse_known_args(list(words))
    name, rest = (options.words[0], [*options.words[1:], *others]) if options.words else ("", others)
    if options.help or not (name or rest):
        print(_HELP, end="")
    elif name == "plan":
        _plan(rest, options.json)
    elif name == "audit":
        _audit(rest, options.json)
    else:
        raise ConfigurationError(
            f"lightrail privacy has no command '{name or rest[0]}'",
            found=" ".join(words),
            allowed="plan, audit",
            remedy=f"{closest(name, ('plan', 'audit'))}`lightrail privacy --help` has examples.",
        )
    return 0


def _plan(words: Sequence[str], as_json: bool) -> None:
    from lightrail.privacy.accounting import ACCOUNTANTS, calibrated, checked_accountant, epsilon_of
    from lightrail.privacy.events import Event
    from lightrail.report.wording import number

    given = _given(words)
    accountant = checked_accountant(given.get("accountant", "pld"))
    _one(given, "epsilon", "noise")
    batch, records = _rate(given)
    steps, delta = _steps(given, batch, records), _delta(given)

    def at(noise: float, count: int = steps) -> list[Event]:
        return [Event(noise, count, batch, records)]

    noises = {}
    if "epsilon" in given:
        target = _number(given, "epsilon")
        noises = {each: _upward(calibrated(at, target, delta, each)) for each in ACCOUNTANTS}
        aim, noise = f"epsilon {given['epsilon']}", noises[accountant]
    else:
        noise = _number(given, "noise")
        positive(noise=noise)
        aim = f"noise multiplier {number(noise)}"
    rows = []
    for count in sorted({max(1, -(-steps * share // 100)) for share in _SHARES}):
        # The last is what will be said of the run; the others may be a thousandth off, in a tenth of the time.
        interval = 1e-4 if count == steps else 1e-3
        rows.append((count, {each: epsilon_of(at(noise, count), delta, each, interval) for each in ACCOUNTANTS}))
    if as_json:
        plan = {"delta": delta, "rate": f"{batch}/{records}", "steps": steps, "accountant": accountant, "noise": noise}
        told = [{"steps": count, **{each: _finite(value) for each, value in row.items()}} for count, row in rows]
        print(json.dumps({**plan, "noise_by_accountant": noises, "epsilon_by_steps": told}, indent=2))
        return
    print(f"{aim} at delta {number(delta)} · rate {batch}/{records} · {number(steps)} step{'s' * (steps > 1)}\n")
    if noises:
        found = [[each.upper(), f"{value:.4f}"] for each, value in noises.items()]
        print(_aligned([["accountant", "noise multiplier"], *found]), end="\n\n")
        print(f"epsilon with the noise multiplier {noise:.4f}:\n")
    table = [[number(count), f"{count / steps:.0%}", *map(_figure, row.values())] for count, row in rows]
    print(_aligned([["steps", "", *map(str.upper, ACCOUNTANTS)], *table], first=str.rjust))


def _audit(words: Sequence[str], as_json: bool) -> None:
    from lightrail.privacy.audit import audited, costs
    from lightrail.privacy.ledger import composed

    if not words or (flags := [word for word in words if word.startswith("-")]):
        raise ConfigurationError(
            "an audit needs a run" if not words else f"an audit has no option '{flags[0]}'",
            found=" ".join(words) or "nothing",
            allowed="run folders, privacy.json files, checkpoints, or 'latest'; and --json",
            remedy="Say which: lightrail privacy audit latest",
        )
    audits = [audited(word) for word in words]
    total = composed([each.ledger for each in audits]) if len(audits) > 1 else None
    together = None if total is None else costs(total)
    if as_json:
        told = None if total is None else {"delta": total.delta, "epsilon": _all_finite(together or {})}
        print(json.dumps({"runs": [_object(each) for each in audits], "together": told}, indent=2))
        return
    print("\n\n".join(map(_shown, audits)))
    if total is not None and together is not None:
        print(f"\n{len(audits)} runs together, if on the same data: {_cost(total, together)}")


def _shown(audit: Audit) -> str:
    from lightrail.privacy.ledger import plan_table
    from lightrail.report.wording import number

    ledger = audit.ledger
    heading = ["", *map(str.upper, audit.spent), *(["said"] if audit.said is not None else [])]
    spent = ["epsilon spent", *map(_figure, audit.spent.values())]
    spent += [_figure(audit.said)] if audit.said is not None else []
    planned = ["epsilon planned", *map(_figure, audit.planned.values()), *([""] if audit.said is not None else [])]
    released = sum(event.steps for event in ledger.events)
    facts = {name: value for name, value in plan_table(ledger) if name != "epsilon"}
    facts["steps"] = f"{number(released)} of {facts.get('steps', '0')}"
    blocks = [audit.name, _aligned([heading, spent, planned]), _aligned(list(facts.items()), last=str.ljust)]
    if ledger.assumptions:
        blocks.append("\n".join(["This rests on:", *(f"  - {line}" for line in ledger.assumptions)]))
    if ledger.guards:
        lines = (f"  - {name}: {_listed(guard)}" for name, guard in ledger.guards.items())
        blocks.append("\n".join(["Guards of the validation:", *lines]))
    return "\n\n".join(blocks)


def _listed(guard: Mapping[str, Any]) -> str:
    from lightrail.report.wording import number

    return ", ".join(f"{key} {number(value)}" for key, value in guard.items())


def _cost(ledger: Ledger, spent: Mapping[str, float]) -> str:
    from lightrail.report.wording import number

    figures = ", ".join(f"{_figure(value)} ({name.upper()})" for name, value in spent.items())
    return f"epsilon {figures} at delta {number(ledger.delta)}"


def _object(audit: Audit) -> dict[str, Any]:
    ledger = audit.ledger.to_dict()
    kept = ("delta", "is_private", "accountant", "adjacency", "sampling", "assumptions", "events", "guards")
    figures = {"epsilon": _all_finite(audit.spent), "planned_epsilon": _all_finite(audit.planned)}
    return {"run": audit.name, **figures, "said": _finite(audit.said), **{name: ledger[name] for name in kept}}


def _all_finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: _finite(value) for name, value in values.items()}


def _given(words: Sequence[str]) -> dict[str, str]:
    given = {}
    for word in words:
        key, equals, value = word.partition("=")
        if key not in _KEYS or not equals:
            raise ConfigurationError(
                f"a plan has no '{key}'" if equals else f"'{word}' is not KEY=VALUE",
                found=word,
                allowed=", ".join(f"{key}=…" for key in _KEYS),
                remedy=f"{closest(key, _KEYS)}`lightrail privacy --help` explains each.",
            )
        given[key] = value
    return given


def _one(given: Mapping[str, str], *names: str) -> str:
    """Which one of these keys was given."""
    found = [name for name in names if name in given]
    if len(found) != 1:
        raise ConfigurationError(
            f"{' and '.join(found)} are given at once" if found else f"a plan needs {' or '.join(names)}",
            found=" ".join(f"{key}={value}" for key, value in given.items()) or "nothing",
            allowed=f"one of {', '.join(f'{name}=…' for name in names)}",
            remedy="Leave all but one of them out." if found else f"Add {names[0]}=…",
        )
    return found[0]


def _rate(given: Mapping[str, str]) -> tuple[int, int]:
    if _one(given, "rate", "batch") == "batch":
        _one(given, "records")
        batch, records = _whole(given, "batch"), _whole(given, "records")
        return batch, records
    rate = _exact(given, "rate")
    if not 0 < rate <= 1:
        raise _out_of_range(given, "rate", "a rate in (0, 1], such as 0.01, 1/100 or 64/1437")
    return rate.numerator, rate.denominator


def _steps(given: Mapping[str, str], batch: int, records: int) -> int:
    from lightrail.privacy.events import steps_per_epoch

    name = _one(given, "steps", "epochs")
    return _whole(given, name) * (1 if name == "steps" else steps_per_epoch(batch, records))


def _delta(given: Mapping[str, str]) -> float:
    from lightrail.privacy.delta import check_delta, default_delta

    if "delta" not in given and "records" in given:
        return default_delta(_whole(given, "records"))
    _one(given, "delta")
    delta = _number(given, "delta")
    if not 0 < delta < 1:
        raise _out_of_range(given, "delta", "a number in (0, 1), such as 1e-5")
    return check_delta(delta, _whole(given, "records")) if "records" in given else delta


def _exact(given: Mapping[str, str], name: str) -> Fraction:
    try:
        return Fraction(given[name])
    except (ValueError, ZeroDivisionError) as error:
        raise _out_of_range(given, name, "a number") from error


def _whole(given: Mapping[str, str], name: str) -> int:
    value = _exact(given, name)
    if value.denominator != 1 or value < 1:
        raise _out_of_range(given, name, "a whole number of at least 1")
    return int(value)


def _number(given: Mapping[str, str], name: str) -> float:
    return float(_exact(given, name))


def _out_of_range(given: Mapping[str, str], name: str, allowed: str) -> ConfigurationError:
    return ConfigurationError(
        f"{name} is out of range",
        found=f"{name}={given[name]}",
        allowed=allowed,
        remedy=f"Set {name} within that range.",
    )


def _upward(noise: float) -> float:
    """Rounded to what is shown, and never below: what is typed off the table keeps its promise."""
    return math.ceil(noise * 1e4) / 1e4


def _figure(epsilon: float) -> str:
    """Four decimals, so that points stand below each other; other forms for what is tiny or huge."""
    from lightrail.report.wording import number

    return f"{epsilon:.4f}" if 1e-3 <= epsilon < 1e4 else number(epsilon)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _aligned(rows: Sequence[Sequence[str]], first: Any = str.ljust, last: Any = str.rjust) -> str:
    """Columns side by side: numbers to the right, what they belong to as ``first`` says."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *values in rows:
        cells = (last(value, width) for value, width in zip(values, widths[1:], strict=True))
        lines.append("   ".join([first(name, widths[0]), *cells]).rstrip())
    return "\n".join(lines)
