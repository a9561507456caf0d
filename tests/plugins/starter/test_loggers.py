"""W&B without a network or an account, and TensorBoard."""

from __future__ import annotations

import logging
import sys
import time

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightrail.errors import ConfigurationError, PluginError
from lightrail_starter.data.rows import Rows, as_is
from lightrail_starter.loggers.tensorboard import TensorBoard
from lightrail_starter.loggers.wandb import Wandb

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    """A machine where nobody is logged in."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return monkeypatch


class Task(LightningModule):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        loss = self.linear(batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.linear(batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader():
    return DataLoader(Rows(torch.randn(8, 2)), batch_size=4, collate_fn=as_is)


def trainer_with(logger):
    return Trainer(
        max_epochs=2, logger=logger, log_every_n_steps=1, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip


def offline_runs(folder):
    return sorted(path.name.rpartition("-")[2] for path in folder.glob("wandb/offline-run-*"))


def test_one_offline_run_spans_training_and_test_and_is_resumed_under_its_id(tmp_path, capfd):
    folder = tmp_path / "run"
    logger = Wandb(folder=str(folder), project="tests")
    logger.log_hyperparams({"lr": 0.1})
    task, trainer = Task(), trainer_with(logger)
    assert not hasattr(logger, "experiment")
    assert not folder.exists()
    assert logger.state_dict() == {"id": None}
    trainer.fit(task, loader())
    trainer.test(task, loader(), verbose=False)
    state = logger.state_dict()
    logger.close()
    assert offline_runs(folder) == [state["id"]]
    (record,) = folder.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 20  # W&B's own process writes the file
    while b"test_loss" not in record.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)

    resumed = Wandb(folder=str(folder), project="tests")
    resumed.load_state_dict(state)
    resumed.log_metrics({"loss": 0.5}, step=9)
    assert resumed.version == state["id"]
    resumed.finalize("failed")
    assert set(offline_runs(folder)) == {state["id"]}
    output = capfd.readouterr()
    assert output.out == ""
    assert "wandb" not in output.err


def test_the_mode_follows_the_login(nobody, tmp_path):
    assert Wandb()._resolved_mode() == "offline"
    with pytest.raises(ConfigurationError, match="logged in"):
        Wandb(mode="online")
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password 0123\n")
    assert Wandb()._resolved_mode() == "online"
    assert Wandb(mode="offline")._resolved_mode() == "offline"
    (tmp_path / "netrc").write_text("machine elsewhere.org login user password 0123\n")
    assert Wandb()._resolved_mode() == "offline"
    (tmp_path / "netrc").write_text("this is { no netrc")
    assert Wandb()._resolved_mode() == "offline"
    nobody.setenv("WANDB_API_KEY", "0" * 40)
    assert Wandb()._resolved_mode() == "online"
    nobody.setenv("WANDB_MODE", "dryrun")
    assert Wandb()._resolved_mode() == "offline"
    nobody.setenv("WANDB_MODE", "disabled")
    assert Wandb()._resolved_mode() == "disabled"
    with pytest.raises(ConfigurationError, match="mode"):
        Wandb(mode="on")  # type: ignore[arg-type]


def test_disabled_writes_nothing(tmp_path):
    logger = Wandb(folder=str(tmp_path / "run"), mode="disabled")
    logger.log_metrics({"a": 1.0}, step=1)
    logger.finalize("success")
    assert not (tmp_path / "run").exists()


def test_a_log_that_cannot_start_does_not_stop_the_run(tmp_path, monkeypatch):
    import wandb
    import wandb.errors

    def refuse(**options):
        raise wandb.errors.CommError("no server")

    monkeypatch.setattr(wandb, "init", refuse)
    logger = Wandb(folder=str(tmp_path))
    with pytest.warns(UserWarning, match="no server"):
        logger.log_metrics({"a": 1.0}, step=1)
    logger.log_metrics({"a": 2.0}, step=2)


def test_online_falls_back_to_offline(tmp_path, monkeypatch):
    import wandb
    import wandb.errors

    real, asked = wandb.init, []

    def init(**options):
        asked.append(options["mode"])
        if options["mode"] == "online":
            raise wandb.errors.CommError("no network")
        return real(**options)

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    logger = Wandb(folder=str(tmp_path))
    with pytest.warns(UserWarning, match="no network"):
        logger.log_metrics({"a": 1.0}, step=1)
    logger.close()
    assert asked == ["online", "offline"]
    assert len(offline_runs(tmp_path)) == 1


def test_a_second_run_in_one_process_ends_the_first(tmp_path):
    first, second = Wandb(folder=str(tmp_path / "a")), Wandb(folder=str(tmp_path / "b"))
    first.log_metrics({"a": 1.0}, step=1)
    second.log_metrics({"a": 1.0}, step=1)
    assert first._run is None
    assert second._run is not None
    assert first.version != second.version
    second.close()
    assert Wandb._open is None
    assert offline_runs(tmp_path / "a") == [first.version]
    assert offline_runs(tmp_path / "b") == [second.version]


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = Wandb(folder=str(tmp_path / "run"))
    logger.log_metrics({"a": 1.0}, step=1)
    assert not (tmp_path / "run").exists()


def test_tensorboard_writes_into_the_run_folder(tmp_path):
    pytest.importorskip("tensorboard")
    logger = TensorBoard(folder=str(tmp_path))
    trainer_with(logger).fit(Task(), loader())
    (events,) = tmp_path.glob("tensorboard/events.out.*")
    assert b"loss" in events.read_bytes()
    with pytest.raises(ConfigurationError, match="flush_seconds"):
        TensorBoard(folder=str(tmp_path), flush_seconds=0)


def test_without_tensorboard_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(PluginError, match="'tensorboard'") as caught:
        TensorBoard()
    assert "pip install" in caught.value.remedy
