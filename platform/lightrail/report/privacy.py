"""What a private run promises, what it has spent, and what that rests on; and, where it promises nothing, why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lightrail.errors import UserError
from lightrail.report.record import RunRecord
from lightrail.report.wording import number, title

__all__ = ["account", "banner", "figure", "is_conditional", "spending", "why_not_private"]

CONDITIONAL = "Conditional"  # how an assumption begins that goes beyond the sampling and the noise


def figure(epsilon: object) -> str:
    """Epsilon with four decimals, rounded up: what is shown is still a bound.

    Args:
        epsilon: At least 0; ``None`` for one without a bound.

    Example:
        >>> figure(2.99901), figure(3), figure(None), figure(0.00012301), figure(123456.7)
        ('2.9991', '3.0000', '∞', '0.0002', '123,457')
    """
    if not isinstance(epsilon, int | float) or isinstance(epsilon, bool) or math.isinf(epsilon):
        return "∞"
    if epsilon >= 1e4:
        return number(math.ceil(epsilon))
    return f"{math.ceil(round(epsilon * 1e4, 6)) / 1e4:.4f}"


def why_not_private(values: Mapping[str, Any]) -> str:
    """Why an account promises nothing; empty where it does.

    Args:
        values: The contents of ``privacy.json``, or what ``summary.json`` says of privacy.

    Example:
        >>> why_not_private({"is_private": False, "noise": 0.0}), why_not_private({"private": True})
        ('it has no noise', '')
    """
    if values.get("is_private", values.get("private", False)) is True:
        return ""
    noises = [event.get("noise") for name in ("planned", "events") for event in _mappings(values.get(name))]
    return "it has no noise" if 0 in [values.get("noise"), *noises] else "its noise can be foretold"


def is_conditional(values: Mapping[str, Any]) -> bool:
    """Whether an account rests on more than the sampling and the noise.

    Args:
        values: The contents of ``privacy.json``.
    """
    return any(line.startswith(CONDITIONAL) for line in _lines(values))


def spending(values: Mapping[str, Any]) -> str:
    """What was spent, in one line.

    Args:
        values: The contents of ``privacy.json``, or what ``summary.json`` says of privacy.

    Example:
        >>> spending({"epsilon": 2.99901, "target_epsilon": 3, "delta": 1e-5, "accountant": "pld", "is_private": True})
        'epsilon 2.9991 of 3 at delta 1e-5 (PLD)'
        >>> spending({"epsilon": None, "delta": 1e-5, "noise": 0.0, "is_private": False})
        'NOT private: it has no noise'
    """
    if why := why_not_private(values):
        return f"NOT private: {why}"
    accountant = f" ({str(values['accountant']).upper()})" if values.get("accountant") else ""
    conditional = ", conditional" if is_conditional(values) else ""
    target = values.get("target_epsilon")
    of = f" of {target:g}" if isinstance(target, int | float) else ""
    return (
        f"epsilon {figure(values.get('epsilon'))}{of} at delta {number(values.get('delta'))}{accountant}{conditional}"
    )


# The page.


def banner(record: RunRecord) -> str:
    """Where privacy was asked for and nothing is promised, that, before everything else."""
    if not record.is_private_by_plan:
        return ""
    if not record.privacy:
        return _alarm("Nothing says what this run has spent of its privacy.", _missing(record))
    if why := why_not_private(record.privacy):
        return _alarm("This run is NOT private.", f"{why[:1].upper()}{why[1:]}. {_UNBOUNDED}")
    return ""


_ALONE = "Epsilon is of this run alone: what other runs on the same data spend comes on top."
_UNBOUNDED = "No epsilon bounds what its results tell of single records: treat them as you treat the data."


def _alarm(what: str, why: str) -> str:
    return f'<div class="alarm" role="alert"><b>{escape(what)}</b>{escape(why)}</div>\n'


def _missing(record: RunRecord) -> str:
    return record.missing.get("privacy.json", "privacy.json is empty.")


def account(record: RunRecord) -> str:
    """What was spent, of what; the plan; the sentences that it rests on; and what guards have left."""
    values = record.privacy
    if not values:
        return ""
    return "\n".join(
        part
        for part in (
            "" if why_not_private(values) else _budget(values),
            _plan(values),
            _sentences(values),
            _guards(values),
        )
        if part
    )


def _budget(values: Mapping[str, Any]) -> str:
    spent, target = values.get("epsilon"), values.get("target_epsilon")
    of = bar = ""
    if isinstance(target, int | float) and target > 0:
        share = min(1.0, spent / target) if isinstance(spent, int | float) else 1.0
        of = f'<span class="stage">of {target:g}</span>'
        bar = f'<div class="bar"><i style="width:{share:.1%}"></i></div>'
    condition = "<span>under the conditions below</span>" if is_conditional(values) else ""
    accountant = escape(str(values.get("accountant", "")).upper())
    return (
        f'<div class="card budget"><div class="what">Epsilon spent</div>'
        f'<div class="value" title="{escape(repr(spent))}"><b>{escape(figure(spent))}</b>{of}</div>{bar}'
        f'<div class="others"><span>delta <b>{escape(number(values.get("delta")))}</b></span>'
        f"<span>accountant <b>{accountant}</b></span>{condition}</div></div>"
    )


def _plan(values: Mapping[str, Any]) -> str:
    from lightrail.privacy.ledger import Ledger, plan_table

    try:
        rows = plan_table(Ledger.from_dict(values))
    except UserError as error:
        return f'<p class="absent">{escape(f"The plan cannot be shown: {error.what}: {error.found}.")}</p>'
    if why_not_private(values):
        rows = [row for row in rows if row[0] not in ("private", "epsilon", "delta", "accountant")]
    pairs = "".join(f"<dt>{escape(name.capitalize())}</dt><dd>{escape(value)}</dd>" for name, value in rows)
    return f"<h3>The plan of the whole run</h3><dl>{pairs}</dl>"


def _sentences(values: Mapping[str, Any]) -> str:
    # What a guarantee rests on is of no interest where there is none.
    lines = [] if why_not_private(values) else [*_lines(values), _ALONE]
    text = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<h3>What this rests on</h3><ul class="sentences">{text}</ul>' if text else ""


def _guards(values: Mapping[str, Any]) -> str:
    guards = values.get("guards")
    pairs = "".join(
        f"<dt>{escape(title(str(name)))}</dt>"
        f"<dd>{escape(' · '.join(f'{word} {number(value)}' for word, value in guard.items()))}</dd>"
        for name, guard in (guards.items() if isinstance(guards, Mapping) else ())
        if isinstance(guard, Mapping)
    )
    return f"<h3>Guards of the validation</h3><dl>{pairs}</dl>" if pairs else ""


def _lines(values: Mapping[str, Any]) -> list[str]:
    found = values.get("assumptions")
    return [str(line) for line in found] if isinstance(found, list | tuple) else []


def _mappings(values: object) -> Sequence[Mapping[str, Any]]:
    return [each for each in values if isinstance(each, Mapping)] if isinstance(values, list | tuple) else []
