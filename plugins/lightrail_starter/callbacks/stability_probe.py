"""A probe of how stable training is: curvature, coherence and activations, now and then, on samples that stay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, IterableDataset

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.options import at_least, one_of
from lightrail.run.loops import progress_of
from lightrail.step.batches import leading_size
from lightrail.step.curvature import extreme_eigenvalues, hessian_trace
from lightrail.step.players import game_of
from lightrail.traits import Traits
from lightrail_starter.callbacks.stability_measures import (
    ProbeClosure,
    WatchedReLUs,
    coherence,
    directional_sharpness,
    evaluating,
    from_one_seed,
    stable_below,
)

__all__ = ["StabilityProbe"]

MEASURES = ("sharpness", "trace", "direction", "coherence", "activations", "weights")
CHEAP = MEASURES[2:]
TIMES = 20  # a run, where nothing else is said
# Copies of the parameters that a measure holds at once: its own vectors and the three of a Hessian-vector product.
COPIES = {"sharpness": 6, "trace": 4, "direction": 6, "coherence": 3}


class StabilityProbe(Callback):
    """Measures, every so many steps and on the same few training samples, what decides whether training is stable.

    With H the Hessian of the task's loss at the point where a step begins, in evaluation mode:

    ``sharpness``    the largest and the smallest eigenvalue of H, by Lanczos
    ``trace``        the trace of H, by Hutchinson's estimate
    ``direction``    vᵀHv / vᵀv for the update v that the step then makes
    ``coherence``    the mean cosine between the gradients of two groups of samples
    ``activations``  the share of outputs of ``nn.ReLU`` that are zero, and of units that are zero for every sample
    ``weights``      the L1 norm of the trained parameters

    Beside the largest eigenvalue stands ``stable_below``, 2 / lr (2 (1 + μ) / lr with momentum): a quadratic sharper
    than that throws gradient descent out. It is left out for methods that divide the gradient by its history, as Adam
    does.

    Args:
        measures: Which; ``None`` for the cheap ones, all but ``sharpness`` and ``trace``.
        every: Optimizer steps from one probe to the next, at least 1; ``None`` for twenty probes a run.
        samples: Training samples to measure on, over all ranks.
        groups: Of samples, for ``coherence``, at least 2; as many as ``samples`` for each one's own gradient.
        products: Hessian-vector products that ``sharpness`` may spend, each about two evaluations.
        signs: Random vectors that ``trace`` averages over, one product each.

    Raises:
        ConfigurationError: An option is out of range, or the probe would not fit in memory.
        CompositionError: The task has several players, steps its optimizers itself, or has no layer to watch; the
            parameters are sharded; gradients are scaled (16-mixed); or ``every`` is open and so is the end of the run.

    Guarantees:
        A run with the probe ends bit for bit where one without it does. Samples lie evenly over the training set and
        are read once, as the loader would read them; those of a stream are the first batch (and noise that another
        callback adds is then in it). Under DDP every rank measures on samples of its own, and figures are means over
        ranks. Activations applied as functions (``F.relu``), or inside a compiled module, are not seen.

    Example:
        >>> StabilityProbe(measures=["sharpness", "direction"], every=100).measures
        ('sharpness', 'direction')

    Reference:
        J. Cohen, S. Kaur, Y. Li, J. Z. Kolter and A. Talwalkar (2021), Gradient Descent on Neural Networks Typically
        Occurs at the Edge of Stability, ICLR; Y. Pan and Y. Li (2023), Toward Understanding Why Adam Converges Faster
        Than SGD for Transformers, for ``direction``.
    """

    traits: ClassVar[Traits] = Traits(
        rule="λ_max, λ_min and tr of H beside 2 / lr; vᵀHv / vᵀv of the update; cos of group gradients; zeros of ReLU"
    )

    # Lightning passes over hooks that are no function: this one is there only while a probe waits for its update.
    on_train_batch_end = None  # type: ignore[assignment]

    def __init__(
        self,
        measures: list[str] | None = None,
        every: int | None = None,
        samples: int = 64,
        groups: int = 8,
        products: int = 20,
        signs: int = 4,
    ) -> None:
        super().__init__()
        for measure in measures or ():
            one_of(MEASURES, measures=measure)
        if every is not None:
            at_least(1, every=every)
        at_least(1, samples=samples, products=products, signs=signs)
        at_least(2, groups=groups)
        self.measures: tuple[str, ...] = CHEAP if measures is None else tuple(measures)
        if "coherence" in self.measures and groups > samples:
            raise ConfigurationError(
                "groups is out of range",
                found=f"groups={groups}, samples={samples}",
                allowed="at most one group a sample",
                remedy="Lower groups, or raise samples.",
            )
        self.every, self.samples, self.groups, self.products, self.signs = every, samples, groups, products, signs
        self._insists = measures is not None
        self._interval = 1
        self._probed = -1
        self._batch: Any = None
        self._is_of_stream = False
        self._found: dict[str, float] = {}
        self._before: list[Tensor] = []

    # Before the run.

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_task(pl_module)
        strategy = type(trainer.strategy).__name__
        if any(word in strategy.lower() for word in ("fsdp", "modelparallel", "deepspeed")):
            raise _refusal("works on whole parameters", f"{strategy}, which shards them", "ddp, or one device")
        if trainer.precision == "16-mixed":
            raise _refusal(
                "cannot scale gradients", "trainer.precision=16-mixed", "32-true, bf16-mixed, bf16-true, 64-true"
            )
        self._check_memory(pl_module)

    def _check_task(self, module: LightningModule) -> None:
        if not module.automatic_optimization:
            raise _refusal("would step the optimizers of this task", "automatic_optimization=False", "one loss a batch")
        if game_of(module) is not None:
            raise _refusal("needs one loss", "a task with several players", "a task with one loss")
        if self._insists and "activations" in self.measures and not WatchedReLUs(module).layers:
            raise _refusal("finds no activations to watch", "no nn.ReLU in the task", "a model with nn.ReLU layers")

    def _check_memory(self, module: LightningModule) -> None:
        """Refuses what is certain not to fit; evaluations need room beside, which nobody knows before the first."""
        params = [p for p in module.parameters() if p.requires_grad]
        copies, measure = max(((COPIES.get(each, 0), each) for each in self.measures), default=(0, ""))
        needed = copies * sum(p.numel() * p.element_size() for p in params)
        free = _free_memory(params[0].device) if params else None
        if free is not None and needed > free:
            raise ConfigurationError(
                f"callback 'stability_probe' does not fit in memory with '{measure}'",
                found=f"{copies} copies of the parameters are {needed / 2**30:.3g} GiB; {params[0].device} has "
                f"{free / 2**30:.3g} GiB free",
                allowed="what fits beside the training itself",
                remedy=f"Leave {measure} out of callback.stability_probe.measures, or use a device with more memory.",
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        whole = progress_of(trainer)[1] if self.every is None else 0
        if math.isinf(whole):
            raise _refusal(
                "does not know how long the run is",
                f"trainer.max_epochs={trainer.max_epochs} trainer.max_steps={trainer.max_steps}",
                "a number of steps or epochs, or callback.stability_probe.every",
            )
        self._interval = self.every or max(1, math.ceil(_steps(trainer, whole) / TIMES))
        self._probed, self._before, self._found = -1, [], {}
        with from_one_seed(), evaluating(pl_module):
            batch = self._batch if self._is_of_stream else _samples_of(trainer, self.samples)
            if batch is not None:
                if not self._is_of_stream:
                    batch = pl_module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch))
                self._batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    # The probe. It looks where a step begins; the direction of the step is known once it is made.

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if self._batch is None:
            self._batch, self._is_of_stream = _first_of(batch, self.samples), True
        if step % self._interval or step == self._probed:
            return
        self._probed = step
        with from_one_seed(), evaluating(pl_module):
            self._found = self._look(trainer, pl_module)
        if "direction" in self.measures:
            self._before = [p.detach().clone() for p in _trained(pl_module)]
        self.on_train_batch_end = self._after_batch

    def _look(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        params = _trained(module)
        closure = ProbeClosure(trainer, params, self._batch)
        found: dict[str, float | None] = {}
        if "sharpness" in self.measures:
            low, high = extreme_eigenvalues(closure.hvp, params, steps=self.products)
            found |= {"sharpness:largest": high, "sharpness:stable_below": stable_below(trainer.optimizers[0])}
            found["smallest_eigenvalue"] = low
        if "trace" in self.measures:
            found["trace"] = hessian_trace(closure.hvp, params, probes=self.signs)
        if "coherence" in self.measures:
            found["coherence"] = coherence(closure, min(self.groups, leading_size(self._batch) or 0))
        if "activations" in self.measures:
            with WatchedReLUs(module) as watched:
                if watched.layers:
                    closure.loss()
            found |= {f"activations:{name}": share for name, share in watched.shares(trainer).items()}
        if "weights" in self.measures:
            found["l1_norm"] = float(torch.stack([p.detach().abs().sum(dtype=torch.float64) for p in params]).sum())
        return {f"stability_probe/{name}": value for name, value in found.items() if value is not None}

    def _after_batch(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._probed:
            return  # gradients are being accumulated, the step is still to come
        self.on_train_batch_end = None  # type: ignore[assignment]
        found, self._found = self._found, {}
        if self._before:
            before, self._before = self._before, []
            with from_one_seed(), evaluating(pl_module):
                along = directional_sharpness(ProbeClosure(trainer, _trained(pl_module), self._batch), before)
            if along is not None:
                found["stability_probe/along_update"] = along
        if trainer.is_global_zero:
            step = trainer.fit_loop.epoch_loop._batches_that_stepped
            for logger in trainer.loggers:
                logger.log_metrics({**found, "epoch": trainer.current_epoch}, step)

    # Samples of a stream cannot be read again.

    def state_dict(self) -> dict[str, Any]:
        return {"batch": self._batch} if self._is_of_stream else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._is_of_stream = "batch" in state_dict
        self._batch = state_dict.get("batch")


def _steps(trainer: Trainer, whole: float) -> float:
    """The whole of a run in optimizer steps, as many as there would be if their size stayed what it is at first."""
    windows = getattr(trainer.fit_loop, "windows", None)
    return whole if windows is None or windows.counts_steps else whole / windows.base


def _refusal(what: str, found: str, allowed: str) -> CompositionError:
    return CompositionError(
        f"callback 'stability_probe' {what}",
        found=found,
        allowed=allowed,
        remedy="Leave out callback=stability_probe, or change what was found.",
    )


def _trained(module: LightningModule) -> list[Tensor]:
    return [p for p in module.parameters() if p.requires_grad]


def _samples_of(trainer: Trainer, count: int) -> Any:
    """This rank's share of samples that lie evenly over the training set; ``None`` where it cannot be indexed."""
    loader: Any = trainer.train_dataloader
    dataset: Any = getattr(loader, "dataset", None)
    if not isinstance(loader, DataLoader) or isinstance(dataset, IterableDataset) or loader.batch_sampler is None:
        return None
    pool: Sequence[int] = getattr(loader.sampler, "indices", range(len(dataset)))
    ranks = trainer.world_size
    total = ranks * max(1, min(count, len(pool)) // ranks)
    indices = [int(pool[i * len(pool) // total]) for i in range(total)][trainer.global_rank :: ranks]
    read_all: Any = getattr(dataset, "__getitems__", None)
    samples: Any = read_all(indices) if callable(read_all) else [dataset[i] for i in indices]
    return loader.collate_fn(samples)


def _first_of(batch: Any, count: int) -> Any:
    size = leading_size(batch)

    def kept(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return (leaf[:count] if leaf.dim() and leaf.shape[0] == size else leaf).detach().clone()

    return pytree.tree_map(kept, batch)


def _free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had there; ``None`` where the system does not say."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "cpu":
        table = Path("/proc/meminfo")
        lines = table.read_text().splitlines() if table.is_file() else []
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    return None
