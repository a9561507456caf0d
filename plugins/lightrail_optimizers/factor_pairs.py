"""Which parameters are factors of a product, told by their names and shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from lightrail.errors import ConfigurationError

__all__ = ["Factor", "checked_pairs", "find_factors"]

# Whole words of a dotted name, except for adapters, which put more after it.
_PAIRS = (
    ("*lora_B*", "*lora_A*"),
    ("*lora_embedding_B*", "*lora_embedding_A*"),
    ("left", "right"),
    ("*.left", "*.right"),
    ("U", "V"),
    ("*.U", "*.V"),
)


class Factor(NamedTuple):
    """A parameter [rows, k] that is a factor and the factor beside it; ``turned`` where k is the first axis."""

    p: Tensor
    turned: bool
    other: Tensor
    other_turned: bool


def checked_pairs(pairs: Iterable[Sequence[str]] | None) -> list[tuple[str, str]]:
    """Pairs of patterns; ``None`` for those of adapters and of plain factors.

    Raises:
        ConfigurationError: An entry does not name two different factors.
    """
    found = []
    for pair in _PAIRS if pairs is None else pairs:
        if len(pair) != 2 or pair[0].count("*") != pair[1].count("*") or pair[0] == pair[1]:
            raise ConfigurationError(
                "an entry of pairs does not name two factors",
                found=f"pairs entry {list(pair)}",
                allowed="two different patterns with equally many *",
                remedy="Write it like ['*lora_B*', '*lora_A*'].",
            )
        found.append((pair[0], pair[1]))
    return found


def find_factors(
    named: Sequence[tuple[str, Tensor]], pairs: Sequence[tuple[str, str]], symmetric: Sequence[str], product: str
) -> list[Factor]:
    """Every factor: both of each pair, then single ones.

    Args:
        named: ``(name, parameter)`` pairs.
        pairs: Patterns for left and right; ``*`` must stand for the same text in both names.
        symmetric: Patterns of single factors; parameters with one axis are none.
        product: ``LR``, ``LRt`` or ``auto``, as for :class:`ScaledGD`.

    Raises:
        ConfigurationError: The shapes of a pair do not fit.

    Example:
        >>> import torch
        >>> b, a = torch.zeros(5, 2), torch.zeros(2, 3)
        >>> factors = find_factors([("q.lora_A", a), ("q.lora_B", b)], [("*lora_B", "*lora_A")], [], "auto")
        >>> [(tuple(factor.p.shape), factor.turned) for factor in factors]
        [((5, 2), False), ((2, 3), True)]
    """
    factors: list[Factor] = []
    taken: set[Tensor] = set()
    for left, right in pairs:
        rights = {stem: (name, p) for name, p in named if (stem := _under_wildcards(right, name)) is not None}
        for name, p in named:
            stem = _under_wildcards(left, name)
            if stem is None or stem not in rights or p in taken or rights[stem][1] in taken:
                continue
            other_name, other = rights[stem]
            turned = _is_turned(name, p, other_name, other, product)
            factors += [Factor(p, False, other, turned), Factor(other, turned, p, False)]
            taken |= {p, other}
    for name, p in named:
        is_single = any(_under_wildcards(pattern, name) is not None for pattern in symmetric)
        if is_single and p.ndim >= 2 and p not in taken:
            factors.append(Factor(p, False, p, False))
    return factors


def _under_wildcards(pattern: str, name: str) -> tuple[str, ...] | None:
    """What each ``*`` of the pattern stands for; ``None`` where the name does not match."""
    match = re.fullmatch("(.*)".join(map(re.escape, pattern.split("*"))), name)
    return None if match is None else match.groups()


def _is_turned(left_name: str, left: Tensor, right_name: str, right: Tensor, product: str) -> bool:
    """Whether the right factor is [k, n] rather than [n, k]."""
    fits = {"LR": False, "LRt": False}
    if left.ndim >= 2 and right.ndim >= 2:
        k = left.flatten(1).shape[1]
        fits = {"LR": right.shape[0] == k, "LRt": right.flatten(1).shape[1] == k}
    choices = [word for word, fit in fits.items() if fit and product in ("auto", word)]
    if len(choices) == 1:
        return choices[0] == "LR"
    raise ConfigurationError(
        "the shapes of a pair do not " + ("tell which product it forms" if choices else "fit a product"),
        found=f"{left_name} {tuple(left.shape)} and {right_name} {tuple(right.shape)}, product={product}",
        allowed="[m, k] with [k, n] (product=LR), or with [n, k] (product=LRt)",
        remedy="Set optimizer.product=LR or LRt." if choices else "Name other factors in optimizer.pairs.",
    )
