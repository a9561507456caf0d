"""Claims about samples as a document: a table, the pictures, and the sentences for each method's card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

from lightrail.bench.claims.cards import update_cards
from lightrail.bench.claims.sampling import Sampled, judged
from lightrail.catalogue import load
from lightrail.files import replacing

__all__ = ["SamplingDocument"]


class SamplingDocument:
    """All that was measured of one kind of method that acts on samples.

    Args:
        kind: The kind of the methods.
        record: What was measured.
        seeds: Generations of each.
        folder: Where the pictures are.
    """

    def __init__(self, kind: str, record: Mapping[str, Sampled], seeds: int, folder: Path) -> None:
        self.kind, self.record, self.seeds, self.folder = kind, record, seeds, folder

    def text(self) -> str:
        """The table and the pictures, as Markdown."""
        head = [
            f"# What papers claim of {self.kind}, and what was measured",
            "",
            f"Made by `lightrail bench claims --kind {self.kind}`; not edited by hand.",
            "",
            f"Each figure is that of {self.seeds} generations from as many seeds, with its standard deviation, beside "
            "that of the baseline with the same seeds. A difference counts as seen where it exceeds twice its standard "
            "error. Problems of this size decide nothing about large models.",
            "",
            "Scales, operators and other options were chosen by hand after a first look at the same kind of samples; a "
            "verdict holds under those options. Where a promise was kept under some and broken under others that a "
            "reader would expect, both are claims here.",
            "",
            "| method | claim | metric | with it | baseline | verdict |",
            "|---|---|---|---|---|---|",
        ]
        lines = [_line(each) for each in self.record.values()]
        parts: dict[str, list[Sampled]] = {}
        for each in self.record.values():
            parts.setdefault(each.picture, []).append(each)
        return "\n".join([*head, *lines, *(line for claims in parts.values() for line in self._part(claims))])

    def _part(self, claims: Sequence[Sampled]) -> list[str]:
        """What the claims about the same generations were measured on."""
        each = claims[0]
        claim = each.claim
        words = [" ".join(("generate", *claim.overrides))]
        if claim.baseline is not None:
            words.append(" ".join(("generate", *claim.baseline)))
        trained = [f"train {' '.join(command)}  # {name}" for name, command in claim.trained.items()]
        shown = (self.folder / self.kind / each.picture).is_file()
        beside = " and, to the right, the baseline's" if claim.baseline is not None else ""
        picture = [f"![Samples of {each.method}{beside}]({self.kind}/{each.picture})", ""] if shown else []
        said = [f"- {other.claim.sentence}: {judged(other)}" for other in claims]
        return ["", f"## {each.method}", "", *said, "", *picture, "```text", *trained, *words, "```"]

    def write(self, folder: Path) -> None:
        """Writes the document."""
        with replacing(folder / f"{self.kind}.md") as temporary:
            temporary.write_text(self.text() + "\n")

    def write_cards(self, path: Path) -> None:
        """Writes what each method's card says, by its class; what the file says of other classes stays."""
        own: dict[str, list[str]] = {}
        for each in self.record.values():
            if each.values:
                cls = load(self.kind, each.method)
                own.setdefault(f"{cls.__module__}.{cls.__qualname__}", []).append(_sentence(each, self.seeds))
        update_cards(path, own)

    def to_dict(self) -> dict[str, object]:
        """Figures as plain values."""
        return {
            each.key.partition("@")[0]: {
                "values": list(each.values),
                "baselines": list(each.baselines),
                "verdict": judged(each),
            }
            for each in self.record.values()
        }


def _line(each: Sampled) -> str:
    claim = each.claim
    metric = claim.metric if claim.target is None else f"{claim.metric} (exactly {claim.target:g})"
    cells = (each.method, claim.sentence, metric, _spread(each.values), _spread(each.baselines), judged(each))
    return f"| {' | '.join(cells)} |"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{mean(values):.4g} ± {stdev(values):.2g}" if len(values) > 1 else f"{values[0]:.4g}"


def _sentence(each: Sampled, seeds: int) -> str:
    claim = each.claim
    against = "unguided" if claim.baseline is None else "the baseline's"
    return (
        f"{claim.sentence}: {judged(each)} ({claim.metric} {_spread(each.values)} beside {against} "
        f"{_spread(each.baselines)}, {seeds} seeds)"
    )
