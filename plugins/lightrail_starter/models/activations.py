"""Activations by name."""

from __future__ import annotations

from torch import nn

from lightrail.options import one_of

__all__ = ["activation_named"]

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}


def activation_named(name: str) -> nn.Module:
    """A new activation layer: ``relu``, ``gelu``, ``silu`` or ``tanh``."""
    one_of(ACTIVATIONS, activation=name)
    return ACTIVATIONS[name]()
