"""What cannot work where each rank holds a part of every parameter, refused before anything is spent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightrail.configuration import Chosen
from lightrail.errors import CompositionError
from lightrail.traits import Traits

__all__ = ["check_module", "check_sharding", "is_sharding"]

STRATEGY = "fsdp"
_CUTS = ("fsdp", "model_parallel", "deepspeed")
_PRECISIONS = ("32-true", "32", "bf16-mixed", "bf16", "bf16-true", "16-true")
# Of torch's own, which carry no traits.
_WHOLE = tuple(getattr(torch.optim, name) for name in ("Adafactor", "LBFGS", "Muon") if hasattr(torch.optim, name))
_ASKS = {
    "needs_per_sample_gradients": "needs one gradient a sample",
    "needs_clusters": "evaluates clusters of the batch, of which a rank may have none",
    "needs_module": "looks at the parameters before they are sharded",
}


def is_sharding(trainer: Mapping[str, Any]) -> bool:
    """Whether the ``trainer`` group asks for sharded parameters."""
    return str(trainer.get("strategy", "auto")) == STRATEGY


def check_sharding(
    methods: Sequence[tuple[Chosen, Traits]],
    chosen: Sequence[Chosen],
    objects: Mapping[str, Any],
    trainer: Any,
    notes: list[str],
) -> None:
    """Checks what was chosen.

    Args:
        methods: The optimizer, transforms, schedule and batching, with their traits.
        chosen: All plugins.
        objects: The class or function of each, by its path.
        trainer: The ``trainer`` group.
        notes: Gets a sentence on what is left out.

    Raises:
        CompositionError: Something needs what sharding cuts.
    """
    strategy = str(trainer.get("strategy", "auto"))
    if any(word in strategy for word in _CUTS):
        _check_whole(methods, objects, strategy)
    if not is_sharding(trainer):
        _check_unused(trainer, strategy, notes)
        return
    if str(trainer.precision) not in _PRECISIONS:
        raise CompositionError(
            f"precision {trainer.precision} cannot work where parameters are sharded",
            found=f"trainer.precision={trainer.precision} trainer.strategy={strategy}",
            allowed="32-true, bf16-mixed, bf16-true, 16-true",
            remedy="Use trainer.precision=bf16-mixed, or trainer=ddp.",
        )
    notes.append("the report has no figures of the task: the first process alone cannot evaluate a model in shards")
    for each in chosen:
        if each.kind == "federated":
            raise _cannot(each, "trains copies of the whole task", strategy)
    for each, traits in methods:
        for trait, does in _ASKS.items():
            if getattr(traits, trait):
                raise _cannot(each, does, strategy)


def _check_whole(methods: Sequence[tuple[Chosen, Traits]], objects: Mapping[str, Any], strategy: str) -> None:
    for chosen, traits in methods:
        if traits.needs_whole_tensors or objects[chosen.path] in _WHOLE:
            raise CompositionError(
                f"{chosen.kind} '{chosen.name}' works on whole tensors, which sharding would cut",
                found=f"trainer.strategy={strategy}",
                allowed="trainer.strategy=ddp, or one device",
                remedy="Use trainer=ddp, or an elementwise method.",
            )


def _check_unused(trainer: Any, strategy: str, notes: list[str]) -> None:
    for key in ("shard", "distributed_checkpoint"):
        if trainer.get(key) not in (None, False):
            notes.append(f"trainer.{key} does nothing: parameters are not sharded; trainer=fsdp shards them")
    if strategy == "fsdp_cpu_offload":
        raise CompositionError(
            "this strategy shards in torch's older way, which checkpoints and methods here do not know",
            found=f"trainer.strategy={strategy}",
            allowed="trainer=fsdp, trainer=ddp, or one device",
            remedy="Use trainer=fsdp.",
        )


def _cannot(chosen: Chosen, does: str, strategy: str) -> CompositionError:
    return CompositionError(
        f"{chosen.kind} '{chosen.name}' {does}, and parameters are sharded",
        found=f"trainer.strategy={strategy}",
        allowed="trainer=ddp, or one device",
        remedy=f"Use trainer=ddp, or choose another {chosen.kind}.",
    )


def check_module(task: nn.Module, *, is_game: bool) -> None:
    """Checks the task, before any process is started.

    Args:
        task: With its weights drawn.
        is_game: Whether it has several players.

    Raises:
        CompositionError: It cannot be sharded.
    """
    if is_game:
        raise CompositionError(
            "a task with several players cannot be sharded",
            found="trainer.strategy=fsdp",
            allowed="trainer=ddp, or one device: each player has a backward pass of its own",
            remedy="Use trainer=ddp.",
        )
    for name, p in task.named_parameters():
        if p.dim() == 0:
            raise CompositionError(
                f"parameter '{name}' is a scalar, which cannot be sharded",
                found=f"{name} of shape ()",
                allowed="parameters of at least one dimension, under trainer=fsdp",
                remedy="Make it a torch.nn.Parameter of shape (1,), or use trainer=ddp.",
            )
