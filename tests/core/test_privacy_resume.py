"""What was spent stays spent: a private run that is stopped anywhere and resumed tells what an unbroken one tells."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from privacy_runs import Watch, compose, flat, only, private, told, watched
from run_plugins import Signals

from lightrail import Run
from lightrail.errors import CheckpointError, Interrupted

FIRST = {"noise": 1.0, "steps": 16, "batch": 8, "records": 64}
TWO_EPOCHS = "trainer.max_epochs=2"


def stopped(run: Run, step: int) -> None:
    run.callbacks = [*run.callbacks, Signals(step)]
    with pytest.raises(Interrupted):
        run.execute(show_progress=False)


def resumed(root: Path, *overrides: str, **names: Any) -> Run:
    return private(root, f"run.resume={only(root)}", TWO_EPOCHS, *overrides, **names)


@pytest.mark.parametrize("step", [3, 8, 11])
def test_a_stopped_run_goes_on_with_its_ledger(tmp_path: Path, step: int) -> None:
    stopped(private(tmp_path, TWO_EPOCHS), step)
    spent = told(only(tmp_path))
    assert spent["events"] == [FIRST | {"steps": spent["events"][0]["steps"]}]
    assert step <= spent["events"][0]["steps"] <= step + 1
    run = resumed(tmp_path)
    run.execute(show_progress=False)
    ledger = told(only(tmp_path))
    assert ledger["events"] == ledger["planned"] == [FIRST]
    assert ledger["epsilon"] > spent["epsilon"]


def test_with_noise_that_can_be_repeated_a_stopped_run_ends_where_an_unbroken_one_does(tmp_path: Path) -> None:
    options = ("privacy.deterministic_noise=true", TWO_EPOCHS)
    whole = private(tmp_path / "whole", *options)
    whole.execute(show_progress=False)
    stopped(private(tmp_path / "stopped", *options), 5)
    run = resumed(tmp_path / "stopped", *options)
    run.execute(show_progress=False)
    torch.testing.assert_close(flat(run.task), flat(whole.task), rtol=0, atol=0)


def test_a_longer_run_keeps_its_noise_and_must_fit_its_target(tmp_path: Path) -> None:
    options = ("+privacy=dp_sgd", "privacy.accountant=rdp", "privacy.epsilon=4")
    compose(tmp_path, *options).execute(show_progress=False)
    before = told(only(tmp_path))
    longer = ("trainer.max_epochs=3", f"run.resume={only(tmp_path)}")
    with pytest.raises(CheckpointError, match="what is left of the privacy budget does not suffice"):
        compose(tmp_path, *options, *longer).execute(show_progress=False)
    # What was saved of the first part is as it was.
    assert told(only(tmp_path))["events"] == before["events"]
    compose(tmp_path, *options, *longer, "privacy.epsilon=8").execute(show_progress=False)
    ledger = told(only(tmp_path))
    assert ledger["noise"] == before["noise"]
    assert ledger["events"] == [before["events"][0] | {"steps": 24}]
    assert before["epsilon"] < ledger["epsilon"] <= 8


def test_a_run_without_a_ledger_cannot_become_private(tmp_path: Path) -> None:
    compose(
        tmp_path,
    ).execute(show_progress=False)
    checkpoint = only(tmp_path) / "checkpoints" / "last.ckpt"
    saved = torch.load(checkpoint, weights_only=False)
    with pytest.raises(CheckpointError, match="other plugins"):
        resumed(tmp_path).execute(show_progress=False)
    # Even where nothing else of the run tells.
    run = private(tmp_path / "other", TWO_EPOCHS)
    run.execute(show_progress=False)
    path = only(tmp_path / "other") / "checkpoints" / "last.ckpt"
    saved = torch.load(path, weights_only=False)
    saved["lightrail"]["privacy"] = None
    torch.save(saved, path)
    with pytest.raises(CheckpointError, match="was not trained privately"):
        resumed(tmp_path / "other", "trainer.max_epochs=3").execute(show_progress=False)


def test_noise_of_the_first_part_stays_in_the_ledger(tmp_path: Path) -> None:
    private(tmp_path, noise=2.0).execute(show_progress=False)
    resumed(tmp_path, noise=1.0).execute(show_progress=False)
    assert [(each["noise"], each["steps"]) for each in told(only(tmp_path))["events"]] == [(2.0, 8), (1.0, 8)]


def test_a_part_without_noise_makes_the_whole_not_private(tmp_path: Path) -> None:
    private(tmp_path, noise=0.0).execute(show_progress=False)
    resumed(tmp_path, noise=1.0).execute(show_progress=False)
    ledger = told(only(tmp_path))
    assert not ledger["is_private"]
    assert ledger["epsilon"] is None


@pytest.mark.parametrize("step", [3, 7, 11])
def test_an_epoch_of_fixed_batches_goes_on_with_the_records_that_are_left(tmp_path: Path, step: int) -> None:
    shuffle = "privacy.sampling=shuffle"
    first, before = private(tmp_path, shuffle, TWO_EPOCHS), Watch()
    first.callbacks = [*first.callbacks, before]
    stopped(first, step)
    after = watched(resumed(tmp_path, shuffle))
    ledger = told(only(tmp_path))
    assert ledger["events"] == ledger["planned"] == [{"noise": 1.0, "steps": 2, "batch": 64, "records": 64}]
    steps = [*before.records, *after.records]
    epochs = [[record for each in part for record in each] for part in (steps[:8], steps[8:])]
    assert [sorted(each) for each in epochs] == [list(range(64))] * 2


def test_fixed_batches_cannot_become_others_within_an_epoch(tmp_path: Path) -> None:
    shuffle = "privacy.sampling=shuffle"
    stopped(private(tmp_path, shuffle, TWO_EPOCHS), 3)
    with pytest.raises(CheckpointError, match="cannot go on with others"):
        resumed(tmp_path, shuffle, "data.batch_size=4").execute(show_progress=False)


def test_batches_cannot_be_drawn_in_another_way(tmp_path: Path) -> None:
    private(tmp_path).execute(show_progress=False)
    with pytest.raises(CheckpointError, match="cannot be accounted together"):
        resumed(tmp_path, "privacy.sampling=shuffle").execute(show_progress=False)


def test_what_was_released_beyond_an_earlier_checkpoint_counts(tmp_path: Path) -> None:
    private(tmp_path, TWO_EPOCHS, "run.name=run", "trainer.checkpoint_every=5").execute(show_progress=False)
    folder = tmp_path / "run"
    earlier = folder / "checkpoints" / "earlier.ckpt"
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=False)
    assert saved["lightrail"]["privacy"]["events"] == [FIRST]
    stopped(private(tmp_path, "trainer.max_epochs=3", f"run.resume={folder}"), 18)
    shutil.copy(folder / "checkpoints" / "last.ckpt", earlier)
    private(tmp_path, "trainer.max_epochs=3", f"run.resume={folder}").execute(show_progress=False)
    assert told(folder)["events"] == [FIRST | {"steps": 24}]
    # The same five steps once more, with other noise.
    private(tmp_path, "trainer.max_epochs=3", f"run.resume={earlier}").execute(show_progress=False)
    ledger = told(folder)
    again = 24 - torch.load(earlier, weights_only=False)["lightrail"]["privacy"]["step"]
    assert again == 5
    assert ledger["events"] == ledger["planned"] == [FIRST | {"steps": 24 + again}]
    assert any("earlier checkpoint" in line for line in ledger["assumptions"])
