"""Pictures in folders that bear the names of their classes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightrail.errors import DataError
from lightrail.options import at_least
from lightrail_starter.data.files import existing
from lightrail_starter.data.images import as_tensor, pillow
from lightrail_starter.data.module import SplitData
from lightrail_starter.data.splits import Split, split_indices

__all__ = ["ImageFolder"]

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"})
LAYOUT = "a folder with one folder of pictures a class, or with train/, val/ and test/ above those"
ALIASES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


class _Pictures(Dataset[tuple[Tensor, Tensor]]):
    """Pictures that are read from disk when their batch comes."""

    def __init__(self, files: Sequence[Path], labels: np.ndarray, size: int, grayscale: bool) -> None:
        self.files = list(files)
        self.labels = torch.from_numpy(labels)
        self.size = size
        self.grayscale = grayscale

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._read(self.files[index]), self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        pictures = [self._read(self.files[index]) for index in indices]
        return torch.stack(pictures), self.labels[torch.tensor(indices)]

    def _read(self, file: Path) -> Tensor:
        try:
            with pillow("data 'image_folder'").open(file) as picture:
                return as_tensor(picture, self.size, self.grayscale)
        except (OSError, SyntaxError) as error:  # what Pillow raises for broken files
            raise DataError(
                f"the picture {file} cannot be read",
                found=str(error),
                allowed=f"a picture that Pillow reads ({', '.join(sorted(SUFFIXES))})",
                remedy="Replace or remove that file.",
            ) from error


class ImageFolder(SplitData):
    """Pictures under ``path/<class>/``, resized to squares.

    Where ``path`` holds ``train/`` (and ``val/``, ``test/``), these are the parts; parts that are missing are cut from
    training by the fractions. A batch is ``(images [B, C, image_size, image_size] float32 in [0, 1], labels [B]
    int64)``. Needs the extra ``images``.

    Args:
        path: The folder.
        image_size: Pixels a side, at least 1.
        grayscale: One channel in place of three.
        batch_size: Pictures a batch, at least 1.
        num_workers: Processes that read and resize pictures; one a core pays for large pictures.
        split_seed: Seed of the split, independent of the seed of the run.
        val_fraction: Share of the pictures for validation, in (0, 1).
        test_fraction: Share of the pictures for test, in (0, 1).

    Raises:
        DataError: On reading: there is no such folder, no picture in it, or a picture that is broken.
        PluginError: Pillow is not installed.
    """

    def __init__(
        self,
        path: str,
        image_size: int = 32,
        grayscale: bool = False,
        batch_size: int = 32,
        num_workers: int = 0,
        split_seed: int = 0,
        val_fraction: float = 0.15,
        test_fraction: float = 0.15,
    ) -> None:
        super().__init__(batch_size, num_workers, split_seed, val_fraction, test_fraction)
        at_least(1, image_size=image_size)
        pillow("data 'image_folder'")
        self.path = Path(path).expanduser()
        self.image_size = image_size
        self.grayscale = grayscale

    def dimensions(self) -> dict[str, int]:
        """The sizes of a picture and the number of classes."""
        channels, classes = 1 if self.grayscale else 3, len(self._classes)
        return {
            "in_features": channels * self.image_size**2,
            "in_channels": channels,
            "image_size": self.image_size,
            "num_classes": classes,
            "out_features": classes,
        }

    @cached_property
    def _roots(self) -> dict[str, Path]:
        """The folder of each part that has one; the folder itself for ``train`` where there are no parts."""
        root = existing(self.path, LAYOUT)
        found = {
            part: root / name for part, names in ALIASES.items() for name in reversed(names) if (root / name).is_dir()
        }
        return found if "train" in found else {"train": root}

    @cached_property
    def _classes(self) -> list[str]:
        root = self._roots["train"]
        folders = [each for each in root.iterdir() if each.is_dir()] if root.is_dir() else []
        names = sorted(each.name for each in folders if _pictures(each))
        if not names:
            raise DataError(
                f"there are no pictures in {root}",
                found=f"{len(folders)} folders, none with a picture in it",
                allowed=LAYOUT,
                remedy="Put each class's pictures into a folder of its name, or set data.path to such a folder.",
            )
        self.class_names = names
        return names

    def _list(self, root: Path) -> tuple[list[Path], np.ndarray]:
        unknown = sorted({each.name for each in root.iterdir() if each.is_dir() and _pictures(each)} - {*self._classes})
        if unknown:
            raise DataError(
                f"{root} has a class that training has not",
                found=unknown[0],
                allowed=", ".join(self._classes),
                remedy="Add training pictures of that class, or remove the folder.",
            )
        pairs = [(file, i) for i, name in enumerate(self._classes) for file in _pictures(root / name)]
        return [file for file, _ in pairs], np.array([label for _, label in pairs], dtype=np.int64)

    def load(self) -> Split[Any]:
        listed = {part: self._list(root) for part, root in self._roots.items()}
        files, labels = listed["train"]
        drawn = split_indices(labels, self.fractions, self.split_seed)
        kept = [drawn.train, *(getattr(drawn, part) for part in ("val", "test") if part in listed)]
        where = {"train": np.sort(np.concatenate(kept)), "val": drawn.val, "test": drawn.test}
        for part, indices in where.items():
            if part == "train" or part not in listed:
                listed[part] = [files[i] for i in indices], labels[indices]
        return Split(*(_Pictures(*listed[part], self.image_size, self.grayscale) for part in ("train", "val", "test")))


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
