"""Claims about samples: what is drawn and compared, what counts as kept, what is written down."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from lightrail.bench.claims import measure, sampling, sampling_document
from lightrail.bench.claims.sampling import Sampled, judged
from lightrail.generation import Generated, Guidance
from lightrail.traits import SamplingClaim, Traits

COMMON = ("denoiser=gaussian_mixture", "+sampler=ddim", "sampler.steps=4", "generate.count=30")
SHIFTED = (*COMMON, "+guidance=[test_sampling_claims.Shift]")


class Shift(Guidance):
    """Adds to the predicted data."""

    def __init__(self, by: float = 1.0) -> None:
        self.by = by

    def correct(self, prediction, moment):  # type: ignore[no-untyped-def]
        return prediction.with_data(prediction.data + self.by)

    def measure(self, generated: Generated) -> dict[str, float]:
        return {"mean": float(generated.samples.mean())}

    traits = Traits(
        sampling_claims=(
            SamplingClaim("moves the mean up", "mean", SHIFTED),
            SamplingClaim("moves the mean down", "mean", SHIFTED, is_higher_better=False),
            SamplingClaim(
                "half of it comes nearer to 1",
                "mean",
                SHIFTED,
                baseline=(*COMMON, "+guidance=[test_sampling_claims.Far]"),
                target=1.0,
            ),
            SamplingClaim("costs nothing", "evaluations", SHIFTED, is_higher_better=False),
            SamplingClaim("needs a run", "mean", ("run={digits}",), trained={"digits": ("task=nowhere",)}),
        )
    )


class Far(Shift):
    """Adds too much."""

    def __init__(self) -> None:
        super().__init__(5.0)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "available", lambda kind: ["shift"])
    for module in (sampling, sampling_document):
        monkeypatch.setattr(module, "load", lambda kind, name: Shift)


def options(folder: Path, **changes: Any) -> argparse.Namespace:
    plain = {"kind": "guidance", "only": [], "trials": 1, "seeds": 2, "folder": folder, "cards": None, "processes": 1}
    return argparse.Namespace(**{**plain, **changes})


@pytest.mark.usefixtures("installed")
def test_claims_are_measured_judged_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cards = tmp_path / "measured.json"
    document: Any = measure(options(tmp_path, cards=cards))
    verdicts = {name: each["verdict"] for name, each in document.to_dict().items()}
    assert verdicts["guidance/shift/0"] == "reproduces"
    assert verdicts["guidance/shift/1"] == "does not reproduce"
    assert verdicts["guidance/shift/2"] == "reproduces"
    assert verdicts["guidance/shift/3"] == "reproduces"
    assert verdicts["guidance/shift/4"].startswith("does not apply")
    text = (tmp_path / "guidance.md").read_text()
    assert "| shift | moves the mean up | mean |" in text
    assert "![Samples of shift](guidance/shift.png)" in text
    assert (tmp_path / "guidance" / "shift.png").is_file()
    (sentences,) = json.loads(cards.read_text()).values()
    assert len(sentences) == 4
    assert sentences[0].startswith("moves the mean up: reproduces (mean ")
    # What is measured is not measured again; what could not be is tried.
    tried: list[int] = []

    def measured(each: Sampled, *_: Any) -> Sampled:
        tried.append(each.number)
        return dataclasses.replace(each, refused="still not there")

    monkeypatch.setattr(sampling, "_measured", measured)
    again: Any = measure(options(tmp_path, only=["shift"]))
    assert tried == [4]
    assert again.to_dict()["guidance/shift/0"] == document.to_dict()["guidance/shift/0"]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("number", "values", "baselines", "expected"),
    [
        (0, (2.0, 2.1, 2.2), (1.0, 1.0, 1.0), "reproduces"),
        (0, (1.0, 1.0, 1.0), (2.0, 2.1, 2.2), "does not reproduce"),
        (0, (0.0, 2.0, 1.2), (1.0, 1.0, 1.0), "cannot be seen at this size"),
        (1, (1.0, 1.0, 1.0), (2.0, 2.1, 2.2), "reproduces"),
        (2, (0.9, 1.1, 1.0), (2.0, 2.0, 0.0), "reproduces"),
        (2, (2.0, 2.0, 0.0), (0.9, 1.1, 1.0), "does not reproduce"),
        (0, (float("nan"), 1.0, 1.0), (1.0, 1.0, 1.0), "does not reproduce"),
        (0, (2.0,), (1.0,), "cannot be seen at this size"),
    ],
)
def test_a_promise_is_kept_only_beyond_the_noise(
    number: int, values: tuple[float, ...], baselines: tuple[float, ...], expected: str
) -> None:
    assert judged(Sampled("guidance", "shift", number, "", values, baselines)) == expected
