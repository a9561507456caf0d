"""Evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["evaluating"]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, the module is in evaluation mode; on the way out each part is as it was."""
    training = [each for each in module.modules() if each.training] if module.training else []
    for each in training:
        each.training = False
    try:
        yield
    finally:
        for each in training:
            each.training = True
