"""The help of a command: what can be chosen, and the configuration that it starts from."""

from __future__ import annotations

import json
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from lightrail.catalogue.forms import shown
from lightrail.catalogue.plugin import available
from lightrail.configuration.folders import yaml_options
from lightrail.configuration.snapshot import Snapshot, snapshot
from lightrail.kinds import KINDS

__all__ = ["as_yaml", "help_text", "options_of_group"]

_USAGE = {
    "train": """\
Usage: train [-m] [--config-dir FOLDER] [KIND=NAME | KEY=VALUE]…

  train                                    the default below
  train optimizer=NAME                     another optimizer, nothing else changed; +optimizer=NAME means the same
  train optimizer=NAME optimizer.KEY=VALUE an option of it
  train '+transform=[NAME,NAME]'           several of one kind, in this order
  train task._target_=mine.Task            your own class in place of an installed one
  train -m optimizer=NAME,NAME seed=1,2    one run for each combination
  train --cfg …                            show the whole configuration and do nothing
""",
    "generate": """\
Usage: generate [run=FOLDER|latest | denoiser=NAME] [KIND=NAME | KEY=VALUE]…

  generate run=latest                                 samples of the newest run, by a sampler that suits it
  generate run=latest +sampler=NAME sampler.steps=10  another sampler
  generate run=latest generate.label=3                samples of one class
  generate run=latest generate.prompt="…"             text, from the run of a language model
  generate denoiser=gaussian_mixture +sampler=NAME    the exact test bed, with the sampler's error
  generate denoiser=diffusers denoiser.path=FOLDER    a pipeline on disk
  generate run.resume=latest                          go on with a generation that was interrupted
  generate --cfg …                                    show the whole configuration and do nothing
""",
    "search": """\
Usage: lightrail search NAME [run=FOLDER|latest | denoiser=NAME] [KIND=NAME | KEY=VALUE]…

  lightrail search autodiffusion run=latest +sampler=ddim sampler.steps=5  the best times for five steps
  lightrail search usf run=latest +sampler=unipc sampler.steps=5           times, and how each step is solved
  lightrail search dc_ratios run=latest +sampler=unipc sampler.steps=5     ratios of DC-Solver
  lightrail search ems run=latest +sampler=dpm_solver_v3                   statistics for dpm_solver_v3
  lightrail search NAME … search.KEY=VALUE     an option of the search
  lightrail search NAME … search.to=FILE.json  where its file goes; the run's folder searched/ by default
  lightrail search NAME … --cfg                show the whole configuration and do nothing
""",
}


def help_text(config_name: str = "train", config_dirs: Sequence[str | os.PathLike[str]] = ()) -> str:
    """What ``--help`` prints; no plugin is imported for it.

    Args:
        config_name: The command.
        config_dirs: The user's own folders of configurations.
    """
    found = snapshot(config_name, config_dirs=config_dirs)
    kinds = [each for each in KINDS if each in found.groups]
    others = [each for each in found.groups if each not in KINDS]
    blocks = [
        _USAGE.get(config_name, f"Usage: {config_name} [KIND=NAME | KEY=VALUE]…\n"),
        "Installed plugins, by kind (`lightrail plugins NAME` describes one)",
        "\n".join(_line(group, found) for group in kinds),
    ]
    if others:
        blocks += ["\nGroups of settings", "\n".join(_line(group, found) for group in others)]
    blocks += ["\nThe default configuration (KEY=VALUE changes any line)", as_yaml(found.filled(), indent=2)]
    return "\n".join(blocks)


def options_of_group(group: str, found: Snapshot) -> list[str]:
    """The names that a group offers: installed plugins, and files of YAML."""
    return sorted({*(available(group) if group in KINDS else ()), *yaml_options(found.folders, group)})


def _line(group: str, found: Snapshot) -> str:
    names = ", ".join(options_of_group(group, found)) or "none"
    return textwrap.fill(names, width=100, initial_indent=f"  {group:<16}", subsequent_indent=" " * 18)


def as_yaml(config: Mapping[str, Any], indent: int = 0) -> str:
    """Plain values as YAML; starting a YAML library takes longer than the rest of the help.

    Example:
        >>> print(as_yaml({"a": {"b": [1, 2.5], "c": None}, "d": "x: y"}))
        a:
          b: [1, 2.5]
          c: null
        d: "x: y"
    """
    lines = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{' ' * indent}{key}:", as_yaml(value, indent + 2)]
        else:
            lines.append(f"{' ' * indent}{key}: {_scalar(value)}")
    return "\n".join(lines)


def _scalar(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_scalar(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_scalar, value))}]"
    if isinstance(value, str):
        is_plain = re.fullmatch(r"[A-Za-z_/.][\w./${}-]*", value) and value.lower() not in _YAML_WORDS
        return value if is_plain else json.dumps(value, ensure_ascii=False)
    if isinstance(value, float):
        return {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(str(value), str(value))
    return shown(value)


_YAML_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "~", "none"}
