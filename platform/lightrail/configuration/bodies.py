"""The files that set options beside choosing plugins: the primary configuration and experiments.

An option in such a file belongs to the plugin that the file chose. Once another is chosen over it, from the command
line or by a file that builds on this one, the option no longer holds: a learning rate for AdamW is no learning rate
for Lion.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any

from hydra.core.default_element import GroupDefault, ResultDefault
from omegaconf import DictConfig, OmegaConf

from lightrail.configuration.command_line import node_name
from lightrail.configuration.sources import Repository, split_option
from lightrail.kinds import KINDS

__all__ = ["Bodies"]


class Bodies:
    """The files of one composition that set options at the root.

    Args:
        repository: Where they were loaded from.
        primary: The name of the primary configuration.
        results: The final defaults list.
        defaults: What the primary configuration chooses by itself, by group.

    Attributes:
        notes: What was left out, one sentence each.
    """

    def __init__(
        self, repository: Repository, primary: str, results: Sequence[ResultDefault], defaults: dict[str, Any]
    ) -> None:
        self._repository = repository
        self._primary = primary
        self._defaults = defaults
        self._children: dict[str, list[str]] = {}
        self.files: list[str] = []
        self.notes: list[str] = []
        for each in results:
            path = each.config_path or ""
            if each.parent and each.parent != path:
                self._children.setdefault(each.parent, []).append(path)
            if not (each.package or "") and split_option(path) is None:
                self.files.append(path)

    def drop_what_no_longer_holds(self, options: Sequence[tuple[str, str, str]], by_hand: Collection[str]) -> None:
        """Takes out of each body the options of plugins that are not the chosen ones.

        Args:
            options: What is chosen, as ``(kind, option, path)``.
            by_hand: The kinds that the command line chose; their choice stands over any ``_target_`` in a file.
        """
        bodies = {path: self._body(path) for path in self.files}
        for kind in KINDS.values():
            names = [name for of, name, _ in options if of == kind.name]
            for path, body in bodies.items():
                if not isinstance(node := body.get(kind.name), DictConfig):
                    continue
                if kind.many:
                    self._drop_many(path, kind.name, node, names)
                else:
                    final = self._final(kind.name, names, bodies, kind.name in by_hand)
                    self._drop_one(path, kind.name, body, final)
        for path, body in bodies.items():
            self._repository.replace(path, body)

    def origin(self, key: str, overrides: Sequence[str]) -> str:
        """Who set a key, for an error: the command line, or the file that did so last."""
        if any(token.lstrip("+~").partition("=")[0] in (key, *_above(key)) for token in overrides):
            return "the command line"
        for path in reversed(self.files):
            if OmegaConf.select(self._body(path), key) is not None:
                return f"{path}.yaml"
        return "the configuration"

    def _body(self, path: str) -> DictConfig:
        result = self._repository.load_config(path)
        assert result is not None
        return copy.deepcopy(result.config) if isinstance(result.config, DictConfig) else OmegaConf.create()

    def _final(self, kind: str, names: list[str], bodies: dict[str, DictConfig], by_hand: bool) -> str | None:
        """What the node will be: the option, or the target that a file writes over it."""
        targets = [target for body in bodies.values() if (target := _target(body, kind))]
        return targets[-1] if targets and not by_hand else (names[0] if names else None)

    def _expected(self, path: str, kind: str) -> Any:
        """What a file takes to be chosen when it sets options."""
        result = self._repository.load_config(path)
        if result is None:
            return self._defaults.get(kind)
        if isinstance(result.config, DictConfig) and (target := _target(result.config, kind)):
            return target
        for each in result.defaults_list or ():
            if isinstance(each, GroupDefault) and (each.group or "").lstrip("/") == kind:
                return each.value
        if path != self._primary:
            inherited = [self._expected(child, kind) for child in self._children.get(path, ()) if child in self.files]
            if inherited:
                return inherited[-1]
        return self._defaults.get(kind)

    def _drop_one(self, path: str, kind: str, body: DictConfig, final: str | None) -> None:
        expected = self._expected(path, kind)
        if expected == final or expected is None:
            return
        keys = [str(key) for key in body[kind] if key != "_target_"]
        del body[kind]
        if path != self._primary and keys:
            listed = ", ".join(f"{kind}.{key}" for key in keys)
            self.notes.append(f"{path} sets {listed} for {kind} '{expected}'; left out, since {kind} is '{final}'")

    def _drop_many(self, path: str, kind: str, node: DictConfig, names: list[str]) -> None:
        expected = self._expected(path, kind)
        expected = [expected] if isinstance(expected, str) else (expected or [])
        gone = {node_name(name) for name in expected} - {node_name(name) for name in names}
        for name in gone & set(map(str, node)):
            if isinstance(node[name], DictConfig) and "_target_" in node[name]:
                continue
            del node[name]
            if path != self._primary:
                self.notes.append(f"{path} sets {kind}.{name}; left out, since it is not chosen")


def _target(body: DictConfig, kind: str) -> str | None:
    node = body.get(kind)
    target = node.get("_target_") if isinstance(node, DictConfig) and not KINDS[kind].many else None
    return target if isinstance(target, str) else None


def _above(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]
