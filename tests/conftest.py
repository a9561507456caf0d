"""Modules that tests share lie beside them, and the cache of signatures is the tests' own."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent / folder) for folder in ("core", "packaging")]
os.environ.setdefault("LIGHTRAIL_CACHE", tempfile.mkdtemp(prefix="lightrail-cache-"))
