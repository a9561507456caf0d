"""What was chosen of one kind, made and checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightrail.errors import CompositionError

if TYPE_CHECKING:
    from lightrail.run.resolve import Resolved

__all__ = ["made"]


def made(resolved: Resolved, kind: str, wanted: type) -> Any:
    """The one plugin of a kind.

    Args:
        resolved: What was chosen.
        kind: Of which one was.
        wanted: The class that it extends.

    Raises:
        CompositionError: It is something else.
    """
    from lightrail.run.build import make

    chosen = resolved.one(kind)
    assert chosen is not None
    found = make(resolved, chosen)
    if not isinstance(found, wanted):
        raise CompositionError(
            f"what was chosen as {kind} is not a lightrail.{wanted.__name__}",
            found=f"{type(found).__module__}.{type(found).__qualname__}",
            allowed=f"a lightrail.{wanted.__name__}",
            remedy=f"Choose another with {kind}=NAME, or let the class extend lightrail.{wanted.__name__}.",
        )
    return found
