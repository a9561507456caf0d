"""Filling options with the defaults of a signature, on plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightrail.catalogue.schema import Schema
from lightrail.kinds import KINDS

__all__ = ["in_order", "with_defaults"]

_FIRST = ("seed", "run", "trainer")


def with_defaults(written: Mapping[str, Any], target: str, schema: Schema | None) -> dict[str, Any]:
    """The node of one plugin: its target, every option that has a default, and what was set over them.

    Args:
        written: What was set.
        target: The class or function.
        schema: What it accepts; ``None`` where it could not be read.
    """
    node: dict[str, Any] = {"_target_": target, **(schema.defaults() if schema is not None else {})}
    for key, value in written.items():
        default = node.get(key)
        if isinstance(default, Mapping) and isinstance(value, Mapping) and "_target_" not in value:
            value = {**default, **value}
        node[key] = value
    # The target may have been written as an interpolation.
    return {**node, "_target_": target}


def in_order(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys at the root in the order in which they are read: the run, then the kinds."""
    order = [*_FIRST, *KINDS, *config]
    return {key: config[key] for key in dict.fromkeys(order) if key in config}
