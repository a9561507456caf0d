"""The README is executed: its longer commands."""

from __future__ import annotations

from pathlib import Path

import pytest
from readme_commands import commands, execute, is_long


@pytest.mark.parametrize("command", [command for command in commands() if is_long(command)])
def test_command(tmp_path: Path, command: str) -> None:
    execute(tmp_path, command)
