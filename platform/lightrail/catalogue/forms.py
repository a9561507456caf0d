"""The shapes that an option's value may have, as plain data, and the check of a value against one.

A form is ``{"is": name}`` with name one of any, int, float, bool, str, none, callable; or with more beside it:
``literal`` (``values``), ``union`` and ``tuple`` (``of``: a list of forms), ``list`` and ``mapping`` (``of``: a form).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["ANY", "accepts", "describe", "shown"]

Form = Mapping[str, Any]

ANY: dict[str, Any] = {"is": "any"}

_WORDS = {
    "any": "anything",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "none": "null",
    "callable": "a dotted name, or a node with _target_",
}


def accepts(form: Form, value: Any) -> bool:
    """Whether a value from YAML or the command line has this form.

    A node with ``_target_`` is accepted everywhere: it makes an object that only its own class can judge.

    Example:
        >>> accepts({"is": "float"}, 1), accepts({"is": "float"}, True), accepts({"is": "int"}, 1.5)
        (True, False, False)
    """
    if isinstance(value, Mapping) and "_target_" in value:
        return True
    check = _CHECKS.get(form["is"])
    return True if check is None else check(form, value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _fits_tuple(form: Form, value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == len(form["of"])
        and all(accepts(each, item) for each, item in zip(form["of"], value, strict=True))
    )


_CHECKS = {
    "none": lambda form, value: value is None,
    "int": lambda form, value: isinstance(value, int) and not isinstance(value, bool),
    "float": lambda form, value: _is_number(value),
    "bool": lambda form, value: isinstance(value, bool),
    "str": lambda form, value: isinstance(value, str),
    "callable": lambda form, value: isinstance(value, str) and "." in value,
    # 1 == True in Python, but not on a command line.
    "literal": lambda form, value: any(value == each and type(value) is type(each) for each in form["values"]),
    "union": lambda form, value: any(accepts(each, value) for each in form["of"]),
    "tuple": _fits_tuple,
    "list": lambda form, value: isinstance(value, list | tuple) and all(accepts(form["of"], item) for item in value),
    "mapping": lambda form, value: (
        isinstance(value, Mapping) and all(accepts(form["of"], item) for item in value.values())
    ),
}


def describe(form: Form) -> str:
    """What a form allows, in words.

    Example:
        >>> describe({"is": "tuple", "of": [{"is": "float"}, {"is": "float"}]})
        'a list of 2: [a number, a number]'
    """
    match form["is"]:
        case "literal":
            return ", ".join(map(shown, form["values"]))
        case "union":
            return " or ".join(dict.fromkeys(map(describe, form["of"])))
        case "tuple":
            return f"a list of {len(form['of'])}: [{', '.join(map(describe, form['of']))}]"
        case "list":
            return "a list" if form["of"] == ANY else f"a list, each {describe(form['of'])}"
        case "mapping":
            return "a mapping" if form["of"] == ANY else f"a mapping, each value {describe(form['of'])}"
        case name:
            return _WORDS[name]


def shown(value: Any) -> str:
    """A value as one would type it.

    Example:
        >>> shown(None), shown(True), shown([1, None])
        ('null', 'true', '[1, null]')
    """
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
