"""A composition as plain values, and back: what was composed in one place is carried out in another, unchanged."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lightrail.catalogue.plugin import find
from lightrail.configuration.composition import Chosen, Composition

__all__ = ["composition_from", "plain_composition"]


def plain_composition(composition: Composition) -> dict[str, Any]:
    """A composition as values that JSON knows, every interpolation resolved: :func:`composition_from` reads it.

    Args:
        composition: What was composed.

    Example:
        >>> from lightrail.configuration import compose
        >>> plain = plain_composition(compose(["seed=3"]))
        >>> composition_from(plain).config.seed
        3
    """
    from omegaconf import OmegaConf

    chosen = [
        {**_fields(each), "options": OmegaConf.to_container(OmegaConf.create(each.options), resolve=True)}
        for each in composition.chosen
    ]
    return {
        "config": OmegaConf.to_container(composition.config, resolve=True),
        "chosen": chosen,
        "overrides": list(composition.overrides),
        "notes": list(composition.notes),
    }


def _fields(chosen: Chosen) -> dict[str, Any]:
    fields = {field.name: getattr(chosen, field.name) for field in dataclasses.fields(chosen)}
    return {**fields, "plugin": chosen.plugin is not None}


def composition_from(plain: Mapping[str, Any]) -> Composition:
    """The inverse of :func:`plain_composition`; plugins are those that are installed here.

    Args:
        plain: What was written.

    Raises:
        PluginError: A plugin that was chosen there is not installed here.
    """
    from omegaconf import OmegaConf

    chosen = tuple(
        Chosen(**{**each, "plugin": find(each["kind"], each["name"]) if each["plugin"] else None})
        for each in plain["chosen"]
    )
    config = OmegaConf.create(dict(plain["config"]))
    OmegaConf.set_struct(config, True)
    return Composition(config, chosen, tuple(plain["overrides"]), tuple(plain["notes"]))
