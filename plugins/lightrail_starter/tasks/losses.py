"""Losses by name, or by the dotted path of the user's own."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from lightrail.errors import ClosureError, ConfigurationError, closest

__all__ = ["LossFn", "loss_named", "losses_of_samples", "refuse_sampling"]

LossFn = Callable[..., Tensor]


def loss_named(name: str, among: Mapping[str, LossFn]) -> LossFn:
    """A loss by its name, or whatever a dotted path names.

    Args:
        name: A word of ``among``, or ``package.module.function`` for a ``function(prediction, target)`` that returns
            the mean over the batch. A class is built without arguments.
        among: The losses that have names here.

    Raises:
        ConfigurationError: There is no such loss.

    Example:
        >>> loss_named("torch.nn.functional.soft_margin_loss", {}).__name__
        'soft_margin_loss'
    """
    if name in among:
        return among[name]
    if "." not in name:
        _refuse(name, among, f"{closest(name, among)}Choose one of the names, or write a dotted path.")
    module, _, attribute = name.rpartition(".")
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # importing the user's module may raise anything
        _refuse(name, among, f"Check the path: {type(error).__name__}: {error}", error)
    if not callable(found):
        _refuse(name, among, f"It names a {type(found).__name__}, which cannot be called.")
    return cast(LossFn, found() if inspect.isclass(found) else found)


def _refuse(name: str, among: Mapping[str, LossFn], remedy: str, cause: Exception | None = None) -> NoReturn:
    raise ConfigurationError(
        f"there is no loss '{name}'",
        found=f"loss={name}",
        allowed=f"{', '.join(sorted(among))}, or the dotted path of a function(prediction, target)",
        remedy=remedy,
    ) from cause


def losses_of_samples(loss_fn: LossFn, prediction: Tensor, target: Tensor) -> Tensor:
    """The loss of each sample, ``[B]``, of which ``loss_fn`` is the mean.

    Args:
        loss_fn: ``loss_fn(prediction, target)``; one with an argument ``reduction`` is asked once, another sample by
            sample.
        prediction: ``[B, …]``.
        target: ``[B, …]``.

    Example:
        >>> losses_of_samples(torch.nn.functional.mse_loss, torch.tensor([1.0, 3.0]), torch.zeros(2)).tolist()
        [1.0, 9.0]
    """
    if "reduction" in inspect.signature(loss_fn).parameters:
        losses = loss_fn(prediction, target, reduction="none")
        return losses.flatten(1).mean(1) if losses.dim() > 1 else losses
    return torch.stack([loss_fn(p[None], t[None]) for p, t in zip(prediction, target, strict=True)])


def refuse_sampling(loss: str, likelihoods: str) -> NoReturn:
    """Refuses to draw labels where the loss is no likelihood, so that no method uses the curvature of another loss."""
    raise ClosureError(
        f"no labels can be drawn from the model under the loss '{loss}'",
        found=f"task.loss={loss}, which is not the negative logarithm of a likelihood known here",
        allowed=f"a loss that is one: {likelihoods}",
        remedy=f"Set task.loss to {likelihoods}, or choose a method that needs no sampled labels.",
    )
