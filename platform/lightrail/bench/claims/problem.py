"""Problems: tasks small enough to train many times over, on which claims are measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn

from lightrail.step import Closure

__all__ = ["CountedClosure", "Problem", "RunProblem", "TaskProblem"]


class CountedClosure(Closure):
    """A closure that says what was spent, in forward-backward passes.

    A Hessian-vector product counts as two, a loss without its gradient as a third.
    """

    extra_passes = 0.0

    @property
    def passes(self) -> float:
        return self.evaluations + self.extra_passes

    def hvp(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        self.extra_passes += 1
        return super().hvp(vectors)

    def loss(self) -> Tensor:
        self.extra_passes -= 2 / 3
        return super().loss()

    def value_of(self, fn: Any) -> Tensor:
        self.extra_passes -= 2 / 3
        return super().value_of(fn)

    def sample_losses(self) -> Tensor:
        self.extra_passes -= 2 / 3
        return super().sample_losses()


class Problem:
    """One task with its data, made anew for every trial from torch's global generator.

    Args:
        passes: How many forward-backward passes a trial may spend.
        merit: What is compared, lower is better, for tables and pictures.
    """

    passes: ClassVar[int] = 300
    merit_name: ClassVar[str] = "loss"
    module: nn.Module | None = None  # for transforms that must see it

    @classmethod
    def outcome(cls, merits: Sequence[float]) -> float | None:
        """What is compared of a trial's merits, lower is better; ``None`` for the last of them."""
        return None

    def named_parameters(self) -> list[tuple[str, Tensor]]:
        """The parameters, by name."""
        raise NotImplementedError

    def groups(self, named: bool) -> list[Any]:
        """What an optimizer is built from: parameters, pairs of name and parameter, or groups of either."""
        return list(self.named_parameters()) if named else [p for _, p in self.named_parameters()]

    def closure(self, step: int) -> CountedClosure:
        """The closure of a step, over a batch of its own."""
        raise NotImplementedError

    def loss(self, step: int) -> Tensor:
        """The loss of a step's batch, with its graph, for loops that differentiate it themselves."""
        closure = self.closure(step)
        return closure._loss_fn(*closure._batches[0])

    def merit(self) -> float:
        """What is compared, at the current parameters: lower is better. It spends nothing."""
        raise NotImplementedError


class TaskProblem(Problem):
    """A task and its data, trained as `train` would; its merit is the mean validation loss.

    Args:
        task: A task whose ``training_step`` returns a mapping with ``loss``.
        data: Its data.
        validation_batches: How many batches of the validation part are looked at.
    """

    merit_name = "validation loss"

    def __init__(self, task: LightningModule, data: LightningDataModule, validation_batches: int = 16) -> None:
        self.task = self.module = task
        self._data = data
        data.setup("fit")
        self._batches = self._endless()
        loader = iter(data.val_dataloader())
        self._validation = [batch for _, batch in zip(range(validation_batches), loader, strict=False)]

    def _endless(self) -> Iterator[Any]:
        while True:
            yield from self._data.train_dataloader()

    def named_parameters(self) -> list[tuple[str, Tensor]]:
        return [(name, p) for name, p in self.task.named_parameters() if p.requires_grad]

    def closure(self, step: int) -> CountedClosure:
        task: Any = self.task
        return CountedClosure(
            lambda batch: task.training_step(batch, step)["loss"],
            [p for _, p in self.named_parameters()],
            next(self._batches),
            module=task,
            sampled_loss_fn=getattr(task, "sampled_loss", None),
            objectives_fn=getattr(task, "objectives", None),
            clusters_fn=getattr(task, "clusters", None),
            num_samples_fn=getattr(task, "num_samples", None),
            sample_losses_fn=getattr(task, "sample_losses", None),
            outputs_fn=getattr(task, "outputs", None),
            output_loss_fn=getattr(task, "output_loss", None),
        )

    @torch.no_grad()
    def merit(self) -> float:
        task: Any = self.task
        task.eval()
        losses = [float(task.training_step(batch, 0)["loss"]) for batch in self._validation]
        task.train()
        return sum(losses) / len(losses)


class RunProblem(Problem):
    """A problem for what works on whole runs, callbacks and batchings: each trial is a run of ``train``.

    Its merits are those of the validations; ``passes`` are the optimizer steps that the baseline makes.

    Args:
        overrides: The command line of the run.
        metric: What is compared, a column of ``metrics.csv``, lower is better.
    """

    overrides: ClassVar[tuple[str, ...]] = ()
    metric: ClassVar[str] = "val_loss"
    merit_name: ClassVar[str] = "validation loss"
