"""Optional libraries, imported when they are first needed."""

from __future__ import annotations

import importlib
from typing import Any

from lightrail.errors import PluginError

__all__ = ["require"]


def require(module: str, *, extra: str, plugin: str) -> Any:
    """Imports a library of an extra.

    Args:
        module: What to import.
        extra: The extra of this distribution that brings it.
        plugin: Who needs it, in the user's words, such as ``data 'hub'``.

    Raises:
        PluginError: The library is not installed; the error names the extra.

    Example:
        >>> require("json", extra="hub", plugin="data 'hub'").dumps([1])
        '[1]'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        raise PluginError(
            f"{plugin} needs the extra '{extra}', which is not installed",
            found=f"no module named '{error.name}'",
            allowed=f"the extra '{extra}' of lightrail",
            remedy=f"Run `pip install 'lightrail[{extra}]'`.",
        ) from error
