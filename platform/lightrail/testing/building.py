"""What every kind of plugin shares: it is built from its options, refuses unknown ones, and says what it is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from lightrail.errors import UserError
from lightrail.testing.suite import NonConformance, NotApplicable, require
from lightrail.traits import Traits, traits_of

__all__ = [
    "accepts",
    "built",
    "check_is_documented",
    "check_names_its_paper",
    "is_foreign",
    "missing_options",
    "refuses_unknown_options",
    "unless_named",
    "with_defaults",
]

UNKNOWN = "option_that_nothing_has"


def accepts(plugin: Any, option: str) -> bool:
    """Whether the signature of ``plugin`` has a parameter of that name."""
    return option in inspect.signature(plugin).parameters


def is_foreign(plugin: Any) -> bool:
    """Whether it is torch's own class, which declares no traits and keeps torch's documentation."""
    return plugin.__module__.startswith("torch.")


def missing_options(plugin: Any, options: Mapping[str, Any], given: int) -> list[str]:
    """The parameters beyond the first ``given`` that have neither a default nor a value in ``options``."""
    parameters = list(inspect.signature(plugin).parameters.values())[given:]
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variadic and p.name not in options]


def built(plugin: Any, options: Mapping[str, Any]) -> Any:
    """``plugin(**options)``; not applicable where it reads something that an example cannot bring along."""
    missing = missing_options(plugin, options, given=0)
    if missing:
        wanted = ", ".join(missing)
        raise NotApplicable(f"it needs {wanted}, which the example does not give; subclass the suite with options")
    return plugin(**options)


def with_defaults(plugin: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options without which it cannot be built or run; the others go back to their defaults.

    What traits say in numbers (``state``, ``extra_evaluations``) they say of the defaults, whereas an example may
    well exercise a method harder than that.
    """
    parameters = inspect.signature(plugin).parameters
    return {
        name: value
        for name, value in options.items()
        if name not in parameters or parameters[name].default in (None, inspect.Parameter.empty)
    }


def check_is_documented(plugin: Any, options: Mapping[str, Any]) -> None:
    """Its docstring begins with a sentence of its own on one line, which is its line in the listing."""
    summary = (inspect.getdoc(plugin) or "").split("\n\n")[0].strip()
    require(summary, f"{plugin.__qualname__} has no docstring: its first sentence is its line in the listing")
    if is_foreign(plugin):
        return
    bases = plugin.__mro__[1:] if isinstance(plugin, type) else ()
    inherited = any(summary == (inspect.getdoc(base) or "").split("\n\n")[0].strip() for base in bases)
    require(not inherited, f"the summary of {plugin.__qualname__} is that of its base class: {summary!r}")
    require("\n" not in summary and summary.endswith("."), f"the summary is not one sentence on one line: {summary!r}")


def check_names_its_paper(plugin: Any, options: Mapping[str, Any]) -> None:
    """It declares traits, and ``traits.paper`` says where the method is from."""
    if is_foreign(plugin):
        return
    require(isinstance(getattr(plugin, "traits", None), Traits), f"{plugin.__qualname__} declares no `traits`")
    require(traits_of(plugin).paper, "traits.paper is empty: authors, year, title, arXiv or DOI")


def refuses_unknown_options(build: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Building with an option that the signature lacks raises TypeError or a lightrail error."""
    try:
        build(**{**options, UNKNOWN: 1})
    except (TypeError, UserError):
        return
    raise NonConformance(f"it accepted {UNKNOWN}=1 in silence, so a typo in an option would be lost")


def unless_named(word: str, attempt: Callable[[], None]) -> bool:
    """Runs ``attempt``; true where it went through, false where it was refused by an error that says ``word``."""
    try:
        attempt()
    except NonConformance:
        raise
    except Exception as error:
        message = str(error)
        # torch's dispatcher names the backend that failed; that is a crash, not a refusal.
        require(
            word in message.lower() and "aten::" not in message,
            f"{word} gradients crash it, and the error does not name them: {type(error).__name__}: {message}",
        )
        return False
    return True


def require_refused(plugin: Any, options: Mapping[str, Any], told: str) -> None:
    """Fails unless a plugin refuses options by an error in four parts.

    Args:
        plugin: The class or function.
        options: What is wrong.
        told: The same in words.
    """
    try:
        plugin(**options)
    except UserError as error:
        parts = (error.what, error.found, error.allowed, error.remedy)
        require(all(parts), f"{told} is refused by an error that lacks a part: {error}")
    except Exception as error:
        raise NonConformance(f"{told} is refused by a {type(error).__name__}, and no error in four parts") from error
    else:
        raise NonConformance(f"it accepted {told}")
