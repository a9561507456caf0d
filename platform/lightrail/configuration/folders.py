"""Where configuration files lie, found without importing anything."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

from lightrail.catalogue.distributions import environment
from lightrail.catalogue.plugin import CONF_GROUP
from lightrail.errors import ConfigurationError

__all__ = ["configuration_folders", "own_folder", "yaml_groups", "yaml_options"]


def own_folder() -> str:
    """The folder ``conf`` of lightrail: inside the installed package, or beside the source roots of a checkout."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    installed = os.path.join(package, "conf")
    return installed if os.path.isdir(installed) else os.path.join(os.path.dirname(os.path.dirname(package)), "conf")


def configuration_folders(config_dirs: Sequence[str | os.PathLike[str]] = ()) -> list[str]:
    """The folders that are searched, first match first: the user's, lightrail's own, those of other distributions.

    Args:
        config_dirs: The user's own.

    Raises:
        ConfigurationError: One of the user's does not exist.
    """
    for folder in config_dirs:
        if not os.path.isdir(folder):
            raise ConfigurationError(
                "a folder of configuration files does not exist",
                found=os.fspath(folder),
                allowed="a folder laid out as conf/: experiment/NAME.yaml, trainer/NAME.yaml, …",
                remedy="Check the path after --config-dir.",
            )
    entries = [entry for each in environment().distributions for entry in each.entries if entry.group == CONF_GROUP]
    others = [folder for entry in entries if (folder := _package_folder(entry.value)) is not None]
    return [*(os.path.abspath(folder) for folder in config_dirs), own_folder(), *others]


def _package_folder(package: str) -> str | None:
    """The folder of a package; only its outermost part is looked up, so that no code of it runs."""
    top, *rest = package.replace(":", ".").split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        if os.path.isdir(folder := os.path.join(place, *rest)):
            return folder
    return None


def yaml_groups(folders: Sequence[str]) -> set[str]:
    """The groups that the folders hold, nested ones with a slash."""
    return {
        os.path.relpath(path, folder).replace(os.sep, "/")
        for folder in folders
        for path, _, files in os.walk(folder)
        if path != folder and any(file.endswith(".yaml") for file in files)
    }


def yaml_options(folders: Sequence[str], group: str) -> list[str]:
    """The options of one group that the folders hold, sorted."""
    found = set()
    for folder in folders:
        place = os.path.join(folder, *group.split("/"))
        if os.path.isdir(place):
            found.update(file.removesuffix(".yaml") for file in os.listdir(place) if file.endswith(".yaml"))
    return sorted(found)
