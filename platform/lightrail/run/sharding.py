"""Fully sharded data parallelism (FSDP2) for any LightningModule, under Lightning's ``ModelParallelStrategy``.

Every rank keeps a part of each parameter, of its gradient and of the optimizer's state; a block's parameters are whole
on a rank only while the block runs. A module that calls ``fully_shard`` in a ``configure_model`` of its own keeps its
own arrangement.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.optim import Optimizer

from lightrail.errors import CompositionError
from lightrail.run.checkpoint import AtomicCheckpointIO
from lightrail.run.sharded_state import load_optimizer_state, load_weights, whole_tree
from lightrail.run.sharding_checks import is_sharding
from lightrail.step.sharded import is_shard

__all__ = ["ShardedStrategy", "blocks_of", "strategy_for"]

# The methods of a task, beside `forward`, that see its parameters whole.
_EVALUATING = (
    "training_step",
    "validation_step",
    "test_step",
    "predict_step",
    "on_train_epoch_start",
    "on_train_epoch_end",
    "on_validation_epoch_start",
    "on_validation_epoch_end",
    "on_test_epoch_start",
    "on_test_epoch_end",
    "sampled_loss",
    "objectives",
    "sample_losses",
    "outputs",
    "output_loss",
)


def strategy_for(trainer: Mapping[str, Any]) -> Any:
    """The strategy for Lightning's Trainer: its own word, or ours for ``fsdp``.

    Args:
        trainer: The ``trainer`` group of the configuration.
    """
    if not is_sharding(trainer):
        return trainer.get("strategy", "auto")
    return ShardedStrategy(trainer.get("shard"), distributed_checkpoint=bool(trainer.get("distributed_checkpoint")))


class ShardedStrategy(ModelParallelStrategy):
    """Data parallelism over shards, whose checkpoints are those of one process.

    Args:
        classes: Names of the classes whose parameters are gathered one instance at a time; ``None`` for whatever
            repeats in a ``ModuleList`` or ``Sequential``; none at all gathers the whole model at once.
        distributed_checkpoint: Whether each rank writes its own shards, beside a file that names them.
    """

    def __init__(self, classes: Sequence[str] | None = None, *, distributed_checkpoint: bool = False) -> None:
        super().__init__(save_distributed_checkpoint=False)
        self._classes = classes
        self._is_distributed_checkpoint = distributed_checkpoint

    # Setting up.

    def setup_environment(self) -> None:
        # All devices share the data: none of Lightning's defaults of one tensor-parallel group a machine.
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()
        task: Any = self.lightning_module
        if not getattr(task.configure_model, "shards", False):
            task.configure_model = self._sharding(task, task.configure_model)

    def _sharding(self, task: LightningModule, configure_model: Callable[[], None]) -> Callable[[], None]:
        """The task's ``configure_model``, followed by ours where it did not shard."""

        def configure_and_shard() -> None:
            configure_model()
            if not any(map(is_shard, task.parameters())):
                self._shard(task)

        configure_and_shard.shards = True  # type: ignore[attr-defined]
        return configure_and_shard

    def _shard(self, task: LightningModule) -> None:
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        self._equalise(task)
        for block in blocks_of(task, self._classes):
            fully_shard(block, mesh=mesh)
        fully_shard(task, mesh=mesh)
        for name in _EVALUATING:
            if callable(getattr(task, name, None)):
                _evaluate_whole(task, name)

    def _equalise(self, task: nn.Module) -> None:
        """Weights and buffers of the first rank, on all of them, as under data parallelism."""
        with torch.no_grad():
            for each in (*task.parameters(), *task.buffers()):
                if not each.is_meta:
                    sent = each.detach().to(self.root_device)
                    torch.distributed.broadcast(sent, src=0)
                    each.copy_(sent)

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        self._statistics = [b for b in self.lightning_module.buffers() if b.is_floating_point()]  # type: ignore[union-attr]

    # Evaluating.

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._share_statistics()
        with _explained():
            return super().training_step(*args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        self._share_statistics()
        with _explained():
            return super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        self._share_statistics()
        with _explained():
            return super().test_step(*args, **kwargs)

    def _share_statistics(self) -> None:
        """Running statistics are those of the first rank, as under data parallelism."""
        if not self._statistics or self.world_size == 1:
            return
        with torch.no_grad():
            sent = torch.cat([each.detach().flatten().float() for each in self._statistics])
            torch.distributed.broadcast(sent, src=0)
            parts = sent.split([each.numel() for each in self._statistics])
            for each, part in zip(self._statistics, parts, strict=True):
                each.copy_(part.view(each.shape))

    # Checkpoints: what one process would write, gathered as it is written, and cut again as it is read.

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return getattr(optimizer, "_optimizer", optimizer).state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        from lightrail.run.distributed_checkpoint import remove_unnamed, write_shards

        if self._is_distributed_checkpoint:
            checkpoint = write_shards(checkpoint, Path(filepath), self)
        else:
            checkpoint = whole_tree(checkpoint, keep=self.is_global_zero)
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)
            remove_unnamed(Path(filepath).parent)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        assert isinstance(self.checkpoint_io, AtomicCheckpointIO)
        return self.checkpoint_io.load_checkpoint(checkpoint_path, mesh=self.device_mesh["data_parallel"])

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        load_weights(self.lightning_module, checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            load_optimizer_state(optimizer, state)


def _evaluate_whole(task: Any, name: str) -> None:
    """Makes a method one of those that gather the parameters that belong to no block."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    own = getattr(task, name)
    register_fsdp_forward_method(task, name)
    evaluate = getattr(task, name)

    @functools.wraps(own)
    def method(*args: Any, **kwargs: Any) -> Any:
        found = evaluate(*args, **kwargs)
        if not torch.is_grad_enabled():
            # What no backward pass follows would stay whole, and stale once the parameters move.
            task.reshard()
        return found

    setattr(task, name, method)


# What is cut apart.


def blocks_of(module: nn.Module, classes: Sequence[str] | None = None) -> list[nn.Module]:
    """The parts of a module whose parameters are gathered one part at a time.

    Args:
        module: Any module.
        classes: Names of their classes; ``None`` for the classes of which a ``ModuleList``, ``ModuleDict`` or
            ``Sequential`` has two or more. A part that shares a parameter with the rest is none.

    Raises:
        CompositionError: No part of the module has a class of that name.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        >>> [type(block).__name__ for block in blocks_of(model)]
        ['Linear', 'Linear']
    """
    found = list(_repeated(module)) if classes is None else list(_named(module, classes))
    owners: dict[int, int] = {}
    for each in (*_owned_outside(module, found), *found):
        for key in {id(p) for p in each.parameters()}:
            owners[key] = owners.get(key, 0) + 1
    return [each for each in found if all(owners[id(p)] == 1 for p in each.parameters())]


def _owned_outside(module: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[nn.ParameterList]:
    inside = {id(part) for block in blocks for part in block.modules()}
    for part in module.modules():
        if id(part) not in inside:
            yield nn.ParameterList(part.parameters(recurse=False))


def _repeated(module: nn.Module) -> Iterator[nn.Module]:
    containers = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    children = list(module.children())
    of_class: dict[type, int] = {}
    for child in children:
        of_class[type(child)] = of_class.get(type(child), 0) + 1
    for child in children:
        is_block = isinstance(module, containers) and not isinstance(child, containers) and of_class[type(child)] > 1
        if is_block and any(True for _ in child.parameters()):
            yield child
        else:
            yield from _repeated(child)


def _named(module: nn.Module, classes: Sequence[str]) -> Iterator[nn.Module]:
    parts = [each for each in module.modules() if each is not module]
    known = {type(each).__name__ for each in parts}
    missing = [name for name in classes if name not in known]
    if missing:
        raise CompositionError(
            f"no part of the model is a '{missing[0]}'",
            found=f"trainer.shard=[{','.join(classes)}]",
            allowed=", ".join(sorted(known)),
            remedy="Name classes of the model's parts, or leave trainer.shard out.",
        )
    inside: set[int] = set()
    for each in parts:
        if type(each).__name__ in classes and id(each) not in inside and any(True for _ in each.parameters()):
            inside |= {id(part) for part in each.modules()}
            yield each


@contextmanager
def _explained() -> Iterator[None]:
    """What torch says of a part that was used without being called, in four parts."""
    try:
        yield
    except RuntimeError as error:
        if "mixed torch.Tensor and DTensor" not in str(error):
            raise
        raise CompositionError(
            "a part of the model is used in another way than by calling it, while its parameters are sharded",
            found=str(error).splitlines()[0][:200],
            allowed="blocks that are called: block(x), rather than block.weight or block.method(x)",
            remedy="Name the classes that are only called with trainer.shard=[CLASS,…] ([] gathers the whole model at "
            "once), or shard the model in the task's own configure_model.",
        ) from error
