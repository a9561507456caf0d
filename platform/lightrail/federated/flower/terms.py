"""What the clients of a run are told of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightrail.options import positive

__all__ = ["Terms"]


@dataclass(frozen=True)
class Terms:
    """What clients are told of the run, and how long they are waited for.

    Args:
        overrides: That the server's run was composed of.
        lock: What it is made of, from ``lightrail.run.lock.lock_of``; empty: versions are not compared.
        timeout: Seconds that a round waits for an answer.
        patience: Seconds that the first round waits for clients to come.

    Raises:
        ConfigurationError: A time that is not greater than 0.
    """

    overrides: Sequence[str] = ()
    lock: Mapping[str, Any] | None = None
    timeout: float = 600.0
    patience: float = 600.0

    def __post_init__(self) -> None:
        positive(timeout=self.timeout, patience=self.patience)
