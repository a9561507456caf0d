"""The pytest plugin; it does nothing until asked with ``--lightrail-plugins``.

Every pytest run of an environment with lightrail in it imports this module, so it imports nothing itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from lightrail.testing.installed import Case

KINDS = ("optimizer", "transform", "schedule", "task", "data", "model")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lightrail", "conformance of installed lightrail plugins")
    group.addoption(
        "--lightrail-plugins",
        nargs="?",
        const="",
        default=None,
        metavar="DIST",
        help="check every installed plugin, or those of one distribution: --lightrail-plugins=DIST",
    )
    group.addoption(
        "--lightrail-kind",
        action="append",
        default=[],
        choices=KINDS,
        help="check plugins of this kind only; may be given several times",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    distribution = config.getoption("--lightrail-plugins")
    if distribution is None:
        if config.getoption("--lightrail-kind"):
            raise pytest.UsageError("--lightrail-kind chooses among plugins: give --lightrail-plugins too")
        return
    from lightrail.testing.installed import installed_cases

    cases = installed_cases(config.getoption("--lightrail-kind") or (), distribution)
    if distribution and not cases:
        raise pytest.UsageError(
            f"no plugin comes from the distribution '{distribution}'; "
            "give --lightrail-plugins alone for all (after the paths, or with '=' before them)"
        )
    items.extend(_collected(session, cases))


def _collected(session: pytest.Session, cases: list[Case]) -> Iterator[pytest.Item]:
    collectors: dict[str, _InstalledPlugin] = {}
    for case in cases:
        if case.label not in collectors:
            collectors[case.label] = _InstalledPlugin.from_parent(session, name=case.label, nodeid=case.label)
        yield _Conformance.from_parent(collectors[case.label], case=case)


class _InstalledPlugin(pytest.Collector):
    """What stands between the session and the checks of one plugin, for their ids."""

    def collect(self) -> list[pytest.Item]:
        return []


class _Conformance(pytest.Item):
    """One check of one plugin."""

    def __init__(self, *, case: Case, **kwargs: Any) -> None:
        from lightrail.testing.suite import name_of

        super().__init__(name=name_of(case.check), **kwargs)
        self.case = case
        self.keywords["lightrail_conformance"] = True

    def runtest(self) -> None:
        from lightrail.testing.suite import report

        report(self.case.outcome())

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        from lightrail.testing.suite import NonConformance

        if isinstance(excinfo.value, NonConformance):
            return f"{self.case.label}, {self.name}: {self.case.check.__doc__}\n  {excinfo.value}"
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        return self.path, None, f"{self.case.label}: {self.name}"
