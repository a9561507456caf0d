"""The suites through pytest's own command line, and what becomes of plugins that cannot be loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lightrail.catalogue import Plugin
from lightrail.errors import ConfigurationError
from lightrail.testing import Case, ScheduleSuite, installed_cases
from lightrail.testing.schedule import check_is_documented

pytest_plugins = ("pytester",)


SUITE_OF_AN_AUTHOR = """
from lightrail import Traits
from lightrail.testing import ScheduleSuite
from torch.optim.lr_scheduler import LambdaLR

def halving(optimizer, total_steps, rate: float = 0.5):
    '''Halves every step, whatever the horizon.'''
    return LambdaLR(optimizer, lambda step: rate ** step)

halving.traits = Traits(exceptions={"honours_total_steps": "it has no horizon"})

class TestHalving(ScheduleSuite):
    plugin = halving
    options = {"rate": 0.9}
"""


# In processes of their own: pytester in this process would import torch twice, which torch does not survive.


def test_nothing_is_collected_unless_asked(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    assert result.ret == pytest.ExitCode.NO_TESTS_COLLECTED


def test_suites_run_over_what_is_installed_and_over_subclasses(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SUITE_OF_AN_AUTHOR)
    arguments = ["--lightrail-plugins=lightrail", "--lightrail-kind=schedule", "-v", "-k", "Halving or cosine"]
    result = pytester.runpytest_subprocess(*arguments)
    result.stdout.fnmatch_lines(["schedule-cosine::honours_total_steps PASSED*"])
    others = len(installed_cases(["schedule"], "lightrail")) - len(ScheduleSuite.checks)
    result.assert_outcomes(passed=11 + len(ScheduleSuite.checks), skipped=1, xfailed=1, deselected=others)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lightrail-plugins=nobodys"], "*no plugin comes from the distribution 'nobodys'*"),
        (["--lightrail-kind=schedule"], "*give --lightrail-plugins too*"),
    ],
)
def test_a_wrong_option_is_told(pytester: pytest.Pytester, arguments: list[str], message: str) -> None:
    result = pytester.runpytest_subprocess(*arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])


def test_the_pytest_plugin_imports_nothing_heavy() -> None:
    program = "import sys, lightrail.testing.pytest_plugin; print({'torch', 'lightning', 'hydra'} & {*sys.modules})"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "set()"


def test_a_broken_plugin_fails_with_the_reason() -> None:
    plugin = Plugin("schedule", "theirs", "nobodys_package:schedule", "nobodys", "1.0")
    outcome = Case(plugin, check_is_documented).outcome()
    assert outcome.state == "failed"
    assert "nobodys_package" in outcome.reason


def test_a_missing_extra_skips_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = Plugin("schedule", "theirs", "nobodys_package:schedule", "nobodys", "1.0", extras=("more",))
    monkeypatch.setattr("lightrail.catalogue.plugin.requirements", lambda location, extra: ["nobodys_dependency"])
    outcome = Case(plugin, check_is_documented).outcome()
    assert outcome.state == "skipped"
    assert "nobodys_dependency" in outcome.reason


def test_a_kind_without_a_suite_is_told() -> None:
    with pytest.raises(ConfigurationError, match="logger"):
        installed_cases(["logger"])
