"""How much wider each parameter is than in a base model, and what the maximal update parametrization makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightrail.errors import CompositionError

__all__ = [
    "Width",
    "Widths",
    "initial_factor",
    "is_constant",
    "learning_rate_factor",
    "target_deviation",
    "widths_beside",
    "widths_by_ratio",
]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_MATRIX = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_EMBEDDING = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class Width:
    """A parameter's fan-in and fan-out, each over that of the same parameter in the base model.

    Args:
        fan_in: m_in; 1 for a bias, a gain or an embedding, whose input has one entry that is not zero.
        fan_out: m_out; 1 for a layer whose output is not wide, as the model's last.
    """

    fan_in: float = 1.0
    fan_out: float = 1.0


def target_deviation(width: Width) -> float:
    """The standard deviation of the first weights, over that in the base model.

    ``1/sqrt(m_in)`` for what reads a wide layer and writes one, ``1/m_in`` for what reads one and writes none, else 1.

    Example:
        >>> target_deviation(Width(4, 4)), target_deviation(Width(4, 1)), target_deviation(Width(1, 4))
        (0.5, 0.25, 1.0)
    """
    return 1 / width.fan_in if width.fan_out == 1 else width.fan_in**-0.5


def learning_rate_factor(width: Width, scales_with_gradient: bool) -> float:
    """The learning rate, over that in the base model: ``m_out / m_in`` for SGD, ``1 / m_in`` for Adam.

    Example:
        >>> learning_rate_factor(Width(4, 4), True), learning_rate_factor(Width(4, 4), False)
        (1.0, 0.25)
    """
    return (width.fan_out if scales_with_gradient else 1.0) / width.fan_in


def initial_factor(width: Width, p: Tensor, base: Tensor | None) -> float:
    """What fresh weights are to be multiplied by, so that their deviation is ``target_deviation`` times the base's.

    How a model draws its weights shows in the root mean squares of the two: a deviation that is the same at every
    width, or falls as ``fan_in^-1/2`` or ``fan_out^-1/2``, whichever is nearest. Where none is within a fifth, the
    root mean squares themselves decide.

    Args:
        width: Of the parameter.
        p: The weights.
        base: Those of the base model; ``None`` for the first two laws as PyTorch has them: ``fan_in^-1/2``.

    Example:
        >>> wide, base = torch.arange(1.0, 257.0), torch.arange(1.0, 257.0)
        >>> initial_factor(Width(4, 4), wide / 2, base), initial_factor(Width(4, 4), wide, base)
        (1.0, 0.5)
    """
    target = target_deviation(width)
    if base is None:
        return target * width.fan_in**0.5
    ours, theirs = _root_mean_square(p), _root_mean_square(base)
    if width == Width() or not ours or not theirs:
        return 1.0
    found = ours / theirs
    laws = (1.0, width.fan_in**-0.5, width.fan_out**-0.5)
    nearest = min(laws, key=lambda law: abs(math.log(law / found)))
    return target / (nearest if abs(math.log(nearest / found)) < 0.2 else found)


def _root_mean_square(t: Tensor) -> float:
    return float(t.detach().double().square().mean().sqrt()) if t.numel() else 0.0


@dataclass(frozen=True)
class Widths:
    """What is known of a model's widths.

    Args:
        of: Each parameter's.
        base: Each parameter in the base model, where there is one.
        biases: Those of linear layers and convolutions, with m_in of their layer.
        readouts: Layers whose weight is an embedding's as well, with their m_in.
    """

    of: dict[Tensor, Width] = field(default_factory=dict)
    base: dict[Tensor, Tensor] = field(default_factory=dict)
    biases: dict[Tensor, float] = field(default_factory=dict)
    readouts: list[tuple[nn.Module, float]] = field(default_factory=list)


@dataclass(frozen=True)
class _Place:
    """Where a parameter stands: its full name there, its layer, and its name in that layer."""

    name: str
    p: nn.Parameter
    layer: nn.Module
    kind: str

    @property
    def is_matrix(self) -> bool:
        return isinstance(self.layer, _MATRIX)


def _places(model: nn.Module) -> Iterator[_Place]:
    for prefix, layer in model.named_modules():
        if isinstance(layer, nn.utils.parametrize.ParametrizationList):
            raise CompositionError(
                f"the width of '{prefix}' cannot be told",
                found="a weight that a parametrization computes",
                allowed="layers whose weights are parameters",
                remedy="Remove the parametrization, or leave mup out.",
            )
        for kind, p in layer.named_parameters(recurse=False):
            yield _Place(f"{prefix}.{kind}" if prefix else kind, p, layer, kind)


def widths_beside(model: nn.Module, base: nn.Module) -> Widths:
    """The widths of a model beside a base model whose parameters have the same names.

    An axis is wide where its length differs from that in the base model.

    Raises:
        CompositionError: A parameter has another number of axes than in the base model, or wide ones beyond a fan-in
            and a fan-out.
    """
    theirs = dict(base.named_parameters(remove_duplicate=False))

    def width_at(place: _Place) -> Width:
        p, q = place.p, theirs[place.name]
        width = _width(place, _ratios(p, q)) if p.dim() == q.dim() else None
        if width is None:
            raise CompositionError(
                f"the width of '{place.name}' cannot be told",
                found=f"{tuple(p.shape)}, and {tuple(q.shape)} in the base model",
                allowed="parameters that differ from the base model's in their fan-in and fan-out alone",
                remedy="Change only widths between the two models: not the sizes of kernels, vocabularies or contexts.",
            )
        return width

    found = _assembled(list(_places(model)), width_at)
    found.base.update({place.p: theirs[place.name] for place in _places(model)})
    return found


def _ratios(p: Tensor, q: Tensor) -> list[float]:
    return [a / b if b else 1.0 for a, b in zip(p.shape, q.shape, strict=True)]


def _width(place: _Place, ratios: Sequence[float]) -> Width | None:
    """The fans among a parameter's axes; ``None`` where another axis is wide."""
    wide = [axis for axis, ratio in enumerate(ratios) if ratio != 1]
    if place.is_matrix and place.kind == "weight":
        fan_in, fan_out = (0, 1) if isinstance(place.layer, _TRANSPOSED) else (1, 0)
        return Width(ratios[fan_in], ratios[fan_out]) if set(wide) <= {0, 1} else None
    if isinstance(place.layer, _EMBEDDING):
        return Width(1.0, ratios[1]) if set(wide) <= {1} else None
    # By convention, as in recurrent layers: what is written comes first, what is read last.
    if len(wide) <= 1:
        return Width(1.0, ratios[wide[0]] if wide else 1.0)
    return Width(ratios[wide[-1]], ratios[wide[0]]) if len(wide) == 2 else None


def widths_by_ratio(model: nn.Module, m: float) -> Widths:
    """The widths of a model of linear layers, convolutions, embeddings and norms, all m times wider than some base.

    In the order in which they were registered, the first layer reads what is not wide, and the last writes it.

    Raises:
        CompositionError: There are not two such layers, or another one has weights.
    """
    places = list(_places(model))
    layers = list({id(e.layer): e.layer for e in places if isinstance(e.layer, (*_MATRIX, *_EMBEDDING))}.values())
    if len(layers) < 2:
        raise CompositionError(
            "mup found no hidden layer",
            found=f"{len(layers)} linear layers, convolutions and embeddings in {type(model).__name__}",
            allowed="a first and a last layer at least, with a width between them",
            remedy="Leave mup out, or set transform.mup.base in place of ratio.",
        )

    def width_at(place: _Place) -> Width:
        m_in, m_out = (1.0 if place.layer is end else m for end in (layers[0], layers[-1]))
        if place.is_matrix and place.kind == "weight":
            return Width(m_in, m_out)
        if place.p.numel() == 1 or place.is_matrix:
            return Width(1.0, m_out if place.is_matrix else 1.0)
        if place.p.dim() == 1 or isinstance(place.layer, _EMBEDDING):
            return Width(1.0, m)
        raise CompositionError(
            f"the width of '{place.name}' cannot be told",
            found=f"a weight of shape {tuple(place.p.shape)} in {type(place.layer).__name__}, and a ratio",
            allowed="linear layers, convolutions, embeddings and norms",
            remedy="Set transform.mup.base in place of ratio.",
        )

    return _assembled(places, width_at)


def _assembled(places: Sequence[_Place], width_at: Callable[[_Place], Width]) -> Widths:
    found = Widths()
    embeddings = {place.p for place in places if isinstance(place.layer, _EMBEDDING)}
    for place in places:
        width = width_at(place)
        if place.is_matrix and place.kind == "weight" and place.p in embeddings:
            found.readouts.append((place.layer, width.fan_in))
        else:
            found.of.setdefault(place.p, width)
        bias = getattr(place.layer, "bias", None)
        if place.is_matrix and place.kind == "weight" and bias is not None:
            found.biases.setdefault(bias, width.fan_in)
    return found


def is_constant(p: Tensor) -> bool:
    """Whether all entries are the same, as those of a bias that begins at zero."""
    return p.numel() == 0 or bool(torch.eq(p.min(), p.max()))
