"""Conformance of searches: what they are; what one finds is for its own tests to say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lightrail.generation.search import Search
from lightrail.testing.building import (
    built,
    check_is_documented,
    check_names_its_paper,
    refuses_unknown_options,
)
from lightrail.testing.suite import Check, Suite, known_exceptions, name_of, require

__all__ = ["SearchSuite"]

Options = Mapping[str, Any]


def check_builds_from_options(plugin: Any, options: Options) -> None:
    """``plugin(**options)`` is a lightrail.Search."""
    search = built(plugin, options)
    require(isinstance(search, Search), f"it is no lightrail.Search but {type(search).__name__}")


def check_rejects_unknown_options(plugin: Any, options: Options) -> None:
    """An option that the signature lacks is an error."""
    refuses_unknown_options(plugin, options)


CHECKS: tuple[Check, ...] = (
    check_is_documented,
    check_names_its_paper,
    check_builds_from_options,
    check_rejects_unknown_options,
)


class SearchSuite(Suite):
    """Every check of a search."""

    kind: ClassVar[str] = "search"
    checks: ClassVar[tuple[Check, ...]] = (*CHECKS, known_exceptions(frozenset(map(name_of, CHECKS))))
