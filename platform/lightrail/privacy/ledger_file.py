"""The file privacy.json as it stands, and how it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightrail.errors import CheckpointError

__all__ = ["SCHEMA", "read_json", "unreadable"]

SCHEMA = 1


def read_json(path: Path) -> dict[str, Any]:
    """The contents of a ``privacy.json``, with the ``epsilon`` and ``planned_epsilon`` that it says.

    Args:
        path: The file.

    Raises:
        CheckpointError: It is missing, truncated or foreign.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{path.stat().st_size} bytes; {error}"
        raise unreadable(str(path), str(reason)) from error
    if not isinstance(values, dict) or values.get("schema") != SCHEMA:
        raise unreadable(str(path), "JSON without the marks of a ledger")
    return values


def unreadable(what: str, found: str) -> CheckpointError:
    """The error for what is no ledger.

    Args:
        what: Its name.
        found: What it holds instead.
    """
    return CheckpointError(
        f"{what} is not an account of privacy that can be read",
        found=found,
        allowed=f"an intact privacy.json of a private run, schema {SCHEMA}",
        remedy="Name a run that was trained with privacy, its privacy.json or one of its checkpoints.",
    )
