"""Tiny diffusers pipelines on disk, made once for the tests of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent)]


@pytest.fixture(scope="session")
def pipeline_folders(tmp_path_factory):
    """The folder of each pipeline, by name."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from tiny_pipelines import BUILDERS

    found = {}
    for build in BUILDERS:
        torch.manual_seed(0)
        found[build.__name__] = tmp_path_factory.mktemp(build.__name__)
        build().save_pretrained(found[build.__name__])
    return found
