"""TensorBoard."""

from __future__ import annotations

from lightning.pytorch.loggers.tensorboard import TensorBoardLogger

from lightrail.options import positive
from lightrail_starter.extras import require

__all__ = ["TensorBoard"]


class TensorBoard(TensorBoardLogger):
    """Writes event files for TensorBoard, into ``tensorboard/`` of the run folder.

    Look at several runs side by side with ``tensorboard --logdir`` and the folder above theirs. Needs the extra
    ``tensorboard``.

    Args:
        folder: Where the folder ``tensorboard`` is made; the run folder under ``train``.
        flush_seconds: How often what was logged is written to disk, in seconds, above 0.

    Raises:
        PluginError: TensorBoard is not installed.
    """

    def __init__(self, folder: str | None = None, flush_seconds: float = 30.0) -> None:
        require("tensorboard", extra="tensorboard", plugin="logger 'tensorboard'")
        positive(flush_seconds=flush_seconds)
        super().__init__(
            save_dir=folder or ".",
            name="",
            version="tensorboard",
            default_hp_metric=False,
            flush_secs=flush_seconds,
        )
