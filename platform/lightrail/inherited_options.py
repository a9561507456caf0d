"""Options that a method inherits: what a constructor hands on as ``**common`` is listed as if it were its own."""

from __future__ import annotations

import contextlib
import inspect
import typing

__all__ = ["signature_with_inherited"]


def signature_with_inherited(cls: type) -> inspect.Signature:
    """The signature of a constructor, with the options of the class that it extends in the place of ``**common``.

    What a class in between wants without a default is the business of the class that extends it, and no option.

    Args:
        cls: A class whose ``__init__`` ends with ``**common``, or lists everything itself.

    Example:
        >>> class Base:
        ...     def __init__(self, *, rounds: int = 3): ...
        >>> class Method(Base):
        ...     def __init__(self, *, mu: float = 0.1, **common: object): ...
        >>> str(signature_with_inherited(Method))
        '(*, mu: float = 0.1, rounds: int = 3)'
    """
    places = [each for each in cls.__mro__ if "__init__" in vars(each)]
    found: dict[str, inspect.Parameter] = {}
    for place in places:
        own = list(inspect.signature(place.__init__).parameters.values())[1:]  # type: ignore[misc]
        hints: dict[str, object] = {}
        with contextlib.suppress(NameError):  # an annotation that only a type checker knows stays as it is written
            hints = typing.get_type_hints(place.__init__)  # type: ignore[misc]
        for each in own:
            is_set = place is not cls and each.default is each.empty  # by the constructor of the class that extends it
            if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL) and not is_set and each.name not in found:
                found[each.name] = each.replace(annotation=hints.get(each.name, each.annotation))
        if all(each.kind is not each.VAR_KEYWORD for each in own):
            break
    return inspect.Signature(sorted(found.values(), key=lambda each: each.kind))
