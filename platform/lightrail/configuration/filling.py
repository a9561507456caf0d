"""Fills the options that nobody set with the defaults of the signature, and puts the configuration in order."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from lightrail.configuration.composing import Composed
from lightrail.configuration.defaults import in_order, with_defaults
from lightrail.configuration.picks import Pick, picks_of
from lightrail.kinds import KINDS

__all__ = ["filled"]


def filled(composed: Composed) -> tuple[DictConfig, list[Pick]]:
    """The whole configuration, and what it chooses.

    Args:
        composed: What Hydra composed: targets, and what was set explicitly.
    """
    picks = picks_of(composed)
    plain = OmegaConf.to_container(composed.config, resolve=False)
    assert isinstance(plain, dict)
    written: dict[str, Any] = {str(key): value for key, value in plain.items()}
    for kind in KINDS.values():
        if kind.name in composed.layout.groups:
            mine = [pick for pick in picks if pick.kind == kind.name]
            written[kind.name] = _nodes(written.get(kind.name), mine, kind.many)
    return OmegaConf.create(in_order(written)), picks


def _nodes(written: Any, picks: list[Pick], many: bool) -> dict[str, Any] | None:
    """The node of one kind: its options, or one node a plugin for a kind of which there can be many."""
    if not many:
        return with_defaults(written, picks[0].target, picks[0].schema) if picks else None
    names = [pick.path.partition(".")[2] for pick in picks]
    return {
        name: with_defaults(written[name], pick.target, pick.schema) for name, pick in zip(names, picks, strict=True)
    }
