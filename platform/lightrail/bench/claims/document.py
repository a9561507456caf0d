"""The claims as a document: a table a problem, a picture, and the sentences for each method's card."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from lightrail.bench.claims.cards import update_cards
from lightrail.bench.claims.pairs import pair
from lightrail.bench.claims.problem import Problem
from lightrail.bench.claims.record import Measured
from lightrail.bench.claims.verdict import Comparison, compare, verdict
from lightrail.catalogue import load
from lightrail.files import replacing
from lightrail.traits import Claim, traits_of

__all__ = ["Document", "Row"]


@dataclass(frozen=True)
class Row:
    """One method on one problem beside its baseline."""

    measured: Measured
    claim: Claim
    found: Comparison | None
    verdict: str


class Document:
    """All that was measured of one kind.

    Args:
        kind: The kind of the methods.
        record: What was measured.
        trials: Learning rates that each could try.
        seeds: Seeds of the comparison.
    """

    def __init__(self, kind: str, record: Mapping[str, Measured], trials: int, seeds: int) -> None:
        self.kind, self.trials, self.seeds = kind, trials, seeds
        self.rows: dict[str, list[Row]] = {}
        for measured in record.values():
            self.rows.setdefault(measured.problem, []).append(self._row(measured, record.values()))
        for rows in self.rows.values():
            rows.sort(key=lambda row: row.measured.mean if row.measured.trials else math.inf)

    def _row(self, measured: Measured, record: Iterable[Measured]) -> Row:
        own = measured.kind == self.kind and measured.method != "none"
        claim = traits_of(load(self.kind, measured.method)).claim if own else None
        if claim is None:
            return Row(measured, Claim(sentence=""), None, "")
        mine, theirs = pair(self.kind, measured.problem, measured.method, claim)
        if measured.key.partition("@")[0] != mine.key.partition("@")[0]:  # it is there for others to be beside
            return Row(measured, Claim(sentence=""), None, "")
        name = theirs.key.partition("@")[0]
        baseline = next((each for each in record if each.key.partition("@")[0] == name), None)
        if measured.refused or baseline is None or not baseline.trials:
            return Row(measured, claim, None, f"does not apply: {measured.refused}" if measured.refused else "")
        problem: type[Problem] = load("problem", measured.problem)
        found = compare(measured.trials, baseline.trials, problem.passes)
        return Row(measured, claim, found, verdict(claim, found))

    def text(self) -> str:
        """The tables, as Markdown."""
        return "\n".join([*self._head(), *(line for problem in self.rows for line in self._table(problem))])

    def write(self, folder: Path) -> None:
        """Writes the tables and the picture."""
        from lightrail.bench.claims.picture import draw

        with replacing(folder / f"{self.kind}.md") as temporary:
            temporary.write_text(self.text() + "\n")
        draw(self, folder / f"{self.kind}.svg")

    def write_cards(self, path: Path) -> None:
        """Writes what each method's card says, by its class; what the file says of other classes stays."""
        own: dict[str, list[str]] = {}
        for problem, rows in self.rows.items():
            for row in rows:
                if row.found is not None and row.claim.sentence:
                    cls = load(self.kind, row.measured.method)
                    sentence = _sentence(problem, row, self.seeds)
                    own.setdefault(f"{cls.__module__}.{cls.__qualname__}", []).append(sentence)
        update_cards(path, own)

    def to_dict(self) -> dict[str, object]:
        """Figures as plain values."""
        return {
            problem: {row.measured.method: {"lr": row.measured.lr, "verdict": row.verdict} for row in rows}
            for problem, rows in self.rows.items()
        }

    def _head(self) -> list[str]:
        return [
            f"# What {_plural(self.kind)} claim, and what was measured",
            "",
            f"Made by `lightrail bench claims --kind {self.kind}`; not edited by hand.",
            "",
            *(self._how_runs() if self.kind in ("callback", "batching", "privacy", "federated") else self._how_loops()),
            "",
            "Options beside a method's name were chosen by hand to suit a problem of this size, some of them after a "
            "first run at the defaults, which the baselines were not offered; a verdict with options holds under "
            "those options. Rates are chosen by the same figure that is compared, on another seed; where the claim is "
            "about a given rate, none are tried.",
            "",
            "A difference counts as seen where it exceeds twice its standard error. Problems of this size "
            "decide nothing about large models: *cannot be seen* is an honest and frequent answer.",
            "",
            f"![Outcome beside the baseline]({self.kind}.svg)",
        ]

    def _how_loops(self) -> list[str]:
        is_behind = self.kind == "transform"
        behind = " Transforms stand in front of the optimizer that is their baseline." if is_behind else ""
        return [
            f"Each method tries {self.trials} learning rates on one seed (by decades from its own default, then by "
            f"halves), a method that sets its own step size none. It then trains from {self.seeds} other seeds, on a "
            "straight line to zero where it takes a schedule. Every trial spends the same number of forward-backward "
            f"passes: extra evaluations count, a Hessian-vector product counts as two.{behind}",
            "",
            "*Steps* is the share of those passes after which the method reached the baseline's final figure; ∞ is "
            "never.",
        ]

    def _how_runs(self) -> list[str]:
        return [
            f"Each trial is a run of `train` over the same samples, from {self.seeds} seeds; where learning rates are "
            f"tried, {self.trials} on another seed (by decades, then by halves).",
            "",
            "*Steps* is the share of the optimizer steps of the baseline's whole run after which the method reached "
            "the baseline's final figure; ∞ is never.",
        ]

    def _table(self, problem: str) -> list[str]:
        cls: type[Problem] = load("problem", problem)
        rule = traits_of(cls).rule
        lines = ["", f"## {problem}", "", f"{rule}; {cls.passes} passes; {cls.merit_name}.", ""]
        lines += [
            f"| method | lr | {cls.merit_name} | difference | steps | claim | verdict |",
            "|---|---|---|---|---|---|---|",
        ]
        return [*lines, *(_line(row) for row in self.rows[problem])]


def _plural(kind: str) -> str:
    named = {"privacy": "private methods", "federated": "federated methods"}
    return named.get(kind, f"{kind}es" if kind.endswith("s") else f"{kind}s")


def _line(row: Row) -> str:
    measured = row.measured
    name = _with_options(measured.method, measured.options)
    claim = f"{row.claim.sentence} ({_baseline(row.claim)})" if row.claim.sentence else ""
    if not measured.trials:
        return f"| {name} | | | | | {claim} | {row.verdict} |"
    rate = f"{measured.lr:.3g}" if measured.lr is not None else "its own"
    finals = [trial.final for trial in measured.trials]
    loss = f"{_number(mean(finals))} ± {_number(stdev(finals))}" if _finite(finals) and len(finals) > 1 else "∞"
    if row.found is None or not row.claim.sentence:
        return f"| {name} | {rate} | {loss} | | | | {row.verdict or 'baseline'} |"
    return f"| {name} | {rate} | {loss} | {_difference(row.found)} | {_share(row.found)} | {claim} | {row.verdict} |"


def _sentence(problem: str, row: Row, seeds: int) -> str:
    assert row.found is not None
    where = _with_options(problem, row.measured.options)
    if not math.isfinite(row.found.mean):
        return f"{row.claim.sentence}: {row.verdict} ({where}: diverged, {seeds} seeds)"
    shares = f"; {_share(row.found)} of the passes to its final loss" if row.claim.steps is not None else ""
    return (
        f"{row.claim.sentence}: {row.verdict} ({where}: {_difference(row.found)} of {row.found.baseline:.4f} "
        f"beside {_baseline(row.claim)}, {seeds} seeds{shares})"
    )


def _with_options(method: str, options: Mapping[str, Any]) -> str:
    return " ".join([method, *(f"{key}={value}" for key, value in sorted(options.items()))])


def _baseline(claim: Claim) -> str:
    return _with_options(claim.baseline, claim.baseline_options)


def _difference(found: Comparison) -> str:
    return f"{found.mean:+.4f} ± {found.error:.4f}" if math.isfinite(found.mean) else "∞"


def _number(value: float) -> str:
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"


def _share(found: Comparison) -> str:
    share = median(found.steps)
    return f"{share:.2f}" if math.isfinite(share) else "∞"


def _finite(values: list[float]) -> bool:
    return all(map(math.isfinite, values))
