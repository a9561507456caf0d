"""From a Python annotation to what a value in YAML may be."""

from __future__ import annotations

import collections.abc as abc
import os
import pathlib
import types
from collections.abc import Mapping
from typing import Annotated, Any, ForwardRef, Literal, NewType, TypeVar, Union, get_args, get_origin

from lightrail.catalogue.forms import ANY

__all__ = ["evaluated", "form_of", "text_of"]

_PLAIN: dict[Any, str] = {
    int: "int", float: "float", bool: "bool", str: "str", None: "none", type(None): "none", type: "callable",
    pathlib.Path: "str", pathlib.PurePath: "str", os.PathLike: "str", abc.Callable: "callable",
}  # fmt: skip
_LISTS = (list, set, frozenset, abc.Sequence, abc.MutableSequence, abc.Iterable, abc.Collection, abc.Set)
_MAPPINGS = (dict, abc.Mapping, abc.MutableMapping)


class _Unspellable:
    """Stands for a name in an annotation that exists for type checkers only."""


def evaluated(annotation: Any, namespace: Mapping[str, Any]) -> Any:
    """The object that an annotation means, where it was written as text.

    A name that is imported for type checkers only counts as a class that YAML cannot spell; the rest of the annotation
    keeps its meaning.

    Args:
        annotation: Text or object.
        namespace: The globals of the module that wrote it.
    """
    if not isinstance(annotation, str):
        return annotation
    missing: dict[str, Any] = {}
    for _ in range(20):
        try:
            return eval(annotation, dict(namespace), missing)
        except NameError as error:
            if not error.name or error.name in missing:
                return Any
            missing[error.name] = type(error.name, (_Unspellable,), {})
        except Exception:
            return Any
    return Any


def form_of(annotation: Any) -> dict[str, Any]:
    """What a value may be, as :mod:`lightrail.catalogue.forms` defines it; anything where nobody can tell.

    Example:
        >>> form_of(tuple[float, float])
        {'is': 'tuple', 'of': [{'is': 'float'}, {'is': 'float'}]}
    """
    return _form(annotation) or dict(ANY)


def _form(annotation: Any) -> dict[str, Any] | None:
    """As :func:`form_of`; ``None`` for a class that YAML cannot spell."""
    if isinstance(annotation, NewType):
        return _form(annotation.__supertype__)
    if annotation in (Any, object) or isinstance(annotation, TypeVar | ForwardRef | str):
        return dict(ANY)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _form(arguments[0])
    if origin is Literal:
        plain = all(isinstance(each, str | int | bool | type(None)) for each in arguments)
        return {"is": "literal", "values": list(arguments)} if plain else dict(ANY)
    if origin in (Union, types.UnionType):
        return _union(arguments)
    return _container(origin or annotation, arguments)


def _union(members: tuple[Any, ...]) -> dict[str, Any]:
    forms = [form for each in members if (form := _form(each)) is not None]
    # `float | Tensor` takes a number; `torch.dtype | None` takes what only torch can judge.
    spelled = [form for form in forms if form != {"is": "none"}]
    if not spelled or ANY in forms:
        return dict(ANY)
    return forms[0] if len(forms) == 1 else {"is": "union", "of": forms}


def _container(base: Any, arguments: tuple[Any, ...]) -> dict[str, Any] | None:
    if base is tuple and arguments and arguments[-1] is not Ellipsis:
        return {"is": "tuple", "of": [form_of(each) for each in arguments]}
    if base is tuple or base in _LISTS:
        return {"is": "list", "of": form_of(arguments[0]) if arguments else dict(ANY)}
    if base in _MAPPINGS:
        return {"is": "mapping", "of": form_of(arguments[1]) if len(arguments) == 2 else dict(ANY)}
    try:
        name = _PLAIN.get(base)
    except TypeError:
        return dict(ANY)
    return {"is": name} if name else None


def text_of(annotation: Any) -> str:
    """An annotation as its author would write it, without module names.

    Example:
        >>> text_of(dict[str, float] | None)
        'dict[str, float] | None'
    """
    if annotation in (None, type(None)):
        return "None"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return text_of(arguments[0])
    if origin in (Union, types.UnionType):
        return " | ".join(map(text_of, arguments))
    if origin is Literal:
        return " | ".join(map(repr, arguments))
    if origin is not None and arguments:
        inside = ", ".join("..." if each is Ellipsis else text_of(each) for each in _flat(arguments))
        return f"{_name(origin)}[{inside}]"
    return "anything" if annotation is Any else _name(annotation)


def _flat(arguments: tuple[Any, ...]) -> list[Any]:
    return [part for each in arguments for part in (each if isinstance(each, list) else [each])]


def _name(annotation: Any) -> str:
    name = getattr(annotation, "__name__", None) or str(annotation)
    return name.removeprefix("typing.").rsplit(".", 1)[-1] if "[" not in name else name
