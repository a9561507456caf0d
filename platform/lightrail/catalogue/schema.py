"""What can be said of a plugin without importing it again: plain data, made once from its signature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Parameter", "Schema"]


@dataclass(frozen=True)
class Parameter:
    """One option of a plugin.

    Args:
        name: The key on the command line.
        type: The annotation, for people.
        form: The annotation, for :func:`lightrail.catalogue.forms.accepts`.
        default: Its default, where that can be written in YAML.
        has_default: Whether ``default`` can be written in YAML.
        required: Whether the signature has no default at all.
        choices: The words that it takes, where it takes words only.
        doc: What its docstring says of it, in one line.
    """

    name: str
    type: str
    form: Mapping[str, Any]
    default: Any = None
    has_default: bool = False
    required: bool = False
    choices: tuple[Any, ...] = ()
    doc: str = ""


@dataclass(frozen=True)
class Schema:
    """A plugin's options and its card.

    Args:
        target: The class or function, as ``module.Name``.
        parameters: Its options, in the order of the signature.
        accepts_any_key: Whether the signature ends in ``**options``.
        supplied: Parameters that the platform fills in.
        summary: The first sentence of its docstring.
        traits: Its traits that differ from the default, as plain values.
    """

    target: str
    parameters: tuple[Parameter, ...] = ()
    accepts_any_key: bool = False
    supplied: tuple[str, ...] = ()
    summary: str = ""
    traits: Mapping[str, Any] = field(default_factory=dict)

    def parameter(self, name: str) -> Parameter | None:
        """The option of that name, if there is one."""
        return next((each for each in self.parameters if each.name == name), None)

    def defaults(self) -> dict[str, Any]:
        """The options that have a default, with it."""
        return {each.name: each.default for each in self.parameters if each.has_default}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Schema:
        parameters = tuple(Parameter(**{**each, "choices": tuple(each["choices"])}) for each in data["parameters"])
        return cls(**{**data, "parameters": parameters, "supplied": tuple(data["supplied"])})
