"""From a class or function to its schema: every option with its default, without any registration code."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightrail.catalogue.annotations import evaluated, form_of, text_of
from lightrail.catalogue.docstrings import parameter_lines, summary_of
from lightrail.catalogue.schema import Parameter, Schema
from lightrail.errors import PluginError
from lightrail.kinds import KINDS, Kind
from lightrail.traits import traits_of

__all__ = ["schema_of", "signature_parameters", "source_files"]


def schema_of(kind: str, target: str, plugin: Any) -> Schema:
    """The schema of a plugin.

    Args:
        kind: Its kind: the platform supplies other parameters for each.
        target: Where it is, as ``module.Name``.
        plugin: The class or function.

    Raises:
        PluginError: It cannot be a plugin of that kind.
    """
    _check_kind(kind, target, plugin)
    try:
        signature = inspect.signature(plugin)
    except (TypeError, ValueError):
        # Written in C: nothing is known, so everything is allowed.
        return Schema(target, accepts_any_key=True, summary=summary_of(_own_docstring(plugin)))
    parameters = signature_parameters(plugin)
    names = [each.name for each in parameters]
    described = KINDS.get(kind, Kind(kind, "a class or a function"))
    supplied = (*(names[:1] if described.supplies_first else ()), *(n for n in described.supplied if n in names))
    return Schema(
        target=target,
        parameters=tuple(each for each in parameters if each.name not in supplied),
        accepts_any_key=any(each.kind is each.VAR_KEYWORD for each in signature.parameters.values()),
        supplied=supplied,
        summary=summary_of(_own_docstring(plugin)),
        traits=_plain_traits(_card(target, plugin)),
    )


def signature_parameters(plugin: Any) -> list[Parameter]:
    """Every parameter of a class or function that can be given by name.

    Args:
        plugin: The class or function.
    """
    # Options that a base class declares are described there.
    classes = reversed(plugin.__mro__[1:-1]) if isinstance(plugin, type) and hasattr(plugin, "__signature__") else ()
    documented = {name: line for each in classes for name, line in parameter_lines(_own_docstring(each)).items()}
    documented |= {**parameter_lines(_constructor_docstring(plugin)), **parameter_lines(_own_docstring(plugin))}
    namespace = _namespace(plugin)
    return [
        _parameter(each, namespace, documented.get(each.name, ""))
        for each in inspect.signature(plugin).parameters.values()
        if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
    ]


def _check_kind(kind: str, target: str, plugin: Any) -> None:
    base = KINDS[kind].base if kind in KINDS else None
    if isinstance(plugin, type):
        suits = base is None or any(ancestor.__name__ == base for ancestor in plugin.__mro__)
    else:
        suits = callable(plugin)
    if not suits:
        raise PluginError(
            f"'{target}' cannot be {'an' if kind[0] in 'aeiou' else 'a'} {kind}",
            found=f"{'the class' if isinstance(plugin, type) else type(plugin).__name__} {target}",
            allowed=KINDS[kind].names if kind in KINDS else "a class or a function",
            remedy=f"Name a class of that kind, or a function that returns one, as the {kind}.",
        )


def _parameter(parameter: inspect.Parameter, namespace: Mapping[str, Any], doc: str) -> Parameter:
    has_annotation = parameter.annotation is not parameter.empty
    annotation = evaluated(parameter.annotation, namespace) if has_annotation else Any
    form = form_of(annotation)
    required = parameter.default is parameter.empty
    expressible, default = (False, None) if required else _as_yaml(parameter.default)
    if isinstance(parameter.annotation, str):
        text = parameter.annotation
    else:
        text = text_of(annotation) if has_annotation else "anything"
    return Parameter(
        name=parameter.name,
        type=text,
        form=form,
        default=default,
        has_default=expressible,
        required=required,
        choices=tuple(form["values"]) if form["is"] == "literal" else (),
        doc=doc,
    )


def _as_yaml(value: Any) -> tuple[bool, Any]:
    """Whether YAML can hold a default, and the default as YAML would hold it."""
    if value is None or isinstance(value, bool | int | float):
        # A subclass, such as an enumeration's member, is more than its number.
        return type(value) in (type(None), bool, int, float), value
    if isinstance(value, os.PathLike):
        return True, os.fspath(value)
    if type(value) is str:
        return "${" not in value and value != "???", value
    if isinstance(value, list | tuple):
        items = [_as_yaml(item) for item in value]
        return all(fits for fits, _ in items), [item for _, item in items]
    if type(value) is dict:
        items = [_as_yaml(item) for item in value.values()]
        fits = all(fits for fits, _ in items) and all(type(key) is str for key in value)
        return fits, dict(zip(value, (item for _, item in items), strict=True))
    return False, None


def _plain_traits(traits: Mapping[str, Any]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        return value if isinstance(value, str | int | float | bool | None) else str(value)

    return plain(traits)


def _own_docstring(plugin: Any) -> str | None:
    # A class without words of its own would otherwise speak with those of nn.Module.
    return vars(plugin).get("__doc__") if isinstance(plugin, type) else getattr(plugin, "__doc__", None)


def _constructor_docstring(plugin: Any) -> str | None:
    constructor = vars(plugin).get("__init__") if isinstance(plugin, type) else None
    return getattr(constructor, "__doc__", None)


def _namespace(plugin: Any) -> Mapping[str, Any]:
    """The globals in which the annotations of a signature were written."""
    makers = (plugin.__init__, plugin.__new__) if isinstance(plugin, type) else (plugin,)
    written = next((found for each in makers if (found := getattr(inspect.unwrap(each), "__globals__", None))), None)
    if written is None or (isinstance(plugin, type) and "__dataclass_fields__" in vars(plugin)):
        return vars(sys.modules[plugin.__module__]) if getattr(plugin, "__module__", None) in sys.modules else {}
    return written


def _card(target: str, plugin: Any) -> dict[str, Any]:
    """The traits, with what the package's own measurements say of the plugin."""
    traits = traits_of(plugin)
    file = _measured_file(target.split(".")[0])
    measured = json.loads(file.read_text()).get(target, []) if file and file.exists() else []
    return dataclasses.replace(traits, verified=(*traits.verified, *measured)).to_dict()


def _measured_file(package: str) -> Path | None:
    """Where `lightrail bench claims --cards` writes what it measured of a package's plugins."""
    home = getattr(sys.modules.get(package), "__file__", None)
    return Path(home).with_name("measured.json") if home and Path(home).name == "__init__.py" else None


def source_files(plugin: Any) -> list[str]:
    """The files whose change may change a plugin's schema: its own, and those of the classes that it extends."""
    things = plugin.__mro__ if isinstance(plugin, type) else (plugin, inspect.unwrap(plugin))
    modules = {getattr(thing, "__module__", None) for thing in things}
    found = (getattr(sys.modules.get(name or ""), "__file__", None) for name in modules)
    measured = _measured_file(things[0].__module__.split(".")[0])
    if measured is not None:  # a file that is not there yet is noticed by its folder
        found = (*found, str(measured if measured.exists() else measured.parent))
    return sorted({file for file in found if file})
