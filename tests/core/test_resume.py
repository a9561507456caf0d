"""A run that is stopped anywhere and resumed ends as one that was not: weights, optimizer, metrics, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning_runs import Noisy, fit, problem, transformed
from torch import Tensor
from torch.optim import Optimizer

from lightrail import Closure, Transform
from lightrail.errors import CheckpointError, RunFolderError
from lightrail.run.checkpoint import load_checkpoint


class KilledError(Exception):
    pass


class KillAt(pl.Callback):
    """Ends the process's run without a word, in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise KilledError


class Metrics(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def _take(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    on_validation_end = on_train_epoch_end = _take


class Climb(Transform):
    def before_step(self, params: list[Tensor], closure: Closure) -> None:
        with closure.at([p + 0.05 * p.grad for p in params if p.grad is not None]):
            closure()


class Averaging(torch.optim.SGD):
    """Trains at one point and is evaluated at another: the average of all iterates."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = super().step(closure)
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state["count"] = state.get("count", 0) + 1
            mean = state.setdefault("mean", p.detach().clone())
            mean.lerp_(p.detach(), 1 / state["count"])
        return loss

    @torch.no_grad()
    def _swap(self, to_mean: bool) -> None:
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            if "mean" in state and state.get("at_mean", False) != to_mean:
                other = state["mean"].clone()
                state["mean"].copy_(p)
                p.copy_(other)
                state["at_mean"] = to_mean

    def eval(self) -> None:
        self._swap(True)

    def train(self) -> None:
        self._swap(False)


def adamw(params: list[Tensor]) -> Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


VARIANTS: dict[str, tuple[Callable[[Any], Optimizer], dict[str, Any]]] = {
    "plain": (adamw, {}),
    "augmentation": (adamw, {"dataset": Noisy(*problem().tensors)}),
    "workers": (adamw, {"dataset": Noisy(*problem().tensors), "num_workers": 1}),
    "lasting-workers": (adamw, {"num_workers": 2, "persistent": True}),
    "accumulation": (transformed(adamw, Climb()), {"window": True, "accumulate_grad_batches": 2}),
    "validation-within": (adamw, {"val_check_interval": 4}),
    "two-points": (lambda p: Averaging(p, lr=0.1, momentum=0.9), {}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_resumed_equals_undisturbed(tmp_path: Path, name: str) -> None:
    make, arguments = VARIANTS[name]
    expected = Metrics()
    whole, trainer, observed = fit(tmp_path / "whole", make, max_epochs=3, every=2, callbacks=[expected], **arguments)
    total = trainer.global_step
    for step in (3, total // 3 + 1, total // 3 + 2, total - 1):
        folder = tmp_path / f"killed-at-{step}"
        with pytest.raises(KilledError):
            fit(folder, make, max_epochs=3, every=2, callbacks=[KillAt(step)], **arguments)
        found = Metrics()
        last = folder / "checkpoints" / "last.ckpt"
        resumed, again, observed_again = fit(
            folder, make, max_epochs=3, every=2, seed=99, callbacks=[found], checkpoint=last, **arguments
        )
        for (key, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
            assert torch.equal(a, b), (step, key)
        assert str(trainer.optimizers[0].state_dict()) == str(again.optimizers[0].state_dict()), step
        assert found.seen, step
        assert expected.seen[-len(found.seen) :] == found.seen, step
        assert again.global_step == total
        assert observed.training.last == observed_again.training.last, step
        assert_same_checkpoint(tmp_path / "whole" / "checkpoints" / "last.ckpt", last)


def assert_same_checkpoint(left: Path, right: Path) -> None:
    a, b = load_checkpoint(left), load_checkpoint(right)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "loops"):
        assert str(a[key]) == str(b[key]), key
    assert str(a["lightrail"]["training"]) == str(b["lightrail"]["training"])
    assert str(a["lightrail"]["positions"]) == str(b["lightrail"]["positions"])


def test_a_longer_run_goes_on_from_the_horizon_of_a_shorter_one(tmp_path: Path) -> None:
    whole, _, _ = fit(tmp_path / "whole", adamw, max_steps=23, max_epochs=-1)
    fit(tmp_path / "short", adamw, max_steps=13, max_epochs=-1)
    longer, trainer, _ = fit(
        tmp_path / "short",
        adamw,
        max_steps=23,
        max_epochs=-1,
        seed=9,
        checkpoint=tmp_path / "short" / "checkpoints" / "last.ckpt",
    )
    assert trainer.global_step == 23
    for a, b in zip(whole.state_dict().values(), longer.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_more_epochs_go_on_from_a_finished_run(tmp_path: Path) -> None:
    whole, _, _ = fit(tmp_path / "whole", adamw, max_epochs=3)
    fit(tmp_path / "short", adamw, max_epochs=2)
    last = tmp_path / "short" / "checkpoints" / "last.ckpt"
    longer, _, _ = fit(tmp_path / "short", adamw, max_epochs=3, seed=9, checkpoint=last)
    for a, b in zip(whole.state_dict().values(), longer.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_the_evaluation_point_is_what_a_checkpoint_holds(tmp_path: Path) -> None:
    make, _ = VARIANTS["two-points"]
    task, trainer, _ = fit(tmp_path, make, max_epochs=1)
    checkpoint = load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    key = "net.0.weight"
    weight = task.get_parameter(key)
    assert torch.equal(checkpoint["current_model_state"][key], weight)
    assert torch.equal(checkpoint["state_dict"][key], trainer.optimizers[0].state[weight]["mean"])
    assert not torch.equal(checkpoint["state_dict"][key], checkpoint["current_model_state"][key])


def test_truncated_and_foreign_checkpoints_are_refused_by_name(tmp_path: Path) -> None:
    fit(tmp_path, adamw, max_epochs=1)
    last = tmp_path / "checkpoints" / "last.ckpt"
    truncated = tmp_path / "truncated.ckpt"
    truncated.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(truncated)
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"model": torch.zeros(2)}, foreign)
    with pytest.raises(CheckpointError, match="not a checkpoint of lightrail"):
        load_checkpoint(foreign)
    dangerous = tmp_path / "dangerous.ckpt"
    torch.save({"lightrail": {}, "loops": print}, dangerous)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(dangerous)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "absent.ckpt")


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(tmp_path, adamw, max_epochs=1)
    last = tmp_path / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    write = torch.save

    def save_until_full(content: Any, path: Any) -> None:
        write(content, path)
        Path(path).write_bytes(Path(path).read_bytes()[:1000])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", save_until_full)
    with pytest.raises(RunFolderError, match=r"last\.ckpt cannot be written") as caught:
        fit(tmp_path, adamw, max_epochs=2, checkpoint=last)
    assert "No space left on device" in str(caught.value)
    assert last.read_bytes() == before
    assert {path.name for path in last.parent.iterdir()} == {"best.ckpt", "last.ckpt"}
