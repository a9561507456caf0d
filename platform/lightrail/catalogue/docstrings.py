"""The first sentence of a docstring, and one line a parameter from its ``Args`` section."""

from __future__ import annotations

import inspect
import re

__all__ = ["parameter_lines", "summary_of"]

_ROLE = re.compile(r":\w+:`~?([^`<]*?)(?:\s*<[^`>]*>)?`")
_LINK = re.compile(r"`([^`<]+?)(?:\s*<[^`>]*>)?`_{1,2}")
_SECTION = re.compile(r"^(\w[\w ]*):\s*$")
_PARAMETER = re.compile(r"^(?P<indent>\s*)\*{0,2}(?P<name>\w+)\s*(\([^)]*\))?\s*:\s*(?P<text>.*)$")


def summary_of(docstring: str | None) -> str:
    """The first sentence, in one line.

    Example:
        >>> summary_of("Decays :math:`x` to zero.\\n\\nMore.")
        'Decays x to zero.'
    """
    if not docstring:
        return ""
    paragraph = " ".join(inspect.cleandoc(docstring).split("\n\n", 1)[0].split())
    return _plain(re.split(r"(?<=[.!?])\s+(?=[A-Z`])", paragraph, maxsplit=1)[0])


def parameter_lines(docstring: str | None) -> dict[str, str]:
    """What the ``Args`` section says of each parameter, each in one line.

    Args:
        docstring: In Google's style; of any other style, nothing is read.
    """
    lines: dict[str, list[str]] = {}
    inside, depth, name = False, 0, ""
    for line in inspect.cleandoc(docstring or "").splitlines():
        if (section := _SECTION.match(line)) is not None:
            inside, depth = section[1] in ("Args", "Arguments", "Parameters"), 0
        elif inside and line.strip():
            match = _PARAMETER.match(line)
            indent = len(line) - len(line.lstrip())
            if match is not None and (not depth or indent <= depth):
                depth, name = indent, match["name"]
                lines[name] = [match["text"]]
            elif not indent:
                inside = False
            elif name:
                lines[name].append(line.strip())
    return {name: _plain(" ".join(text).strip()) for name, text in lines.items()}


def _plain(text: str) -> str:
    without_roles = _ROLE.sub(lambda match: match[1].rsplit(".", 1)[-1], text)
    return _LINK.sub(r"\1", without_roles).replace("``", "").replace("`", "")
