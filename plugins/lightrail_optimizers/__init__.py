"""Optimizers and gradient transforms."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightrail_optimizers.clip_norm import ClipNorm
    from lightrail_optimizers.coordinate_clip import CoordinateClip
    from lightrail_optimizers.lbfgs import LBFGS
    from lightrail_optimizers.lion import Lion
    from lightrail_optimizers.muon import Muon
    from lightrail_optimizers.sam import SAM
    from lightrail_optimizers.sophia import SophiaG, SophiaH

__all__ = ["LBFGS", "SAM", "ClipNorm", "CoordinateClip", "Lion", "Muon", "SophiaG", "SophiaH"]

_HOMES = {
    "ClipNorm": "clip_norm",
    "CoordinateClip": "coordinate_clip",
    "LBFGS": "lbfgs",
    "Lion": "lion",
    "Muon": "muon",
    "SAM": "sam",
    "SophiaG": "sophia",
    "SophiaH": "sophia",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
