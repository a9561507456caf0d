"""Conformance of compressors: a vector arrives, as near as they say, and lies are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightrail.federated.compressor import Compressor
from lightrail.testing.building import built, check_is_documented, refuses_unknown_options
from lightrail.testing.suite import Check, NonConformance, NotApplicable, Suite, known_exceptions, name_of, require

__all__ = ["CompressorSuite"]

Options = Mapping[str, Any]
SIZES = (1, 2, 17)
DRAWS = 1000


def _vector(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64).to(dtype)


def _drawn(compressor: Compressor, x: Tensor, draws: int) -> Tensor:
    """C(x) so many times, ``[draws, d]`` in float64."""
    generator = torch.Generator().manual_seed(3)
    return torch.stack([compressor.compress(x, generator).decoded() for _ in range(draws)]).double()


def check_builds_from_options(plugin: Any, options: Options) -> None:
    """``plugin(**options)`` is a compressor that encodes and decodes, and says what kind it is."""
    compressor = built(plugin, options)
    require(isinstance(compressor, Compressor), f"it is no Compressor but {type(compressor).__name__}")
    for name in ("is_unbiased", "is_contractive"):
        require(isinstance(getattr(compressor, name, None), bool), f"{name} is neither true nor false")
    for name in ("encode", "decode"):
        require(getattr(plugin, name) is not getattr(Compressor, name), f"it does not override {name}")


def check_rejects_unknown_options(plugin: Any, options: Options) -> None:
    """An option that the signature lacks is an error."""
    built(plugin, options)
    refuses_unknown_options(plugin, options)


def check_carries_a_vector(plugin: Any, options: Options) -> None:
    """What arrives has the size and the type of what was sent, which is left as it was; zeros stay zeros."""
    compressor = built(plugin, options)
    for size in SIZES:
        for dtype in (torch.float32, torch.float64):
            x = _vector(size, dtype)
            before = x.clone()
            encoded = compressor.compress(x, torch.Generator().manual_seed(0))
            found, where = encoded.decoded(), f"of {size} entries of {dtype}"
            require(torch.equal(x, before), f"encoding changes the vector {where}")
            require(all(part.device.type == "cpu" for part in encoded.parts.values()), "a part is not on the processor")
            require(
                found.shape == x.shape and found.dtype == dtype, f"{where} arrive {found.dtype} {list(found.shape)}"
            )
            require(bool(found.isfinite().all()), f"{where} some arrive that are not finite")
            zeros = compressor.compress(torch.zeros_like(x), torch.Generator().manual_seed(0)).decoded()
            require(not zeros.any(), f"of {size} zeros something else arrives")


def check_draws_from_its_generator(plugin: Any, options: Options) -> None:
    """The same generator gives the same message, and torch's own is left alone."""
    compressor, x, state = built(plugin, options), _vector(17), torch.get_rng_state()
    first, second = (compressor.encode(x, torch.Generator().manual_seed(9)) for _ in range(2))
    same = first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    require(same, "the same generator gives another message")
    require(torch.equal(torch.get_rng_state(), state), "it draws from torch's own generator")


def check_has_the_right_mean(plugin: Any, options: Options) -> None:
    """Where it is unbiased, the mean of 1000 draws is x within five standard errors, and their variance within ω."""
    compressor = built(plugin, options)
    if not compressor.is_unbiased:
        raise NotApplicable("it is not unbiased")
    for size in (1, 8):
        x = _vector(size).double()
        found = _drawn(compressor, x.float(), DRAWS)
        error = (found.mean(0) - x).abs()
        allowed = 5 * found.std(0) / DRAWS**0.5 + 1e-6
        require(bool((error <= allowed).all()), f"the mean of {DRAWS} draws is off by {float(error.max()):.3g}")
        squares = (found - x).square().sum(1)
        most = compressor.variance(size) * float(x.square().sum()) + 5 * float(squares.std()) / DRAWS**0.5 + 1e-6
        require(float(squares.mean()) <= most, f"E ‖C(x) - x‖² is {float(squares.mean()):.3g}, above {most:.3g}")


def check_contracts(plugin: Any, options: Options) -> None:
    """Where it is contractive, the mean of ‖C(x) − x‖² is at most (1 − δ)‖x‖², with δ in (0, 1]."""
    compressor = built(plugin, options)
    if not compressor.is_contractive:
        raise NotApplicable("it is not contractive")
    for size in SIZES:
        delta = compressor.contraction(size)
        require(0 < delta <= 1, f"its contraction for {size} entries is {delta}")
        for x in (_vector(size), _vector(size) ** 5, torch.ones(size), torch.eye(size)[0]):
            squares = (_drawn(compressor, x.clone(), 100) - x).square().sum(1)
            most = (1 - delta) * float(x.double().square().sum()) + 5 * float(squares.std()) / 100**0.5 + 1e-6
            require(float(squares.mean()) <= most, f"E ‖C(x) - x‖² is {float(squares.mean()):.3g}, above {most:.3g}")


def check_refuses_lies(plugin: Any, options: Options) -> None:
    """A part that is missing, too short, or holds what is no number is refused with a ValueError."""
    compressor, size = built(plugin, options), 17
    parts = compressor.encode(_vector(size), torch.Generator().manual_seed(0))
    for name, part in parts.items():
        lies = {
            f"without '{name}'": {key: value for key, value in parts.items() if key != name},
            f"with '{name}' shortened": {**parts, name: part.flatten()[:-1]},
        }
        if part.is_floating_point():
            lies[f"with '{name}' of NaN"] = {**parts, name: torch.full_like(part, torch.nan)}
        for what, lie in lies.items():
            try:
                compressor.decode(lie, size, torch.float32)
            except ValueError:
                continue
            except Exception as error:
                raise NonConformance(
                    f"a message {what} is refused with {type(error).__name__}, not ValueError"
                ) from error
            raise NonConformance(f"a message {what} is decoded")


CHECKS: tuple[Check, ...] = (
    check_is_documented,
    check_builds_from_options,
    check_rejects_unknown_options,
    check_carries_a_vector,
    check_draws_from_its_generator,
    check_has_the_right_mean,
    check_contracts,
    check_refuses_lies,
)


class CompressorSuite(Suite):
    """Every check of a compressor."""

    kind: ClassVar[str] = "compressor"
    checks: ClassVar[tuple[Check, ...]] = (*CHECKS, known_exceptions(frozenset(map(name_of, CHECKS))))
