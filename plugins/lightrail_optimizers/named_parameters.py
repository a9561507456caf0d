"""Parameters that come with their names, for methods that treat hidden matrices and all else differently."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from lightrail.errors import ConfigurationError

__all__ = ["EMBEDDING_AND_OUTPUT_NAMES", "is_hidden_matrix", "named_groups"]

# Patterns in the manner of file names, for parts of a dotted name.
EMBEDDING_AND_OUTPUT_NAMES = (
    "embed*",
    "*embed",
    "*embedding",
    "*embeddings",
    "unembed*",
    "wte",
    "wpe",
    "head",
    "*_head",
    "classifier",
    "output",
)


def is_hidden_matrix(name: str, p: Tensor, adamw_names: Sequence[str] = EMBEDDING_AND_OUTPUT_NAMES) -> bool:
    """Whether a parameter is two-dimensional, and no part of its dotted name matches a pattern.

    Args:
        name: Dotted, as ``named_parameters`` gives it.
        p: The parameter.
        adamw_names: Patterns of names that stay with AdamW.

    Example:
        >>> import torch
        >>> weight = torch.zeros(4, 4)
        >>> is_hidden_matrix("blocks.0.attention.weight", weight), is_hidden_matrix("lm_head.weight", weight)
        (True, False)
    """
    words = [name, *name.split(".")]
    return p.ndim == 2 and not any(fnmatchcase(word, pattern) for word in words for pattern in adamw_names)


def named_groups(method: str, params: Iterable[Any]) -> list[dict[str, Any]]:
    """Groups whose ``params`` are lists of ``(name, parameter)`` pairs.

    Args:
        method: The optimizer's name, for errors.
        params: Such pairs, or groups of them.

    Raises:
        ConfigurationError: A parameter without a name.
    """
    items = list(params)
    groups = items if items and isinstance(items[0], Mapping) else [{"params": items}]
    groups = [{**group, "params": list(group["params"])} for group in groups]
    for group in groups:
        for pair in group["params"]:
            if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
                raise ConfigurationError(
                    f"{method} is built from named parameters",
                    found=f"a bare {type(pair).__name__}",
                    allowed="(name, parameter) pairs",
                    remedy="Pass model.named_parameters() in place of model.parameters().",
                )
    return groups
