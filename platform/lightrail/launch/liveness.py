"""Whether a process of this machine still lives; its number alone does not tell, since numbers come again."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["birth_of", "is_alive"]


def birth_of(process: int) -> int | None:
    """When a process was started, which tells it from a later one of the same number; ``None`` where it is gone.

    Args:
        process: Its number.

    Example:
        >>> birth_of(os.getpid()) == birth_of(os.getpid()), birth_of(2**22 + 1)
        (True, None)
    """
    if sys.platform != "linux":
        try:
            os.kill(process, 0)
        except OSError:
            return None
        return 0
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def is_alive(process: int, since: int | None) -> bool:
    """Whether a process that was started at ``since`` still lives, on this machine.

    Args:
        process: Its number.
        since: What :func:`birth_of` said.
    """
    return since is not None and birth_of(process) == since
