"""What every data module that reads the user's files asks of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from lightrail.errors import DataError, closest

__all__ = ["existing", "readable"]


def existing(path: Path, allowed: str) -> Path:
    """The path itself.

    Raises:
        DataError: There is nothing at the path.
    """
    if path.exists():
        return path
    parent = path.parent
    found = "nothing there" if parent.is_dir() else f"no folder {parent}"
    neighbours = [each.name for each in parent.iterdir()] if parent.is_dir() else []
    raise DataError(
        f"there is no file or folder {path}",
        found=f"{found} (looked in {Path.cwd()})" if not path.is_absolute() else found,
        allowed=allowed,
        remedy=f"{closest(path.name, neighbours)}Set data.path to an existing path.",
    )


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns the operating system's refusal to read a file into an error that tells what to do."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path} cannot be read",
            found=error.strerror or str(error),
            allowed="a file that this user may read",
            remedy="Mend its permissions, or set data.path to another file.",
        ) from error
