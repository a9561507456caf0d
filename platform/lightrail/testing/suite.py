"""What a check is, what comes of one, and the classes that run them.

A check is a function ``check_NAME(plugin, options)`` that returns where the plugin conforms, raises
:class:`NonConformance` where it does not and :class:`NotApplicable` where it has nothing to say. Checks branch on a
plugin's traits and signature, never on its name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lightrail.traits import traits_of

__all__ = ["Check", "NonConformance", "NotApplicable", "Outcome", "Suite", "examine", "name_of", "require"]

Check = Callable[[Any, Mapping[str, Any]], None]
State = Literal["passed", "failed", "skipped", "expected"]


class NonConformance(AssertionError):
    """A plugin does not keep the contract of its kind; the message says what was expected and what was seen."""


class NotApplicable(Exception):
    """A check has nothing to say of this plugin; the message says why."""


def require(condition: object, message: str) -> None:
    """Raises :class:`NonConformance` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise NonConformance(message)


def name_of(check: Check) -> str:
    """The name under which ``traits.exceptions`` and the listing know a check.

    Example:
        >>> def check_is_quick(plugin, options): ...
        >>> name_of(check_is_quick)
        'is_quick'
    """
    return check.__name__.removeprefix("check_")


@dataclass(frozen=True)
class Outcome:
    """What came of one check.

    Args:
        check: The name of the check.
        state: ``passed``; ``failed``; ``skipped`` (nothing to say); ``expected``: it fails, as ``traits.exceptions``
            says.
        reason: Why, in words; empty where it passed.
        error: What the check raised.
    """

    check: str
    state: State
    reason: str = ""
    error: BaseException | None = None


def examine(check: Check, plugin: Any, options: Mapping[str, Any] | None = None) -> Outcome:
    """Runs one check on one plugin; whatever goes wrong is in the outcome, nothing is raised.

    Args:
        check: A function ``check_NAME(plugin, options)``.
        plugin: The class or function.
        options: What to build it with; ``traits.example`` where not given.

    Returns:
        The outcome. A check that passes although ``traits.exceptions`` names it has failed: the exception is stale.
    """
    traits = traits_of(plugin)
    name = name_of(check)
    exceptions = {key.removeprefix("check_"): reason for key, reason in traits.exceptions.items()}
    try:
        _isolated(check, plugin, dict(traits.example) if options is None else options)
    except NotApplicable as answer:
        return Outcome(name, "skipped", str(answer))
    except Exception as error:
        if name in exceptions:
            return Outcome(name, "expected", exceptions[name], error)
        return Outcome(name, "failed", str(error), error)
    if name in exceptions:
        return Outcome(name, "failed", f"it passes, but traits.exceptions names it ({exceptions[name]}); remove that")
    return Outcome(name, "passed")


def _isolated(check: Check, plugin: Any, options: Mapping[str, Any]) -> None:
    """Runs from a fixed seed and leaves the random generators as they were."""
    import torch

    from lightrail.step.randomness import RandomState

    with RandomState.kept():
        torch.manual_seed(0)
        check(plugin, options)


def known_exceptions(names: frozenset[str]) -> Check:
    """A check that ``traits.exceptions`` names only checks of the suite, so that a typo excuses nothing."""

    def check_excepts_known_checks(plugin: Any, options: Mapping[str, Any]) -> None:
        unknown = {key.removeprefix("check_") for key in traits_of(plugin).exceptions} - names
        require(not unknown, f"traits.exceptions names {sorted(unknown)}; the checks are {sorted(names)}")

    return check_excepts_known_checks


class Suite:
    """Every check of a kind, as a class that pytest collects once it has a plugin.

    Subclass the suite of a kind, name the class ``Test…`` and set ``plugin``; set ``options`` where
    ``traits.example`` is not what to build it with. Every check is a method ``test_NAME``, to be overridden or
    extended like any other.

    Example:
        >>> import torch
        >>> from lightrail.testing import OptimizerSuite
        >>> class TestMine(OptimizerSuite):
        ...     plugin = torch.optim.SGD
        ...     options = {"lr": 0.1}
        >>> all(outcome.state != "failed" for outcome in TestMine.outcomes())
        True
    """

    kind: ClassVar[str] = ""
    checks: ClassVar[tuple[Check, ...]] = ()
    plugin: ClassVar[Any] = None
    options: ClassVar[Mapping[str, Any] | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for check in cls.__dict__.get("checks", ()):
            if f"test_{name_of(check)}" not in cls.__dict__:
                setattr(cls, f"test_{name_of(check)}", _as_method(check))

    @classmethod
    def outcomes(cls) -> list[Outcome]:
        """What comes of every check, without pytest."""
        return [examine(check, cls._plugin(), cls.options) for check in cls.checks]

    @classmethod
    def _plugin(cls) -> Any:
        # A function that stands in a class would turn into a method on the ordinary way out.
        plugin = inspect.getattr_static(cls, "plugin")
        if plugin is None:
            raise TypeError(f"{cls.__name__} has no plugin: set `plugin = …` in its body")
        return plugin.__func__ if isinstance(plugin, staticmethod) else plugin


def _as_method(check: Check) -> Callable[[Suite], None]:
    def test(self: Suite) -> None:
        # `self.options`, so that a fixture may set what only a test can make, such as the path of a file.
        report(examine(check, self._plugin(), self.options))

    test.__name__ = f"test_{name_of(check)}"
    test.__doc__ = check.__doc__
    return test


def report(outcome: Outcome) -> None:
    """Tells pytest what came of a check."""
    import pytest

    if outcome.state == "skipped":
        pytest.skip(outcome.reason)
    if outcome.state == "expected":
        pytest.xfail(outcome.reason)
    if outcome.state == "failed":
        raise outcome.error or NonConformance(outcome.reason)
