"""Configuration: from a command line to a whole, checked configuration and the plugins that it chooses."""

from __future__ import annotations

from typing import Any

from lightrail.configuration.composition import Chosen, Composition, compose, fingerprint
from lightrail.configuration.help import help_text
from lightrail.configuration.sweeps import is_sweep, sweep

__all__ = [
    "Chosen",
    "Composition",
    "check_trainer_options",
    "compose",
    "fingerprint",
    "help_text",
    "is_sweep",
    "sweep",
]


def __getattr__(name: str) -> Any:
    # Hydra is imported where it is needed, not where help is shown.
    if name == "check_trainer_options":
        from lightrail.configuration.checks import check_trainer_options

        return check_trainer_options
    raise AttributeError(f"module 'lightrail.configuration' has no attribute '{name}'")
