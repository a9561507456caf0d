"""The reference manual of Python, from the copy that Python carries."""

from __future__ import annotations

import importlib
from typing import ClassVar

from lightrail.errors import DataError
from lightrail.traits import Traits
from lightrail_starter.data.byte_windows import ByteText

__all__ = ["Docs"]


class Docs(ByteText):
    """The topics behind Python's own ``help()``: some 450 kB of English and code as bytes; no download.

    A batch is ``(inputs [B, context] int64, targets [B, context] int64)``; the targets are the inputs one byte later.
    The parts are split by topic. The text differs a little from one version of Python to the next.

    Args:
        context: Bytes a window, at least 1.
        stride: Bytes between the starts of two training windows, at least 1; ``None`` for ``context``.
        batch_size: Windows a batch, at least 1.
        num_workers: Processes that load batches; 0 is fastest here.
        split_seed: Seed of the split, independent of the seed of the run.
        val_fraction: Share of the bytes for validation, in (0, 1).
        test_fraction: Share of the bytes for test, in (0, 1).

    Example:
        >>> inputs, targets = next(iter(Docs(context=64, batch_size=8).train_dataloader()))
        >>> tuple(inputs.shape), bool((inputs[:, 1:] == targets[:, :-1]).all())
        ((8, 64), True)
    """

    traits: ClassVar[Traits] = Traits(example={"batch_size": 8, "context": 32})

    def __init__(
        self,
        context: int = 128,
        stride: int | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        split_seed: int = 0,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
    ) -> None:
        super().__init__(context, stride, batch_size, num_workers, split_seed, val_fraction, test_fraction)

    def documents(self) -> list[bytes]:
        """The topics, in the order of their names, each under its name."""
        try:
            topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        except (ImportError, AttributeError) as error:
            raise DataError(
                "this Python does not carry its documentation topics",
                found=str(error),
                allowed="the module pydoc_data.topics of the standard library",
                remedy="Use a full CPython, or your own text: data=text_files data.path=FOLDER.",
            ) from error
        return [f"{name}\n\n{topics[name].strip()}\n".encode() for name in sorted(topics)]
