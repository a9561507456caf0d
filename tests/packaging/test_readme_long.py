"""The README is executed: its longer commands, and those that go on with what others have made."""

from __future__ import annotations

import re
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
    # The jobs of a sweep lie deeper; what it came to has a report of its own.
    is_run = re.compile(r"(train|generate) (?!-m |sweep\.resume)|lightrail sweep")
    runs = [line for line in stories()[index] if is_run.match(line)]
    assert len(list(tmp_path.glob("runs/*/report.html"))) == len(runs)


def test_there_are_stories() -> None:
    assert stories()
