"""Files are written to a temporary name and renamed: a reader sees the old one or the new one, never a part."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lightrail.errors import RunFolderError

__all__ = ["copy_atomically", "replacing"]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``, which takes its place when the block ends well.

    Args:
        path: The file that is to be written.

    Yields:
        Where to write. A reader sees the old file or the new one, never a part.

    Raises:
        RunFolderError: The folder cannot be written, or the disk is full; the old file stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    except RuntimeError as error:
        # torch's own writer reports a full disk as a RuntimeError of the zip archive.
        if "PytorchStreamWriter" in str(error) or "unexpected pos" in str(error):
            raise _unwritable(path, error) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _unwritable(path: Path, error: Exception) -> RunFolderError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
    free = shutil.disk_usage(path.parent).free / 1e6 if path.parent.exists() else 0.0
    return RunFolderError(
        f"{path.name} cannot be written",
        found=f"{reason} ({path.parent}, {free:.0f} MB free)",
        allowed="a folder on a disk with room",
        remedy="Free some room or choose another folder with run.root=FOLDER; what was saved before is intact.",
    )


def copy_atomically(source: Path, target: Path) -> None:
    """Copies a file to a temporary name and renames it."""
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)
