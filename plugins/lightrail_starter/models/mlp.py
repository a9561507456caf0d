"""A multilayer perceptron."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn

from lightrail.options import at_least, between
from lightrail.traits import Traits
from lightrail_starter.models.activations import activation_named
from lightrail_starter.models.sizes import known

__all__ = ["MLP"]


class MLP(nn.Module):
    """Fully connected layers over a flattened input.

    Args:
        in_features: Numbers a sample, after flattening; known from the data where none is given.
        out_features: Outputs: classes, or regression targets; known from the data where none is given.
        hidden: The width of each hidden layer; an empty list makes the model linear.
        activation: ``relu``, ``gelu``, ``silu`` or ``tanh``.
        dropout: Probability with which a hidden unit is dropped, in [0, 1).

    Example:
        >>> import torch
        >>> MLP(in_features=64, out_features=10, hidden=[32])(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    traits: ClassVar[Traits] = Traits(example={"hidden": [16]})

    def __init__(
        self,
        in_features: int | None = None,
        out_features: int | None = None,
        hidden: list[int] | None = None,
        activation: Literal["relu", "gelu", "silu", "tanh"] = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [64, 64] if hidden is None else list(hidden)
        first, last = known(in_features=in_features, out_features=out_features)
        for width in widths:
            at_least(1, hidden=width)
        between(0, 1, dropout=dropout)
        layers: list[nn.Module] = []
        for fan_in, width in zip([first, *widths], widths, strict=False):
            layers += [nn.Linear(fan_in, width), activation_named(activation)]
            if dropout:
                layers.append(nn.Dropout(dropout))
        self.layers = nn.Sequential(*layers, nn.Linear([first, *widths][-1], last))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, ...]`` to ``[B, out_features]``."""
        return self.layers(x.flatten(1))
