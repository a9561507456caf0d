"""Methods that train at one point and are evaluated at another, in whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

import lightrail
from lightrail.step import CombinedOptimizer
from lightrail_optimizers import DoG, PastExtragradient


class WeightsInTest(Callback):
    """What is tested."""

    found: dict[str, torch.Tensor]

    def on_test_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.found = {name: p.detach().clone() for name, p in pl_module.named_parameters()}


def test_what_is_tested_is_what_the_best_checkpoint_holds(tmp_path: Path) -> None:
    run = lightrail.compose(
        [
            "optimizer=dog",
            "optimizer.reps_rel=1e-3",
            "model=mlp",
            "trainer.max_epochs=2",
            "trainer.accelerator=cpu",
            "logger=[csv]",
            f"run.root={tmp_path}",
        ]
    )
    run.task.monitor = ("val_loss", "max")  # type: ignore[assignment]  # so that the best is not the last
    seen = WeightsInTest()
    run.callbacks = [*run.callbacks, seen]
    result = run.execute()
    best = torch.load(result.folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert seen.found
    for name, value in seen.found.items():
        assert torch.equal(value, best[name]), name


def test_optimizers_that_are_combined_go_to_their_evaluation_points_together() -> None:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    parts = [
        PastExtragradient([params[0]], lr=0.1),
        DoG([params[1]], reps_rel=0.1),
        torch.optim.SGD([params[2]], lr=0.1),
    ]
    combined = CombinedOptimizer(parts)
    assert combined.has_evaluation_point
    assert not CombinedOptimizer(parts[2:]).has_evaluation_point
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = torch.full_like(p, float(step + i + 1))
        combined.step()
    training = [p.detach().clone() for p in params]
    combined.eval()
    assert [torch.equal(p, t) for p, t in zip(params, training, strict=True)] == [False, False, True]
    combined.train()
    assert all(torch.equal(p, t) for p, t in zip(params, training, strict=True))
