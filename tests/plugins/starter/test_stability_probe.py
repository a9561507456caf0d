"""The stability probe: exact figures on quadratics, a run that it does not change, and what it refuses."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning_runs  # type: ignore[import-not-found]
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.testing.quiet_trainer import quiet_trainer
from lightrail_starter.callbacks import stability_probe
from lightrail_starter.callbacks.mollification import Mollification
from lightrail_starter.callbacks.stability_measures import WatchedReLUs, stable_below
from lightrail_starter.callbacks.stability_probe import MEASURES, StabilityProbe
from lightrail_starter.data.rows import Rows, as_is

ALL: list[str] = list(MEASURES)
H = torch.tensor([[3.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, -1.0]], dtype=torch.float64)
DIAGONAL = torch.diag(torch.tensor([4.0, 1.0, -0.5], dtype=torch.float64))


class Quadratic(LightningModule):
    """xᵀHx / 2, plus the mean over the batch of what its samples pull at x."""

    def __init__(self, hessian: Tensor, optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.hessian = hessian
        self.x = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
        self.optimizer = optimizer
        self.points: list[Tensor] = []

    def training_step(self, batch: Any) -> Tensor:
        return self.x @ self.hessian @ self.x / 2 + (batch[0] @ self.x).mean()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.points.append(self.x.detach().clone())

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


class Seen(DummyLogger):
    """The metrics of every step, as a logger is given them."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: Any, step: int) -> None:  # type: ignore[override]
        rows = self.rows.setdefault(step, {})
        rows.update({k.removeprefix("stability_probe/"): v for k, v in metrics.items() if k.startswith("stability_")})


def sgd(**options: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda params: torch.optim.SGD(params, **options)


def pulls(samples: int = 12) -> Tensor:
    return torch.randn(samples, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def probed(task: LightningModule, probe: StabilityProbe, data: Any = None, **arguments: Any) -> dict[int, Any]:
    seen = Seen()
    loader = data if isinstance(data, DataLoader) else DataLoader(TensorDataset(data if data is not None else pulls()),
                                                                  batch_size=4, shuffle=True)  # fmt: skip
    arguments = {"max_epochs": 2, **arguments}
    callbacks = [probe, *arguments.pop("callbacks", [])]
    torch.manual_seed(0)
    with quiet_trainer(callbacks=callbacks, **arguments) as trainer:
        trainer.loggers = [seen]
        trainer.fit(task, loader)
    return seen.rows


def test_figures_on_a_quadratic_are_exact() -> None:
    task = Quadratic(H, sgd(lr=0.1, momentum=0.5))
    rows = probed(task, StabilityProbe(["sharpness", "direction", "weights"], every=1))
    low, *_, high = torch.linalg.eigvalsh(H).tolist()
    assert sorted(rows) == list(range(6))
    points = [*task.points, task.x.detach()]
    for step, row in rows.items():
        assert row["sharpness:largest"] == pytest.approx(high, rel=1e-9)
        assert row["smallest_eigenvalue"] == pytest.approx(low, rel=1e-9)
        assert row["sharpness:stable_below"] == pytest.approx(2 * 1.5 / 0.1)
        v = points[step + 1] - points[step]
        assert row["along_update"] == pytest.approx(float(v @ H @ v / (v @ v)), rel=1e-9)
        assert row["l1_norm"] == pytest.approx(float(points[step].abs().sum()), rel=1e-12)
    traced = probed(Quadratic(DIAGONAL, sgd(lr=0.1)), StabilityProbe(["trace"], every=2, signs=1))
    assert {step: row["trace"] for step, row in traced.items()} == dict.fromkeys((0, 2, 4), 4.5)


def test_a_step_of_several_micro_batches_is_probed_once_and_its_loss_is_not_divided() -> None:
    class Counting(Quadratic):
        looked = 0

        def training_step(self, batch: Any) -> Tensor:
            self.looked += not self.training
            return super().training_step(batch)

    task = Counting(DIAGONAL, sgd(lr=0.1))
    rows = probed(task, StabilityProbe(["trace"], every=1, signs=1), accumulate_grad_batches=3)
    assert {step: row["trace"] for step, row in rows.items()} == {0: 4.5, 1: 4.5}
    assert task.looked == 2


def test_the_direction_is_judged_where_the_step_begins() -> None:
    class Quartic(Quadratic):
        def training_step(self, batch: Any) -> Tensor:
            return self.x.pow(4).sum() / 4

    task = Quartic(H, sgd(lr=0.2))
    rows = probed(task, StabilityProbe(["direction"], every=3))
    assert sorted(rows) == [0, 3]
    points = [*task.points, task.x.detach()]
    for step, row in rows.items():
        x, v = points[step], points[step + 1] - points[step]
        assert row["along_update"] == pytest.approx(float((3 * x**2 * v**2).sum() / (v @ v)), rel=1e-9)


def test_coherence_is_the_mean_cosine_of_two_groups() -> None:
    data = pulls(8)
    task = Quadratic(torch.zeros(3, 3, dtype=torch.float64), sgd(lr=0.1))
    for groups, gradients in ((8, data), (4, data.view(4, 2, 3).mean(1))):
        unit = gradients / gradients.norm(dim=1, keepdim=True)
        cosines = unit @ unit.T
        mean = float((cosines.sum() - groups) / (groups * (groups - 1)))
        rows = probed(task, StabilityProbe(["coherence"], every=1, samples=8, groups=groups), data)
        assert rows[0]["coherence"] == pytest.approx(mean, rel=1e-9)
        assert rows[3]["coherence"] == pytest.approx(mean, rel=1e-9)


class Layers(LightningModule):
    """Two layers whose units are known to fire or not, and all that a probe could disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
        with torch.no_grad():
            # For positive inputs: one unit dead, one alive for the first input alone, two always alive.
            self.net[0].weight.copy_(torch.tensor([[-1.0, -1], [1, -1], [1, 1], [2, 0]]))  # type: ignore[operator]
            self.net[0].bias.zero_()  # type: ignore[operator]
        self.modes: list[bool] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.modes.append(self.net[2].training)
        self.log("seen", 1.0)
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_activations_are_counted_in_evaluation_mode_and_every_module_is_left_in_its_own() -> None:
    task = Layers()
    task.net[3].eval()
    data = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    rows = probed(task, StabilityProbe(["activations", "direction"], every=1), data, max_epochs=1)
    assert rows[0]["activations:zeros"] == pytest.approx(3 / 8)
    assert rows[0]["activations:dead_units"] == pytest.approx(1 / 4)
    assert "along_update" not in rows[0]  # with lr 0 nothing moves
    assert task.modes == [False, True]
    assert [each.training for each in task.net] == [True, True, True, False, True]


@pytest.mark.parametrize(("shape", "units"), [((5, 3), 3), ((5, 3, 2, 2), 3), ((5, 2, 3), 3), ((3,), 3)])
def test_a_unit_is_a_channel_or_a_feature(shape: tuple[int, ...], units: int) -> None:
    net = nn.Sequential(nn.ReLU(), nn.Identity())
    with WatchedReLUs(net) as watched:
        net(torch.ones(shape))
    assert watched._alive[0].shape == (units,)
    assert not net[0]._forward_hooks


def test_samples_stay_and_lie_evenly_over_the_training_set() -> None:
    class Means(Quadratic):
        def training_step(self, batch: Any) -> Tensor:
            means.append(batch[0].mean())
            return super().training_step(batch)

    means: list[Tensor] = []
    data = torch.arange(40.0, dtype=torch.float64)[:, None].expand(-1, 3)
    probed(Means(H, sgd(lr=0.01)), StabilityProbe(["trace"], every=1, samples=4, signs=1), data, max_epochs=1)
    assert means[::2] == [torch.tensor(15.0)] * 10  # of 0, 10, 20, 30
    means.clear()
    loader = DataLoader(Rows(data), batch_size=4, sampler=SubsetRandomSampler([3, 5, 7, 9]), collate_fn=as_is)
    probed(Means(H, sgd(lr=0.01)), StabilityProbe(["trace"], every=1, samples=9, signs=1), loader, max_epochs=1)
    assert means[0] == 6


def test_mollified_runs_are_probed_on_clean_samples() -> None:
    probe = StabilityProbe(every=1)
    probed(Quadratic(H, sgd(lr=0.01)), probe, callbacks=[Mollification(kind="constant", noise=1.0)])
    assert torch.equal(probe._batch[0], pulls())


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        return iter(pulls(20))


def test_a_stream_is_probed_on_its_first_batch_and_a_resumed_run_keeps_it(tmp_path: Path) -> None:
    class Whole(Quadratic):
        def training_step(self, batch: Any) -> Tensor:
            return super().training_step([batch])

    class Save(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "two.ckpt")

    loader = DataLoader(Stream(), batch_size=4)
    probe = StabilityProbe(every=1, samples=3, groups=3)
    probed(Whole(H, sgd(lr=0.01)), probe, loader, max_steps=4, callbacks=[Save()])
    assert torch.equal(probe._batch, pulls(20)[:3])
    state = torch.load(tmp_path / "two.ckpt", weights_only=True)["callbacks"]["StabilityProbe"]
    again = StabilityProbe(every=1, samples=3, groups=3)
    again.load_state_dict(state)
    probed(Whole(H, sgd(lr=0.01)), again, DataLoader(Stream(), batch_size=2), max_steps=2)
    assert torch.equal(again._batch, pulls(20)[:3])
    assert StabilityProbe().state_dict() == {}


def adamw(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


class Climb(lightning_runs.Transform):
    def before_step(self, params: list[Tensor], closure: Any) -> None:
        with closure.at([p + 0.05 * p.grad for p in params if p.grad is not None]):
            closure()


class Metrics(Callback):
    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append({k: float(v) for k, v in trainer.callback_metrics.items()})


@pytest.mark.parametrize("variant", ["plain", "augmented", "accumulated"])
def test_a_run_with_the_probe_ends_where_one_without_it_does_bit_for_bit(tmp_path: Path, variant: str) -> None:
    make, arguments = adamw, {}
    if variant == "augmented":
        arguments = {"dataset": lightning_runs.Noisy(*lightning_runs.problem().tensors)}
    if variant == "accumulated":
        make = lightning_runs.transformed(adamw, Climb())
        arguments = {"window": True, "accumulate_grad_batches": 2}
    runs = []
    for name, probes in (("plain", []), ("probed", [StabilityProbe(ALL, every=2)])):
        metrics, seen = Metrics(), Seen()
        task, trainer, observation = lightning_runs.fit(
            tmp_path / name, make, max_epochs=2, callbacks=[*probes, metrics], logger=[seen], **arguments
        )
        optimizer = str(trainer.optimizers[0].state_dict())
        runs.append((task.state_dict(), optimizer, metrics.seen, observation.training.last, torch.get_rng_state()))
    (weights, *rest, random), (weights_too, *rest_too, random_too) = runs
    for key, value in weights.items():
        assert torch.equal(value, weights_too[key]), key
    assert rest == rest_too
    assert torch.equal(random, random_too)
    steps = [step for step, row in seen.rows.items() if row]
    assert steps == list(range(0, trainer.global_step, 2))
    assert {"sharpness:largest", "along_update", "trace", "smallest_eigenvalue", "coherence",
            "activations:zeros", "activations:dead_units", "l1_norm"} == set(seen.rows[0])  # fmt: skip


class KilledError(Exception):
    pass


class KillAt(Callback):
    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 7:
            raise KilledError


def test_a_resumed_run_is_probed_as_one_that_was_never_stopped(tmp_path: Path) -> None:
    def run(folder: str, *others: Callback, **arguments: Any) -> dict[int, Any]:
        seen, callbacks = Seen(), [StabilityProbe(ALL, every=2), *others]
        arguments |= {"callbacks": callbacks, "logger": [seen], "max_epochs": 2, "every": 1}
        with contextlib.suppress(KilledError):
            lightning_runs.fit(tmp_path / folder, adamw, **arguments)
        return {step: row for step, row in seen.rows.items() if row}

    whole, killed = run("whole"), run("cut", KillAt())
    resumed = run("cut", seed=99, checkpoint=tmp_path / "cut" / "checkpoints" / "last.ckpt")
    assert (list(killed), list(resumed)) == ([0, 2, 4, 6], [8, 10, 12, 14, 16])
    assert killed | resumed == whole


def test_twenty_probes_a_run_and_nothing_between_them() -> None:
    waiting: list[bool] = []

    class Look(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            waiting.append(probe.on_train_batch_end is not None)

    probe = StabilityProbe(["weights"])
    rows = probed(Quadratic(H, sgd(lr=0.001)), probe, pulls(4), max_epochs=60, callbacks=[Look()])
    assert list(rows) == list(range(0, 60, 3))
    assert waiting == [step % 3 == 0 for step in range(60)]
    with pytest.raises(CompositionError, match="how long the run is"):
        probed(Quadratic(H, sgd(lr=0.001)), StabilityProbe(), max_epochs=-1)


@pytest.mark.parametrize("options", [
    {}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.5, "dampening": 0.4},
])  # fmt: skip
def test_a_quadratic_just_sharper_than_stable_below_throws_the_method_out(options: dict[str, Any]) -> None:
    for factor, stays in ((0.99, True), (1.01, False)):
        x = nn.Parameter(torch.ones((), dtype=torch.float64))
        optimizer = torch.optim.SGD([x], lr=0.1, **options)
        sharpness = factor * stable_below(optimizer)  # type: ignore[operator]
        for _ in range(4000):
            x.grad = sharpness * x.detach()
            optimizer.step()
        assert (abs(x.item()) < 1) == stays, (options, factor)


def test_the_least_stable_group_counts_and_adaptive_methods_have_no_such_bound() -> None:
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    assert stable_below(torch.optim.SGD([{"params": [a], "lr": 0.5}, {"params": [b], "lr": 0.1}])) == pytest.approx(4)
    assert stable_below(torch.optim.Adam([a])) is None
    assert stable_below(torch.optim.SGD([a], lr=0.0)) is None
    rows = probed(Quadratic(H, adamw), StabilityProbe(["sharpness"], every=1))
    assert set(rows[0]) == {"sharpness:largest", "smallest_eigenvalue"}


class Manual(Quadratic):
    def __init__(self) -> None:
        super().__init__(H, sgd(lr=0.1))
        self.automatic_optimization = False


class Game(Quadratic):
    def __init__(self) -> None:
        super().__init__(H, sgd(lr=0.1))

    def players(self) -> dict[str, Any]:
        return {"x": [self.x]}

    def player_loss(self, player: str, batch: Any) -> Tensor:
        return self.x.sum()


def test_what_cannot_be_probed_is_refused_before_the_run() -> None:
    class FSDPStrategy:
        pass

    def refused(task: LightningModule, match: str, probe: StabilityProbe | None = None, **trainer: Any) -> None:
        arguments = {"strategy": object(), "precision": "32-true", **trainer}
        with pytest.raises(CompositionError, match=match):
            (probe or StabilityProbe()).on_fit_start(SimpleNamespace(**arguments), task)  # type: ignore[arg-type]

    plain = Quadratic(H, sgd(lr=0.1))
    refused(Manual(), "step the optimizers")
    refused(Game(), "one loss")
    refused(plain, "whole parameters", strategy=FSDPStrategy())
    refused(plain, "scale", precision="16-mixed")
    refused(plain, "no activations", StabilityProbe(["activations"]))
    StabilityProbe().on_fit_start(SimpleNamespace(strategy=object(), precision="32-true"), plain)  # type: ignore[arg-type]


def test_a_probe_that_does_not_fit_in_memory_is_refused_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert stability_probe._free_memory(torch.device("cpu")) not in (None, 0) or not Path("/proc/meminfo").is_file()
    needed = 6 * 3 * 8
    for free, fits in ((needed - 1, False), (needed, True), (None, True)):
        monkeypatch.setattr(stability_probe, "_free_memory", lambda device, free=free: free)
        probe = StabilityProbe(["weights", "sharpness"], every=1)
        if fits:
            probed(Quadratic(H, sgd(lr=0.1)), probe, max_epochs=1)
            continue
        with pytest.raises(ConfigurationError, match="does not fit in memory with 'sharpness'") as caught:
            probed(Quadratic(H, sgd(lr=0.1)), probe, max_epochs=1)
        assert "6 copies" in caught.value.found


@pytest.mark.parametrize("options", [
    {"measures": ["mass"]}, {"every": 0}, {"samples": 0}, {"groups": 1}, {"products": 0}, {"signs": 0},
    {"samples": 4, "groups": 8},
])  # fmt: skip
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        StabilityProbe(**options)


PROGRAM = """
import sys, torch
from pathlib import Path
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

{imported}

def main():
    folder, devices = Path(sys.argv[1]), int(sys.argv[2])
    seen = Seen()
    torch.manual_seed(0)
    task = Layered()
    probe = StabilityProbe(ALL, every=2, samples=8, groups=2)
    trainer = Trainer(
        max_steps=4, callbacks=[probe], accelerator="cpu", devices=devices,
        strategy="ddp" if devices > 1 else "auto", logger=False, enable_checkpointing=False, default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.loggers = [seen]
    x = torch.randn(8, 2, dtype=torch.float64)
    trainer.fit(task, DataLoader(TensorDataset(x), batch_size=8 // devices))
    assert torch.equal(probe._batch[0], x[trainer.global_rank :: devices])
    if trainer.is_global_zero:
        torch.save(seen.rows, folder / f"{{devices}}.pt")


class Layered(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.ReLU(), torch.nn.Linear(5, 1)).double()

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


main()
"""


def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    imported = "\n".join([
        "from lightning.pytorch import LightningModule", "from lightning.pytorch.loggers.logger import DummyLogger",
        "from lightrail_starter.callbacks.stability_probe import MEASURES, StabilityProbe", "ALL = list(MEASURES)",
        "from typing import Any", inspect.getsource(Seen),
    ])  # fmt: skip
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(imported=imported))
    found = []
    for devices in (1, 2):
        subprocess.run([sys.executable, str(program), str(tmp_path), str(devices)], check=True, capture_output=True,
                       timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
        found.append(torch.load(tmp_path / f"{devices}.pt"))
    one, two = found
    assert one.keys() == two.keys() == {0, 2}
    for step in one:
        assert one[step].keys() == two[step].keys()
        # Groups hold other samples: two of each rank rather than four of one.
        for name in one[step].keys() - {"coherence"}:
            assert math.isclose(one[step][name], two[step][name], rel_tol=1e-6, abs_tol=1e-9), (step, name)
