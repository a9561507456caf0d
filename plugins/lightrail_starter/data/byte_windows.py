"""Windows of bytes for next-byte prediction, and the data module around them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightrail.errors import DataError
from lightrail.options import at_least
from lightrail_starter.data.module import SplitData
from lightrail_starter.data.splits import Split, split_documents

__all__ = ["VOCABULARY", "ByteText", "ByteWindows"]

VOCABULARY = 256


class ByteWindows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of a text that start ``stride`` bytes apart, each with the same window one byte on.

    Args:
        text: The bytes.
        context: Bytes a window, at least 1.
        stride: Bytes between the starts of two windows, at least 1; ``context`` where none is given, so that every
            byte is predicted once.

    Example:
        >>> windows = ByteWindows(b"abcdef", context=2)
        >>> len(windows), [bytes(part.tolist()) for part in windows[1]]
        (2, [b'cd', b'de'])
    """

    def __init__(self, text: bytes, context: int, stride: int | None = None) -> None:
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
        self.stride = stride or context
        self._window = torch.arange(context + 1)
        self._length = max(0, (len(text) - context - 1) // self.stride + 1)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.__getitems__([index])
        return inputs[0], targets[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        starts = torch.from_numpy(np.array(indices, dtype=np.int64)) * self.stride
        windows = self.text[starts[:, None] + self._window].long()
        return windows[:, :-1], windows[:, 1:]


class ByteText(SplitData):
    """Texts as bytes: each byte is a token, so any language and any file has the same vocabulary of 256.

    A batch is ``(inputs [B, context] int64, targets [B, context] int64)``; the targets are the inputs one byte later.

    Args:
        context: Bytes a window, at least 1.
        stride: Bytes between the starts of two training windows, at least 1; ``None`` for ``context``.
        batch_size: Windows a batch, at least 1.
        num_workers: Processes that load batches.
        split_seed: Seed of the split, independent of the seed of the run.
        val_fraction: Share of the bytes for validation, in (0, 1).
        test_fraction: Share of the bytes for test, in (0, 1).
    """

    def __init__(
        self,
        context: int,
        stride: int | None,
        batch_size: int,
        num_workers: int,
        split_seed: int,
        val_fraction: float,
        test_fraction: float,
    ) -> None:
        super().__init__(batch_size, num_workers, split_seed, val_fraction, test_fraction)
        at_least(1, context=context, stride=context if stride is None else stride)
        self.context = context
        self.stride = stride

    @abstractmethod
    def documents(self) -> Sequence[bytes]:
        """The texts, in a fixed order."""

    @cached_property
    def texts(self) -> Split[bytes]:
        """The text of each part."""
        return split_documents(self.documents(), self.fractions, self.split_seed)

    def dimensions(self) -> dict[str, int]:
        """The vocabulary and the length of a window."""
        return {"vocab_size": VOCABULARY, "context": self.context}

    def load(self) -> Split[Any]:
        for name in ("train", "val", "test"):
            size = len(getattr(self.texts, name))
            if size <= self.context:
                raise DataError(
                    f"the {name} part of the text is shorter than one window",
                    found=f"{size} bytes in {name}",
                    allowed=f"more than {self.context} bytes (data.context={self.context})",
                    remedy=f"Lower data.context to less than {size}, or give more text."
                    if size > 1
                    else "Give more text.",
                )
        return Split(
            ByteWindows(self.texts.train, self.context, self.stride),
            ByteWindows(self.texts.val, self.context),
            ByteWindows(self.texts.test, self.context),
        )
