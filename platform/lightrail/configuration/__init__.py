"""Configuration: from a command line to a whole, checked configuration and the plugins that it chooses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightrail.configuration.composition import Chosen, Composition, compose, fingerprint
from lightrail.configuration.help import help_text
from lightrail.configuration.sweeps import is_sweep, sweep

if TYPE_CHECKING:
    from omegaconf import DictConfig

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


def check_trainer_options(trainer: DictConfig) -> None:
    """Checks the keys of ``trainer`` that are Lightning's own against the signature of its Trainer.

    Args:
        trainer: The node ``trainer`` of a composed configuration.

    Raises:
        ConfigurationError: A key is neither lightrail's nor Lightning's, or has the wrong type.
    """
    # Lightning and Hydra are imported where they are needed, not where help is shown.
    from lightrail.configuration.checks import check_trainer_options as check

    check(trainer)
