"""Files are written to a temporary name and renamed: a reader sees the old one or the new one, never a part."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lightrail.errors import RunFolderError

__all__ = ["copy_file", "replace_file", "replacing", "tells_unwritable"]


@contextlib.contextmanager
def tells_unwritable(path: Path) -> Iterator[None]:
    """Turns a refusal to write ``path`` (no permission, a full disk) into an error for the user.

    Raises:
        RunFolderError: The block could not write.
    """
    try:
        yield
    except OSError as error:
        raise _unwritable(path, error.strerror or str(error)) from error
    except RuntimeError as error:
        # torch's own writer reports a full disk as a RuntimeError of its archive.
        if "PytorchStreamWriter" in str(error) or "unexpected pos" in str(error):
            raise _unwritable(path, str(error).splitlines()[0]) from error
        raise


def _unwritable(path: Path, reason: str) -> RunFolderError:
    folder = next((parent for parent in path.parents if parent.exists()), Path.cwd())
    return RunFolderError(
        f"{path.name} cannot be written",
        found=f"{path}: {reason} ({shutil.disk_usage(folder).free / 1e6:.0f} MB free)",
        allowed="a run folder on a disk with free space, in which you may write",
        remedy="Free some space or mend the permissions, or choose another folder with run.root=FOLDER; "
        "what was saved before is intact.",
    )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``, which takes its place, safely on the disk, when the block ends well.

    Args:
        path: The file that is to be written, in a folder that is there.

    Yields:
        Where to write.

    Raises:
        RunFolderError: It cannot be written; what stood there before still does.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with tells_unwritable(path):
            yield temporary
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def replace_file(path: Path, content: bytes) -> None:
    """Writes a whole file; see :func:`replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def copy_file(source: Path, target: Path) -> None:
    """Copies a file, whole or not at all; see :func:`replacing`."""
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)
