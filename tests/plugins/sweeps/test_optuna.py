"""Optuna over the sweep's folder: better than chance, the same after a kill, and merciless to hopeless trials."""

from __future__ import annotations

import json
import math
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend

from lightrail.errors import CheckpointError, ConfigurationError
from lightrail.sweep import Choices, Goal, Interval
from lightrail_sweeps.optuna import Optuna

SPACE = {
    "lr": Interval(1e-5, 1.0, log=True),
    "width": Interval(8, 128, whole=True),
    "optimizer": Choices(("adamw", "sgd", "sophia")),
    "momentum": Interval(0.0, 1.0),
}
GOAL = Goal("val_loss", "min")


def loss(values: dict[str, str]) -> float:
    """Least, with 0, at lr 1e-3, width 64, adamw and momentum 0.9."""
    rate, width, momentum = float(values["lr"]), int(values["width"]), float(values["momentum"])
    chosen = {"adamw": 0.0, "sophia": 0.5, "sgd": 2.0}[values["optimizer"]]
    return (math.log10(rate) + 3) ** 2 + ((width - 64) / 40) ** 2 + chosen + 4 * (momentum - 0.9) ** 2


def carried_out(method: Optuna, numbers: range) -> list[dict[str, str]]:
    asked = []
    for number in numbers:
        asked.append(method.ask(number))
        method.tell(number, loss(asked[-1]))
    return asked


def test_it_beats_chance(tmp_path):
    def best(sampler: str, seed: int) -> float:
        method = Optuna(SPACE, tmp_path / f"{sampler}{seed}", GOAL, trials=30, sampler=sampler, seed=seed)
        return min(map(loss, carried_out(method, range(30))))

    inferred, drawn = ([best(sampler, seed) for seed in range(3)] for sampler in ("tpe", "random"))
    assert max(inferred) < min(drawn), (inferred, drawn)


def test_more_is_better_where_the_goal_says_so(tmp_path):
    method = Optuna({"x": Interval(-1.0, 1.0)}, tmp_path, Goal("val_accuracy", "max"), trials=25)
    for number in range(25):
        method.tell(number, -((float(method.ask(number)["x"]) - 0.6) ** 2))
    assert abs(float(method.ask(25)["x"]) - 0.6) < 0.3


PROGRAM = """
import sys, time
sys.path[:0] = [{tests!r}]
from pathlib import Path
import test_optuna as the
method = the.Optuna(the.SPACE, Path(sys.argv[1]), the.GOAL, trials=24, seed=1)
for number in range(24):
    values = method.ask(number)
    print(number, flush=True)
    time.sleep(0.05)  # so that it is killed before it ends
    method.tell(number, the.loss(values))
"""


def test_a_search_that_is_killed_goes_on_as_if_it_had_not_been(tmp_path):
    whole = carried_out(Optuna(SPACE, tmp_path / "whole", GOAL, trials=24, seed=1), range(24))
    program = PROGRAM.format(tests=str(Path(__file__).parent))
    chance = random.Random(0)
    for _ in range(2):
        search = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "killed")], stdout=subprocess.PIPE)
        assert search.stdout is not None
        assert search.stdout.readline() == b"0\n"
        time.sleep(chance.uniform(0.0, 0.3))
        search.send_signal(signal.SIGKILL)
        assert search.wait() == -signal.SIGKILL
        search.stdout.close()
    # A controller that goes on asks for all trials again, and tells again what it reads from their folders.
    assert carried_out(Optuna(SPACE, tmp_path / "killed", GOAL, trials=24, seed=1), range(24)) == whole
    journal = optuna.storages.JournalStorage(JournalFileBackend(str(tmp_path / "killed" / "optuna.journal")))
    (study,) = optuna.get_all_study_summaries(journal)
    assert study.n_trials == 24  # none was lost, and none was proposed twice


def test_a_line_that_was_torn_by_a_kill_is_cut_off(tmp_path):
    method = Optuna(SPACE, tmp_path, GOAL)
    first = carried_out(method, range(3))
    with open(tmp_path / "optuna.journal", "ab") as journal:
        journal.write(b'{"op_code":6,"worker_id":"x","trial')
    again = Optuna(SPACE, tmp_path, GOAL)
    again.tell(3, loss(again.ask(3)))
    lines = (tmp_path / "optuna.journal").read_bytes().splitlines()
    assert all(json.loads(line) for line in lines)
    assert [Optuna(SPACE, tmp_path, GOAL).ask(number) for number in range(3)] == first


def curve(number: int, validation: int) -> float:
    """Trials 0 to 4 end near 0.1; odd ones after them stay near 1."""
    level = 1.0 if number >= 5 and number % 2 else 0.1
    return level + 1.0 / validation


@pytest.mark.parametrize(("pruner", "stopped"), [("median", {5: 2, 7: 2, 9: 2}), ("none", {})])
def test_hopeless_trials_are_stopped_and_no_others(tmp_path, pruner, stopped):
    controller = Optuna(SPACE, tmp_path, GOAL, pruner=pruner)
    found = {}
    for number in range(10):
        controller.ask(number)
        # Every job has an object of its own, as on another machine.
        job = Optuna(SPACE, tmp_path, GOAL, pruner=pruner)
        for validation in range(1, 6):
            if job.is_hopeless(number, validation, curve(number, validation)):
                found[number] = validation
                # One that was started again is no better.
                assert Optuna(SPACE, tmp_path, GOAL, pruner=pruner).is_hopeless(number, 1, 0.0)
                break
        controller.tell(number, curve(number, validation))
    assert found == stopped
    states = [trial.state.name for trial in Optuna(SPACE, tmp_path, GOAL, pruner=pruner)._study.trials]
    assert [states[number] for number in range(10)] == [
        "PRUNED" if number in stopped else "COMPLETE" for number in range(10)
    ]


def test_hyperband_stops_the_worst(tmp_path):
    controller = Optuna(SPACE, tmp_path, GOAL, pruner="hyperband", sampler="random", trials=30)
    stopped = []
    for number in range(30):
        controller.ask(number)
        level = float(number % 10)
        for validation in range(1, 10):
            if controller.is_hopeless(number, validation, level):
                stopped.append(level)
                break
        controller.tell(number, level)
    assert stopped
    assert 0.0 not in stopped


def test_a_failure_that_was_tried_again_counts(tmp_path):
    method = Optuna(SPACE, tmp_path, GOAL)
    first = method.ask(0)
    method.tell(0, math.nan)
    assert method._trial(0).state.name == "FAIL"
    method.tell(0, 0.25)
    method.tell(0, 7.0)
    assert (method._trial(0).value, method.ask(0)) == (0.25, first)


def test_bad_options_are_told(tmp_path):
    wrongs: list[dict[str, Any]] = [
        {"sampler": "cmaes"},
        {"pruner": "median2"},
        {"trials": 0},
        {"warmup": -1},
        {"startup": -1},
    ]
    for wrong in wrongs:
        with pytest.raises(ConfigurationError):
            Optuna(SPACE, tmp_path, GOAL, **wrong)
    with pytest.raises(CheckpointError, match="trial 7 was never asked for"):
        Optuna(SPACE, tmp_path, GOAL).tell(7, 1.0)
