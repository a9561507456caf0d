"""The command line, rewritten so that each token means the same whichever operator was typed.

Hydra tells apart ``group=x`` (the group stands in the defaults list), ``+group=x`` (it does not), ``key=v`` (the key
exists) and ``+key=v`` (it does not). Nobody should have to know which is the case.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightrail.errors import ConfigurationError, closest
from lightrail.kinds import KINDS

__all__ = ["Layout", "Token", "node_name", "normalise"]

_TOKEN = re.compile(r"(?P<operator>\+\+|\+|~)?(?P<key>[^=+~][^=]*?)(?:=(?P<value>.*))?", re.DOTALL)
_DOTTED = re.compile(r"""(?P<quote>["']?)(?P<path>[A-Za-z_]\w*(\.[A-Za-z_]\w*)+)(?P=quote)""")
_NOTHING = ("null", "none")


@dataclass(frozen=True)
class Layout:
    """What the command line may name.

    Args:
        command: ``train`` or ``generate``.
        groups: Every group of which one chooses an option by name.
        chosen: Those among them that stand in the defaults list.
        roots: The words that a key may begin with, beside the groups.
    """

    command: str
    groups: frozenset[str]
    chosen: frozenset[str]
    roots: frozenset[str]


@dataclass(frozen=True)
class Token:
    """One token of the command line in its parts; ``value`` is ``None`` without an equals sign."""

    operator: str
    key: str
    value: str | None

    @classmethod
    def parse(cls, text: str) -> Token:
        match = _TOKEN.fullmatch(text)
        if match is None or (match["value"] is None and match["operator"] != "~"):
            raise ConfigurationError(
                f"'{text}' is not an override",
                found=text or "an empty word",
                allowed="key=value, group=name, ~key; +key=value is the same as key=value",
                remedy="Put an equals sign between the key and its value, without spaces around it.",
            )
        return cls(match["operator"] or "", match["key"], match["value"])

    def __str__(self) -> str:
        return f"{self.operator}{self.key}" + ("" if self.value is None else f"={self.value}")

    @property
    def group(self) -> str:
        """The key as a group would be named: without its package."""
        return self.key.partition("@")[0]


def normalise(tokens: Iterable[str], layout: Layout) -> list[str]:
    """Rewrites a command line; doing it twice changes nothing.

    Args:
        tokens: As typed, without options that begin with a dash.
        layout: What they may name.

    Raises:
        ConfigurationError: A token is not an override, or names no known kind, group or key.

    Example:
        >>> layout = Layout("train", frozenset({"optimizer", "task"}), frozenset({"optimizer"}), frozenset({"seed"}))
        >>> normalise(["+optimizer=sophia", "optimizer.lr=0.1", "++seed=3", "task._target_=mine.Task"], layout)
        ['optimizer=sophia', '++optimizer.lr=0.1', '++seed=3', '+task=mine.Task']
    """
    parsed = [_outside(Token.parse(text)) for text in tokens]
    return [str(token) for token in _last_choices([_rewritten(token, layout) for token in parsed], layout)]


def _outside(token: Token) -> Token:
    """``federated.partition.alpha`` is ``partition.alpha``: a kind within another has a place of its own."""
    root, _, rest = token.key.partition(".")
    part = rest.partition(".")[0]
    is_within = part in KINDS and KINDS[part].within == root
    return Token(token.operator, rest, token.value) if is_within else token


def _rewritten(token: Token, layout: Layout) -> Token:
    if token.group in layout.groups and not (token.value or "").startswith("{"):
        return _choice(token, layout)
    root, _, rest = token.key.partition(".")
    _check_root(root, token, layout)
    if token.operator == "~":
        return token
    kind = KINDS.get(root)
    if rest == "_target_" and kind is not None and not kind.many and (match := _DOTTED.fullmatch(token.value or "")):
        return _choice(Token("", root, match["path"]), layout)
    return Token("++", token.key, token.value)


def _choice(token: Token, layout: Layout) -> Token:
    if "@" in token.key:
        return token
    operator = "" if token.group in layout.chosen else "+"
    kind = KINDS.get(token.group)
    deletes = token.operator == "~" or (token.value or "").lower() in _NOTHING
    if not deletes:
        return Token(operator, token.key, token.value)
    if kind is not None and kind.many:
        # Hydra can delete one choice from the defaults list, but not a list of them.
        return Token(operator, token.key, "[]")
    return Token("~", token.key, None)


def _last_choices(tokens: Sequence[Token], layout: Layout) -> list[Token]:
    """The last choice of each group alone: Hydra takes two as a contradiction, or the deletion as the stronger."""
    last = {token.key: place for place, token in enumerate(tokens) if _chooses(token, layout)}
    kept = [token for place, token in enumerate(tokens) if not _chooses(token, layout) or last[token.key] == place]
    # A group that nothing chooses by default has nothing to delete.
    return [token for token in kept if not (token.operator == "~" and token.key in layout.groups - layout.chosen)]


def _chooses(token: Token, layout: Layout) -> bool:
    return token.key in layout.groups and not (token.value or "").startswith("{")


def _check_root(root: str, token: Token, layout: Layout) -> None:
    if root in layout.groups | layout.roots:
        return
    known = sorted(layout.groups | layout.roots)
    if root in KINDS:
        commands = " and ".join(f"`{command}`" for command in KINDS[root].commands)
        hint = f"{root} belongs to {commands}. "
    else:
        hint = closest(root, known)
    what = "kind, group or key" if token.key == root else "kind or group"
    raise ConfigurationError(
        f"there is no {what} '{root}'",
        found=str(token),
        allowed=", ".join(known),
        remedy=f"{hint}`{layout.command} --help` shows all of them.",
    )


def node_name(option: str) -> str:
    """The name under which an option of a many-kind keeps its own options.

    Example:
        >>> node_name("theirs:sam"), node_name("mine.Sign"), node_name("sam")
        ('sam', 'Sign', 'sam')
    """
    return option.rpartition(":")[2].rpartition(".")[2]
