"""Regional eta: fresh noise inside a mask, none outside."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightrail.errors import CompositionError, ConfigurationError, DataError
from lightrail.generation import Denoiser, Guidance, Level, Moment, Prediction, Sampler, State
from lightrail.options import between
from lightrail.traits import Traits
from lightrail_generation.guidance.dps import refuse_fixed_states
from lightrail_generation.samplers.dmcmc import DMCMC
from lightrail_generation.samplers.dpm_solver_v3 import DPMSolverV3
from lightrail_generation.samplers.momentum import GHVB, HeavyBall, Nesterov

__all__ = ["RegionalEta", "box_mask", "turned"]

# Its draws are apart from those of other guidance at the same step.

CARRIERS_OF_NOISE = {
    DPMSolverV3: "which carries along what it saw behind earlier noise",
    DMCMC: "whose samples are at levels of their own",
    HeavyBall: "which carries a mean of earlier noise along",
    Nesterov: "which carries a mean of earlier noise along",
    GHVB: "which carries a mean of earlier noise along",
}


def turned(noise: Tensor, z: Tensor, share: Tensor) -> Tensor:
    """(√(1 − r²) − 1) ε + r z: what is added to ε where a part of it is replaced, in double precision.

    Args:
        noise: ε.
        z: Standard normal numbers.
        share: r, the fresh noise, in [0, 1], one for each entry.
    """
    return ((1 - share**2).clamp(min=0).sqrt() - 1) * noise.double() + share * z.double()


def box_mask(box: Sequence[float], height: int, width: int) -> Tensor:
    """1 where the centre of a pixel lies within the box, else 0, ``[height, width]``.

    Args:
        box: Top, left, bottom and right, as shares of the height and the width.
        height: Pixels.
        width: Pixels.

    Example:
        >>> box_mask((0.5, 0.0, 1.0, 0.5), 2, 4).tolist()
        [[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]]
    """
    top, left, bottom, right = box
    rows = (torch.arange(height, dtype=torch.float64) + 0.5) / height
    columns = (torch.arange(width, dtype=torch.float64) + 0.5) / width
    return ((rows >= top) & (rows < bottom)).double()[:, None] * ((columns >= left) & (columns < right)).double()


class RegionalEta(Guidance):
    """Replaces a part of the noise in a region by fresh noise after each step, as DDIM does everywhere for η > 0.

    x ← x + (√(σ_t² − s²) − σ_t) ε + s z,  s = η m σ_t √(1 − e^{−2h}),  h = λ_t − λ_s,  m the mask

    Inside, the process is stochastic and free to change; outside, the sampler solves what it solves alone. With
    ``ddim`` this is DDIM with η inside and without noise outside. ε is what the network said at the start of the step:
    with a sampler of higher order it is the noise of the new state to first order only, and so is the stochastic part
    of the process. Predictions that a multistep sampler keeps get the same noise, with their data unchanged, so that it
    goes on as if the noise had always been this one.

    Args:
        eta: η, the share of fresh noise, in [0, 1]; 0 is the run without it, 1 ancestral sampling inside.
        mask: ``[top, left, bottom, right]`` as shares of the height and width of a sample; or a file with a grey image,
            white inside, or an array (``.npy``) of shares of ``eta`` in [0, 1], scaled to the size of a state; ``None``
            for everywhere.

    Raises:
        ConfigurationError: ``eta`` or ``mask`` is out of range.
        DataError: The mask's file cannot be read, or does not fit a state.
        CompositionError: The sampler draws noise itself, or carries along what fresh noise would spoil (``bdia``,
            ``dpm_solver_v3``, ``heavy_ball``, …); or a box is asked for where a state is no image.

    Deviations:
        None known; the paper has ``ddim`` alone, with η = 0.4 inside.

    Example:
        >>> from lightrail.generation import GaussianMixture, sample
        >>> from lightrail_generation.samplers.ddim import DDIM
        >>> from lightrail_generation.time_grids.uniform import Uniform
        >>> mixture, sampler = GaussianMixture(), DDIM(steps=10)
        >>> grid = sampler.grid(mixture.path, Uniform())
        >>> sample(mixture, sampler, grid, range(4), guidance=[RegionalEta(eta=1.0)]).evaluations
        10

    Reference:
        C. Mou, X. Wang, J. Song, Y. Shan and J. Zhang (2024), DiffEditor: Boosting Accuracy and Flexibility on
        Diffusion-based Image Editing, arXiv 2402.02583, the regional SDE.
    """

    traits: ClassVar[Traits] = Traits(
        rule="x ← x + (√(σ_t² − s²) − σ_t) ε + s z with s = η m σ_t √(1 − e^{−2h})",
        paper="C. Mou, X. Wang, J. Song, Y. Shan, J. Zhang, 2024, DiffEditor: Boosting Accuracy and Flexibility on "
        "Diffusion-based Image Editing, arXiv 2402.02583",
        is_stochastic=True,
        example={"eta": 0.5},
    )

    def __init__(self, eta: float = 0.4, mask: str | Sequence[float] | None = None) -> None:
        between(0, 1, closed="both", eta=eta)
        self.eta = eta
        self.mask = mask if mask is None or isinstance(mask, str) else _box(mask)
        self._found: Tensor | None = None

    def prepare(self, denoiser: Denoiser, sampler: Sampler) -> None:
        solver = sampler.solver
        reason = next((why for kind, why in CARRIERS_OF_NOISE.items() if isinstance(solver, kind)), None)
        if sampler.card.is_stochastic:
            reason = "which draws noise itself"
        if reason is not None:
            raise CompositionError(
                f"RegionalEta has no meaning with {type(solver).__name__}, {reason}",
                found=f"{type(solver).__name__} with RegionalEta",
                allowed="a sampler without noise of its own that can go on from states and predictions alone",
                remedy="Choose ddim without sampler.eta, or another such as dpm_solver_pp, unipc or edm_heun.",
            )
        refuse_fixed_states(self, sampler)
        self._mask_of(denoiser)

    def after_step(self, state: State, moment: Moment) -> State:
        prediction, there = moment.prediction, moment.grid[state.index]
        went_back = state.index <= moment.index  # another guidance has: those steps will be taken again
        if not self.eta or there.is_clean or went_back or prediction is None:
            return state
        z = moment.normal()
        share = self.eta * self._mask_of(moment.denoiser) * _fresh(moment.level, there)
        x = (state.x.double() + there.sigma * turned(prediction.noise, z, share)).to(state.x.dtype)
        history = tuple(_with_noise_turned(each, z, share) for each in state.history)
        return dataclasses.replace(state, x=x, history=history)

    def _mask_of(self, denoiser: Denoiser) -> Tensor:
        """m at each entry of a state, broadcast against it; made once, as it is the same in every run."""
        if self._found is None or self._found.device != denoiser.device:
            self._found = self._made(tuple(denoiser.shape)).to(denoiser.device)
        return self._found

    def _made(self, shape: tuple[int, ...]) -> Tensor:
        if self.mask is None:
            return torch.ones((), dtype=torch.float64)
        if isinstance(self.mask, str):
            return _read(Path(self.mask), shape)
        if len(shape) < 2:
            raise CompositionError(
                "a box is a region of an image, and this model's states are none",
                found=f"mask={list(self.mask)} and states of shape {shape}",
                allowed="a model of images; or mask=null, or an array of a state's shape in a file",
                remedy="Leave guidance mask out, or write an array with numpy.save.",
            )
        return box_mask(self.mask, *shape[-2:])


def _fresh(here: Level, there: Level) -> Any:
    """√(1 − e^{−2h})."""
    h = torch.as_tensor(there.lam, dtype=torch.float64) - torch.as_tensor(here.lam, dtype=torch.float64)
    return (-torch.expm1(-2 * h)).clamp(min=0).sqrt()


def _with_noise_turned(prediction: Prediction, z: Tensor, share: Tensor) -> Prediction:
    """The same data seen behind other noise."""
    level, data = prediction.level, prediction.data
    moved = (prediction.x.double() + level.sigma * turned(prediction.noise, z, share)).to(data.dtype)
    return Prediction(moved, level, "data", data)


def _box(values: Sequence[float]) -> tuple[float, ...]:
    allowed = "four shares in [0, 1], top below bottom and left below right; a file; or null"
    box = tuple(values)
    if not (
        len(box) == 4
        and all(isinstance(each, int | float) and 0 <= each <= 1 for each in box)
        and box[0] < box[2]
        and box[1] < box[3]
    ):
        raise ConfigurationError(
            "the mask is no box",
            found=f"mask={list(box)}",
            allowed=allowed,
            remedy="Write it as [top, left, bottom, right]: the upper half is [0, 0, 0.5, 1].",
        )
    return tuple(map(float, box))


def _read(path: Path, shape: tuple[int, ...]) -> Tensor:
    """The mask of a file, at the size of a state."""
    try:
        if path.suffix.lower() == ".npy":
            found = torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float64))
        else:
            from PIL import Image

            with Image.open(path) as opened:
                found = torch.from_numpy(np.asarray(opened.convert("L")).astype(np.float64)) / 255
    except (OSError, ValueError) as error:
        raise DataError(
            "the mask cannot be read",
            found=f"{path}: {str(error).partition(chr(10))[0]}",
            allowed="an image, or an array in a file that ends in .npy",
            remedy="Set mask to a file that opens elsewhere.",
        ) from error
    is_fitting = tuple(found.shape) == shape or (len(shape) > 1 and found.ndim == 2)
    if not is_fitting or not bool(((found >= 0) & (found <= 1)).all()):
        raise DataError(
            "the mask does not fit a state",
            found=f"{path} of shape {tuple(found.shape)}, from {float(found.min()):.3g} to {float(found.max()):.3g}",
            allowed=f"numbers in [0, 1] of shape {shape}" + (", or [height, width]" if len(shape) > 1 else ""),
            remedy="Write it with numpy.save, or give an image of one channel.",
        )
    if tuple(found.shape) == shape or tuple(found.shape) == shape[-2:]:
        return found
    return F.interpolate(found[None, None], size=shape[-2:], mode="area")[0, 0]
