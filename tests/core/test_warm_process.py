"""A program that finds its imports made is otherwise a process of its own."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from warm_process import run_warm

PROGRAM = """
import os, random, sys, torch
print(__name__, sys.argv[1:], os.getcwd(), os.environ.get("ASKED"), hasattr(torch, "left_behind"))
print(random.random(), torch.get_num_threads(), file=sys.stderr)
torch.left_behind = True
"""


def test_each_is_a_process_of_its_own_with_the_imports_made(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, "ASKED": "something"}
    first, second = (run_warm([sys.executable, program, "a b"], cwd=tmp_path, env=environment) for _ in range(2))
    assert (first.returncode, first.stdout) == (0, f"__main__ ['a b'] {tmp_path} something False\n")
    assert second.stdout == first.stdout
    assert second.stderr != first.stderr
    assert "ASKED" not in os.environ
    alone = run_warm([sys.executable, "-c", PROGRAM, "c"])
    assert alone.stdout == f"__main__ ['c'] {Path.cwd()} None False\n"


@pytest.mark.parametrize(
    ("code", "status", "told"),
    [
        ("import sys; sys.exit(3)", 3, ""),
        ("raise ValueError('so')", 1, "ValueError: so"),
        (f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})", -signal.SIGKILL, ""),
        ("import atexit, sys; atexit.register(print, 'last', file=sys.stderr)", 0, "last"),
    ],
)
def test_it_ends_as_a_program_does(code: str, status: int, told: str) -> None:
    finished = run_warm([sys.executable, "-c", code])
    assert finished.returncode == status
    assert told in finished.stderr
