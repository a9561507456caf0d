"""One composition by Hydra: the defaults list, the bodies that still hold, and the command line on top."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra._internal.defaults_list import DefaultsList, create_defaults_list
from hydra.core.default_element import GroupDefault, ResultDefault
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lightrail.catalogue.plugin import available, unknown_plugin
from lightrail.configuration.bodies import Bodies
from lightrail.configuration.command_line import Layout, Token, normalise
from lightrail.configuration.folders import own_folder, yaml_groups, yaml_options
from lightrail.configuration.sources import Repository, split_option
from lightrail.errors import ConfigurationError, UserError, closest
from lightrail.kinds import KINDS

__all__ = ["Composed", "compose_with_hydra", "parse"]


@dataclass(frozen=True)
class Composed:
    """What Hydra composed, before options are filled in from signatures.

    Args:
        config: The configuration; a plugin's node holds its target and what was set explicitly.
        options: What was chosen, as ``(kind, option, path)``, in order.
        defaults: What the primary configuration chooses by itself, by group.
        overrides: The command line, normalised.
        bodies: The files that took part.
        layout: What the command line could name.
        plugin_of: The plugin behind each chosen option: the option itself, or what a variant varies.
    """

    config: DictConfig
    options: tuple[tuple[str, str, str], ...]
    defaults: dict[str, Any]
    overrides: tuple[str, ...]
    bodies: Bodies
    layout: Layout
    plugin_of: dict[tuple[str, str], str]


def parse(tokens: Sequence[str], config_loader: Any = None) -> list[Override]:
    """Hydra's reading of overrides.

    Raises:
        ConfigurationError: One of them is not written as Hydra's grammar wants it.
    """
    parser = OverridesParser.create(config_loader=config_loader)
    parsed = []
    for token in tokens:
        try:
            parsed.extend(parser.parse_overrides([token]))
        except OverrideParseException as error:
            raise ConfigurationError(
                f"'{token}' cannot be read",
                found=str(error).splitlines()[0],
                allowed="key=value; a value with spaces or special characters stands in quotes",
                remedy=f"""Quote the value: '{Token.parse(token).key}="…"'.""",
            ) from error
    return parsed


def compose_with_hydra(tokens: Sequence[str], config_name: str, folders: Sequence[str]) -> Composed:
    """Composes a command line.

    Args:
        tokens: As typed.
        config_name: The primary configuration.
        folders: Where configurations lie.

    Raises:
        UserError: Something is unknown, or contradicts itself.
    """
    repository = Repository(folders)
    try:
        return _compose(repository, tokens, config_name, folders)
    except UserError:
        raise
    except MissingConfigException as error:
        raise _missing(error.missing_cfg_file, folders) from error
    except TypeError as error:  # Hydra expects names in a list of choices, and adds whatever it finds to a path
        raise ConfigurationError(
            "a list of plugins holds something that is no name",
            found=", ".join(token for token in tokens if "{" in token) or str(error),
            allowed="names: '+transform=[sam,clip_norm]'",
            remedy="Choose by name, and set options apart: transform.sam.rho=0.1.",
        ) from error
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ConfigurationError(
            "the configuration cannot be composed",
            found=str(error.__cause__ or error).strip(),
            allowed="files and overrides that Hydra can merge",
            remedy="Change the file or the override that is named above.",
        ) from error


def _compose(repository: Repository, tokens: Sequence[str], config_name: str, folders: Sequence[str]) -> Composed:
    primary = repository.load_config(config_name)
    if primary is None or not isinstance(primary.config, DictConfig):
        raise MissingConfigException(f"no {config_name}", config_name)
    choices = [each for each in primary.defaults_list or () if isinstance(each, GroupDefault) and each.group]
    defaults = {each.group or "": each.value for each in choices}
    layout = Layout(
        command=config_name,
        groups=_groups(config_name, folders, defaults),
        chosen=frozenset(defaults),
        roots=frozenset(str(key) for key in primary.config if key not in KINDS),
    )
    layout = _with_computed_choices(repository, tokens, config_name, layout)
    overrides = normalise(tokens, layout)
    parsed = parse(overrides)
    _refuse_sweeps(parsed)
    listed = _defaults_list(repository, config_name, parsed)
    options = _options(listed.defaults)
    chosen_by_hand = {Token.parse(each).group for each in overrides} & set(KINDS)
    bodies = Bodies(repository, config_name, listed.defaults, defaults)
    bodies.drop_what_no_longer_holds(options, chosen_by_hand)
    loader = _Loader(repository)
    config = loader.compose(listed, repository)
    return Composed(config, tuple(options), defaults, tuple(overrides), bodies, layout, dict(repository.plugin_of))


def _groups(config_name: str, folders: Sequence[str], defaults: Collection[str]) -> frozenset[str]:
    """The kinds of this command, and the groups of YAML; those of lightrail's own that another command uses are not."""
    kinds = {kind for kind in KINDS if config_name in KINDS[kind].commands}
    foreign = yaml_groups([own_folder()]) - set(defaults)
    return frozenset(kinds | (yaml_groups(folders) - foreign - set(KINDS)) | (set(defaults) - set(KINDS)))


class _Loader(ConfigLoaderImpl):
    """Hydra's loader over a repository of our own, without its own configuration."""

    def __init__(self, repository: Repository) -> None:
        self.config_search_path = ConfigSearchPathImpl()
        self.repository = repository

    def compose(self, listed: DefaultsList, repository: Repository) -> DictConfig:
        config = self._compose_config_from_defaults_list(listed.defaults, repository)
        # A default is deleted before signatures fill it in, and so has nothing to delete yet.
        overrides = [
            each
            for each in listed.config_overrides
            if not each.is_delete() or OmegaConf.select(config, each.key_or_group) is not None
        ]
        self._apply_overrides_to_config(overrides, config)
        return config


def _with_computed_choices(repository: Repository, tokens: Sequence[str], config_name: str, layout: Layout) -> Layout:
    """The layout with the groups that a chosen configuration adds to the defaults list."""
    groups = [token for text in tokens if (token := Token.parse(text)).group in layout.groups]
    if all(token.group in layout.chosen for token in groups):
        return layout
    known = [str(token) for token in groups if token.group in layout.chosen]
    listed = _defaults_list(repository, config_name, parse(normalise(known, layout)))
    chosen = layout.chosen | set(listed.overrides.known_choices)
    return Layout(layout.command, layout.groups, chosen, layout.roots)


def _defaults_list(repository: Repository, config_name: str, parsed: list[Override]) -> DefaultsList:
    return create_defaults_list(repository, config_name, parsed, prepend_hydra=False, skip_missing=False)


def _options(defaults: Sequence[ResultDefault]) -> list[tuple[str, str, str]]:
    found: list[tuple[str, str, str]] = []
    for each in defaults:
        option = split_option(each.config_path or "")
        path = each.package or ""
        if option is None or (each.is_self and (*option, path) in found):
            continue
        kind, name = option
        if path.split(".")[0] != kind or path.count(".") != KINDS[kind].many:
            continue  # placed elsewhere, as a part of something else
        if any(path == other for _, _, other in found):
            raise ConfigurationError(
                f"{kind} '{path.rpartition('.')[2]}' is chosen twice",
                found=name,
                allowed="one of each name, since options are kept under the name",
                remedy=f"Give the second a name of its own: {kind}.second._target_=module.Class.",
            )
        found.append((kind, name, path))
    return found


def _refuse_sweeps(parsed: Sequence[Override]) -> None:
    for each in parsed:
        if each.is_sweep_override():
            value = each.get_value_string()
            raise ConfigurationError(
                f"'{each.key_or_group}' has several values, and one run takes one",
                found=each.input_line,
                allowed="one value; several with -m, one run each",
                remedy=f"Add -m to run each, or write {each.key_or_group}='[{value}]' for a list.",
            )


def _missing(config_path: str | None, folders: Sequence[str]) -> UserError:
    path = config_path or "?"
    option = split_option(path)
    group, _, name = path.rpartition("/")
    if option is not None:
        kind, name = option
        return unknown_plugin(kind, name, sorted({*available(kind), *yaml_options(folders, kind)}))
    names = yaml_options(folders, group) if group else []
    return ConfigurationError(
        f"there is no {group or 'configuration'} '{name}'",
        found=path,
        allowed=", ".join(names) or f"a file {path}.yaml",
        remedy=f"{closest(name, names)}Files are sought in {', '.join(folders)}.",
    )
