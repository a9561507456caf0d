"""What an epoch has gathered so far in ``self.log`` and in torchmetrics: a checkpoint in its middle must hold it."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torchmetrics import Metric

__all__ = ["load_logged_state", "logged_state"]


def logged_state(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """The gathered values, as tensors and plain values."""
    results = {}
    for key, result in trainer.fit_loop.epoch_loop._results.items():
        if result.is_tensor and result.meta.on_epoch:
            size = getattr(result, "cumulated_batch_size", None)
            results[key] = {
                "value": result.value.detach().cpu().clone(),
                "size": None if size is None else torch.as_tensor(size).clone(),
                "how": "max" if result.meta.is_max_reduction else "min" if result.meta.is_min_reduction else "sum",
            }
    metrics = {
        name: {"state": _plain(metric._copy_state_dict()), "updates": metric._update_count}
        for name, metric in _metrics(module).items()
        if metric._update_count
    }
    # Callbacks of the user compare with what the epochs before this one gave.
    seen = {name: value.detach().cpu().clone() for name, value in trainer.callback_metrics.items()}
    return {"results": results, "metrics": metrics, "seen": seen}


def load_logged_state(trainer: Trainer, state: dict[str, Any]) -> dict[str, Any] | None:
    """Puts gathered values back; called again after the first batches until nothing is left.

    Args:
        trainer: The trainer that resumes.
        state: What :func:`logged_state` gave, or what an earlier call left.

    Returns:
        What could not be put back yet; ``None`` when all is.
    """
    trainer._logger_connector._callback_metrics.update(state["seen"])
    metrics = _metrics(trainer.lightning_module)
    for name, kept in state["metrics"].items():
        if name in metrics:
            for attribute, value in kept["state"].items():
                setattr(metrics[name], attribute, _to(value, metrics[name].device))
            metrics[name]._update_count = kept["updates"]
            metrics[name]._computed = None
    waiting = {}
    for key, kept in state["results"].items():
        result = trainer.fit_loop.epoch_loop._results.get(key)
        if result is None:
            waiting[key] = kept
            continue
        earlier = kept["value"].to(result.value.device)
        if kept["how"] == "sum":
            result.value = result.value + earlier
        else:
            result.value = getattr(torch, f"{kept['how']}imum")(result.value, earlier)
        if kept["size"] is not None:
            result.cumulated_batch_size = result.cumulated_batch_size + kept["size"].to(result.value.device)
    return {"results": waiting, "metrics": {}, "seen": {}} if waiting else None


def _metrics(module: LightningModule) -> dict[str, Metric]:
    return {name: each for name, each in module.named_modules() if isinstance(each, Metric)}


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    return {k: [t.cpu() for t in v] if isinstance(v, list) else v.cpu().clone() for k, v in state.items()}


def _to(value: Any, device: torch.device) -> Any:
    return [t.to(device) for t in value] if isinstance(value, list) else value.to(device)
