"""What a run is made of: versions, plugins, commit, seed. Written beside every run and into every checkpoint."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lightrail import __version__
from lightrail.configuration import Composition, fingerprint
from lightrail.errors import CheckpointError

__all__ = ["check_lock", "lock_of"]

# A change of these makes the saved state meaningless; of others it only changes how the run goes on.
_SHAPING_KINDS = ("task", "model", "optimizer", "transform", "privacy", "federated")


def lock_of(composition: Composition, command: str = "train") -> dict[str, Any]:
    """The lock of a composition: plain values only.

    Args:
        composition: What was composed.
        command: The command that was typed.
    """
    return {
        "core": __version__,
        "python": platform.python_version(),
        "torch": version("torch"),
        "lightning": version("lightning"),
        "git": _git(Path.cwd()),
        "seed": composition.config.seed,
        "command": command_of(composition.overrides, command),
        "overrides": list(composition.overrides),
        "config": fingerprint(composition.config),
        "plugins": [
            {
                "kind": chosen.kind,
                "name": chosen.name,
                "target": chosen.target,
                "distribution": chosen.plugin.distribution if chosen.plugin else None,
                "version": chosen.plugin.version if chosen.plugin else None,
                "options": _plain(chosen.options),
            }
            for chosen in composition.chosen
        ],
    }


def command_of(overrides: Sequence[str], command: str = "train") -> str:
    """The command that makes this run again, quoted for a shell."""
    return shlex.join([command, *(o.removeprefix("++") for o in overrides)])


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.create(dict(options)), resolve=True)  # type: ignore[return-value]


def _git(folder: Path) -> dict[str, Any] | None:
    """The commit that the user's folder is at; git is asked only where there is a repository."""
    if not any((parent / ".git").exists() for parent in (folder, *folder.parents)):
        return None

    def ask(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=5, check=True
        ).stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def check_lock(saved: Mapping[str, Any], current: Mapping[str, Any], *, accept_changes: bool) -> list[str]:
    """Compares what a run was made of with what would continue it.

    Args:
        saved: The lock of the run that is resumed.
        current: The lock of the composition that resumes it.
        accept_changes: Whether other versions of the same plugins are accepted.

    Returns:
        The differences that were accepted, one sentence each.

    Raises:
        CheckpointError: Other plugins, or other versions of them that were not accepted.
    """
    before = {(p["kind"], p["name"]): p for p in saved["plugins"]}
    now = {(p["kind"], p["name"]): p for p in current["plugins"]}
    shaping_before = [p["target"] for key, p in before.items() if key[0] in _SHAPING_KINDS]
    shaping_now = [p["target"] for key, p in now.items() if key[0] in _SHAPING_KINDS]
    if shaping_before != shaping_now:
        raise CheckpointError(
            "the run was made of other plugins than those that would continue it",
            found=", ".join(shaping_now),
            allowed=", ".join(shaping_before),
            remedy="Resume without choosing another task, model, optimizer or transform; or start a new run.",
        )
    changes = [
        f"{kind} '{name}' was {_named(before[kind, name])} and is {_named(p)}"
        for (kind, name), p in now.items()
        if (kind, name) in before and _named(before[kind, name]) != _named(p)
    ]
    if saved["core"] != current["core"]:
        changes.append(f"lightrail was {saved['core']} and is {current['core']}")
    if changes and not accept_changes:
        raise CheckpointError(
            "plugins have changed since the run was saved",
            found="; ".join(changes),
            allowed="the versions that the run was made with",
            remedy="Install those versions again, or accept the change with run.accept_changes=true.",
        )
    changes += [
        f"{kind} '{name}': {option} was {p_before['options'].get(option)} and is {p['options'].get(option)}"
        for (kind, name), p in now.items()
        if (p_before := before.get((kind, name))) is not None
        for option in sorted({*p_before["options"], *p["options"]})
        if p_before["options"].get(option) != p["options"].get(option)
    ]
    return changes


def _named(plugin: Mapping[str, Any]) -> str:
    return f"{plugin['distribution']} {plugin['version']}" if plugin["distribution"] else plugin["target"]


def python_command() -> list[str]:
    """How to start `train` in a process of its own, in this very environment."""
    return [sys.executable, "-m", "lightrail.train"]
