"""The bench of launches: what it reads and what it leaves out."""

from __future__ import annotations

import pytest

from lightrail.bench.launch import _COLUMNS, _latency, _launched, _marks
from lightrail.errors import PluginError


def test_marks_of_a_run_that_is_writing_are_read(tmp_path):
    assert _marks(tmp_path) == []
    (tmp_path / "marks.txt").write_text("10.5 7\n11.0 7\n11.5")
    assert _marks(tmp_path) == [(10.5, 7), (11.0, 7)]


def test_launches_are_compared_with_here():
    taken = {
        "here": [{"submission": 1.0, "start": 2.0, "restart": 4.0}],
        "slurm": [{"submission": 3.0, "start": 5.0, "restart": 2.0}],
        "ray": [],
    }
    table = _latency("restart", taken)
    assert [row.name for row in table.rows] == ["here", "slurm"]
    assert [table.ratio(row) for row in table.rows] == [None, 0.5]
    assert set(_COLUMNS) == set(taken["here"][0])


def test_a_launch_that_is_not_there_is_named(tmp_path):
    with pytest.raises(PluginError, match="nowhere cannot be measured") as caught:
        _launched("nowhere", tmp_path / "runs")
    assert "launch 'nowhere' is not installed" in caught.value.found
