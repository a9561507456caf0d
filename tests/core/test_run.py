"""Whole runs through the command's own entry, in this process."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest
import torch

import lightrail
from lightrail.run.checkpoint import load_checkpoint
from lightrail.train import main

TINY = [
    "task=run_plugins.Module",
    "data=run_plugins.Points",
    "logger=[csv]",
    "trainer.max_epochs=2",
    "trainer.accelerator=cpu",
]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def train(*overrides: str) -> int:
    return main([*TINY, *overrides])


def newest() -> Path:
    return max(Path("runs").iterdir(), key=lambda path: path.stat().st_mtime_ns)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"]


def test_a_strangers_module_and_data_run_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert train() == 0
    folder = newest()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["steps"] == 8
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml",
        "lock.json",
        "metrics.csv",
        "summary.json",
        "report.html",
        "checkpoints",
    }
    assert str(folder.resolve() / "report.html") in capsys.readouterr().out
    lock = json.loads((folder / "lock.json").read_text())
    named = {plugin["kind"]: plugin["name"] for plugin in lock["plugins"]}
    assert named["optimizer"] == "adamw"


def test_the_python_api_gives_the_result() -> None:
    result = lightrail.compose([*TINY, "run.name=mine"]).execute(show_progress=False)
    assert result.folder == Path("runs/mine").resolve()
    assert result.checkpoint == result.folder / "checkpoints" / "best.ckpt"
    assert result.metrics["val_loss"] > 0


def test_a_tasks_own_optimizer_is_kept_until_one_is_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("task=run_plugins.OwnOptimizer", "run.name=own") == 0
    assert "the task's own configure_optimizers" in capsys.readouterr().err
    assert (
        load_checkpoint(Path("runs/own/checkpoints/last.ckpt"))["optimizer_states"][0]["param_groups"][0]["lr"] == 0.125
    )
    assert train("task=run_plugins.OwnOptimizer", "optimizer=adamw", "schedule=null", "run.name=chosen") == 0
    group = load_checkpoint(Path("runs/chosen/checkpoints/last.ckpt"))["optimizer_states"][0]["param_groups"][0]
    assert "betas" in group


def test_transforms_act() -> None:
    assert train("run.name=plain") == 0
    assert train("+transform=[run_plugins.LooksTwice]", "run.name=twice") == 0
    assert not torch.equal(weights(Path("runs/plain"))["net.0.weight"], weights(Path("runs/twice"))["net.0.weight"])


def test_a_wrapper_takes_a_run_and_returns_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        train("optimizer=sgd", "optimizer.lr=0.2", "schedule=null", "privacy=run_plugins.Wrapper", "run.name=wrapped")
        == 0
    )
    assert "updates times 0.5" in capsys.readouterr().err
    assert train("optimizer=sgd", "optimizer.lr=0.1", "schedule=null", "run.name=slow") == 0
    for a, b in zip(weights(Path("runs/wrapped")).values(), weights(Path("runs/slow")).values(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_default_schedule_gives_way_to_a_method_that_sets_its_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("optimizer=run_plugins.SetsItsStep") == 0
    assert "sets its own step size" in capsys.readouterr().err


def test_metrics_are_tracked_logged_and_kept() -> None:
    assert (
        main(
            [
                "data=digits",
                "model=mlp",
                "logger=[csv]",
                "trainer.max_epochs=2",
                "trainer.accelerator=cpu",
                "+metric=[f1]",
                "run.name=digits",
            ]
        )
        == 0
    )
    with open("runs/digits/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert {"step", "epoch", "train_loss", "train_accuracy", "lr", "val_loss", "val_accuracy", "val_f1"} <= set(rows[0])
    summary = json.loads(Path("runs/digits/summary.json").read_text())
    assert {"train_loss", "val_accuracy", "test_accuracy", "test_f1"} <= set(summary["metrics"])
    report = Path("runs/digits/report.html").read_text()
    assert report.count("data:image/png;base64,") >= 4


def test_sigterm_saves_says_how_to_resume_and_resumes_exactly(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("run.name=whole") == 0
    status = train("run.name=stopped", "callback=[run_plugins.Signals]")
    assert status == 143
    out = capsys.readouterr().out
    assert out.rstrip().endswith(f"train run.resume={Path('runs/stopped').resolve()}")
    assert json.loads(Path("runs/stopped/summary.json").read_text())["status"] == "stopped"
    assert load_checkpoint(Path("runs/stopped/checkpoints/last.ckpt"))["lightrail"]["steps"] == 4
    assert main(["run.resume=latest", "callback=[]"]) == 0
    for a, b in zip(weights(Path("runs/whole")).values(), weights(Path("runs/stopped")).values(), strict=True):
        assert torch.equal(a, b)
    assert Path("runs/whole/metrics.csv").read_bytes() == Path("runs/stopped/metrics.csv").read_bytes()


def test_an_average_of_the_weights_resumes_exactly() -> None:
    ema = ["callback.ema.decay=0.9", "callback.ema.warmup=false"]
    assert train("run.name=whole", "callback=[ema]", *ema) == 0
    assert train("run.name=stopped", "callback=[ema,run_plugins.Signals]", *ema) == 143
    assert main(["run.resume=runs/stopped", "callback.Signals.step=-1"]) == 0
    whole, resumed = (load_checkpoint(Path("runs") / n / "checkpoints" / "last.ckpt") for n in ("whole", "stopped"))
    for key in ("state_dict", "current_model_state"):
        assert str(whole[key]) == str(resumed[key])
    assert str(whole["state_dict"]) != str(whole["current_model_state"])


def test_a_second_sigint_stops_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("callback=[run_plugins.Signals]", "callback.Signals.number=2", "callback.Signals.times=2") == 2
    error = capsys.readouterr().err
    assert "stopped at once" in error
    assert "Traceback" not in error


def assert_four_parts(error: str) -> None:
    assert all(part in error for part in ("found:", "allowed:", "remedy:"))
    assert "Traceback" not in error


REFUSED = {
    "unknown plugin": (["optimizer=sofia"], "sophia"),
    "unknown kind": (["optimiser=adamw"], "optimizer"),
    "unknown key": (["optimizer.learning_rate=1"], "learning_rate"),
    "key typed with plus": (["+optimizer.wings=2"], "wings"),
    "wrong type": (["optimizer.lr=fast"], "optimizer.lr"),
    "out of range for the platform": (["trainer.accumulate=0"], "accumulate"),
    "out of range for the plugin": (["optimizer=run_plugins.SetsItsStep", "optimizer.scale=-1"], "scale"),
    "no such module": (["task=nowhere.Module"], "nowhere"),
    "more devices than there are": (["trainer.accelerator=gpu", "trainer.devices=64"], "devices"),
    "closure-level at 16-mixed": (["+transform=[run_plugins.LooksTwice]", "trainer.precision=16-mixed"], "16-mixed"),
    "schedule on a method that sets its step": (["optimizer=run_plugins.SetsItsStep", "schedule=cosine"], "schedule"),
    "a task that cannot sample": (["optimizer=sophia"], "sampled_loss"),
    "a model that the task does not take": (["model=mlp"], "takes no model"),
    "no checkpoint to resume": (["run.resume=latest"], "no run to resume"),
    "a folder that is no run": (["run.resume=."], "resume"),
    "a folder that cannot be made": (["run.root=/proc/nowhere"], "cannot be made"),
    "a file in the way": (["run.root=file.txt"], "cannot be made"),
    "a missing data file": (["data=csv", "data.path=absent.csv", "task=regression"], "absent.csv"),
    "an unknown argument of Lightning's Trainer": (["trainer.wings=2"], "wings"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_four_parts(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file.txt").write_text("not a folder")
    overrides, named = REFUSED[case]
    assert train(*overrides) == 2
    error = capsys.readouterr().err
    assert_four_parts(error)
    assert named in error
    assert not list(Path().glob("runs/*/checkpoints/*"))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    status = train("data.poisoned=40", "trainer.checkpoint_every=1", "run.name=poisoned")
    assert status == 2
    error = capsys.readouterr().err
    assert_four_parts(error)
    assert "became nan at step 3" in error
    checkpoint = load_checkpoint(Path("runs/poisoned/checkpoints/last.ckpt"))
    assert checkpoint["lightrail"]["steps"] == 2
    assert all(torch.isfinite(value).all() for value in checkpoint["state_dict"].values())
    assert json.loads(Path("runs/poisoned/summary.json").read_text())["status"] == "failed"
    assert train("data.poisoned=40", "run.on_nan=skip", "run.name=skipped") == 0
    assert all(torch.isfinite(value).all() for value in weights(Path("runs/skipped")).values())


def test_a_truncated_checkpoint_is_refused_and_nothing_is_lost(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("run.name=cut") == 0
    before = {path: path.read_bytes() for path in Path("runs/cut").glob("*") if path.is_file()}
    last = Path("runs/cut/checkpoints/last.ckpt")
    last.write_bytes(last.read_bytes()[:1000])
    assert main(["run.resume=runs/cut"]) == 2
    error = capsys.readouterr().err
    assert_four_parts(error)
    assert "cannot be read" in error
    assert {path: path.read_bytes() for path in Path("runs/cut").glob("*") if path.is_file()} == before


def test_a_changed_plugin_is_refused_until_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("run.name=old", "optimizer=adamw") == 0
    lock = Path("runs/old/lock.json")
    lock.write_text(
        lock.read_text()
        .replace(f'"version": "{torch.__version__}"', '"version": "0.0.1"')
        .replace('"version": "0.1.0"', '"version": "0.0.1"')
    )
    assert main(["run.resume=runs/old"]) == 2
    assert "have changed" in capsys.readouterr().err
    assert main(["run.resume=runs/old", "run.accept_changes=true", "trainer.max_epochs=3"]) == 0
    assert main(["run.resume=runs/old", "run.accept_changes=true", "optimizer=sgd"]) == 2
    assert "other plugins" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_full_disk_in_the_middle_of_a_run_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import lightrail.run.checkpoint as checkpoint

    write, count = torch.save, [0]

    def save(content: object, path: Path) -> None:
        count[0] += 1
        if count[0] == 3:
            with open("/dev/full", "wb", buffering=0) as full:
                full.write(b"no room")
        write(content, path)

    monkeypatch.setattr(checkpoint.torch, "save", save)
    assert train("trainer.checkpoint_every=1", "run.name=full") == 2
    error = capsys.readouterr().err
    assert_four_parts(error)
    assert "No space left on device" in error
    assert load_checkpoint(Path("runs/full/checkpoints/last.ckpt"))["lightrail"]["steps"] == 2
