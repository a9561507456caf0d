"""Optimal boundary condition: every sample starts from the one noise that a search found best."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.generation import Denoiser, Generated, Guidance, Moment, Sampler, State
from lightrail.generation.search import Artefact
from lightrail.traits import Traits
from lightrail_generation.guidance.starting_noise import refuse_stochastic

__all__ = ["OptimalBoundary"]


class OptimalBoundary(Guidance):
    """Starts every sample from one x_T*, at which samples were nearest to known truths on average.

    x_0 = h(x_T*, c),  x_T* = argmin over random x_T of E d(h(x_T, c), truth of c)

    h is the sampler, c what steers a sample. ``lightrail search optimal_boundary`` finds x_T*. No evaluation is added.
    What a sample is then follows from c alone: of one class or one measurement all samples are the same.

    Args:
        path: The ``.json`` that the search wrote.

    Raises:
        DataError: The file cannot be read.
        ConfigurationError: It holds no starting noise.
        CompositionError: It is for another model or noise path, or the sampler adds noise of its own.

    Example:
        >>> import tempfile, pathlib, torch
        >>> from lightrail.generation import GaussianMixture, sample
        >>> from lightrail.generation.artefact import path_key
        >>> from lightrail_generation.samplers.ddim import DDIM
        >>> from lightrail_generation.time_grids.uniform_lambda import UniformLambda
        >>> mixture, sampler = GaussianMixture(), DDIM(steps=10)
        >>> key = {"model": mixture.fingerprint(), "path": path_key(mixture.path), "steps": 10}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder) / "found.json"
        ...     Artefact("optimal_boundary", key, {"start": torch.zeros(2)}).save(file)
        ...     guidance = OptimalBoundary(str(file))
        >>> x = sample(mixture, sampler, sampler.grid(mixture.path, UniformLambda()), range(4), guidance=[guidance]).x
        >>> bool((x == x[0]).all())
        True

    Reference:
        Y. Ma, H. Yang, W. Yang, J. Fu and J. Liu (2024), Solving Diffusion ODEs with Optimal Boundary Conditions for
        Better Image Super-Resolution, arXiv 2305.15357, section 3.
    """

    traits: ClassVar[Traits] = Traits(
        rule="x_T = x_T* for every sample, x_T* = argmin E d(h(x_T, c), truth)",
        paper="Y. Ma, H. Yang, W. Yang, J. Fu, J. Liu, 2024, Solving Diffusion ODEs with Optimal Boundary Conditions "
        "for Better Image Super-Resolution, arXiv 2305.15357",
    )

    def __init__(self, path: str) -> None:
        self.path = path
        self.artefact = Artefact.load(path)
        if not isinstance(self.artefact.values.get("start"), Tensor):
            raise ConfigurationError(
                f"the search '{self.artefact.search}' found no starting noise",
                found=f"{path}: {', '.join(self.artefact.values)}",
                allowed="the file of the search optimal_boundary",
                remedy="Search first: lightrail search optimal_boundary …; then name its file in "
                "guidance.optimal_boundary.path.",
            )

    def prepare(self, denoiser: Denoiser, sampler: Sampler) -> None:
        refuse_stochastic(self, sampler)
        self.artefact.check(denoiser=denoiser)
        found = tuple(self.artefact.values["start"].shape)
        if found != tuple(denoiser.shape):
            raise CompositionError(
                "the starting noise of the search has another shape than the model's states",
                found=f"{found}; a state has {tuple(denoiser.shape)}",
                allowed=f"{tuple(denoiser.shape)}",
                remedy="Search again at this size: lightrail search optimal_boundary ….",
            )

    def around(self, run: Callable[[Tensor], State], start: Tensor, moment: Moment) -> State:
        scale = moment.denoiser.path.starting_scale(moment.grid[0])
        best = self.artefact.values["start"].double() * scale
        return run(best.to(start.device, start.dtype).expand_as(start).clone())

    def measure(self, generated: Generated) -> dict[str, float]:
        """The root mean square distance from what was measured, or from truths of the search of the same class."""
        samples = generated.samples.flatten(1).double()
        observed = generated.observed
        if observed is not None:
            known = None if observed.truth is None else observed.truth.flatten(1).double()
            return {} if known is None else {"truth_error": float((samples - known).square().mean().sqrt())}
        truths, labels = self.artefact.values.get("truths"), self.artefact.values.get("labels")
        if not isinstance(truths, Tensor):
            return {}
        squares = torch.cdist(samples, truths.flatten(1).double()).square() / samples.shape[1]
        asked = (generated.condition or {}).get("label")
        if isinstance(labels, Tensor) and isinstance(asked, Tensor):
            is_same = asked.cpu()[:, None] == labels
            return {"truth_error": float(squares[is_same].mean().sqrt())} if bool(is_same.any()) else {}
        return {"truth_error": float(squares.mean().sqrt())}
