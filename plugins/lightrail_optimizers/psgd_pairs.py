"""Pairs of a random direction v and the change h of the gradient along it, to which PSGD fits its preconditioner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightrail.step import Closure
from lightrail_optimizers.closure_answers import points_of
from lightrail_optimizers.flat_vector import clear_missing_, flatten, unflatten
from lightrail_optimizers.sophia_rule import draw_directions

__all__ = ["Pair", "Probe", "draw_probe", "exact_pairs", "finite_difference_pairs", "whitening_pair"]

Pair = tuple[Tensor, Tensor]

# How much of the direction is added to a gradient that stands for a product, relative to its mean magnitude.
_WHITENING_DAMPING = 2.0**-13


class Probe(NamedTuple):
    """Where one group is to be probed: its parameters, its gradient (of what is minimized) and a direction."""

    group: Mapping[str, Any]
    g: Tensor
    v: Tensor

    @property
    def params(self) -> Sequence[Tensor]:
        return self.group["params"]


def draw_probe(group: Mapping[str, Any], g: Tensor) -> Probe:
    """A Gaussian direction, zero for parameters without a gradient."""
    v = draw_directions([g], "gaussian")[0]
    clear_missing_(v, group["params"])
    return Probe(group, g, v)


def exact_pairs(closure: Closure, probes: Sequence[Probe]) -> list[Pair]:
    """``h = H v`` by differentiating twice: one product for all groups, along all directions at once."""
    by_parameter = _by_parameter(probes)
    answers = closure.hvp([by_parameter.get(p, torch.zeros_like(p)) for p in closure.params])
    return [(probe.v, _vector(probe, closure, answers)) for probe in probes]


def finite_difference_pairs(closure: Closure, probes: Sequence[Probe]) -> list[Pair]:
    """``h = (g(x + delta v) - g(x)) / delta``, delta the root of the precision of a parameter; v as it came out."""
    by_parameter = _by_parameter(probes)
    params = list(by_parameter)
    points = [p + _delta(p) * by_parameter[p] for p in params]
    # The rounding of x + delta v is no small part of delta v; so v is what separates the points, not what was drawn.
    taken = {p: (point - p) / _delta(p) for p, point in zip(params, points, strict=True)}
    with closure.at(points_of(closure, params, points)):
        _, there = closure.gradient()
    pairs = []
    for probe in probes:
        v = flatten([taken[p] for p in probe.params])
        delta = torch.cat([v.new_full((p.numel(),), _delta(p)) for p in probe.params])
        h = _vector(probe, closure, there).sub_(probe.g, alpha=-1 if probe.group["maximize"] else 1).div_(delta)
        clear_missing_(h, probe.params)
        pairs.append((v, h))
    return pairs


def whitening_pair(probe: Probe) -> Pair:
    """``h = g`` itself, and a little of v, so that no direction is without curvature."""
    mean = torch.linalg.vector_norm(probe.g, 1) / len(probe.g)
    return probe.v, torch.addcmul(probe.g, probe.v, mean, value=_WHITENING_DAMPING)


def _delta(p: Tensor) -> float:
    return torch.finfo(p.dtype).eps ** 0.5


def _by_parameter(probes: Sequence[Probe]) -> dict[Tensor, Tensor]:
    return {p: part for probe in probes for p, part in zip(probe.params, unflatten(probe.v, probe.params), strict=True)}


def _vector(probe: Probe, closure: Closure, answers: Sequence[Tensor]) -> Tensor:
    by_parameter: Mapping[Tensor, Any] = dict(zip(closure.params, answers, strict=True))
    return flatten([by_parameter[p] if p in by_parameter else torch.zeros_like(p) for p in probe.params])
