"""Where Hydra finds configurations: folders of YAML, and the catalogue of plugins as a lazy source.

Hydra is asked through objects of our own, never through its global state, so that composing is reentrant and leaves a
Hydra program around it alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

from hydra._internal.config_repository import ConfigRepository
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.version import VersionBase, setbase
from omegaconf import DictConfig, ListConfig, OmegaConf

from lightrail.catalogue.plugin import available, find
from lightrail.configuration.command_line import node_name
from lightrail.kinds import KINDS

__all__ = ["PluginSource", "Repository", "current_hydra", "split_option"]

SCHEME = "lightrail"


@contextmanager
def current_hydra() -> Any:
    """Composes by Hydra's present rules, whatever version a program around it asked for."""
    outside = VersionBase.instance().version_base
    setbase(None)
    try:
        yield
    finally:
        VersionBase.instance().version_base = outside


def split_option(config_path: str) -> tuple[str, str] | None:
    """Kind and option of a path such as ``optimizer/sophia``; ``None`` for the path of anything else."""
    kind, separator, name = config_path.partition("/")
    return (kind, name) if separator and kind in KINDS and "/" not in name else None


class PluginSource(ConfigSource):
    """Answers from entry-point metadata which options a kind has, and gives the node of one: its target.

    Options are filled in from the signature after composition, when it is known which target the node ends with. A
    dotted path is an option too: the class or function that it names.
    """

    def __init__(self, provider: str = SCHEME, path: str = f"{SCHEME}://") -> None:
        super().__init__(provider, path)

    @staticmethod
    def scheme() -> str:
        return SCHEME

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return config_path.rstrip("/") in KINDS

    def is_config(self, config_path: str) -> bool:
        option = split_option(config_path)
        return option is not None and (_is_path(option[1]) or option[1].rpartition(":")[2] in available(option[0]))

    def list(self, config_path: str, results_filter: ObjectType | None = None) -> list[str]:
        if results_filter == ObjectType.GROUP:
            return [] if config_path else list(KINDS)
        return available(config_path) if config_path in KINDS else []

    def load_config(self, config_path: str) -> ConfigResult:
        option = split_option(config_path)
        if option is None:
            raise ConfigLoadError(f"{config_path} is not an option of a kind")
        kind, name = option
        target = name if _is_path(name) else find(kind, name).target
        node = OmegaConf.create({"_target_": target})
        return ConfigResult(self.provider, self.full_path(), node, {"package": None})


def _is_path(name: str) -> bool:
    return "." in name and ":" not in name


class _NoSchema:
    """Stands where Hydra looks for a structured configuration of the same name: there are none."""

    def load_config(self, config_path: str) -> ConfigResult:
        raise ConfigLoadError(config_path)


class Repository(ConfigRepository):
    """The folders, then the catalogue; each configuration is loaded once.

    Args:
        folders: Folders of YAML, first match first.
    """

    def __init__(self, folders: Sequence[str]) -> None:
        files: list[ConfigSource] = [FileConfigSource(provider=folder, path=f"file://{folder}") for folder in folders]
        self.sources = [*files, PluginSource()]
        self._loaded: dict[str, ConfigResult | None] = {}
        self.plugin_of: dict[tuple[str, str], str] = {}

    def get_schema_source(self) -> Any:
        return _NoSchema()

    def load_config(self, config_path: str) -> ConfigResult | None:
        if config_path not in self._loaded:
            self._loaded[config_path] = self._load(config_path)
        return self._loaded[config_path]

    def replace(self, config_path: str, config: DictConfig) -> None:
        """Puts another content in the place of a loaded configuration."""
        result = self.load_config(config_path)
        assert result is not None
        result.config = config

    def _load(self, config_path: str) -> ConfigResult | None:
        option = split_option(config_path)
        source = self._find_object_source(config_path, ObjectType.CONFIG)
        if source is None:
            return None
        result = source.load_config(config_path)
        if option is not None:
            self._complete(*option, result)
        elif config_path.startswith("experiment/") and result.header["package"] is None:
            result.header["package"] = "_global_"
        raw = self._extract_defaults_list(config_path, result.config)
        result.defaults_list = self._create_defaults_list(config_path, raw)
        return result

    def _complete(self, kind: str, name: str, result: ConfigResult) -> None:
        """Makes an option whole: a variant gets what it varies, an option of a many-kind its own place."""
        self.plugin_of[kind, name] = name
        if KINDS[kind].many and result.header["package"] is None:
            result.header["package"] = f"{kind}.{node_name(name)}"
        body = result.config
        if not isinstance(body, DictConfig) or not isinstance(body.get("defaults"), ListConfig):
            return
        defaults = list(body.pop("defaults"))
        bases = [each for each in defaults if isinstance(each, str) and each != "_self_"]
        body["defaults"] = [each for each in defaults if not isinstance(each, str)]
        for base in reversed(bases):
            varied = (
                PluginSource().load_config(f"{kind}/{base}") if base == name else self.load_config(f"{kind}/{base}")
            )
            if varied is None:
                continue
            self.plugin_of[kind, name] = self.plugin_of.get((kind, base), base)
            body = OmegaConf.merge(varied.config, body)
        result.config = body
