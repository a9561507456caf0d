"""What the packaging tests share: the wheel, and one clean environment that it is installed into."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent)]

from clean_environment import CleanEnvironment, build_wheel, make_environment  # noqa: E402


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    return build_wheel(root, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> CleanEnvironment:
    """An environment with the wheel; a test that installs more takes it out again."""
    return make_environment(tmp_path_factory.mktemp("clean") / "environment", wheel)
