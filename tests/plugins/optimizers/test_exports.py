"""What the package exports, what type checkers read, and what is registered are one list."""

from __future__ import annotations

import importlib
import re
from importlib.metadata import entry_points
from pathlib import Path

import lightrail_optimizers


def test_the_stub_names_what_is_exported() -> None:
    stub = Path(lightrail_optimizers.__file__).with_suffix(".pyi").read_text()
    homes = {name: home for home, name in re.findall(r"from (\S+) import (\w+) as \2", stub)}
    assert sorted(homes) == list(lightrail_optimizers.__all__)
    for name, home in homes.items():
        assert getattr(lightrail_optimizers, name) is getattr(importlib.import_module(home), name)


def test_every_registered_class_is_exported() -> None:
    for kind in ("optimizer", "transform"):
        for point in entry_points(group=f"lightrail.{kind}"):
            if point.module.startswith("lightrail_optimizers."):
                assert point.attr in lightrail_optimizers.__all__


def test_every_class_says_its_rule() -> None:
    for name in lightrail_optimizers.__all__:
        assert getattr(lightrail_optimizers, name).traits.rule


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(lightrail_optimizers, "Nothing")
