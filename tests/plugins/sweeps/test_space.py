"""The space of a sweep, out of the command line."""

from __future__ import annotations

import re

import pytest

from lightrail.configuration import sweep
from lightrail.errors import ConfigurationError
from lightrail.sweep import Choices, Interval
from lightrail.sweep.method import Goal, SweepMethod, plain_space, space_from
from lightrail.sweep.space import space_of


def test_hydras_grammar_spells_the_space():
    space, fixed = space_of(
        [
            "sweep=optuna",
            "optimizer.lr=tag(log, interval(1e-4,1e-1))",
            "optimizer.momentum=interval(0,1)",
            "data.batch_size=int(interval(8,128))",
            "model.width=tag(log, int(interval(8,64)))",
            "model.depth=range(1,7,2)",
            "optimizer=adamw,sophia,adamw",
            "schedule=glob(cos*)",
            "+trainer.note=choice(a,'b c')",
            "seed=3",
        ]
    )
    assert space == {
        "optimizer.lr": Interval(1e-4, 0.1, log=True),
        "optimizer.momentum": Interval(0.0, 1.0),
        "data.batch_size": Interval(8, 128, whole=True),
        "model.width": Interval(8, 64, log=True, whole=True),
        "model.depth": Choices(("1", "3", "5")),
        "optimizer": Choices(("adamw", "sophia")),
        "schedule": Choices(("cosine",)),
        "+trainer.note": Choices(("a", "b\\ c")),
    }
    assert fixed == ["sweep=optuna", "seed=3"]
    assert space_from(plain_space(space)) == space


def test_the_last_word_on_a_key_counts():
    space, fixed = space_of(["optimizer.lr=interval(0,1)", "optimizer.lr=0.3", "seed=4", "+seed=1,2"])
    assert (space, fixed) == ({"+seed": Choices(("1", "2"))}, ["optimizer.lr=0.3"])


@pytest.mark.parametrize(
    ("override", "what", "remedy"),
    [
        ("optimizer.lr=interval(2,1)", "no numbers between", "Swap the ends"),
        ("optimizer.lr=interval(1,1)", "no numbers between", "two finite ends"),
        ("optimizer.lr=interval(0,inf)", "no numbers between", "two finite ends"),
        ("optimizer.lr=tag(log, interval(0,1))", "0 has none", r"interval\(0.0001,1\)"),
        ("optimizer.lr=tag(log, interval(-2,-1))", "-2 has none", "Leave tag"),
        ("optimizer=tag(log, choice(adamw,sgd))", "a tag that says nothing", "'log'"),
        ("optimizer.lr=tag(logarithm, interval(1,2))", "a tag that says nothing", "'logarithm'"),
        ("sweep.trials=10,20", "cannot vary", "start a sweep for each"),
        ("launch=here,slurm", "cannot vary", "start a sweep for each"),
        ("seed=1", "nothing to vary", "several values"),
    ],
)
def test_a_bad_space_is_told_in_four_parts(override, what, remedy):
    with pytest.raises(ConfigurationError, match=what) as caught:
        space_of([override])
    assert override in caught.value.found
    assert re.search(remedy, caught.value.remedy)


def test_a_grid_points_to_the_methods():
    with pytest.raises(ConfigurationError) as caught:
        sweep(["optimizer.lr=interval(0,1)"])
    assert "sweep=optuna" in caught.value.remedy


def test_numbers_are_typed_within_their_interval():
    third = Interval(1 / 3, 2 / 3)
    assert third.typed(0.5) == "0.5"
    assert third.typed(1 / 3) == repr(1 / 3)  # six digits would fall below
    assert third.typed(7.0) == repr(2 / 3)  # six digits would lie above
    assert Interval(1, 9, whole=True).typed(8.6) == "9"


class _Unchanged(SweepMethod):
    def ask(self, number):
        return {}

    def tell(self, number, value):
        pass


def test_another_metric_needs_its_direction(tmp_path):
    goal = Goal("val_loss", "min")
    with pytest.raises(ConfigurationError, match="less or more of 'val_accuracy'"):
        _Unchanged({}, tmp_path, goal, metric="val_accuracy")
    made = _Unchanged({}, tmp_path, goal, metric="val_accuracy", direction="max")
    assert made.goal == Goal("val_accuracy", "max")
    # As a sweep that goes on makes it, from its own goal and the same options.
    assert _Unchanged({}, tmp_path, made.goal, metric="val_accuracy", direction="max").goal == made.goal
    with pytest.raises(ConfigurationError, match="direction has no choice 'up'"):
        _Unchanged({}, tmp_path, goal, direction="up")
