"""The user's own text."""

from __future__ import annotations

from pathlib import Path

from lightrail.errors import DataError
from lightrail_starter.data.byte_windows import ByteText
from lightrail_starter.data.files import existing, readable

__all__ = ["TextFiles"]


class TextFiles(ByteText):
    """A text file, or every ``.txt`` in a folder and below, as bytes.

    A batch is ``(inputs [B, context] int64, targets [B, context] int64)``; the targets are the inputs one byte later.
    Ten files or more are split by file; fewer are joined in the order of their names, and the end goes to validation
    and test.

    Args:
        path: The file or folder.
        context: Bytes a window, at least 1.
        stride: Bytes between the starts of two training windows, at least 1; ``None`` for ``context``.
        batch_size: Windows a batch, at least 1.
        num_workers: Processes that load batches; the text lies in memory, so 0 is fastest.
        split_seed: Seed of the split, independent of the seed of the run.
        val_fraction: Share of the bytes for validation, in (0, 1).
        test_fraction: Share of the bytes for test, in (0, 1).

    Raises:
        DataError: On reading: there is no such file, no text in it, or too little for one window.
    """

    def __init__(
        self,
        path: str,
        context: int = 128,
        stride: int | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        split_seed: int = 0,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
    ) -> None:
        super().__init__(context, stride, batch_size, num_workers, split_seed, val_fraction, test_fraction)
        self.path = Path(path).expanduser()

    def dimensions(self) -> dict[str, int]:
        """The vocabulary and the length of a window."""
        self._files()
        return super().dimensions()

    def documents(self) -> list[bytes]:
        """The texts, in the order of their names."""
        texts = [_read(file) for file in self._files()]
        if not any(texts):
            raise DataError(
                f"there is no text in {self.path}",
                found="empty files only",
                allowed="files with text",
                remedy="Set data.path to a file or folder with text.",
            )
        return [text for text in texts if text]

    def _files(self) -> list[Path]:
        path = existing(self.path, "a text file, or a folder with .txt files")
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*.txt") if file.is_file())
        if not files:
            raise DataError(
                f"there is no text in {path}",
                found="no file that ends in .txt",
                allowed="a folder with .txt files, in it or below",
                remedy="Set data.path to such a folder, or to one file.",
            )
        return files


def _read(file: Path) -> bytes:
    with readable(file):
        return file.read_bytes()
