"""The installed plugins: which there are, what state they are in, and the loading of the one that is named."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lightrail.catalogue.distributions import Distribution, Entry, Environment, environment, normalised, requirements
from lightrail.catalogue.schema import Schema
from lightrail.catalogue.schema_cache import Source, read_schemas
from lightrail.catalogue.target import import_target
from lightrail.errors import PluginError, closest
from lightrail.kinds import KINDS

__all__ = ["Plugin", "available", "find", "load", "plugins", "registered", "schema_at", "unknown_plugin"]

# Distributions register folders of YAML in this group; they are no plugins.
CONF_GROUP = "conf"


@dataclass(frozen=True)
class Plugin:
    """One entry point of one kind.

    Args:
        kind: Its kind.
        name: What one types.
        value: What the entry point names, as ``module:Class``.
        distribution: The distribution that registers it.
        version: Of that distribution.
        extras: The extras that it needs.
        location: The metadata folder of the distribution.
        state: ``ready``, ``broken`` or ``duplicate``.
        reason: Why it is not ready.
        install: The command that would make it ready, where one would.
    """

    kind: str
    name: str
    value: str
    distribution: str
    version: str
    extras: tuple[str, ...] = ()
    location: str = field(default="", repr=False)
    state: str = "ready"
    reason: str = ""
    install: str = ""
    known: Schema | None = field(default=None, repr=False, compare=False)

    @property
    def target(self) -> str:
        """What it names, as ``module.Class``."""
        return self.value.replace(":", ".")

    @property
    def source(self) -> Source:
        return Source(self.kind, self.target, f"{self.distribution} {self.version} {self.value}", self.location)

    @property
    def schema(self) -> Schema:
        """Its options and its card.

        Raises:
            PluginError: It is broken.
        """
        return self.known or schema_at(self.source, plugin=self)

    @property
    def summary(self) -> str:
        """The first sentence of its docstring; empty for a broken one."""
        try:
            return self.schema.summary
        except PluginError:
            return ""

    def load(self) -> Any:
        """The class or function.

        Raises:
            PluginError: It is broken, or an extra that it needs is missing; the cause is chained.
        """
        self.check_extras()
        try:
            return import_target(self.target)
        except PluginError as error:
            raise _broken(self, error.found) from (error.__cause__ or error)

    def check_extras(self) -> None:
        """Refuses a plugin whose extra is not installed, and names the extra."""
        if lacking := _lacking(self):
            raise PluginError(
                f"{self.kind} '{self.name}' needs an extra that is not installed",
                found=f"no {', '.join(lacking)}",
                allowed=f"{self.distribution} with the extra {', '.join(self.extras)}",
                remedy=f"Run `{_extra_command(self)}`.",
            )


def _lacking(plugin: Plugin) -> list[str]:
    installed = environment().names
    return [each for extra in plugin.extras for each in requirements(plugin.location, extra) if each not in installed]


def _extra_command(plugin: Plugin) -> str:
    return f"pip install '{plugin.distribution}[{','.join(plugin.extras)}]'"


def _broken(plugin: Plugin, reason: str) -> PluginError:
    return PluginError(
        f"{plugin.kind} '{plugin.name}' cannot be loaded",
        found=reason,
        allowed=f"a plugin of {plugin.distribution} {plugin.version} that imports without an error",
        remedy=f"Mend or reinstall {plugin.distribution}; `lightrail plugins {plugin.name}` shows its state.",
    )


def registered(kind: str | None = None) -> list[Plugin]:
    """What is installed, by kind and name, from metadata alone."""
    return [plugin for plugin in _registered_in(environment()) if kind is None or plugin.kind == kind]


@functools.lru_cache(maxsize=2)
def _registered_in(installed: Environment) -> tuple[Plugin, ...]:
    found = [
        _record(entry, each) for each in installed.distributions for entry in each.entries if entry.group != CONF_GROUP
    ]
    order = {kind: place for place, kind in enumerate(KINDS)}
    found.sort(key=lambda plugin: (order.get(plugin.kind, len(order)), plugin.kind, plugin.name, plugin.distribution))
    claims: dict[tuple[str, str], list[str]] = {}
    for plugin in found:
        claims.setdefault((plugin.kind, plugin.name), []).append(plugin.distribution)
    return tuple(_with_claims(plugin, claims[plugin.kind, plugin.name]) for plugin in found)


def _record(entry: Entry, by: Distribution) -> Plugin:
    plugin = Plugin(entry.group, entry.name, entry.value, by.name, by.version, entry.extras, by.location)
    if entry.group in KINDS:
        return plugin
    return dataclasses.replace(plugin, state="broken", reason=f"{closest(entry.group, KINDS)}There is no such kind.")


def _with_claims(plugin: Plugin, claims: Sequence[str]) -> Plugin:
    if len(claims) == 1:
        return plugin
    others = ", ".join(each for each in claims if each != plugin.distribution)
    reason = f"also registered by {others}; name it {plugin.distribution}:{plugin.name}"
    return dataclasses.replace(plugin, state="duplicate", reason=reason)


def plugins(kind: str | None = None, *, in_process: bool | None = None) -> list[Plugin]:
    """Every installed plugin with its state, its schema read.

    Args:
        kind: Only those of this kind.
        in_process: Whether plugins may be imported in this process to be read; ``None`` for where torch is already.
    """
    found = registered(kind)
    schemas = read_schemas([plugin.source for plugin in found if plugin.kind in KINDS], in_process=in_process)
    return [_with_schema(plugin, schemas[plugin.source]) if plugin.kind in KINDS else plugin for plugin in found]


def _with_schema(plugin: Plugin, schema: Schema | str) -> Plugin:
    known = schema if isinstance(schema, Schema) else None
    if lacking := _lacking(plugin):
        return dataclasses.replace(
            plugin, state="broken", reason=f"needs {', '.join(lacking)}", install=_extra_command(plugin), known=known
        )
    if isinstance(schema, str):
        return dataclasses.replace(plugin, state="broken", reason=schema)
    return dataclasses.replace(plugin, known=schema)


def schema_at(source: Source, *, in_process: bool | None = None, plugin: Plugin | None = None) -> Schema:
    """The schema of one plugin or of a path that the user typed.

    Args:
        source: Where it comes from.
        in_process: As in :func:`plugins`.
        plugin: The plugin that it is, for the error.

    Raises:
        PluginError: It cannot be imported, or cannot be a plugin of that kind; the cause is chained.
    """
    schema = read_schemas([source], in_process=in_process)[source]
    if isinstance(schema, Schema):
        return schema
    from lightrail.catalogue.signature import schema_of

    # Import it once more, here: the cause is then chained, and what was mended meanwhile is found.
    loaded = plugin.load() if plugin is not None else import_target(source.target)
    return schema_of(source.kind, source.target, loaded)


def available(kind: str) -> list[str]:
    """The names of the installed plugins of a kind, sorted; none is imported.

    Args:
        kind: One of :data:`lightrail.kinds.KINDS`.

    Raises:
        PluginError: There is no such kind.

    Example:
        >>> "adamw" in available("optimizer")
        True
    """
    _check_kind(kind)
    return sorted({plugin.name for plugin in registered(kind)})


def find(kind: str, name: str) -> Plugin:
    """The plugin of that name.

    Args:
        kind: Its kind.
        name: Its name, or ``distribution:name`` where two distributions register one.

    Raises:
        PluginError: None has that name, or two have.
    """
    _check_kind(kind)
    distribution, separator, bare = name.rpartition(":")
    found = [plugin for plugin in registered(kind) if plugin.name == bare]
    if separator:
        of_that = [plugin for plugin in found if normalised(plugin.distribution) == normalised(distribution)]
        if of_that:
            return dataclasses.replace(of_that[0], state="ready", reason="")
        raise unknown_plugin(kind, name, [*available(kind), *(f"{each.distribution}:{each.name}" for each in found)])
    if len(found) > 1:
        choices = [f"{plugin.distribution}:{plugin.name}" for plugin in found]
        raise PluginError(
            f"{kind} '{name}' is registered by {len(found)} distributions",
            found=", ".join(f"{plugin.distribution} {plugin.version}" for plugin in found),
            allowed=", ".join(choices),
            remedy=f"Say which: {kind}={choices[0]} or {kind}={choices[1]}, or uninstall one of them.",
        )
    if not found:
        raise unknown_plugin(kind, name, available(kind))
    return found[0]


def load(kind: str, name: str) -> Any:
    """The class or function of a plugin.

    Args:
        kind: Its kind.
        name: Its name, or ``distribution:name``.

    Raises:
        PluginError: It is unknown, duplicate or broken, or an extra is missing.

    Example:
        >>> load("optimizer", "adamw").__name__
        'AdamW'
    """
    return find(kind, name).load()


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise PluginError(
            f"there is no kind of plugin named '{kind}'",
            found=kind,
            allowed=", ".join(KINDS),
            remedy=f"{closest(kind, KINDS)}`lightrail plugins` lists what there is of each kind.",
        )


def unknown_plugin(kind: str, name: str, names: Sequence[str]) -> PluginError:
    """The error for a name that nothing has.

    Args:
        kind: The kind that was asked for.
        name: The name that was typed.
        names: The names that it could have been.
    """
    elsewhere = [plugin.kind for plugin in registered() if plugin.name == name and plugin.kind != kind]
    hint = closest(name, names)
    if elsewhere and not hint:
        hint = f"'{name}' is of the kind {elsewhere[0]}: write {elsewhere[0]}={name}. "
    return PluginError(
        f"{kind} '{name}' is not installed",
        found=name,
        allowed=", ".join(names) or "none is installed",
        remedy=f"{hint}If you have just added it, reinstall its package.",
    )
