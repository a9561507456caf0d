"""Denoising objectives that are weighted squares."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from lightrail.generation import Level
from lightrail.generation.prediction import weights_of
from lightrail_generation.tasks.data_range import inputs_of
from lightrail_generation.tasks.denoising import DenoisingTask, Example
from lightrail_generation.tasks.draws import Draws
from lightrail_generation.tasks.weightings import tensor_of

__all__ = ["DenoisingRegression"]


class DenoisingRegression(DenoisingTask):
    """A denoising objective that is a weighted square: w(t) ‖y − ŷ‖² of a prediction in one form, averaged.

    What the loss looks at, ``outputs``, are the weighted residuals √w (ŷ − y): noise and level are drawn with them.
    """

    @abstractmethod
    def weight(self, level: Level, t: Tensor) -> Any:
        """What the squared error counts, ``[B, 1, …]`` or a number."""

    def residuals(self, example: Example) -> Tensor:
        """√w (ŷ − y), ``[B, …]``."""
        x0, z = example.x0, self.noise(example)
        level = self.path.levels(example.t, x0.dim())
        x = tensor_of(level.alpha, x0) * x0 + tensor_of(level.sigma, x0) * z
        of_data, of_noise = (tensor_of(weight, x0) for weight in weights_of(self.form, level))
        target = of_data * x0 + of_noise * z
        root = tensor_of(self.weight(level, example.t) ** 0.5, x0)
        return root * (self.answer(x, level, example.t, example.shown) - target)

    def losses(self, example: Example) -> Tensor:
        return self.residuals(example).square().flatten(1).mean(1)

    def outputs(self, batch: Any) -> Tensor:
        """√w (ŷ − y) ``[B, …]``: what the loss looks at."""
        return self.residuals(self.example(batch, self._draws(batch)))

    def output_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """The mean of their squares."""
        return outputs.square().mean()

    def sampled_loss(self, batch: Any, generator: torch.Generator) -> Tensor:
        """The loss with targets drawn from the Gaussian whose negative log-likelihood it is.

        For states of n numbers that is N(√w ŷ, n/2). Its gradient ĝ is such that E[ĝ ⊙ ĝ] · B is the diagonal of the
        Gauss-Newton matrix of the loss, averaged over a batch of B.

        Args:
            batch: As in training.
            generator: Where levels, noise and targets are drawn from.
        """
        draws = Draws(generator, inputs_of(batch).device)
        residuals = self.residuals(self.example(batch, draws))
        spread = (residuals[0].numel() / 2) ** 0.5
        drawn = residuals.detach() + spread * draws.normal(residuals)
        return (residuals - drawn).square().mean()
