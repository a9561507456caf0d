"""Modules that tests share lie beside them, the cache of signatures is the tests' own, and seeding is quick."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A machine that does other things as well stands still for seconds, which says nothing about a test.
settings.register_profile("lightrail", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("lightrail")

sys.path[:0] = [str(Path(__file__).parent / folder) for folder in ("core", "packaging")]
# Begun first, so that no process is left alone with one of them at the end.
LONG = (
    "test_readme_long.py",
    "test_readme.py",
    "test_chaos.py",
    "test_conformance.py",
    "test_sharding.py",
    "test_submission.py",
    "test_sweep.py",
    "test_processes.py",
    "test_torchrun.py",
    "test_third_party.py",
    "test_kill.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


os.environ.setdefault("LIGHTRAIL_CACHE", tempfile.mkdtemp(prefix="lightrail-cache-"))


@pytest.fixture(scope="session", autouse=True)
def _seeding_is_quick() -> None:
    """Without a device, ``torch.manual_seed`` keeps each seed for later with the whole stack: milliseconds a call."""
    torch = pytest.importorskip("torch")
    for device in ("cuda", "xpu", "mtia"):
        backend = getattr(torch, device, None)
        if backend is not None and not backend.is_available():
            backend.manual_seed_all = lambda seed: None
