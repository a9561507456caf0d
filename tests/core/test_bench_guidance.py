"""What guidance costs: a table of its own time beside a network's."""

from __future__ import annotations

import argparse

import pytest

from lightrail.bench.guidance import measure
from lightrail.errors import PluginError


def options(*only: str) -> argparse.Namespace:
    return argparse.Namespace(only=list(only), rounds=2)


def test_guidance_stands_beside_a_network_with_its_bound() -> None:
    table = measure(options("cfg", "apg"))
    rows = {row.name: row for row in table.rows}
    assert set(rows) == {"cfg", "apg", "an evaluation of a U-Net"}
    assert rows["cfg"].bound == 0.03
    assert rows["cfg"].beside == rows["an evaluation of a U-Net"].samples
    assert rows["an evaluation of a U-Net"].median > rows["cfg"].median
    assert "guidance beside its evaluations" in table.text()


def test_what_draws_several_states_or_needs_a_measurement_is_left_out_and_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(PluginError, match="no guidance to measure"):
        measure(options("svdd", "dds"))
    told = capsys.readouterr().err
    assert "left out: svdd" in told
    assert "left out: dds" in told
