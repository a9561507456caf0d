"""A run that is a trial of a sweep: it ends early, and well, once its sweep has given it up."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch

from lightrail.configuration import compose
from lightrail.launch import Order, write_order
from lightrail.sweep import Goal, Interval
from lightrail.sweep.method import plain_space
from lightrail.sweep.pruning import pruning_of
from lightrail_sweeps.optuna import Optuna

SPACE = {"optimizer.lr": Interval(1e-4, 1e-1, log=True)}
GOAL = Goal("val_loss", "min")
NUMBER = 5


def trial_of_a_sweep(folder: Path, *, rivals: float) -> Order:
    """The order of the sixth trial; five that ended before it were at ``rivals`` at each of their validations."""
    method = Optuna(SPACE, folder, GOAL)
    for number in range(NUMBER):
        method.ask(number)
        for validation in range(1, 5):
            method.is_hopeless(number, validation, rivals)
        method.tell(number, rivals)
    name = "lightrail_sweeps.optuna.Optuna"
    content = {"method": {"name": name, "target": name, "options": {"trials": 20}}, "goal": asdict(GOAL)}
    (folder / "sweep.json").write_text(json.dumps({**content, "space": plain_space(SPACE)}))
    values = method.ask(NUMBER)
    job = folder / "jobs" / "5_trial"
    (job / "checkpoints").mkdir(parents=True)
    (job / "trial.json").write_text(json.dumps({"number": NUMBER, "values": values}))
    words = [f"{key}={value}" for key, value in values.items()]
    settings = ["model=mlp", "logger=csv", "trainer.max_epochs=4", "trainer.accelerator=cpu"]
    return write_order(compose([*settings, *words]), job)


def test_a_hopeless_trial_ends_early_and_whole(tmp_path):
    order = trial_of_a_sweep(tmp_path, rivals=1e-6)
    result = order.run().execute(show_progress=False)
    summary = json.loads((order.folder / "summary.json").read_bytes())
    assert (summary["status"], summary["epochs"]) == ("stopped early", 2)  # its first validation is not judged
    assert any("stopped early after validation 2" in note for note in summary["notes"])
    assert "val_loss" in summary["metrics"]
    assert not any(name.startswith("test") for name in summary["metrics"])
    assert result.last_checkpoint is not None
    checkpoint = torch.load(result.last_checkpoint, weights_only=False)
    assert checkpoint["global_step"] == summary["steps"] == summary["monitor"]["step"]
    assert (order.folder / "report.html").is_file()
    told = Optuna(SPACE, tmp_path, GOAL)
    told.tell(NUMBER, summary["metrics"]["val_loss"])
    assert told._trial(NUMBER).state.name == "PRUNED"
    assert sorted(told._trial(NUMBER).intermediate_values) == [1, 2]
    # One that goes on counts on from its checkpoint.
    pruning = pruning_of(order.folder)
    assert pruning is not None
    pruning.load_state_dict(next(state for key, state in checkpoint["callbacks"].items() if "Pruning" in key))
    assert pruning.validations == 2


def test_a_trial_with_hope_is_left_alone(tmp_path):
    order = trial_of_a_sweep(tmp_path, rivals=1e6)
    order.run().execute(show_progress=False)
    summary = json.loads((order.folder / "summary.json").read_bytes())
    assert (summary["status"], summary["epochs"]) == ("finished", 4)
    assert "test_loss" in summary["metrics"]


def test_other_runs_ask_nobody(tmp_path):
    assert pruning_of(tmp_path) is None
    (tmp_path / "jobs" / "0").mkdir(parents=True)
    (tmp_path / "jobs" / "0" / "trial.json").write_text('{"number": 0, "values": {}}')
    assert pruning_of(tmp_path / "jobs" / "0") is None  # no sweep.json
    (tmp_path / "sweep.json").write_text("{}")
    assert pruning_of(tmp_path / "jobs" / "0") is None  # a grid, without a method


def test_a_sweep_that_cannot_be_asked_costs_no_run(tmp_path, capsys):
    order = trial_of_a_sweep(tmp_path, rivals=1e-6)
    pruning = pruning_of(order.folder)
    assert pruning is not None
    (tmp_path / "optuna.journal").write_text("")
    assert pruning._asked(1.0) is False
    assert pruning._asked(1.0) is False
    assert capsys.readouterr().err.count("cannot be asked") == 1
