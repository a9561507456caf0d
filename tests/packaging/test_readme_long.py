"""The README is executed: its longer commands, and those that go on with what others have made."""

from __future__ import annotations

from pathlib import Path

import pytest
from readme_commands import commands, execute, is_long, stories


@pytest.mark.parametrize("command", [command for command in commands() if is_long(command)])
def test_command(tmp_path: Path, command: str) -> None:
    execute(tmp_path, command)


@pytest.mark.parametrize("index", range(len(stories())))
def test_story(tmp_path: Path, index: int) -> None:
    for command in stories()[index]:
        execute(tmp_path, command)
    runs = [line for line in stories()[index] if line.startswith(("train ", "generate "))]
    assert len(list(tmp_path.glob("runs/*/report.html"))) == len(runs)


def test_there_are_stories() -> None:
    assert stories()
