"""Programs and commands run as processes of their own that find the heavy imports made.

A process that imports torch and Lightning spends ten seconds on that alone. Here one process a test session imports
them, and every program that is asked for is a fork of it: its arguments, folder, environment, output and end are its
own. What a *first* import does is seen by none of them; a test of that starts a process the ordinary way.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

__all__ = ["run_warm"]

IMPORTED = (
    "lightrail.run.execution",
    "lightrail.report",
    "lightning.pytorch",
    "matplotlib.figure",
    "sklearn.datasets",
    "wandb.sdk.launch.inputs.internal",
)


def run_warm(
    command: Sequence[str | os.PathLike[str]],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
    check: bool = False,
) -> subprocess.CompletedProcess[str]:
    """As ``subprocess.run(…, capture_output=True, text=True)``, of a script, or Python and its words.

    Args:
        command: The script of an installed command and its words, or ``sys.executable`` and its words.
        cwd: Where it runs; here by default.
        env: Its whole environment; that of this process by default.
        timeout: Seconds after which it is killed.
        check: Whether another end than 0 raises.
    """
    words = [os.fspath(word) for word in command]
    with tempfile.TemporaryDirectory() as folder:
        streams = {name: str(Path(folder, name)) for name in ("stdout", "stderr")}
        place = str(Path.cwd() if cwd is None else cwd)
        asked = {"words": words, "cwd": place, "env": dict(os.environ if env is None else env), **streams}
        code = _Server.running().ask(asked, timeout)
        output = [Path(folder, name).read_text(errors="replace") for name in ("stdout", "stderr")]
    finished = subprocess.CompletedProcess(words, code, *output)
    if check:
        finished.check_returncode()
    return finished


class _Server:
    """The process that is forked; it serves one program after another."""

    _one: ClassVar[_Server | None] = None

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        atexit.register(self.end)

    @classmethod
    def running(cls) -> _Server:
        if cls._one is None:
            cls._one = cls()
        return cls._one

    def ask(self, asked: dict[str, Any], timeout: float) -> int:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            self.end()
            type(self)._one = None
            raise subprocess.TimeoutExpired(asked["words"], timeout)
        answer = self.process.stdout.readline()
        assert answer, "the process that is forked has ended"
        return int(answer)

    def end(self) -> None:
        """Ends it and all that it has started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def serve() -> dict[str, Any] | None:
    """Forks for each program that is asked for.

    Returns:
        In a fork, what it has to run; None when nothing more will be asked.
    """
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            answers.close()
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
    return None


def become(asked: dict[str, Any]) -> None:
    """Runs a program in this process, as the interpreter would have begun it."""
    for target, name, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, asked["stdout"], os.O_WRONLY | os.O_CREAT),
        (2, asked["stderr"], os.O_WRONLY | os.O_CREAT),
    ):
        opened = os.open(name, flags, 0o600)
        os.dup2(opened, target)
        os.close(opened)
    sys.stdin = os.fdopen(0, closefd=False)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    words = asked["words"][1:] if asked["words"][0] == sys.executable else asked["words"]
    roots = [root for root in os.environ.get("PYTHONPATH", "").split(os.pathsep) if root]
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.path[:1] = ["", *roots]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv = words[1:]
        sys.path[:1] = [os.getcwd(), *roots]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path[:1] = [str(Path(words[0]).parent), *roots]
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    import gc

    for _module in IMPORTED:
        __import__(_module)
    gc.freeze()
    _asked = serve()
    if _asked is not None:
        become(_asked)
