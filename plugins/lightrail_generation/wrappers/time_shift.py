"""Time shift: the network is told the time that the state looks like."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightrail.errors import CompositionError
from lightrail.generation import Grid, Level, NoisePath, Predict, Prediction, Sampler, SamplerWrapper, State
from lightrail.generation.variance_preserving import TableVP
from lightrail.options import at_least, between, non_negative
from lightrail.traits import Traits

__all__ = ["TimeShift", "nearest_time"]


def nearest_time(variances: Tensor, candidates: Tensor, path: NoisePath, data_variance: float) -> Tensor:
    """The time whose α² v₀ + σ² is nearest, one a sample.

    Args:
        variances: Of each state, ``[B]``.
        candidates: Times, ``[w]``, or ``[B, w]`` for each sample its own.
        path: The noise path.
        data_variance: v₀, of the data.
    """
    expected = path.alpha(candidates) ** 2 * data_variance + path.sigma(candidates) ** 2
    nearest = (variances[:, None] - expected).abs().argmin(1)
    return candidates.expand(len(variances), -1).gather(1, nearest[:, None])[:, 0]


class TimeShift(SamplerWrapper):
    """Tells the network, for each sample, the nearby time at which states vary as much as this one does.

    t_s = argmin |var(x) − σ²(τ)| over τ within (window − 1)/2 training steps of t

    A solver's states are off those that the network was trained on; the time they look like fits them better than the
    solver's own. The noise that is seen at t_s is taken for that at t: the solver's coefficients stay those of its
    grid. No evaluation is added.

    Args:
        sampler: The one to put it around.
        window: How many training steps the network may be told instead, at least 1, with the solver's in the middle;
            1 is the sampler alone.
        cutoff: Where it ends, as a share of the path, in [0, 1]: 0.3 leaves the times below 30% alone.
        data_variance: v₀, at least 0, the variance of a sample's elements: var(x) is compared with σ² + α² v₀.
        training_steps: The path's length in training steps, at least 1; ``None`` for 1000, or for those of a network
            that was trained at whole times.

    Raises:
        ConfigurationError: An option is out of range.
        CompositionError: The states have a single element, which has no variance.

    Deviations:
        The paper compares with σ² alone (``data_variance=0``). As var(x) = σ² + α² v₀, that pulls toward more noise by
        about α² v₀: data that vary by 1 are always told the noisiest time of the window. Published code shifts the
        solver's main evaluations; here every evaluation below the first level is shifted, those between levels too.

    Example:
        >>> from lightrail.generation import GaussianMixture, sample
        >>> from lightrail_generation.samplers.ddim import DDIM
        >>> from lightrail_generation.time_grids.uniform import Uniform
        >>> mixture, sampler = GaussianMixture(), TimeShift(DDIM(steps=10), window=31, cutoff=0.3)
        >>> sample(mixture, sampler, sampler.grid(mixture.path, Uniform()), range(4)).evaluations
        10

    Reference:
        M. Li, T. Qu, R. Yao, W. Sun and M.-F. Moens (2024), Alleviating Exposure Bias in Diffusion Models through
        Sampling with Shifted Time Steps, arXiv 2305.15583, algorithm 3.
    """

    traits: ClassVar[Traits] = Traits(
        rule="t_s = argmin |var(x) − σ²(τ)| over a window around t",
        paper="M. Li, T. Qu, R. Yao, W. Sun, M.-F. Moens, 2024, Alleviating Exposure Bias in Diffusion Models through "
        "Sampling with Shifted Time Steps, arXiv 2305.15583",
        example={"window": 5, "cutoff": 0.55},
    )

    def __init__(
        self,
        sampler: Sampler,
        window: int = 5,
        cutoff: float = 0.55,
        data_variance: float = 0.0,
        training_steps: int | None = None,
    ) -> None:
        super().__init__(sampler)
        at_least(1, window=window)
        between(0, 1, closed="both", cutoff=cutoff)
        non_negative(data_variance=data_variance)
        at_least(1, training_steps=1 if training_steps is None else training_steps)
        self.window = window
        self.cutoff = cutoff
        self.data_variance = data_variance
        self.training_steps = training_steps

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        return self.sampler.step(state, self._shifting(predict, grid), grid)

    def _shifting(self, predict: Predict, grid: Grid) -> Predict:
        first, path = grid[0].t, grid.path
        lowest = path.t_zero + self.cutoff * (path.t_max - path.t_zero)

        def shifted(x: Tensor, level: Level, *, network_time: Tensor | float | None = None) -> Prediction:
            times = torch.as_tensor(level.t, dtype=torch.float64, device=x.device).reshape(-1, 1)
            is_shifted = (times != first) & (times > lowest)
            if network_time is not None or self.window < 2 or not bool(is_shifted.any()):
                return predict(x, level, network_time=network_time)
            told = torch.where(is_shifted, self._nearest(x, times, path), times)
            return Prediction(x, level, "noise", predict(x, path.levels(told, x.ndim)).noise)

        return shifted

    def _nearest(self, x: Tensor, times: Tensor, path: NoisePath) -> Tensor:
        if x[0].numel() < 2:
            raise CompositionError(
                "time_shift needs states of more than one element",
                found=f"states of shape {tuple(x.shape[1:])}",
                allowed="states whose elements have a variance",
                remedy="Leave sampler_wrapper=time_shift out.",
            )
        known = len(path.table) - 1 if isinstance(path, TableVP) else 1000
        length = (path.t_max - path.t_zero) / (self.training_steps or known)
        reach = self.window // 2
        offsets = torch.arange(-reach, reach + 1, dtype=torch.float64, device=x.device) * length
        candidates = (times + offsets).clamp(path.t_min, path.t_max)
        return nearest_time(x.flatten(1).double().var(1), candidates, path, self.data_variance)[:, None]
