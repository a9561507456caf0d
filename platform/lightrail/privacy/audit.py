"""An audit: the cost of what a run says that it released, computed anew, beside what the run says of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightrail.errors import CheckpointError
from lightrail.privacy.accounting import ACCOUNTANTS
from lightrail.privacy.events import Event
from lightrail.privacy.ledger import Ledger
from lightrail.privacy.ledger_file import read_json

__all__ = ["Audit", "audited", "costs", "located"]

# Of what is said, relative: more than rounding and other versions of the accountant explain.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Args:
        name: The run, as it was named.
        ledger: Its account.
        spent: Epsilon of what was released, by accountant.
        planned: Epsilon of what the whole run releases, by accountant.
        said: The epsilon that ``privacy.json`` gives as spent; ``None`` where only a checkpoint was read.
    """

    name: str
    ledger: Ledger
    spent: dict[str, float]
    planned: dict[str, float]
    said: float | None


def costs(ledger: Ledger) -> dict[str, float]:
    """The epsilon that was spent, by each accountant.

    Args:
        ledger: The account.
    """
    return {name: replace(ledger, accountant=name).epsilon() for name in ACCOUNTANTS}


def located(word: str, root: Path = Path("runs")) -> Path:
    """What a word names: a path, or the newest run.

    Args:
        word: A run folder, a ``privacy.json``, a checkpoint, or ``latest``.
        root: Where ``latest`` looks.

    Raises:
        CheckpointError: There is nothing of that name.
    """
    if word == "latest":
        marks = [mark for name in ("lock.json", "privacy.json") for mark in root.glob(f"*/{name}")]
        if marks:
            return max(marks, key=lambda mark: mark.stat().st_mtime_ns).parent
    elif Path(word).exists():
        return Path(word)
    raise CheckpointError(
        f"there is no run '{word}' to audit",
        found=f"no run under {root}/" if word == "latest" else "no such file or folder",
        allowed="a run folder, its privacy.json, a checkpoint, or 'latest' for the newest run under ./runs",
        remedy="Look for a run that was trained with privacy.",
    )


def audited(word: str, root: Path = Path("runs")) -> Audit:
    """Reads the account of a run, computes anew what it spent, and compares.

    Args:
        word: A run folder, a ``privacy.json``, a checkpoint, or ``latest``.
        root: Where ``latest`` looks.

    Returns:
        What was found, where all agrees.

    Raises:
        CheckpointError: There is no such run, it has no account, the account says another epsilon than its events come
            to, or the checkpoint and ``privacy.json`` disagree.
    """
    path = located(word, root)
    file, checkpoint = path / "privacy.json", path / "checkpoints" / "last.ckpt"
    if path.is_file():
        file, checkpoint = (path, None) if path.suffix == ".json" else (None, path)
    elif not file.is_file() and not checkpoint.is_file():
        raise _without_account(path, "neither privacy.json nor checkpoints/last.ckpt")
    said = read_json(file) if file is not None and file.is_file() else None
    saved = _saved(checkpoint) if checkpoint is not None and checkpoint.is_file() else None
    if said is None:
        if saved is None:
            raise _without_account(path, "a checkpoint without an account of privacy")
        ledger = Ledger.from_dict(saved)
    else:
        ledger = Ledger.from_dict(said)
        if checkpoint is not None and checkpoint.is_file():
            _compare(path, ledger, Ledger.from_dict(saved) if saved is not None else None)
    return _audit(word if word != "latest" else str(path), ledger, said)


def _saved(checkpoint: Path) -> dict[str, Any] | None:
    from lightrail.run.checkpoint import load_checkpoint

    saved = load_checkpoint(checkpoint)
    # A federated run keeps the account of its rounds with them.
    return saved["lightrail"].get("privacy") or saved.get("callbacks", {}).get("federated", {}).get("account")


def _compare(path: Path, told: Ledger, saved: Ledger | None) -> None:
    same = saved is not None and all(
        getattr(told, name) == getattr(saved, name) for name in ("events", "delta", "is_private", "adjacency")
    )
    if not same:
        raise CheckpointError(
            f"the checkpoint and privacy.json of {path} disagree",
            found=f"privacy.json: {_told(told)}\ncheckpoint: {'no account' if saved is None else _told(saved)}",
            allowed="one account of what was released, in both",
            remedy="Trust neither alone: the larger count is what may have been released. Continue the run with "
            f"run.resume={path}, which writes both anew, or audit the checkpoint by its own name.",
        )


def _told(ledger: Ledger) -> str:
    text = " + ".join(_kind(event) for event in ledger.events) or "no steps"
    return f"{text}, delta {ledger.delta:g}{'' if ledger.is_private else ', not private'}"


def _kind(event: Event) -> str:
    return f"{event.steps} steps of noise {event.noise:g} at {event.batch}/{event.records}"


def _audit(name: str, ledger: Ledger, said: dict[str, Any] | None) -> Audit:
    spent, planned = costs(ledger), costs(replace(ledger, events=ledger.planned))
    if said is None:
        return Audit(name, ledger, spent, planned, None)
    for key, found in (("epsilon", spent[ledger.accountant]), ("planned_epsilon", planned[ledger.accountant])):
        _verify(name, key, said.get(key, "nothing"), found)
    return Audit(name, ledger, spent, planned, math.inf if said["epsilon"] is None else float(said["epsilon"]))


def _verify(name: str, key: str, said: Any, found: float) -> None:
    if said is None:
        agrees = found == math.inf
    else:
        is_number = isinstance(said, int | float) and not isinstance(said, bool)
        agrees = is_number and found != math.inf and abs(said - found) <= _TOLERANCE * found
    if not agrees:
        raise CheckpointError(
            f"the account of {name} does not say what its events come to",
            found=f"{key}={said}",
            allowed=f"{found:.6g}, to within a thousandth: what its events come to",
            remedy="It was changed, or written by other versions; the figure that is allowed is the one to publish.",
        )


def _without_account(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"{path} holds no account of privacy",
        found=found,
        allowed="a run that was trained with privacy",
        remedy="Train one, such as `train +privacy=dp_sgd privacy.epsilon=3`, and audit its folder.",
    )
