"""What rounds cost: each way is measured in a process of its own, and Flower is left out by name where it is not."""

from __future__ import annotations

import argparse
import json

import pytest

from lightrail.bench import federated
from lightrail.bench.federated import measure
from lightrail.bench.federated_ways import main
from lightrail.errors import PluginError


def options(**changed: object) -> argparse.Namespace:
    return argparse.Namespace(**{"clients": [8], "models": ["tiny"], "count": 2, "rounds": 1, "flower": "x", **changed})


@pytest.mark.parametrize("way", ["here", "plain", "steps alone"])
def test_a_way_trains_and_tells_how_fast(way: str, capsys: pytest.CaptureFixture[str], tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    main([way, "tiny", "--clients", "2", "--rounds", "2"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["megabytes"] > 0
    assert found.get("rounds_per_second", found.get("milliseconds_per_step")) > 0


def test_ways_stand_beside_flower_with_their_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {"here": 50.0, "here in two processes": 80.0, "steps alone": 100.0, "flower with trainers": 2.0}

    def process(way: str, model: str, clients: int, _options: object) -> dict[str, float]:
        speed = speeds.get(way, 4.0)
        return {"rounds_per_second": speed, "milliseconds_per_step": 1.0, "seconds": 1.0, "megabytes": 500.0}

    monkeypatch.setattr(federated, "_process", process)
    steps, rounds, jobs, memory = measure(options()).tables
    rows = {row.name: row for row in rounds.rows}
    assert rounds.ratio(rows["engine=here"]) == pytest.approx(2 / 50)
    assert rows["engine=here"].bound == 1 / 20
    assert rounds.ratio(rows["steps alone"]) == pytest.approx(2 / 100)
    assert steps.rows[1].bound == 1.1
    assert [row.name for row in jobs.rows] == ["Flower, trainers", "Flower, by hand", "engine=here", "engine=flower"]
    assert memory.rows[0].samples == (500.0,)


def test_flower_that_is_not_there_is_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def process(way: str, model: str, clients: int, _options: object) -> dict[str, float]:
        if "flower" in way:
            raise PluginError("it cannot", found="no ray", allowed="with it", remedy="Install it.")
        return {"rounds_per_second": 5.0, "milliseconds_per_step": 1.0, "seconds": 1.0, "megabytes": 500.0}

    monkeypatch.setattr(federated, "_process", process)
    found = measure(options())
    assert [table.title.split(":")[0] for table in found.tables] == ["a client's step", "memory"]
    assert "left out: flower with trainers, tiny, 8 clients: no ray" in found.text()
