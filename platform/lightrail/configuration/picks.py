"""Which plugin stands at each place of a composed configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightrail.catalogue.plugin import Plugin, available, find, schema_at
from lightrail.catalogue.schema import Schema
from lightrail.catalogue.signature import schema_of
from lightrail.catalogue.target import import_target
from lightrail.configuration.command_line import Token, node_name
from lightrail.configuration.composing import Composed
from lightrail.errors import ConfigurationError
from lightrail.kinds import KINDS

__all__ = ["Pick", "picks_of"]


@dataclass(frozen=True)
class Pick:
    """A chosen plugin.

    Args:
        kind: Its kind.
        name: What was typed to choose it; the target where no name was.
        path: Where its options stand.
        target: The class or function, as ``module.Class``.
        plugin: The installed plugin; ``None`` for a bare target.
        explicit: Whether it is more than the untouched default of the primary configuration.
        schema: What it accepts; ``None`` in a preview.
    """

    kind: str
    name: str
    path: str
    target: str
    plugin: Plugin | None
    explicit: bool
    schema: Schema | None


def picks_of(composed: Composed, *, is_preview: bool = False) -> list[Pick]:
    """The chosen plugins, by kind, in the order in which they act.

    Args:
        composed: What Hydra composed.
        is_preview: Whether schemas are left out, so that no plugin is imported.

    Raises:
        PluginError: A plugin is broken.
        ConfigurationError: Options are set for a plugin that is not chosen.
    """
    picks = []
    for kind in KINDS.values():
        node = composed.config.get(kind.name)
        if kind.name not in composed.layout.groups or node is None:
            continue
        if not isinstance(node, DictConfig):
            raise _not_a_node(kind.name, node)
        for path, part in _places(kind.name, kind.many, node, composed):
            option = next((name for _, name, place in composed.options if place == path), None)
            picks.append(_pick(kind.name, path, part, option, composed, is_preview))
    return picks


def _places(kind: str, many: bool, node: DictConfig, composed: Composed) -> list[tuple[str, DictConfig]]:
    """Path and node of each plugin of one kind: those of the defaults list in its order, then those added by target."""
    if not many:
        return [(kind, node)] if len(node) else []
    listed = [path.partition(".")[2] for of, _, path in composed.options if of == kind]
    names = [name for name in listed if name in node] + [str(name) for name in node if name not in listed]
    places = []
    for name in names:
        if not isinstance(node[name], DictConfig):
            raise _not_a_node(f"{kind}.{name}", node[name])
        places.append((f"{kind}.{name}", node[name]))
    return places


def _pick(kind: str, path: str, node: DictConfig, option: str | None, composed: Composed, is_preview: bool) -> Pick:
    target = _target(kind, path, node, composed)
    plugin = _plugin(kind, option, target, composed)
    is_named = option is not None and (plugin is not None or option == target)
    name = (option or "") if is_named else target
    if KINDS[kind].many and not is_named:
        name = path.partition(".")[2]
    explicit = _is_explicit(kind, path, option, target, plugin, composed)
    schema = None if is_preview else _schema(kind, target, plugin)
    return Pick(kind, name, path, target, plugin, explicit, schema)


def _schema(kind: str, target: str, plugin: Plugin | None) -> Schema:
    if plugin is None:
        # Typed paths depend on the folder that one is in, so that a cache could answer for another folder's module.
        return schema_of(kind, target, import_target(target))
    plugin.check_extras()
    return schema_at(plugin.source, in_process=True, plugin=plugin)


def _plugin(kind: str, option: str | None, target: str, composed: Composed) -> Plugin | None:
    """The installed plugin behind an option, unless a target was written over it."""
    name = composed.plugin_of.get((kind, option or ""), "")
    if not name or name.rpartition(":")[2] not in available(kind):
        return None
    plugin = find(kind, name)
    return plugin if plugin.target == target else None


def _is_explicit(
    kind: str, path: str, option: str | None, target: str, plugin: Plugin | None, composed: Composed
) -> bool:
    default = composed.defaults.get(kind)
    defaults = default if isinstance(default, list) else [default]
    tokens = [Token.parse(each) for each in composed.overrides]
    touched = any(token.group == kind or token.key == path or token.key.startswith(f"{path}.") for token in tokens)
    return touched or option not in defaults or (plugin is None and option != target)


def _target(kind: str, path: str, node: DictConfig, composed: Composed) -> str:
    try:
        target = node.get("_target_")
    except OmegaConfBaseException as error:
        raise ConfigurationError(
            f"{path}._target_ cannot be resolved",
            found=str(error).splitlines()[0],
            allowed="module.Class",
            remedy="Write the path of the class itself.",
        ) from error
    if isinstance(target, str):
        return target
    key = next((str(key) for key in node), "")
    origin = composed.bodies.origin(f"{path}.{key}", composed.overrides)
    name = path.rpartition(".")[2]
    if KINDS[kind].many:
        names = available(kind)
        suggestion = name if name in names else "NAME"
        raise ConfigurationError(
            f"{kind} '{name}' has options but is not chosen",
            found=f"{path}.{key}={_short(node, key)} in {origin}",
            allowed=f"options of a {kind} that is chosen; installed: {', '.join(names) or 'none'}",
            remedy=f"Choose it: '+{kind}=[{suggestion}]'.",
        )
    raise ConfigurationError(
        f"{kind} has options, but no {kind} is chosen",
        found=f"{path}.{key}={_short(node, key)} in {origin}",
        allowed=f"options of a {kind} that is chosen; installed: {', '.join(available(kind)) or 'none'}",
        remedy=f"Choose one: {kind}=NAME.",
    )


def _short(node: DictConfig, key: str) -> Any:
    return OmegaConf.to_container(node, resolve=False).get(key) if key else "{}"  # type: ignore[union-attr]


def _not_a_node(path: str, value: Any) -> ConfigurationError:
    kind, _, name = path.partition(".")
    option = f"{kind}.{node_name(name)}.KEY" if name else f"{kind}.KEY"
    shown = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return ConfigurationError(
        f"{path} is not a plugin with its options",
        found=f"{path}={shown}",
        allowed=f"a name: {', '.join(available(kind))}",
        remedy=f"Choose with {kind}=NAME, and set options with {option}=VALUE.",
    )
