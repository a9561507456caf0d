"""What samples are judged by: classifiers and rewards, the user's own or another run's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightrail.catalogue import import_target
from lightrail.errors import CompositionError, ConfigurationError, PluginError
from lightrail.generation import Denoiser
from lightrail.generation.trained_run import TrainedRun, load_trained

__all__ = ["Classifier", "LoadRun", "Reward", "denoiser_of_run"]

LoadRun = Callable[[str], TrainedRun]


class _Judge:
    """A function of samples in the user's units; its answers are checked once a call."""

    def __init__(self, function: Callable[[Tensor], Tensor], name: str) -> None:
        self.function = function
        self.name = name

    def _answer(self, samples: Tensor, dims: int, allowed: str) -> Tensor:
        found = self.function(samples)
        if not isinstance(found, Tensor) or found.ndim != dims or len(found) != len(samples):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise PluginError(
                f"{self.name} does not answer for each sample",
                found=f"{shape} for {len(samples)} samples",
                allowed=allowed,
                remedy="Let it return one row a sample.",
            )
        if not bool(found.isfinite().all()):
            bad = int((~found.flatten(1).isfinite().all(1)).sum()) if found.ndim > 1 else int((~found.isfinite()).sum())
            raise PluginError(
                f"{self.name} gives numbers that are not finite",
                found=f"{bad} of {len(samples)} samples",
                allowed="finite numbers, for any sample that a run may pass through",
                remedy="Bound it, for instance with clamp or log_softmax, or guide more gently.",
            )
        return found


class Reward(_Judge):
    """r(x): one number a sample, the higher the better.

    Args:
        function: A callable from samples ``[B, …]`` in the user's units to ``[B]``, or its dotted path. On the command
            line ``function._target_=mine.MyReward`` builds one with its options.

    Raises:
        ConfigurationError: It cannot be called.

    Example:
        >>> Reward(lambda samples: samples.flatten(1).mean(1))(torch.ones(3, 1, 2, 2)).tolist()
        [1.0, 1.0, 1.0]
    """

    def __init__(self, function: str | Callable[[Tensor], Tensor]) -> None:
        super().__init__(_callable(function, "the reward"), "the reward")

    def __call__(self, samples: Tensor) -> Tensor:
        return self._answer(samples, 1, "one number a sample, [B]")

    def needs_no_gradient(self, samples: Tensor) -> Tensor:
        """r(x) of a black box, ``[B]``."""
        with torch.no_grad():
            return self(samples.detach())


class Classifier(_Judge):
    """p(y | x) of a classifier: logits ``[B, C]`` of samples in the user's units.

    Args:
        run: A run that trained one (a folder, a checkpoint, or ``latest``), or
        function: a callable from samples to logits, or its dotted path.
        load_run: Loads a run.

    Raises:
        ConfigurationError: Neither or both are given, or what is given cannot be called.

    Example:
        >>> classifier = Classifier(function=lambda samples: torch.eye(3)[: len(samples)])
        >>> classifier.log_probability(torch.zeros(1, 2), torch.tensor([0])).shape
        torch.Size([1])
    """

    def __init__(
        self,
        run: str | None = None,
        function: str | Callable[[Tensor], Tensor] | None = None,
        load_run: LoadRun | None = None,
    ) -> None:
        if (run is None) == (function is None):
            raise ConfigurationError(
                "it is not clear which classifier judges" if run is not None else "there is no classifier",
                found=f"run={run}, function={function}",
                allowed="one of the two",
                remedy="Set run=FOLDER to a run that trained a classifier, or function to one of yours.",
            )
        judge = function if run is None else (load_run or load_trained)(run).task.eval().requires_grad_(False)
        assert judge is not None
        super().__init__(_callable(judge, "the classifier"), "the classifier")

    def __call__(self, samples: Tensor) -> Tensor:
        if isinstance(self.function, nn.Module):
            weight = next(self.function.parameters(), samples)
            if weight.device != samples.device:
                self.function.to(samples.device)
            return self._answer(samples.to(weight.dtype), 2, "logits [B, C]")
        return self._answer(samples, 2, "logits [B, C]")

    def log_probability(self, samples: Tensor, labels: Tensor) -> Tensor:
        """log p(y | x), ``[B]``.

        Args:
            samples: ``[B, …]`` in the user's units; a gradient goes through them.
            labels: ``[B]``.
        """
        logits = self(samples)
        if int(labels.max()) >= logits.shape[1]:
            raise CompositionError(
                "the classifier does not know the class that is asked for",
                found=f"class {int(labels.max())}, and {logits.shape[1]} classes",
                allowed=f"0 to {logits.shape[1] - 1}",
                remedy="Choose a classifier of the same data as the model.",
            )
        return F.log_softmax(logits, -1).gather(1, labels[:, None].to(logits.device))[:, 0]


def denoiser_of_run(run: str, load_run: LoadRun | None = None) -> Denoiser:
    """The denoiser of another run, with its weights.

    Args:
        run: A folder, a checkpoint, or ``latest``.
        load_run: Loads a run.

    Raises:
        CompositionError: What it trained does not generate.
    """
    found = (load_run or load_trained)(run)
    make: Any = getattr(found.task, "denoiser", None)
    if not callable(make):
        raise CompositionError(
            "the other run's task does not generate",
            found=f"{type(found.task).__name__} of {found.checkpoint}",
            allowed="a generative task",
            remedy="Name a run that trained one, such as experiment=digits_diffusion.",
        )
    denoiser = cast(Denoiser, make())
    denoiser.attach(found.data, found.folder)
    return denoiser


def _callable(function: Any, name: str) -> Callable[[Tensor], Tensor]:
    found = import_target(function) if isinstance(function, str) else function
    if isinstance(found, type):
        found = found()
    if not callable(found):
        raise ConfigurationError(
            f"{name} cannot be called",
            found=f"{function!r}",
            allowed="a callable of samples, or its dotted path",
            remedy="Name one with module.function, or build one with _target_.",
        )
    return cast("Callable[[Tensor], Tensor]", found)
