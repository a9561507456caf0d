"""The README is executed: every short command and every piece of Python in it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from readme_commands import README, blocks, commands, execute, is_long, run

SHORT = [command for command in commands() if not is_long(command) and not command.startswith("lightrail bench")]


def test_the_set_up_commands_stand_at_the_top() -> None:
    first = blocks("bash")[0]
    assert first.startswith("./scripts/train")
    assert "./scripts/test" in first
    assert README.read_text().index(first) < 60


@pytest.mark.parametrize("command", SHORT)
def test_command(tmp_path: Path, command: str) -> None:
    execute(tmp_path, command)


@pytest.mark.parametrize("index", range(len(blocks("python"))))
def test_python(tmp_path: Path, index: int) -> None:
    finished = run(tmp_path, [sys.executable, "-c", blocks("python")[index]])
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_every_bench_is_there() -> None:
    from lightrail.bench import BENCHES

    named = {command.split()[2] for command in commands() if command.startswith("lightrail bench")}
    assert named == set(BENCHES)
