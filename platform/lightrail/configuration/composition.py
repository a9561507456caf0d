"""What a command line means: the whole configuration, checked, and the plugins that it chooses."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightrail.catalogue.plugin import Plugin
from lightrail.kinds import KINDS

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = ["Chosen", "Composition", "compose", "fingerprint"]


@dataclass(frozen=True)
class Chosen:
    """One plugin that takes part.

    Args:
        kind: Its kind.
        name: What was typed to choose it; the target where no name was.
        path: Where its options stand: ``optimizer``, or ``transform.sam`` for a kind of which there can be many.
        target: The class or function, as ``module.Class``.
        plugin: The installed plugin; ``None`` for a bare target.
        explicit: Whether it is more than the untouched default of the primary configuration.
        options: Its options, defaults included, interpolations resolved.
    """

    kind: str
    name: str
    path: str
    target: str
    plugin: Plugin | None
    explicit: bool
    options: dict[str, Any]


@dataclass(frozen=True)
class Composition:
    """A composed and checked command line.

    Args:
        config: The whole configuration; interpolations stay until it is resolved.
        chosen: The plugins that take part, by kind, in order.
        overrides: The command line, normalised.
        notes: What was left out of the files that were named, one sentence each.
    """

    config: DictConfig
    chosen: tuple[Chosen, ...]
    overrides: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())


def compose(
    overrides: Sequence[str] = (),
    *,
    config_name: str = "train",
    config_dirs: Sequence[str | os.PathLike[str]] = (),
) -> Composition:
    """Composes a command line; safe to call again and again, in notebooks and inside programs that use Hydra.

    Args:
        overrides: As typed after the command.
        config_name: The primary configuration: ``train`` or ``generate``.
        config_dirs: The user's own folders of configurations, searched first.

    Raises:
        PluginError: A plugin is unknown, broken, registered twice, or lacks an extra.
        ConfigurationError: A key is unknown, or a value has the wrong type or lies out of its range.

    Example:
        >>> composition = compose(["+optimizer=sgd", "optimizer.lr=0.1"])
        >>> [each.name for each in composition.chosen if each.kind == "optimizer"], composition.config.optimizer.lr
        (['sgd'], 0.1)
    """
    from omegaconf import OmegaConf

    from lightrail.configuration.checks import check_composition
    from lightrail.configuration.composing import compose_with_hydra
    from lightrail.configuration.filling import filled
    from lightrail.configuration.folders import configuration_folders
    from lightrail.configuration.sources import current_hydra

    with current_hydra():
        composed = compose_with_hydra(list(overrides), config_name, configuration_folders(config_dirs))
        config, picks = filled(composed)
        check_composition(config, picks, composed)
    OmegaConf.set_struct(config, True)
    chosen = tuple(
        Chosen(
            kind=pick.kind,
            name=pick.name,
            path=pick.path,
            target=pick.target,
            plugin=pick.plugin,
            explicit=pick.explicit,
            options=_options(config, pick.path),
        )
        for pick in picks
    )
    return Composition(config, chosen, composed.overrides, tuple(composed.bodies.notes))


def _options(config: DictConfig, path: str) -> dict[str, Any]:
    from omegaconf import OmegaConf

    node = OmegaConf.to_container(OmegaConf.select(config, path), resolve=True)
    assert isinstance(node, dict)
    return {str(key): value for key, value in node.items() if key != "_target_"}


def fingerprint(config: DictConfig) -> str:
    """A digest of everything that shapes a run: equal where only ``run`` and ``launch`` differ.

    Args:
        config: A composed configuration.
    """
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    # Several plugins of a kind act in order, so their order counts; that of other keys does not.
    shaping = {
        str(key): [list(item) for item in value.items()] if _is_ordered(str(key), value) else value
        for key, value in plain.items()
        if key not in ("run", "launch")
    }
    return hashlib.sha256(json.dumps(shaping, sort_keys=True, default=str).encode()).hexdigest()


def _is_ordered(key: str, value: Any) -> bool:
    return key in KINDS and KINDS[key].many and isinstance(value, Mapping)
