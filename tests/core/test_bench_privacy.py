"""What private training costs: each way trains in a process of its own, and stands beside its peers with a bound."""

from __future__ import annotations

import argparse
import json
import logging

import pytest
import torch

from lightrail.bench import privacy
from lightrail.bench.privacy import measure
from lightrail.bench.privacy_models import CLASSES, MODELS, loss_of, records_for
from lightrail.bench.privacy_ways import WARM, Meter, main
from lightrail.errors import PluginError


def options(*models: str) -> argparse.Namespace:
    return argparse.Namespace(models=list(models), batch=4, steps=2, rounds=2, device="cpu", threads=1)


@pytest.mark.parametrize("way", ["plain", "ours", "Opacus ghost"])
def test_a_way_trains_and_tells_milliseconds_and_megabytes(way: str, capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    try:
        assert main([way, "tiny", "--batch", "4", "--steps", "2"]) == 0
    finally:
        logger.setLevel(level)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found) == {"milliseconds", "memory", "whole"}
    assert found["milliseconds"] > 0
    assert found["whole"] >= found["memory"]


def test_memory_is_what_was_held_at_most_after_the_first_steps() -> None:
    meter = Meter("cpu")
    large = torch.ones(4 << 20)  # 16 MB
    for step in range(WARM + 1):
        if step == WARM:
            del large
        meter.begun(step)
    small = torch.ones(1 << 20)
    meter.begun(WARM + 1)
    found = meter.found()
    assert small.sum() == 1 << 20
    assert 3 < found["memory"] < 12
    assert 15 < found["whole"] < 24


def test_the_ways_take_turns_and_ours_has_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {"plain": 1.0, "ours": 2.0, "Opacus hooks": 5.0, "Opacus functorch": 4.0, "Opacus ghost": 3.0}
    asked = []

    def process(way: str, model: str, _options: object, steps: int, environment: dict[str, str]) -> dict[str, float]:
        asked.append((way, bool(environment)))
        if way == "Opacus ew":
            raise PluginError("it cannot", found="no rule", allowed="others", remedy="Leave it.")
        return {"milliseconds": speeds.get(way, 6.0), "memory": 10 * speeds.get(way, 6.0), "whole": 30.0}

    monkeypatch.setattr(privacy, "_process", process)
    found = measure(options("mlp"))
    time, memory = found.tables
    rows = {row.name: row for row in time.rows}
    assert rows["ours, beside Opacus ghost"].bound == 1.0
    assert time.ratio(rows["ours, beside Opacus ghost"]) == pytest.approx(2 / 3)
    assert "Opacus ew" not in rows
    assert "left out: Opacus ew with mlp: no rule" in found.text()
    ours = next(row for row in memory.rows if row.name == "ours")
    assert (memory.ratio(ours), ours.bound) == (2.0, 1.3)
    timed = [way for way, is_of_memory in asked if not is_of_memory]
    assert timed[0] == "plain"
    assert timed[6] == "ours"  # the second round begins with another


def test_a_model_that_there_is_not_is_refused_by_name() -> None:
    with pytest.raises(PluginError, match="there is no model 'mpl'"):
        measure(options("mpl"))


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_records_that_it_can_be_trained_on(name: str) -> None:
    build, _ = MODELS[name]
    x, y = records_for(name, 2).tensors
    logits = build()(x)
    assert logits.shape == (2, CLASSES)
    assert loss_of(logits, y).isfinite()
