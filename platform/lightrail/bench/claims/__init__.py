"""What the papers claim, measured: every method and its baseline under one budget, and a verdict each."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import hashlib
import inspect
import math
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from types import ModuleType
from typing import Any

from lightrail.bench.claims.document import Document
from lightrail.bench.claims.outcome import Trial
from lightrail.bench.claims.pairs import pair
from lightrail.bench.claims.problem import CountedClosure, Problem, RunProblem, TaskProblem
from lightrail.bench.claims.record import Measured, read_record, write_record
from lightrail.bench.claims.sampling import measure_claims
from lightrail.bench.claims.sampling_document import SamplingDocument
from lightrail.catalogue import available, load
from lightrail.errors import PluginError, UserError
from lightrail.options import at_least, one_of
from lightrail.traits import Claim, traits_of

__all__ = ["CountedClosure", "Problem", "RunProblem", "TaskProblem", "add_arguments", "measure"]

_OF_SAMPLES = ("guidance", "sampler", "sampler_wrapper")
_KINDS = ("optimizer", "transform", "callback", "batching", "privacy", "federated", *_OF_SAMPLES)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this bench."""
    parser.add_argument("--kind", default="optimizer", help=f"whose claims: {', '.join(_KINDS)}")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="some methods, rather than all")
    parser.add_argument("--trials", type=int, default=6, help="learning rates that each method may try")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the comparison, apart from that of the trials")
    parser.add_argument("--folder", type=Path, default=Path("claims"), help="where the document and the record go")
    parser.add_argument("--cards", type=Path, help="a package's measured.json, which `lightrail plugins NAME` shows")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="trials at a time")


def measure(options: argparse.Namespace) -> Document | SamplingDocument:
    """Measures what is not yet in the folder's record, and makes the document of all that is.

    Args:
        options: As :func:`add_arguments` describes.
    """
    one_of(_KINDS, kind=options.kind)
    at_least(1, trials=options.trials, seeds=options.seeds, processes=options.processes)
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.kind in _OF_SAMPLES:
        return _measure_samples(options)
    path = options.folder / f"{options.kind}.json"
    record = read_record(path)
    wanted = {each.key: each for each in _wanted(options.kind, options.only)}
    missing = [each for key, each in wanted.items() if key not in record]
    # `spawn`: a forked process would share torch's threads, and stand still.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(options.processes, len(missing)) or 1, context, _one_thread) as pool:
        futures = {pool.submit(_measure, each, options.trials, options.seeds): each for each in missing}
        for done, future in enumerate(as_completed(futures), 1):
            try:
                found = future.result()
            except Exception as error:  # not of the method's making: it is measured when the bench is run again
                print(f"[{done}/{len(missing)}] {futures[future].method}: {error}", file=sys.stderr, flush=True)
                continue
            record[found.key] = found
            write_record(path, record)
            outcome = found.refused or f"{found.mean:.4g} at lr {found.lr or 'of its own'}"
            print(f"[{done}/{len(missing)}] {found.problem}  {found.method}  {outcome}", file=sys.stderr, flush=True)
    found = {key: record[key] for key in wanted if key in record}
    # What is of another code, or of no claim any more, is dropped with the next writing.
    if not options.only:
        write_record(path, found)
    document = Document(options.kind, found, options.trials, options.seeds)
    document.write(options.folder)
    if options.cards is not None:
        document.write_cards(options.cards)
    return document


def _measure_samples(options: argparse.Namespace) -> SamplingDocument:
    found = measure_claims(options.kind, options.only, options.seeds, options.folder)
    document = SamplingDocument(options.kind, found, options.seeds, options.folder)
    document.write(options.folder)
    if options.cards is not None:
        document.write_cards(options.cards)
    return document


def _wanted(kind: str, only: Sequence[str]) -> list[Measured]:
    """Each method on the problems of its claim, and the baselines there; none is measured yet."""
    methods: dict[str, Claim] = {}
    seen: dict[Any, str] = {}
    for name in available(kind):
        try:
            cls = load(kind, name)
        except UserError as error:
            print(f"left out: {error.what} ({error.remedy})", file=sys.stderr)
            continue
        # Of several names for one method, the longest says most: mars_adamw rather than mars.
        if cls in seen and len(seen[cls]) >= len(name):
            continue
        methods.pop(seen.get(cls, ""), None)
        seen[cls] = name
        claim = traits_of(cls).claim
        if claim is not None and (not only or name in only):
            methods[name] = claim
    wanted: dict[str, Measured] = {}
    for name, claim in methods.items():
        for problem in claim.problems:
            for each in pair(kind, problem, name, claim):
                each = dataclasses.replace(each, source=_digest(each))
                wanted[each.key] = each
    return list(wanted.values())


def _digest(each: Measured) -> str:
    """A record is of this code: another one must be measured again."""
    names = [(each.kind, each.method), ("problem", each.problem)]
    if each.behind:
        names.append(("optimizer", each.behind["optimizer"]))
    code = "".join(code_of(sys.modules[load(*name).__module__]) for name in names if name[1] != "none")
    return hashlib.sha256(code.encode()).hexdigest()[:12]


def code_of(module: ModuleType) -> str:
    """What a module does: its source without docstrings, imports, layout, and what it says of itself in ``traits``."""
    tree = ast.parse(inspect.getsource(module))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [each for each in body if not _is_said(each)]  # type: ignore[attr-defined]
    return ast.dump(tree)


def _is_said(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return True
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    names = [target.id for target in targets if isinstance(target, ast.Name)]
    return any(name in ("traits", "__all__") or name.startswith(("_PAPER", "_CLAIM")) for name in names)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _measure(each: Measured, trials: int, seeds: int) -> Measured:
    """Tunes on one seed, then trains on the others."""
    from lightrail.bench.claims.trial import run_trial
    from lightrail.bench.claims.tuning import search

    def trial(options: Mapping[str, Any], seed: int) -> Trial:
        return run_trial(each.problem, each.kind, each.method, {**each.options, **options}, seed, each.behind)

    try:
        start = _first_rate(each)
        rate = None
        if start is not None:
            rate, _ = search(lambda lr: trial({"lr": lr}, 0).final, start, trials)
        own = {} if rate is None else {"lr": rate}
        found = [trial(own, seed) for seed in range(1, seeds + 1)]
    except PluginError:
        raise
    except UserError as error:
        return dataclasses.replace(each, refused=f"{error.what}: {error.found}")
    return dataclasses.replace(each, rate=rate, trials=tuple(found))


def _first_rate(each: Measured) -> float | None:
    """The method's own default; none for a method whose rate is not to be tried."""
    if each.tuned is False:
        return None
    for options in (each.options, each.behind):
        if "lr" in options:
            return float(options["lr"])
    if each.kind != "optimizer":
        return 1e-3
    cls = load(each.kind, each.method)
    traits = traits_of(cls, each.options)
    tuned = each.tuned if traits.claim is None or each.tuned is not None else traits.claim.tuned
    if not (not traits.sets_step_size if tuned is None else tuned):
        return None
    default = inspect.signature(cls).parameters["lr"].default
    return float(default) if isinstance(default, int | float) and math.isfinite(default) and default > 0 else 1e-3
