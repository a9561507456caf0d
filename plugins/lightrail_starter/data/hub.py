"""A data set from the Hugging Face hub, by name."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightrail.errors import ConfigurationError, DataError, closest
from lightrail.options import at_least
from lightrail_starter.data.byte_windows import VOCABULARY, ByteWindows
from lightrail_starter.data.images import as_tensor
from lightrail_starter.data.module import SplitData
from lightrail_starter.data.splits import Split, split_indices
from lightrail_starter.extras import require

__all__ = ["Hub"]

ALIASES = {"train": ("train",), "val": ("validation", "valid", "val", "dev"), "test": ("test",)}


class _Pictures(Dataset[tuple[Tensor, Tensor]]):
    """Rows of a table with a picture and a label, decoded when their batch comes."""

    def __init__(self, table: Any, columns: tuple[str, str], classes: Sequence[Any], size: int, gray: bool) -> None:
        self.table = table
        self.image, self.label = columns
        self.index = {value: i for i, value in enumerate(classes)}
        self.size = size
        self.gray = gray

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = self.table[list(indices)]
        images = torch.stack([as_tensor(picture, self.size, self.gray) for picture in rows[self.image]])
        return images, torch.tensor([self.index[label] for label in rows[self.label]])


class Hub(SplitData):
    """Any data set of the Hugging Face hub with pictures and labels, or with text.

    With ``image``, a batch is ``(images [B, C, image_size, image_size] float32 in [0, 1], labels [B] int64)``; with
    ``text``, ``(inputs [B, context] int64, targets [B, context] int64)`` as in ``text_files``: bytes, and the same one
    byte later. Parts that the data set lacks are cut from training by the fractions. Needs the extra ``hub``.

    Args:
        name: A name on the hub, or a folder that ``save_to_disk`` wrote.
        config: The configuration of a data set that has several.
        image: The column with pictures.
        label: The column with their classes.
        text: The column with text; give ``image`` or ``text``.
        image_size: Pixels a side, at least 1.
        grayscale: One channel in place of three.
        context: Bytes a window, at least 1.
        batch_size: Samples a batch, at least 1.
        num_workers: Processes that decode pictures.
        split_seed: Seed of the split, independent of the seed of the run.
        val_fraction: Share of the rows for validation, in (0, 1).
        test_fraction: Share of the rows for test, in (0, 1).

    Raises:
        PluginError: The library ``datasets`` is not installed.
        DataError: On reading: there is no such data set, part or column, or too little text.
    """

    def __init__(
        self,
        name: str,
        config: str | None = None,
        image: str | None = None,
        label: str = "label",
        text: str | None = None,
        image_size: int = 32,
        grayscale: bool = False,
        context: int = 128,
        batch_size: int = 32,
        num_workers: int = 0,
        split_seed: int = 0,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
    ) -> None:
        super().__init__(batch_size, num_workers, split_seed, val_fraction, test_fraction)
        at_least(1, image_size=image_size, context=context)
        if (image is None) == (text is None):
            raise ConfigurationError(
                "data 'hub' needs to know which column to read",
                found=f"image={image}, text={text}",
                allowed="one of image=COLUMN and text=COLUMN",
                remedy="Set data.image for classification or data.text for language modelling.",
            )
        self._source, self.config = name, config
        self.image, self.label, self.text = image, label, text
        self.image_size, self.grayscale, self.context = image_size, grayscale, context

    @cached_property
    def _tables(self) -> Split[Any]:
        datasets = require("datasets", extra="hub", plugin="data 'hub'")
        try:
            on_disk = Path(self._source).expanduser().is_dir()
            found = (
                datasets.load_from_disk(self._source) if on_disk else datasets.load_dataset(self._source, self.config)
            )
        except Exception as error:  # what it raises depends on its version, its network and the data set
            raise DataError(
                f"the data set '{self._source}' cannot be loaded",
                found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                allowed="the name of a data set on the Hugging Face hub, or a folder that save_to_disk wrote",
                remedy="Check data.name, data.config and the network.",
            ) from error
        # A single table is what a data set without named parts loads as.
        found = found if isinstance(found, dict) else {"train": found}
        named = {part: next((n for n in names if n in found), None) for part, names in ALIASES.items()}
        if named["train"] is None:
            raise self._missing("part", "train", list(found))
        tables = {part: found[name] for part, name in named.items() if name is not None}
        for table in tables.values():
            for column in (self.image, self.label) if self.image is not None else (self.text,):
                if column not in table.column_names:
                    raise self._missing("column", str(column), list(table.column_names))
        return self._with_all_parts(tables)

    def _with_all_parts(self, tables: dict[str, Any]) -> Split[Any]:
        """Cuts the parts that are missing from training."""
        whole = tables["train"]
        drawn = split_indices(len(whole), self.fractions, self.split_seed)
        kept = [drawn.train, *(getattr(drawn, part) for part in ("val", "test") if part in tables)]
        cut = {part: whole.select(getattr(drawn, part)) for part in ("val", "test") if part not in tables}
        if cut:
            cut["train"] = whole.select(np.sort(np.concatenate(kept)))
        return Split(**(tables | cut))

    def _missing(self, what: str, name: str, among: list[str]) -> DataError:
        return DataError(
            f"the data set '{self._source}' has no {what} '{name}'",
            found=", ".join(among),
            allowed=f"a {what} of that data set",
            remedy=f"{closest(name, among)}Choose another {what} or another data set.",
        )

    @cached_property
    def _classes(self) -> list[Any]:
        """The values that stand in the column of labels, in the order of their indices."""
        feature = self._tables.train.features[self.label]
        names = getattr(feature, "names", None)
        values = list(range(len(names))) if names else sorted(set(self._tables.train[self.label]))
        self.class_names = [str(name) for name in names or values]
        return values

    def dimensions(self) -> dict[str, int]:
        """The sizes of a picture and the number of classes, or the vocabulary and the length of a window."""
        if self.text is not None:
            return {"vocab_size": VOCABULARY, "context": self.context}
        channels, classes = 1 if self.grayscale else 3, len(self._classes)
        return {
            "in_features": channels * self.image_size**2,
            "in_channels": channels,
            "image_size": self.image_size,
            "num_classes": classes,
            "out_features": classes,
        }

    def load(self) -> Split[Any]:
        tables = (self._tables.train, self._tables.val, self._tables.test)
        if self.text is not None:
            texts = ("\n\n".join(table[self.text]).encode() for table in tables)
            return Split(*(ByteWindows(text, self.context) for text in texts))
        columns = (str(self.image), self.label)
        return Split(*(_Pictures(t, columns, self._classes, self.image_size, self.grayscale) for t in tables))
