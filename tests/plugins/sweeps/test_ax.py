"""Ax over the sweep's folder, where it is installed."""

from __future__ import annotations

import json
import math

import pytest

from lightrail.errors import CheckpointError, ConfigurationError
from lightrail.sweep import Choices, Goal, Interval
from lightrail_sweeps.ax import Ax

GOAL = Goal("val_loss", "min")
SPACE = {
    "lr": Interval(1e-5, 1.0, log=True),
    "width": Interval(8, 10, whole=True),
    "optimizer": Choices(("adamw", "sgd")),
    "schedule": Choices(("null",)),
}


def test_it_begins_with_points_that_fill_the_space(tmp_path):
    method = Ax(SPACE, tmp_path, GOAL, startup=16)
    asked = [method.ask(number) for number in range(16)]
    # Sixteen points of a Sobol sequence: two in each eighth of the logarithms, half of them of each choice.
    eighths = sorted(int((math.log10(float(values["lr"])) + 5) / 5 * 8) for values in asked)
    assert eighths == [number // 2 for number in range(16)]
    assert sum(values["optimizer"] == "sgd" for values in asked) == 8
    assert {values["width"] for values in asked} == {"8", "9", "10"}
    assert {values["schedule"] for values in asked} == {"null"}


def test_its_record_holds_what_it_was_told(tmp_path):
    method = Ax(SPACE, tmp_path, GOAL)
    first = method.ask(0)
    method.tell(0, math.inf)
    method.tell(0, 0.5)
    method.tell(0, 7.0)
    assert Ax(SPACE, tmp_path, GOAL).ask(0) == first
    assert json.loads((tmp_path / "ax.json").read_text())["0"] == {"values": first, "state": "finished", "value": 0.5}
    with pytest.raises(CheckpointError, match="trial 3 was never asked for"):
        method.tell(3, 1.0)
    with pytest.raises(ConfigurationError):
        Ax(SPACE, tmp_path, GOAL, startup=0)


def test_it_finds_the_valley(tmp_path):
    pytest.importorskip("ax", reason="Ax is not installed: pip install 'lightrail[ax]'")
    method = Ax({"x": Interval(0.0, 1.0), "y": Interval(0.0, 1.0)}, tmp_path, GOAL, startup=4)
    losses = []
    for number in range(10):
        values = method.ask(number)
        losses.append((float(values["x"]) - 0.3) ** 2 + (float(values["y"]) - 0.8) ** 2)
        method.tell(number, None if number == 1 else losses[-1])
    assert min(losses[4:]) < 0.01 < min(losses[:4])
