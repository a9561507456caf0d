"""From ``module.Class`` to the class."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

from lightrail.errors import PluginError, closest

__all__ = ["import_target", "make_local_modules_importable"]


def make_local_modules_importable() -> None:
    """Lets the user's own modules in the current folder be named, as ``python -m`` does.

    A console script starts with the folder of scripts on ``sys.path`` in place of the user's.
    """
    here = os.getcwd()
    if not sys.flags.safe_path and not {"", here} & set(sys.path):
        sys.path.insert(0, here)


def import_target(target: str) -> Any:
    """The class or function at a dotted path.

    Args:
        target: ``module.Class``; the module may be one in the current folder.

    Raises:
        PluginError: There is none, or its module fails to import; the cause is chained.

    Example:
        >>> import_target("fractions.Fraction")
        <class 'fractions.Fraction'>
    """
    make_local_modules_importable()
    parts = target.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise PluginError(
            f"'{target}' is not the path of a class",
            found=target,
            allowed="module.Class, with dots only",
            remedy="Write the module that holds the class, a dot, and the class.",
        )
    module, first = _import_longest(parts, target)
    found: Any = module
    for depth in range(first, len(parts)):
        if not hasattr(found, parts[depth]):
            where = ".".join(parts[:depth])
            public = [name for name in dir(found) if not name.startswith("_")]
            raise PluginError(
                f"'{target}' was not found",
                found=f"{where}, which has no '{parts[depth]}'",
                allowed=f"a class or function of {where}",
                remedy=f"{closest(parts[depth], public)}Check the spelling of the last part.",
            )
        found = getattr(found, parts[depth])
    return found


def _import_longest(parts: list[str], target: str) -> tuple[ModuleType, int]:
    """The innermost module of a dotted path, and how many parts name it."""
    name, module = parts[0], None
    for depth in range(1, len(parts)):
        name = ".".join(parts[:depth])
        try:
            module = importlib.import_module(name)
        except (Exception, SystemExit) as error:
            if isinstance(error, ModuleNotFoundError) and error.name == name:
                if module is not None:
                    return module, depth - 1
                raise PluginError(
                    f"'{target}' was not found",
                    found=f"no module named '{name}'",
                    allowed="a module that is installed, or lies in the current folder",
                    remedy=f"Install the package that holds '{name}', or run from the folder with {name}.py.",
                ) from error
            raise PluginError(
                f"'{target}' could not be imported",
                found=f"{type(error).__name__}: {error}",
                allowed=f"a module '{name}' that imports without an error",
                remedy=f"Mend '{name}'; `python -c 'import {name}'` shows where it fails.",
            ) from error
    assert module is not None
    return module, len(parts) - 1
