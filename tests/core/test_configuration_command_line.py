"""The normaliser of the command line, by its properties."""

from __future__ import annotations

from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from lightrail.configuration.command_line import Layout, Token, node_name, normalise
from lightrail.errors import ConfigurationError
from lightrail.kinds import KINDS

LAYOUT = Layout(
    command="train",
    groups=frozenset({"optimizer", "schedule", "task", "transform", "callback", "trainer", "experiment", "recipe"}),
    chosen=frozenset({"optimizer", "schedule", "task", "transform", "callback", "trainer", "experiment"}),
    roots=frozenset({"seed", "run"}),
)

operators = st.sampled_from(["", "+", "++"])
groups = st.sampled_from(sorted(LAYOUT.groups))
names = st.sampled_from(["sophia", "theirs:sam", "mine.Thing", "a,b", "glob(*)", "choice(a,b)"])
# Values as people type them, with everything that could be mistaken for syntax of the key.
values = st.sampled_from(
    [
        "1", "1e-3", "-1", "null", "true", "", "'a b'", '"x=y"', "[1, 2]", "{a: 1}", "${optimizer.lr}", "a,b",
        "range(1,4)", "choice(a,b)", "a=b", "+1", "~", "++x", "'[a,b]'", "[sam,clip_norm]",
        "${oc.env:HOME,/tmp}", "x\ny", "é", "{}",
    ]
)  # fmt: skip
keys = st.sampled_from(
    [
        "seed",
        "run.name",
        "optimizer.lr",
        "transform.sam.rho",
        "callback.mine._target_",
        "task._target_",
        "trainer.devices",
        "run",
    ]
)
choices = st.builds(lambda operator, group, name: f"{operator}{group}={name}", operators, groups, names)
nothings = st.builds(
    lambda group, form: f"~{group}" if form == "~" else f"{group}={form}",
    groups,
    st.sampled_from(["~", "null", "none"]),
)
settings = st.builds(lambda operator, key, value: f"{operator}{key}={value}", operators, keys, values)
deletions = st.sampled_from(["~optimizer.lr", "~transform.sam", "~seed"])
command_lines = st.lists(st.one_of(choices, nothings, settings, deletions), max_size=8)


@given(command_lines)
def test_doing_it_twice_changes_nothing(tokens: list[str]) -> None:
    once = normalise(tokens, LAYOUT)
    assert normalise(once, LAYOUT) == once


@given(st.lists(st.tuples(operators, operators, groups, names), max_size=6), st.lists(settings, max_size=4))
def test_the_operator_of_a_choice_means_nothing(picked: list[tuple[str, str, str, str]], others: list[str]) -> None:
    first = [f"{operator}{group}={name}" for operator, _, group, name in picked]
    second = [f"{operator}{group}={name}" for _, operator, group, name in picked]
    assert normalise(first + others, LAYOUT) == normalise(second + others, LAYOUT)


@given(st.lists(st.tuples(operators, operators, keys, values), max_size=6))
def test_the_operator_of_a_setting_means_nothing(picked: list[tuple[str, str, str, str]]) -> None:
    first = [f"{operator}{key}={value}" for operator, _, key, value in picked]
    second = [f"{operator}{key}={value}" for _, operator, key, value in picked]
    assert normalise(first, LAYOUT) == normalise(second, LAYOUT)


@given(operators, st.sampled_from(["seed", "run.name", "optimizer.lr", "transform.sam.rho"]), st.text())
def test_a_value_is_left_as_it_was_typed(operator: str, key: str, value: str) -> None:
    assert normalise([f"{operator}{key}={value}"], LAYOUT) == [f"++{key}={value}"]


@given(command_lines)
def test_nothing_is_lost_and_the_order_is_kept(tokens: list[str]) -> None:
    normalised = normalise(tokens, LAYOUT)
    kept = [Token.parse(each).key for each in normalised]
    typed = [Token.parse(each).key.removesuffix("._target_") for each in tokens]
    assert set(kept) <= set(map(str, typed)) | {Token.parse(each).key for each in tokens}
    settings_typed = [
        Token.parse(each) for each in tokens if Token.parse(each).key in ("seed", "run.name", "optimizer.lr")
    ]
    settings_kept = [
        Token.parse(each) for each in normalised if Token.parse(each).key in ("seed", "run.name", "optimizer.lr")
    ]
    assert [(each.key, each.value) for each in settings_typed] == [(each.key, each.value) for each in settings_kept]


@given(command_lines)
def test_each_group_is_chosen_once_with_the_operator_that_fits(tokens: list[str]) -> None:
    picked = [token for each in normalise(tokens, LAYOUT) if (token := Token.parse(each)).key in LAYOUT.groups]
    assert len({token.key for token in picked}) == len(picked)
    for token in picked:
        assert token.operator in ({"", "~"} if token.key in LAYOUT.chosen else {"+"})
        if KINDS.get(token.key) is not None and KINDS[token.key].many:
            assert token.operator == ""


@given(st.lists(st.one_of(choices, nothings), max_size=6))
def test_hydra_can_read_what_comes_out(tokens: list[str]) -> None:
    OverridesParser.create().parse_overrides(normalise(tokens, LAYOUT))


@pytest.mark.parametrize(
    ("typed", "normalised"),
    [
        (["+optimizer=sophia"], ["optimizer=sophia"]),
        (["recipe=a"], ["+recipe=a"]),
        (["optimizer=a", "seed=1", "++optimizer=b"], ["++seed=1", "optimizer=b"]),
        (["task._target_=mine.Task"], ["task=mine.Task"]),
        (["+task._target_='mine.Task'"], ["task=mine.Task"]),
        (["task._target_=${x}"], ["++task._target_=${x}"]),
        (["task._target_=a.B,a.C"], ["++task._target_=a.B,a.C"]),
        (["callback.mine._target_=pkg.Cls"], ["++callback.mine._target_=pkg.Cls"]),
        (["schedule=null"], ["~schedule"]),
        (["transform=null"], ["transform=[]"]),
        (["~transform"], ["transform=[]"]),
        (["~recipe"], []),
        (["schedule=null", "schedule=cosine"], ["schedule=cosine"]),
        (["optimizer={lr: 1}"], ["++optimizer={lr: 1}"]),
        (["optimizer@task.inner=adamw"], ["optimizer@task.inner=adamw"]),
        (["~optimizer.lr"], ["~optimizer.lr"]),
    ],
)
def test_what_becomes_of_a_command_line(typed: list[str], normalised: list[str]) -> None:
    assert normalise(typed, LAYOUT) == normalised


@pytest.mark.parametrize(
    ("typed", "remedy"),
    [
        ("optimizr=a", "'optimizer'"),
        ("sead=1", "'seed'"),
        ("privacy=x", "privacy belongs to `train`"),
        ("trainer", "equals sign"),
        ("=3", "equals sign"),
        ("", "equals sign"),
        ("+++seed=3", "equals sign"),
    ],
)
def test_what_cannot_be_meant(typed: str, remedy: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        normalise([typed], LAYOUT)
    assert remedy in caught.value.remedy


@given(st.text())
def test_any_text_is_read_or_refused_in_four_parts(text: str) -> None:
    outcome: Any
    try:
        outcome = normalise([text], LAYOUT)
    except ConfigurationError as error:
        outcome = error.found and error.remedy
    assert outcome or text.startswith("~")


def test_names_of_nodes() -> None:
    assert [node_name(each) for each in ("sam", "theirs:sam", "mine.Sign")] == ["sam", "sam", "Sign"]
