"""A run: composed, checked, built, executed, reported."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightrail.run.run import Result, Run

__all__ = ["Result", "Run", "compose"]


def compose(overrides: Sequence[str] = (), *, config_dirs: Sequence[str | Path] = ()) -> Run:
    """Composes a run, as the command line does.

    Args:
        overrides: What would be typed after ``train``.
        config_dirs: Folders of the user's own configuration, searched first.

    Returns:
        The run; its ``execute()`` does it.

    Raises:
        UserError: Anything that cannot work, before anything is spent.

    Example:
        >>> run = compose(["+optimizer=sophia", "trainer.max_epochs=1"])  # doctest: +SKIP
        >>> run.execute().metrics["test_accuracy"]  # doctest: +SKIP
    """
    from lightrail.configuration import compose as compose_configuration
    from lightrail.run.build import build
    from lightrail.run.resume import find_resumed

    resumed = find_resumed(overrides)
    typed = list(overrides) if resumed is None else resumed.overrides(overrides)
    return build(compose_configuration(typed, config_dirs=config_dirs), resumed)


def __getattr__(name: str) -> Any:
    if name in ("Result", "Run"):
        return getattr(importlib.import_module("lightrail.run.run"), name)
    raise AttributeError(f"module 'lightrail.run' has no attribute '{name}'")
