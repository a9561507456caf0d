"""How exact samplers are under a budget of evaluations, and what their arithmetic costs, beside diffusers."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lightrail.bench.sampler_arithmetic import measure_arithmetic
from lightrail.bench.sampler_errors import BUDGETS, PAIRS, Found, Problem, errors_of_peers, errors_of_samplers
from lightrail.bench.table import Table
from lightrail.errors import PluginError

__all__ = ["SamplerTables", "add_arguments", "measure"]

TARGET = 0.6
QUICK = ("ddim", "deis", "dpm_solver_pp", "unipc")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this bench."""
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="some samplers, rather than all")
    parser.add_argument("--quick", action="store_true", help="few samplers, two budgets and small batches: seconds")
    parser.add_argument("--without-diffusers", action="store_true", help="samplers alone")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where samplers.md, .json and .svg go")


def measure(options: argparse.Namespace) -> SamplerTables:
    """Solves one problem with everything that is installed, then times whole runs with a model that costs nothing.

    Args:
        options: As :func:`add_arguments` describes, and ``rounds``.

    Raises:
        PluginError: No sampler has one of the names.
    """
    from lightrail.bench.diffusers_schedulers import is_installed

    budgets = (5, 10) if options.quick else BUDGETS
    only = options.only or (QUICK if options.quick else ())
    has_peers = is_installed() and not options.without_diffusers
    peers = tuple(there for here, there in PAIRS if here.split()[0] in only) if only else ()
    problem = Problem(16 if options.quick else 64)
    found = list(errors_of_samplers(problem, budgets, only))
    if not found:
        raise PluginError(
            "there is no sampler to measure",
            found=" ".join(only) or "no deterministic sampler installed",
            allowed="names of deterministic samplers, as `lightrail plugins --kind sampler` lists them",
            remedy="Name one of them, or leave --only out.",
        )
    if has_peers:
        found += errors_of_peers(problem, budgets, peers)
    rounds = 1 if options.quick else options.rounds
    arithmetic = measure_arithmetic(rounds, 2 if options.quick else 64, only, with_peers=has_peers)
    tables = SamplerTables(best_of(found), budgets, len(found), arithmetic)
    if options.folder:
        from lightrail.bench.sampler_plot import draw

        options.folder.mkdir(parents=True, exist_ok=True)
        options.json = options.json or options.folder / "samplers.json"
        options.document = options.document or options.folder / "samplers.md"
        draw(tables.best, budgets, options.folder / "samplers.svg")
        tables.picture = "samplers.svg"
    return tables


def best_of(found: Iterable[Found]) -> list[Found]:
    """The smallest error of each method under each budget, over its settings and spacings."""
    best: dict[tuple[str, str, int], Found] = {}
    for each in found:
        key = (each.library, each.method, each.budget)
        if key not in best or each.error < best[key].error:
            best[key] = each
    return list(best.values())


@dataclass
class SamplerTables:
    """What was measured, as text, as Markdown and as plain values.

    Args:
        best: The best of each method under each budget.
        budgets: How many evaluations there were to spend.
        runs: How many runs these were chosen from.
        arithmetic: Milliseconds an evaluation, beside the scheduler of the same method.
        picture: The name of the plot beside the document, where there is one.
    """

    best: Sequence[Found]
    budgets: Sequence[int]
    runs: int
    arithmetic: Table
    picture: str = field(default="")

    def of(self, library: str, budget: int, method: str = "") -> Found | None:
        """The best of a library, or of one method of it, under a budget."""
        candidates = [
            each
            for each in self.best
            if each.library == library and each.budget == budget and method in ("", each.method)
        ]
        return min(candidates, key=lambda each: each.error, default=None)

    def ratio(self, budget: int, here: str = "", there: str = "") -> float | None:
        """The error of a sampler over that of a scheduler; of the best of either where none is named."""
        ours, theirs = self.of("lightrail", budget, here), self.of("diffusers", budget, there)
        return None if ours is None or theirs is None else ours.error / theirs.error

    def pairs(self) -> list[tuple[str, str]]:
        """The methods that were measured both here and there."""
        return [(a, b) for a, b in PAIRS if any(self.ratio(budget, a, b) is not None for budget in self.budgets)]

    def tables(self) -> list[tuple[str, list[list[str]]]]:
        """Each table as a heading with rows of cells, the first row its head."""
        heads = [f"{budget} evaluations" for budget in self.budgets]
        found = [(_ERRORS, [["method", *heads], *self._error_rows()])]
        if any(self.of("diffusers", budget) for budget in self.budgets):
            best: list[list[str]] = [["", *heads]]
            for label, library in (("best here", "lightrail"), ("best of diffusers", "diffusers")):
                best.append([label, *(_named(self.of(library, budget)) for budget in self.budgets)])
            best.append([f"ratio, at most {TARGET}", *(_judged(self.ratio(b), TARGET) for b in self.budgets)])
            pairs = [
                [f"{a} / {b}", *(_judged(self.ratio(n, a, b), 1.0) for n in self.budgets)] for a, b in self.pairs()
            ]
            found += [(_BEST, best), (_PAIRED, [["same method, ratio at most 1", *heads], *pairs])]
        settings = [[f"{each.method}, {each.budget}", each.setting, str(each.evaluations)] for each in self.best]
        return [*found, (_SETTINGS, [["method and budget", "settings and spacing", "evaluations"], *settings])]

    def _error_rows(self) -> list[list[str]]:
        rows = []
        for library in ("lightrail", "diffusers"):
            for method in sorted({each.method for each in self.best if each.library == library}):
                found = [self.of(library, budget, method) for budget in self.budgets]
                rows.append([method, *("" if each is None else f"{each.error:.2g}" for each in found)])
        return rows

    def text(self) -> str:
        """The tables for a terminal."""
        parts = []
        for heading, rows in self.tables():
            widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
            lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
            parts.append("\n".join([heading, "", *(line.rstrip() for line in lines)]))
        return "\n\n".join([*parts, self.arithmetic.text()])

    def markdown(self) -> str:
        """The tables for a document."""
        parts = [f"# Samplers beside diffusers\n\n{_problem(self.runs)}"]
        if self.picture:
            parts.append(f"![error over evaluations]({self.picture})")
        for heading, rows in self.tables():
            head, *body = ["| " + " | ".join(row) + " |" for row in rows]
            parts.append("\n".join([heading, "", head, "|" + " --- |" * len(rows[0]), *body]))
        return "\n\n".join([*parts, f"```text\n{self.arithmetic.text()}\n```"])

    def to_dict(self) -> dict[str, object]:
        """Everything as plain values."""
        return {
            "problem": _problem(self.runs),
            "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
            "budgets": list(self.budgets),
            "best": [asdict(each) for each in self.best],
            "ratios": {str(budget): self.ratio(budget) for budget in self.budgets},
            "pairs": {f"{a} / {b}": {str(n): self.ratio(n, a, b) for n in self.budgets} for a, b in self.pairs()},
            "arithmetic": self.arithmetic.to_dict(),
        }


_ERRORS = "Error: root mean square distance from the exact solution, the best of each method's settings and spacings."
_BEST = "The best of all."
_PAIRED = "The same method here and there, each with the best of its settings and spacings."
_SETTINGS = "What the best settings were."


def _problem(runs: int) -> str:
    return (
        "A mixture of three Gaussians in two dimensions with its exact denoiser, on the path of 1000 training times "
        "with linear betas from 1e-4 to 0.02, from standard normal noise at t = 999 to the data at σ = 0. The exact "
        "solution is that of the probability flow from the same noise, at tolerance 1e-12. A budget counts evaluations "
        "of the network; each run takes as many steps as it has room for. Every method is tried with each of its "
        f"settings and spacings, {runs} runs in all, and the best for each budget is shown. The two sides do not have "
        "as many to choose from: of the spacings here four are also tried with other places for the beginning of the "
        "last step (`time_grid.stop` in the settings below), which schedulers fix by their own rules; these places "
        "were chosen on this very problem, and matter most where evaluations are few. "
        "Schedulers are asked at the noise level that they compute with, not at the rounded time, and those that keep "
        "some noise are compared with the exact solution there. With an exact denoiser this measures solvers, not how "
        "samples of a trained network look."
    )


def _named(found: Found | None) -> str:
    return "" if found is None else f"{found.error:.2g} ({found.method})"


def _judged(ratio: float | None, bound: float) -> str:
    return "" if ratio is None else f"{ratio:.2f}{'' if ratio <= bound * 1.0005 else ' OVER'}"
