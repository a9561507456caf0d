"""The check of every key after composition, whichever file or operator set it."""

from __future__ import annotations

import dataclasses
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from lightrail.catalogue.forms import accepts, describe, shown
from lightrail.catalogue.schema import Parameter, Schema
from lightrail.configuration.composing import Composed
from lightrail.configuration.own_keys import OWN_KEYS
from lightrail.configuration.picks import Pick
from lightrail.errors import ConfigurationError, closest
from lightrail.kinds import KINDS

__all__ = ["check_composition", "check_trainer_options"]


def check_composition(config: DictConfig, picks: list[Pick], composed: Composed) -> None:
    """Checks every key of a configuration.

    Args:
        config: With defaults filled in.
        picks: The plugins that it chooses.
        composed: Where each key came from.

    Raises:
        ConfigurationError: A key is unknown, or a value has the wrong type or lies out of its range.
    """
    _check_roots(config, composed)
    _check_own_keys(config, composed)
    for pick in picks:
        if pick.schema is not None:
            _check_plugin(pick, pick.schema, OmegaConf.select(config, pick.path), composed)


def _check_roots(config: DictConfig, composed: Composed) -> None:
    known = composed.layout.roots | composed.layout.groups
    for key in map(str, config):
        if key not in known:
            origin = composed.bodies.origin(key, composed.overrides)
            raise ConfigurationError(
                f"there is no kind, group or key '{key}'",
                found=f"{key} in {origin}",
                allowed=", ".join(sorted(known)),
                remedy=f"{closest(key, known)}Take it out of {origin}, or mend its name.",
            )


def _check_own_keys(config: DictConfig, composed: Composed) -> None:
    own = OWN_KEYS.get(composed.layout.command, {})
    if isinstance(config.get("run"), DictConfig):
        known = [key.partition(".")[2] for key in own if key.startswith("run.")]
        for key in map(str, config.run):
            if known and key not in known:
                raise _unknown_key("run", key, known, composed)
    for path, rule in own.items():
        root, _, key = path.partition(".")
        node = config if not key else config.get(root)
        if not isinstance(node, DictConfig) or (key or root) not in node:
            raise _taken_away(path, rule.allowed)
        value = _value(node, key or root, path)
        if not rule.fits(value):
            raise ConfigurationError(
                f"{path} has the wrong type or lies out of its range",
                found=f"{path}={shown(value)} in {composed.bodies.origin(path, composed.overrides)}",
                allowed=rule.allowed,
                remedy=_quoted(path, value) if rule.allowed.startswith("text") else f"Set {path} to an allowed value.",
            )


def _taken_away(path: str, allowed: str) -> ConfigurationError:
    return ConfigurationError(
        f"{path} is needed and was taken away",
        found=f"no {path}",
        allowed=allowed,
        remedy=f"Leave {path.partition('.')[0]} as it is, or set {path} itself.",
    )


def _quoted(path: str, value: Any) -> str:
    return f"""Quote it: '{path}="{shown(value)}"'."""


def _check_plugin(pick: Pick, schema: Schema, node: DictConfig, composed: Composed) -> None:
    for key in map(str, node):
        if key == "_target_":
            continue
        path = f"{pick.path}.{key}"
        if key == "players" and KINDS[pick.kind].per_player and isinstance(node.get(key), DictConfig):
            for player, options in node[key].items():
                _check_plugin(dataclasses.replace(pick, path=f"{path}.{player}"), schema, options, composed)
            continue
        parameter = schema.parameter(key)
        value = _value(node, key, path)
        if parameter is not None:
            _check_type(path, parameter, value, composed)
        elif key in schema.supplied:
            raise ConfigurationError(
                f"{path} is supplied by lightrail",
                found=f"{path}={shown(value)} in {composed.bodies.origin(path, composed.overrides)}",
                allowed=", ".join(each.name for each in schema.parameters) or "no options",
                remedy=f"Choose it with {key}=NAME." if key in KINDS else f"Leave {path} out.",
            )
        elif not schema.accepts_any_key:
            raise _unknown_key(pick.path, key, [each.name for each in schema.parameters], composed, pick.name)


def _unknown_key(path: str, key: str, known: list[str], composed: Composed, name: str = "") -> ConfigurationError:
    owner = f"{path.split('.')[0]} '{name}'" if name else path
    origin = composed.bodies.origin(f"{path}.{key}", composed.overrides)
    see = f"`lightrail plugins {name}` describes them." if name else "The README describes them."
    return ConfigurationError(
        f"{owner} has no option '{key}'",
        found=f"{path}.{key} in {origin}",
        allowed=", ".join(f"{path}.{each}" for each in known) or "no options",
        remedy=f"{closest(key, known)}{see}",
    )


def _check_type(path: str, parameter: Parameter, value: Any, composed: Composed) -> None:
    is_default = parameter.has_default and value == parameter.default and type(value) is type(parameter.default)
    is_null = value is None and not parameter.required and parameter.default is None
    if is_default or is_null or accepts(parameter.form, value):
        return
    example = f"; by default {shown(parameter.default)}" if parameter.has_default else ""
    hint = _quoted(path, value) if parameter.form == {"is": "str"} and value is not None else ""
    if parameter.choices:
        hint = closest(str(value), map(str, parameter.choices))
    raise ConfigurationError(
        f"{path} has the wrong type" if not parameter.choices else f"{path} has no choice '{shown(value)}'",
        found=f"{path}={shown(value)} ({type(value).__name__}) in {composed.bodies.origin(path, composed.overrides)}",
        allowed=describe(parameter.form) + example,
        remedy=hint or f"Set {path} to an allowed value.",
    )


def _value(node: DictConfig, key: str, path: str) -> Any:
    """The value of a key, its interpolations resolved."""
    try:
        value = node[key]
        return (
            OmegaConf.to_container(value, resolve=True, throw_on_missing=True) if OmegaConf.is_config(value) else value
        )
    except MissingMandatoryValue as error:
        raise ConfigurationError(
            f"{path} has no value",
            found=f"{path}=???",
            allowed="a value",
            remedy=f"Set it: {path}=VALUE.",
        ) from error
    except OmegaConfBaseException as error:
        raise ConfigurationError(
            f"{path} cannot be resolved",
            found=str(error).splitlines()[0],
            allowed="an interpolation of a key or a variable that exists",
            remedy=f"Mend the reference in {path}.",
        ) from error


# What lightrail's own trainer keys are called by Lightning, or what it sets itself.
_RESERVED = {
    "accumulate_grad_batches": "trainer.accumulate",
    "logger": "logger=NAME",
    "callbacks": "callback=NAME",
    "default_root_dir": "run.root",
}


def check_trainer_options(trainer: DictConfig) -> None:
    """Checks the keys of ``trainer`` that are Lightning's own against the signature of its Trainer.

    Args:
        trainer: The node ``trainer`` of a composed configuration.

    Raises:
        ConfigurationError: A key is neither lightrail's nor Lightning's, or has the wrong type.
    """
    from lightning.pytorch import Trainer

    from lightrail.catalogue.signature import signature_parameters

    own = {key.partition(".")[2] for key in OWN_KEYS["train"] if key.startswith("trainer.")}
    parameters = {each.name: each for each in signature_parameters(Trainer) if each.name not in _RESERVED}
    for key in map(str, trainer):
        path = f"trainer.{key}"
        if key in own:
            continue
        value = _value(trainer, key, path)
        if key not in parameters:
            known = sorted(own | set(parameters))
            instead = f"Use {_RESERVED[key]}. " if key in _RESERVED else closest(key, known)
            raise ConfigurationError(
                f"trainer has no option '{key}'",
                found=f"{path}={shown(value)}",
                allowed=", ".join(known),
                remedy=f"{instead}Keys beside lightrail's own are arguments of Lightning's Trainer.",
            )
        if not accepts(parameters[key].form, value):
            raise ConfigurationError(
                f"{path} has the wrong type",
                found=f"{path}={shown(value)} ({type(value).__name__})",
                allowed=describe(parameters[key].form),
                remedy=f"Set {path} to an allowed value.",
            )
