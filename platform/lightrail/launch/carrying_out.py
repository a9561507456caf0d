"""``train --order FOLDER``: one rank of a run whose order is written down."""

from __future__ import annotations

import traceback
from pathlib import Path

from lightrail.errors import UserError
from lightrail.files import replace_file
from lightrail.launch.order import read_order

__all__ = ["carry_out"]


def carry_out(folder: str) -> int:
    """Builds and executes the run whose order lies in a folder.

    Args:
        folder: The run folder.

    Returns:
        The exit status: 0, or 128 + N where signal N asked for a stop.

    Raises:
        UserError: It cannot be carried out here.
    """
    from lightrail.train import run_to_end

    order = read_order(Path(folder))
    error = order.workspace / "error.txt"
    error.unlink(missing_ok=True)
    try:
        return run_to_end(order.run())
    except UserError as mistake:
        replace_file(error, str(mistake).encode())
        raise
    except Exception:
        replace_file(error, traceback.format_exc().encode())
        raise
