"""The metrics file: what is logged is in the file at once, and a resumed run leaves the bytes of one that ran on."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from warm_process import run_warm

from lightrail.errors import DataError, RunFolderError
from lightrail.run.metrics_file import MetricsFile, read_metrics

Call = tuple[int, dict[str, float]]

# As a run logs: training, validation at some of the same steps with columns of its own, and a test at the end.
CALLS: list[Call] = [
    (10, {"train_loss": 2.5, "lr": 0.1, "epoch": 0}),
    (20, {"train_loss": 1.0 / 3.0, "lr": 0.1, "epoch": 0}),
    (20, {"val_loss": 1.25, "epoch": 0}),
    (30, {"train_loss": 0.1 + 0.2, "lr": 1e-17, "epoch": 1}),
    (40, {"train_loss": float("nan"), "lr": 0.05, "epoch": 1}),
    (40, {"val_loss": 1.0, "val_accuracy": 0.5, "epoch": 1}),
    (40, {"test_loss": 1.5, "epoch": 2}),
]


def write(folder: Path, calls: Iterable[Call]) -> MetricsFile:
    logger = MetricsFile(str(folder))
    for step, metrics in calls:
        logger.log_metrics(metrics, step=step)
    return logger


def test_rows_are_steps_and_columns_appear_in_order(tmp_path: Path) -> None:
    logger = write(tmp_path, CALLS)
    assert logger.path.read_text() == (
        "step,epoch,train_loss,lr,val_loss,val_accuracy,test_loss\n"
        "10,0,2.5,0.1,,,\n"
        "20,0,0.3333333333333333,0.1,1.25,,\n"
        "30,1,0.30000000000000004,1e-17,,,\n"
        "40,1,nan,0.05,1.0,0.5,\n"
        "40,2,,,,,1.5\n"
    )
    assert os.listdir(tmp_path) == ["metrics.csv"]


def test_floats_read_back_as_the_same_floats(tmp_path: Path) -> None:
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0]
    logger = write(tmp_path, [(step, {"x": value}) for step, value in enumerate(values)])
    assert [(step, value.hex()) for step, value in read_metrics(logger.path)["x"]] == [
        (step, value.hex()) for step, value in enumerate(values)
    ]


def test_calls_that_disagree_keep_both_values(tmp_path: Path) -> None:
    logger = write(tmp_path, [(1, {"loss": 1.0}), (1, {"loss": 2.0}), (1, {"loss": 2.0, "other": 3.0})])
    assert read_metrics(logger.path) == {"loss": [(1, 1.0), (1, 2.0)], "other": [(1, 3.0)]}


def test_a_call_without_a_step_joins_the_last_row(tmp_path: Path) -> None:
    logger = write(tmp_path, [(7, {"loss": 1.0})])
    logger.log_metrics({"other": 2.0})
    logger.log_metrics({"step": 9, "loss": 0.5})
    logger.log_metrics({"epoch": 3}, step=11)
    assert logger.path.read_text() == "step,epoch,loss,other\n7,,1.0,2.0\n9,,0.5,\n"


def test_names_with_commas_and_quotes_survive_new_columns(tmp_path: Path) -> None:
    logger = write(tmp_path, [(1, {'a,"b"': 1.0}), (2, {'a,"b"': 2.0, "c\nd": 3.0}), (3, {"é": 4.0}), (4, {"é": 5.0})])
    assert read_metrics(logger.path) == {
        'a,"b"': [(1, 1.0), (2, 2.0)], "c\nd": [(2, 3.0)], "é": [(3, 4.0), (4, 5.0)]
    }  # fmt: skip


@pytest.mark.parametrize("extra", [0, 1, 3, len(CALLS)])
@pytest.mark.parametrize("checkpoint", range(len(CALLS) + 1))
def test_a_resumed_file_equals_one_that_ran_on(tmp_path: Path, checkpoint: int, extra: int) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    undisturbed = write(tmp_path / "a", CALLS)
    killed = write(tmp_path / "b", CALLS[:checkpoint])
    state = killed.state_dict()
    for step, metrics in CALLS[checkpoint : checkpoint + extra]:  # lived through after the checkpoint, then killed
        killed.log_metrics(metrics, step=step)
    resumed = MetricsFile(str(tmp_path / "b"))
    resumed.load_state_dict(state)
    if checkpoint == 0:
        assert not resumed.path.exists()
    for step, metrics in CALLS[checkpoint:]:
        resumed.log_metrics(metrics, step=step)
    assert resumed.path.read_bytes() == undisturbed.path.read_bytes()


def test_the_state_is_loaded_with_weights_only(tmp_path: Path) -> None:
    import torch

    state = write(tmp_path, CALLS).state_dict()
    torch.save(state, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == state


def test_a_state_from_another_folder_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    state = write(tmp_path / "a", CALLS).state_dict()
    other = write(tmp_path / "b", CALLS[:1])
    before = other.path.read_bytes()
    other.load_state_dict(state)
    assert other.path.read_bytes() == before


def test_truncate_drops_later_rows_and_the_columns_that_only_they_filled(tmp_path: Path) -> None:
    logger = write(tmp_path, CALLS)
    logger.truncate(20)
    assert logger.path.read_text() == (
        "step,epoch,train_loss,lr,val_loss\n10,0,2.5,0.1,\n20,0,0.3333333333333333,0.1,1.25\n"
    )
    logger.truncate(5)
    assert not logger.path.exists()
    logger.log_metrics({"loss": 1.0}, step=1)
    assert logger.path.read_text() == "step,epoch,loss\n1,,1.0\n"


def test_a_file_that_is_there_is_continued(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    for call in CALLS:
        write(tmp_path / "parts", [call])
    assert (tmp_path / "parts/metrics.csv").read_bytes() == write(tmp_path / "whole", CALLS).path.read_bytes()


def test_a_line_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    logger = write(tmp_path, [(1, {"loss": 1.0}), (2, {"loss": 0.125})])
    logger.path.write_bytes(logger.path.read_bytes()[:-3])
    assert read_metrics(logger.path) == {"loss": [(1, 1.0)]}
    write(tmp_path, [(2, {"loss": 0.125})])
    assert read_metrics(logger.path) == {"loss": [(1, 1.0), (2, 0.125)]}


def test_a_killed_process_loses_nothing_that_it_logged(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from lightrail.run.metrics_file import MetricsFile\n"
        "logger = MetricsFile(sys.argv[1])\n"
        "for step in range(100):\n"
        "    logger.log_metrics({'loss': step / 7}, step=step)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    finished = run_warm([sys.executable, "-c", program, tmp_path])
    assert finished.returncode == -signal.SIGKILL
    assert read_metrics(tmp_path / "metrics.csv")["loss"] == [(step, step / 7) for step in range(100)]


def test_only_rank_zero_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = write(tmp_path, CALLS)
    assert logger.state_dict() == {}
    logger.load_state_dict({})
    logger.truncate(0)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError) as caught:
        write(tmp_path / "file", CALLS)
    assert "Not a directory" in caught.value.found
    assert "run.root" in caught.value.remedy
    with pytest.raises(RunFolderError, match="has no folder"):
        MetricsFile().log_metrics({"loss": 1.0}, step=1)


def test_a_disk_that_fills_up_mid_run_leaves_a_file_that_can_be_resumed(tmp_path: Path) -> None:
    logger = write(tmp_path, CALLS[:4])
    state, before = logger.state_dict(), logger.path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 3, hard))
    try:
        with pytest.raises(RunFolderError, match=r"metrics\.csv cannot be written"):
            logger.log_metrics({"train_loss": 1.0}, step=40)  # a row more
        with pytest.raises(RunFolderError, match=r"metrics\.csv cannot be written"):
            logger.log_metrics({"new_column": 1.0}, step=40)  # a whole new file
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["metrics.csv"]
    resumed = MetricsFile(str(tmp_path))
    resumed.load_state_dict(state)
    assert resumed.path.read_bytes() == before


def test_a_cell_that_is_not_a_number_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,epoch,loss\n1,0,0.5\n2,0,fast\n")
    with pytest.raises(DataError) as caught:
        read_metrics(tmp_path / "metrics.csv")
    assert "'fast' in row 2, column loss" in caught.value.found


@pytest.mark.filterwarnings("ignore")
def test_lightning_logs_through_it(tmp_path: Path) -> None:
    import lightning.pytorch as pl
    import torch

    class Line(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch: torch.Tensor) -> torch.Tensor:
            loss = self.layer(batch).square().mean()
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch: torch.Tensor) -> None:
            self.log("val_loss", self.layer(batch).square().mean())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    loader = torch.utils.data.DataLoader(torch.ones(4, 1))  # type: ignore[arg-type]
    logger = MetricsFile(str(tmp_path))
    trainer = pl.Trainer(max_epochs=2, logger=logger, log_every_n_steps=2, accelerator="cpu", barebones=False,
                         enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(Line(), loader, loader)
    curves = read_metrics(tmp_path / "metrics.csv")
    assert [step for step, _ in curves["train_loss"]] == [1, 3, 5, 7]
    assert [step for step, _ in curves["val_loss"]] == [3, 7]
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 5
    assert list((tmp_path / "checkpoints").glob("*.ckpt"))
