"""Optimizers and gradient transforms; a class is imported when it is first asked for."""

from __future__ import annotations

import importlib
from typing import Any

# `__init__.pyi` says the same to type checkers.
_CLASSES_BY_MODULE = {
    "adamp": ("AdamP",),
    "block_coordinate": ("BlockCoordinate",),
    "cyclic_block": ("CyclicBlock", "VarianceReducedCyclicBlock"),
    "diffgrad": ("DiffGrad",),
    "dog": ("DoG", "LDoG"),
    "efcp_ggt": ("EFCPGGT",),
    "efcp_mfac": ("EFCPTopKMFAC", "EFCPLowRankMFAC"),
    "frugal": ("FrugalAdamW", "FrugalLion", "FrugalSGD"),
    "grams": ("Grams",),
    "lbfgs": ("LBFGS",),
    "lion": ("Lion",),
    "mars": ("MARS", "MARSLion", "MARSShampoo"),
    "mfac": ("MFAC",),
    "multi_momentum": ("MultiMomentum",),
    "muon": ("Muon",),
    "normalized_gd": ("NormalizedGD",),
    "oasis": ("OASIS",),
    "optimistic_adam": ("OptimisticAdam",),
    "optimistic_omd": ("OptimisticOMD",),
    "optimistic_sgd": ("OptimisticSGD",),
    "osd": ("OSDAdamW", "OSDSGD", "OSDLion"),
    "past_extragradient": ("PastExtragradient",),
    "prodigy": ("Prodigy",),
    "psgd_diag": ("PSGDDiag",),
    "psgd_lra": ("PSGDLRA",),
    "psgd_xmat": ("PSGDXMat",),
    "psps": ("PSPS", "PSPSL1", "PSPSL2"),
    "riemannian_adagrad": ("RiemannianAdagrad",),
    "riemannian_adam": ("RiemannianAdam", "RiemannianAMSGrad"),
    "riemannian_sgd": ("RiemannianSGD",),
    "rs_sgdm": ("RandomlyScaledSGDM",),
    "saddle_free_newton": ("SaddleFreeNewton",),
    "scaled_gd": ("ScaledGD",),
    "schedule_free_adamw": ("ScheduleFreeAdamW",),
    "sgdp": ("SGDP",),
    "smb": ("SMB",),
    "soap": ("SOAP",),
    "sophia": ("SophiaG", "SophiaH"),
    "spider": ("Spider",),
    "transforms.agc": ("AGC",),
    "transforms.cagrad": ("CAGrad",),
    "transforms.centralize": ("Centralize",),
    "transforms.clip_norm": ("ClipNorm",),
    "transforms.clip_value": ("ClipValue",),
    "transforms.coordinate_clip": ("CoordinateClip",),
    "transforms.cvar": ("CVaR",),
    "transforms.entropy_sgd": ("EntropySGD",),
    "transforms.fad": ("FAD",),
    "transforms.gam": ("GAM",),
    "transforms.gradient_regularization": ("GradientRegularization",),
    "transforms.invariance_augmentation": ("InvarianceAugmentation",),
    "transforms.lookahead": ("Lookahead",),
    "transforms.mgda": ("MGDA",),
    "transforms.mup": ("MuP",),
    "transforms.orthogonal_conv": ("OrthogonalConv",),
    "transforms.orthogonal_pair": ("OrthogonalPair",),
    "transforms.pcgrad": ("PCGrad",),
    "transforms.perp_grad": ("PerpGrad",),
    "transforms.primal_dual": ("PrimalDual",),
    "transforms.random_scaling": ("RandomScaling",),
    "transforms.sam": ("SAM",),
    "transforms.sdat": ("SDAT",),
    "transforms.sso": ("SSO",),
    "transforms.upgrad": ("UPGrad", "IWRM"),
    "transforms.vat": ("VAT",),
    "transforms.vrgd": ("VRGD",),
}
_HOMES = {name: module for module, names in _CLASSES_BY_MODULE.items() for name in names}

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
