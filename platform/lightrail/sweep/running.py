"""``train -m`` and ``train sweep.resume=…``: a sweep from the command line to its table."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lightrail.configuration.command_line import Token
from lightrail.errors import ConfigurationError, UserError
from lightrail.launch.job import Job
from lightrail.sweep.ledger import Ledger, Trial, find_sweep
from lightrail.sweep.method import Goal
from lightrail.sweep.planning import Planned, composed_trial, found_again, planned_sweep

__all__ = ["carry_on", "run_sweep"]

_FOR_A_METHOD = 4  # trials at a time where the launch sets no limit: more at once would be proposed blindly
_OF_RESUMING = ("sweep.resume", "sweep.retry", "launch.parallel", "run.root")


def run_sweep(overrides: Sequence[str], config_dirs: Sequence[str] = ()) -> int:
    """Runs every combination that the overrides spell, or what a method proposes, and prints a table.

    Args:
        overrides: As typed, with sweeps such as ``seed=1,2``; or ``sweep.resume=FOLDER`` to go on with a sweep.
        config_dirs: Folders of the user's own configuration.

    Returns:
        0 where every job ended well, 1 where one did not, 128 + N where signal N asked for a stop.

    Raises:
        UserError: Jobs that cannot be carried out, or another process that carries out the same sweep.
    """
    typed = {token.key: (token.value or "").strip("'\"") for token in map(Token.parse, overrides)}
    if typed.get("sweep.resume", "null") not in ("", "null"):
        return _resumed(typed)
    if "sweep.retry" in typed:
        overrides = [each for each in overrides if Token.parse(each).key != "sweep.retry"]
    return carry_on(planned_sweep(overrides, config_dirs))


def _resumed(typed: dict[str, str]) -> int:
    others = sorted(set(typed) - set(_OF_RESUMING))
    if others:
        raise ConfigurationError(
            "a sweep that goes on is as it was written",
            found=" ".join(f"{key}={typed[key]}" for key in others),
            allowed="sweep.resume=FOLDER with sweep.retry=true, launch.parallel=N, run.root=FOLDER",
            remedy="Leave the others out, or begin a new sweep.",
        )
    parallel, retry = typed.get("launch.parallel"), typed.get("sweep.retry", "false").lower()
    if retry not in ("true", "false") or not (parallel is None or (parallel.isdigit() and int(parallel) > 0)):
        raise ConfigurationError(
            "the sweep cannot go on like that",
            found=" ".join(f"{key}={value}" for key, value in typed.items() if key != "sweep.resume"),
            allowed="sweep.retry=true or false; launch.parallel a whole number of at least 1",
            remedy="Correct the value.",
        )
    ledger = find_sweep(typed["sweep.resume"], Path(typed.get("run.root", "runs")))
    planned = found_again(ledger, None if parallel is None else int(parallel))
    return carry_on(planned, retry=retry == "true")


def carry_on(planned: Planned, *, retry: bool = False) -> int:
    """Carries a sweep out from wherever it stands, and prints its table.

    Args:
        planned: The sweep.
        retry: Whether jobs that failed are run again.

    Returns:
        See :func:`run_sweep`.
    """
    from lightrail.sweep.control import Controller
    from lightrail.sweep.progress import SweepProgress

    ledger, launch, method = planned.ledger, planned.launch, planned.method
    with ledger.held(), SweepProgress(Goal(**ledger.content["goal"]), ledger.planned) as progress:
        progress.said(f"{ledger.planned} jobs · {ledger.folder}")
        if method is not None and launch.parallel is None:
            launch.parallel = _FOR_A_METHOD
            progress.said(f"note: {_FOR_A_METHOD} jobs at a time, as a method learns from those that ended; see "
                          "launch.parallel")  # fmt: skip
        if method is not None:
            _return_to(Path(ledger.content["directory"]))
        controller = Controller(
            ledger, launch, progress, method=method, propose=None if method is None else _proposing(planned),
            retry=retry,
        )  # fmt: skip
        if launch.parallel is None:
            started = controller.hand_over()
            return _handed_over(ledger, launch.name, started)
        try:
            status = controller.run()
        except KeyboardInterrupt:
            print(f"left; its jobs go on or stop by themselves\n{_how_to_resume(ledger)}", file=sys.stderr)
            return 128 + (controller.signal_number or 2)
    _tell(ledger, status)
    return status


def _return_to(directory: Path) -> None:
    """What a method proposes is composed as if typed where the sweep began, with the modules that lie there."""
    try:
        os.chdir(directory)
    except OSError as error:
        raise ConfigurationError(
            "the folder in which the sweep was begun is not there",
            found=f"{directory}: {error.strerror}",
            allowed="a method proposes further trials only where its sweep was begun, beside the modules they use",
            remedy="Put the folder back, or begin a new sweep.",
        ) from error


def _proposing(planned: Planned) -> Callable[[int], Trial]:
    """Writes the next trial that the method proposes: its number in, the trial out."""
    ledger, method = planned.ledger, planned.method
    assert method is not None

    def propose(number: int) -> Trial:
        values = method.ask(number)
        try:
            composition = composed_trial(ledger, values, is_here=planned.launch.in_this_process)
        except UserError as error:
            return ledger.refused(number, values, str(error))
        return ledger.order(number, values, composition, ledger.planned)

    return propose


def _handed_over(ledger: Ledger, launch: str, started: int) -> int:
    print(f"{started} jobs handed over to {launch} · {ledger.folder}")
    print(f"  lightrail sweep {ledger.folder}   how they fare\n  lightrail jobs   each of them")
    return 0


def _tell(ledger: Ledger, status: int) -> None:
    from lightrail.sweep.results import rows_of
    from lightrail.sweep.table import ending

    rows = rows_of(ledger)
    print(ending(ledger, rows), flush=True)
    if status >= 128 or any(row.state.phase in ("stopped", "lost", "pending") for row in rows):
        print(f"\nnot all jobs have finished\n{_how_to_resume(ledger)}")
        if any(row.state.phase in ("running", "pending") and Job.of(row.trial.folder) is not None for row in rows):
            print("those that were handed over go on by themselves; `lightrail jobs` lists them, --cancel stops one")
    elif any(row.state.phase == "failed" for row in rows):
        print(f"\nfailed jobs are run again by\ntrain sweep.resume={_quoted(ledger)} sweep.retry=true")


def _how_to_resume(ledger: Ledger) -> str:
    return f"resume with:\ntrain sweep.resume={_quoted(ledger)}"


def _quoted(ledger: Ledger) -> str:
    import shlex

    return shlex.quote(str(ledger.folder))
