"""Conformance of measurements: linear, with the adjoint that they say they have, each sample apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightrail.errors import UserError
from lightrail.generation import Measurement, Noise
from lightrail.testing.building import built, check_is_documented, refuses_unknown_options
from lightrail.testing.solver_runs import require_near
from lightrail.testing.suite import Check, Suite, known_exceptions, name_of, require

__all__ = ["MeasurementSuite"]

Options = Mapping[str, Any]
SHAPES = ((1, 8, 8), (3, 16, 12), (2,), (6,))


def _prepared(plugin: Any, options: Options) -> Iterator[tuple[Measurement, tuple[int, ...]]]:
    """It, and each shape of a sample that it does not refuse."""
    made = 0
    for shape in SHAPES:
        measurement = built(plugin, options)
        try:
            measurement.prepare(shape)
        except UserError:
            continue
        made += 1
        yield measurement, shape
    require(made, f"it refuses samples of every shape: {SHAPES}")


def _drawn(shape: tuple[int, ...], count: int = 3, seed: int = 0) -> Tensor:
    return Noise(seed, range(count), shape, torch.float64).normal(0)


def check_builds_from_options(plugin: Any, options: Options) -> None:
    """``plugin(**options)`` is a lightrail.Measurement."""
    measurement = built(plugin, options)
    require(isinstance(measurement, Measurement), f"it is no lightrail.Measurement but {type(measurement).__name__}")


def check_rejects_unknown_options(plugin: Any, options: Options) -> None:
    """An option that the signature lacks is an error."""
    refuses_unknown_options(plugin, options)


def check_is_linear(plugin: Any, options: Options) -> None:
    """A (2 x − 3 z) = 2 A x − 3 A z."""
    for measurement, shape in _prepared(plugin, options):
        x, z = _drawn(shape), _drawn(shape, seed=1)
        expected = 2 * measurement.apply(x) - 3 * measurement.apply(z)
        require_near(measurement.apply(2 * x - 3 * z), expected, f"for samples of shape {shape} it is not linear")


def check_has_its_adjoint(plugin: Any, options: Options) -> None:
    """⟨A x, y⟩ = ⟨x, Aᵀ y⟩."""
    for measurement, shape in _prepared(plugin, options):
        measurement.check_adjoint(shape)


def check_has_its_pseudo_inverse(plugin: Any, options: Options) -> None:
    """A A⁺ A = A, and A⁺ y is in the range of Aᵀ."""
    for measurement, shape in _prepared(plugin, options):
        y = measurement.apply(_drawn(shape))
        found = measurement.pseudo_inverse(y)
        require(found.shape == (3, *shape), f"A⁺ gives samples of shape {tuple(found.shape[1:])}, not {shape}")
        require_near(measurement.apply(found), y, f"for samples of shape {shape} A A⁺ A is not A", 1e-6)
        # Adding what A does not see can only make a sample longer.
        z = _drawn(shape, seed=2)
        unseen = z - measurement.pseudo_inverse(measurement.apply(z))
        dot = float((unseen * found).sum().abs() / (z.norm() * found.norm()))
        require(dot < 1e-5, f"for samples of shape {shape} A⁺ y holds what A does not see")


def check_treats_samples_apart(plugin: Any, options: Options) -> None:
    """What is measured of a sample, noise and all, is the same alone and beside others."""
    for measurement, shape in _prepared(plugin, options):
        measurement.noise = 0.3
        x = _drawn(shape)
        together = measurement.observe(x, Noise(5, range(3), shape, torch.float64))
        alone = measurement.observe(x[1:2], Noise(5, [1], shape, torch.float64))
        require_near(alone, together[1:2], "alone a sample is measured otherwise than beside others")


def check_keeps_the_type(plugin: Any, options: Options) -> None:
    """Of float32 samples float32 numbers are measured, and a gradient goes through."""
    for measurement, shape in _prepared(plugin, options):
        x = _drawn(shape).float().requires_grad_()
        y = measurement.apply(x)
        require(y.dtype == torch.float32, f"of float32 samples {y.dtype} is measured")
        y.square().sum().backward()
        require(x.grad is not None, "no gradient goes through it")


def check_has_a_picture(plugin: Any, options: Options) -> None:
    """What was measured can be shown as samples are."""
    for measurement, shape in _prepared(plugin, options):
        shown = measurement.picture(measurement.apply(_drawn(shape)))
        require(len(shown) == 3 and shown.ndim == len(shape) + 1, f"the picture has the shape {tuple(shown.shape)}")
        require(bool(shown.isfinite().all()), "the picture holds numbers that are not finite")


CHECKS: tuple[Check, ...] = (
    check_is_documented,
    check_builds_from_options,
    check_rejects_unknown_options,
    check_is_linear,
    check_has_its_adjoint,
    check_has_its_pseudo_inverse,
    check_treats_samples_apart,
    check_keeps_the_type,
    check_has_a_picture,
)


class MeasurementSuite(Suite):
    """Every check of a measurement."""

    kind: ClassVar[str] = "measurement"
    checks: ClassVar[tuple[Check, ...]] = (*CHECKS, known_exceptions(frozenset(map(name_of, CHECKS))))
