"""Every example in a docstring runs."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from types import ModuleType

import pytest

PACKAGES = (
    "lightrail",
    "lightrail_starter",
    "lightrail_optimizers",
    "lightrail_schedules",
    "lightrail_privacy",
    "lightrail_federated",
    "lightrail_launch",
    "lightrail_sweeps",
)


def modules() -> list[str]:
    names = []
    for package in map(importlib.import_module, PACKAGES):
        names += [each.name for each in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
    return [name for name in names if not name.endswith("__main__")]


def has_examples(module: ModuleType) -> bool:
    return any(test.examples for test in doctest.DocTestFinder(exclude_empty=True).find(module))


@pytest.mark.parametrize("name", modules())
def test_examples(name: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    if has_examples(module):
        assert doctest.testmod(module).failed == 0
