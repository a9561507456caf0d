"""What papers claim of samples, measured: the same generation with the method and with its baseline, seed by seed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from lightrail.bench.claims.verdict import DOES_NOT, REPRODUCES, UNSEEN
from lightrail.catalogue import available, load
from lightrail.errors import UserError
from lightrail.files import replacing
from lightrail.traits import SamplingClaim, traits_of

__all__ = ["Sampled", "judged", "measure_claims", "wanted_claims"]

QUIET = ("logger=[]",)
COSTS = ("evaluations", "sampling_seconds")


@dataclass(frozen=True)
class Sampled:
    """One claim, with what was measured of it.

    Args:
        kind: Of the method.
        method: Its name.
        number: Which of its claims.
        source: The code of the method and the claim, as a digest.
        values: The metric with the method, one a seed.
        baselines: That of the baseline.
        refused: Why it could not be measured.
    """

    kind: str
    method: str
    number: int = 0
    source: str = ""
    values: tuple[float, ...] = ()
    baselines: tuple[float, ...] = ()
    refused: str = ""

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.method}/{self.number}@{self.source}"

    @property
    def claim(self) -> SamplingClaim:
        return traits_of(load(self.kind, self.method)).sampling_claims[self.number]

    @property
    def picture(self) -> str:
        """The name of its picture's file: one for all claims about the same generations."""
        claims = traits_of(load(self.kind, self.method)).sampling_claims
        mine = (self.claim.overrides, self.claim.baseline)
        first = next(number for number, each in enumerate(claims) if (each.overrides, each.baseline) == mine)
        return f"{self.method}{first or ''}.png"


def wanted_claims(kind: str, only: Sequence[str]) -> list[Sampled]:
    """The claims of the installed methods of a kind; nothing is measured yet."""
    from lightrail.bench.claims import code_of

    wanted = []
    for name in available(kind):
        if only and name not in only:
            continue
        try:
            plugin = load(kind, name)
        except UserError as error:
            print(f"left out: {error.what} ({error.remedy})", file=sys.stderr)
            continue
        for number, claim in enumerate(traits_of(plugin).sampling_claims):
            code = f"{code_of(sys.modules[plugin.__module__])}{claim}"
            wanted.append(Sampled(kind, name, number, hashlib.sha256(code.encode()).hexdigest()[:12]))
    return wanted


def measure_claims(kind: str, only: Sequence[str], seeds: int, folder: Path) -> dict[str, Sampled]:
    """Measures what is not yet in the folder's record.

    Args:
        kind: Whose claims.
        only: Some methods, rather than all.
        seeds: How many generations of each.
        folder: Where the record, the pictures and the runs go that the claims need.
    """
    path = folder / f"{kind}.json"
    record = _read(path)
    wanted = wanted_claims(kind, only)
    generations = _Generations(folder / "runs")
    for each in wanted:
        if each.key in record and len(record[each.key].values) == seeds:
            continue
        try:
            found = _measured(each, seeds, folder, generations)
        except UserError as error:
            found = dataclasses.replace(each, refused=f"{error.what}: {error.found}")
        record[each.key] = found
        _write(path, record)
        print(f"{each.method}: {judged(found)}", file=sys.stderr, flush=True)
    found = {each.key: record[each.key] for each in wanted}
    if not only:
        _write(path, found)
    return found


def _measured(each: Sampled, seeds: int, folder: Path, generations: _Generations) -> Sampled:
    claim = each.claim
    runs = {name: _trained(words, generations.root) for name, words in claim.trained.items()}
    values, baselines = [], []
    for seed in range(1, seeds + 1):
        compares = claim.baseline is None
        summary, samples = generations.made(claim.overrides, runs, seed, compares=compares)
        values.append(_value(summary, claim.metric))
        if claim.baseline is None:
            beside, others = summary["unguided"], None
        else:
            beside, others = generations.made(claim.baseline, runs, seed, compares=False)
        baselines.append(_value(beside, claim.metric))
        if seed == 1:
            _picture(samples, others, folder / each.kind / each.picture)
    return dataclasses.replace(each, values=tuple(values), baselines=tuple(baselines))


def _trained(words: Sequence[str], root: Path) -> Path:
    """The run that was trained with these words; trained now where it is not there."""
    from lightrail.run import compose

    name = f"trained_{hashlib.sha256(' '.join(words).encode()).hexdigest()[:12]}"
    folder = root / name
    if not (folder / "report.html").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        compose([*words, *QUIET, "seed=1", f"run.root={root}", f"run.name={name}"]).execute()
    return folder


class _Generations:
    """The generations of a bench; what several claims are about is made once.

    Args:
        root: Where their run folders go.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._made: dict[tuple[str, ...], tuple[dict[str, Any], Path | None]] = {}

    def made(
        self, words: Sequence[str], runs: Mapping[str, Path], seed: int, *, compares: bool
    ) -> tuple[dict[str, Any], Path | None]:
        """The summary of a generation, and its picture."""
        from lightrail.generation.execution import generate

        named = {name: str(path.resolve()) for name, path in runs.items()}
        told = [word.format(**named) for word in words]
        told += [*QUIET, f"seed={seed}", f"run.root={self.root}", f"generate.compare={str(compares).lower()}"]
        key = tuple(told)
        if key not in self._made:
            result = generate(told, show_progress=False)
            picture = result.folder / "samples.png"
            self._made[key] = dict(result.summary), picture if picture.is_file() else None
        return self._made[key]


def _value(summary: Mapping[str, Any], metric: str) -> float:
    found = summary.get(metric) if metric in COSTS else summary["metrics"].get(metric)
    return math.nan if found is None else float(found)


def _picture(samples: Path | None, baseline: Path | None, target: Path) -> None:
    """The samples, with those of the baseline to their right."""
    from PIL import Image

    shown = [Image.open(path) for path in (samples, baseline) if path is not None]
    if not shown:
        return
    gap, height = 24, max(image.height for image in shown)
    page = Image.new("RGB", (sum(image.width for image in shown) + gap * (len(shown) - 1), height), "white")
    left = 0
    for image in shown:
        page.paste(image, (left, 0))
        left += image.width + gap
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        page.save(temporary, format="PNG", optimize=True)


def judged(found: Sampled) -> str:
    """The verdict on a claim.

    A difference counts as seen where it exceeds twice its standard error over the seeds.

    Args:
        found: What was measured.

    Returns:
        ``reproduces``, ``does not reproduce``, ``cannot be seen at this size``, or why it does not apply.
    """
    if found.refused:
        return f"does not apply: {found.refused}"
    differences = gains(found)
    if not all(map(math.isfinite, differences)):
        return DOES_NOT
    middle = mean(differences)
    error = stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else math.inf
    if middle - 2 * error >= 0:
        return REPRODUCES
    return DOES_NOT if middle + 2 * error < 0 else UNSEEN


def gains(found: Sampled) -> tuple[float, ...]:
    """By how much the promise was kept, seed by seed; below 0 where it was not."""
    claim = found.claim
    pairs = zip(found.values, found.baselines, strict=True)
    if claim.target is not None:
        return tuple(claim.ratio * abs(theirs - claim.target) - abs(mine - claim.target) for mine, theirs in pairs)
    sign = 1 if claim.is_higher_better else -1
    return tuple(sign * (mine - claim.ratio * theirs) for mine, theirs in pairs)


def _read(path: Path) -> dict[str, Sampled]:
    if not path.exists():
        return {}
    found = [
        Sampled(**{**each, "values": tuple(each["values"]), "baselines": tuple(each["baselines"])})
        for each in json.loads(path.read_text())
    ]
    return {each.key: each for each in found}


def _write(path: Path, record: Mapping[str, Sampled]) -> None:
    lines = [json.dumps(asdict(record[key])) for key in sorted(record)]
    with replacing(path) as temporary:
        temporary.write_text("[\n" + ",\n".join(lines) + "\n]\n")
