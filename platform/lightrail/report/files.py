"""Files that are either whole or not there, and one wording for a folder that cannot be written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightrail.errors import RunFolderError

__all__ = ["replace_file", "tells_unwritable"]


@contextmanager
def tells_unwritable(path: Path) -> Iterator[None]:
    """Turns an operating system's refusal to write ``path`` into an error for the user."""
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"{path.name} cannot be written",
            found=f"{path}: {error.strerror or error}",
            allowed="a run folder on a disk with free space, in which you may write",
            remedy="Free some space or mend the permissions, or choose another folder with run.root=PATH.",
        ) from error


def replace_file(path: Path, content: bytes) -> None:
    """Writes the file under a temporary name in the same folder, then renames it into place.

    Raises:
        RunFolderError: It cannot be written; what stood there before still does.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with tells_unwritable(path):
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        except OSError:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
