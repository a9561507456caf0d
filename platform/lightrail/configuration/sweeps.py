"""Several runs from one command line: ``optimizer=adamw,sophia seed=1,2`` is four."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any

from lightrail.configuration.command_line import Token
from lightrail.errors import ConfigurationError
from lightrail.kinds import KINDS

__all__ = ["GroupOptions", "is_sweep", "sweep"]


def is_sweep(overrides: Sequence[str]) -> bool:
    """Whether a command line gives a key several values.

    Example:
        >>> is_sweep(["seed=1,2"]), is_sweep(["optimizer.betas=[0.9,0.99]"])
        (True, False)
    """
    from lightrail.configuration.composing import parse

    # Only these characters can make a sweep; the parser need not start for anything else.
    candidates = [each for each in overrides if {",", "("} & set(each.partition("=")[2])]
    return any(each.is_sweep_override() for each in parse(candidates))


def sweep(overrides: Sequence[str], *, config_dirs: Sequence[str | os.PathLike[str]] = ()) -> list[list[str]]:
    """The command line of each run, the last key varying fastest.

    Args:
        overrides: With ``a,b``, ``choice(…)``, ``range(…)`` or ``glob(…)`` over the options of a group.
        config_dirs: The user's own folders of configurations.

    Raises:
        ConfigurationError: A sweep that cannot be counted, such as ``interval(…)``.

    Example:
        >>> sweep(["optimizer=adamw,sgd", "+seed=1,2", "run.root=out"])[1]
        ['optimizer=adamw', '+seed=2', 'run.root=out']
    """
    from lightrail.configuration.composing import parse

    values: dict[str, list[str]] = {}
    for text, override in zip(overrides, parse(overrides, GroupOptions(config_dirs)), strict=True):
        token = Token.parse(text)
        if not override.is_sweep_override():
            expanded = [text]
        elif override.is_discrete_sweep():
            expanded = [f"{token.operator}{token.key}={value}" for value in override.sweep_string_iterator()]
        else:
            raise ConfigurationError(
                f"'{token.key}' sweeps over an interval, which has no end of values",
                found=text,
                allowed="a,b,c · choice(a,b) · range(start,stop,step) · glob(pattern)",
                remedy="Name the values, use range, or let a method search the interval: add sweep=optuna.",
            )
        # A key that is given twice counts once, where it stood first, with its last value.
        values[token.key] = expanded
    return [list(job) for job in itertools.product(*values.values())]


class GroupOptions:
    """What Hydra's parser asks for the options behind a ``glob``.

    Args:
        config_dirs: The user's own folders of configurations.
    """

    def __init__(self, config_dirs: Sequence[str | os.PathLike[str]]) -> None:
        self._config_dirs = config_dirs

    def get_group_options(self, group_name: str, *_: Any, **__: Any) -> list[str]:
        from lightrail.catalogue.plugin import available
        from lightrail.configuration.folders import configuration_folders, yaml_options

        names = set(yaml_options(configuration_folders(self._config_dirs), group_name))
        return sorted(names | set(available(group_name) if group_name in KINDS else ()))
