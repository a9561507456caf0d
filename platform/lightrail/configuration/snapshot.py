"""What a command's configuration is by default, kept on disk, so that help and completion need not start Hydra."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightrail.catalogue.distributions import environment
from lightrail.catalogue.schema import Schema
from lightrail.catalogue.schema_cache import Source, read_schemas
from lightrail.catalogue.stamps import stamped, unchanged
from lightrail.catalogue.storage import read_entries, write_entries
from lightrail.configuration.defaults import in_order, with_defaults
from lightrail.configuration.folders import configuration_folders

__all__ = ["Snapshot", "snapshot"]


@dataclass(frozen=True)
class Snapshot:
    """A composed configuration as plain values.

    Args:
        config: What was set in files; a plugin's node lacks the defaults of its signature.
        sources: Where the schema of each chosen plugin comes from, by the path of its node.
        groups: The groups of the command, plugins and YAML alike.
        folders: Where configurations lie.
    """

    config: dict[str, Any]
    sources: dict[str, Source]
    groups: tuple[str, ...]
    folders: tuple[str, ...]

    def schemas(self) -> dict[str, Schema]:
        """The schema of each chosen plugin that is not broken, by path; read without importing one here."""
        read = read_schemas(list(self.sources.values()))
        found = {path: read[source] for path, source in self.sources.items()}
        return {path: schema for path, schema in found.items() if isinstance(schema, Schema)}

    def filled(self) -> dict[str, Any]:
        """The whole configuration, with the defaults of signatures."""
        schemas = self.schemas()
        config = dict(self.config)
        for path, source in self.sources.items():
            kind, _, name = path.partition(".")
            written = config[kind][name] if name else config[kind]
            node = with_defaults(written, source.target, schemas.get(path))
            config[kind] = {**config[kind], name: node} if name else node
        return in_order(config)


def snapshot(
    config_name: str, overrides: Sequence[str] = (), config_dirs: Sequence[str | os.PathLike[str]] = ()
) -> Snapshot:
    """The configuration of a command line, composed again only when a file or what is installed has changed.

    Args:
        config_name: The primary configuration.
        overrides: What is chosen on top of it.
        config_dirs: The user's own folders of configurations.
    """
    folders = configuration_folders(config_dirs)
    key, form = json.dumps([config_name, list(overrides), folders]), _form()
    entries = read_entries("defaults", form)
    entry = entries.get(key)
    if not _is_fresh(entry):
        stamps = stamped(_yaml_files(folders))
        entry = {**_compose(config_name, overrides, folders), "files": stamps, "environment": environment().digest}
        write_entries("defaults", form, {**_few(entries), key: entry})
    assert entry is not None
    sources = {path: Source(*fields) for path, fields in entry["sources"].items()}
    return Snapshot(entry["config"], sources, tuple(entry["groups"]), tuple(folders))


def _few(entries: dict[str, Any]) -> dict[str, Any]:
    # Completion asks for many command lines; the latest are the likeliest to come again.
    return dict(list(entries.items())[-30:])


def _is_fresh(entry: Mapping[str, Any] | None) -> bool:
    try:
        return entry is not None and entry["environment"] == environment().digest and unchanged(entry["files"])
    except (KeyError, TypeError, AttributeError):
        return False


def _form() -> str:
    """Changes whenever this package would compose the same files differently."""
    here = os.path.dirname(__file__)
    return json.dumps(list(stamped(os.path.join(here, file) for file in os.listdir(here)).values()))


def _yaml_files(folders: Sequence[str]) -> list[str]:
    """The folders, which change when a file comes or goes, and the files in them."""
    return [
        each
        for folder in folders
        for path, _, files in os.walk(folder)
        for each in (path, *(os.path.join(path, file) for file in files if file.endswith(".yaml")))
    ]


def _compose(config_name: str, overrides: Sequence[str], folders: Sequence[str]) -> dict[str, Any]:
    from omegaconf import OmegaConf

    from lightrail.configuration.composing import compose_with_hydra
    from lightrail.configuration.picks import picks_of
    from lightrail.configuration.sources import current_hydra
    from lightrail.kinds import KINDS

    with current_hydra():
        composed = compose_with_hydra(list(overrides), config_name, folders)
        picks = picks_of(composed, is_preview=True)
    config = OmegaConf.to_container(composed.config, resolve=False)
    assert isinstance(config, dict)
    empty = {kind: {} if KINDS[kind].many else None for kind in KINDS if kind in composed.layout.groups}
    sources = {pick.path: pick.plugin.source if pick.plugin else Source.typed(pick.kind, pick.target) for pick in picks}
    return {
        "config": {**empty, **{str(key): value for key, value in config.items()}},
        "sources": {path: [each.kind, each.target, each.origin, each.location] for path, each in sources.items()},
        "groups": sorted(composed.layout.groups),
    }
