"""Minority guidance: samples like the data that a denoiser finds hardest to restore."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.generation import Condition, Denoiser, Generated, Moment, Noise, Prediction, Sampler
from lightrail.options import at_least, positive
from lightrail.traits import SamplingClaim, Traits
from lightrail_generation.guidance.classifier import LikelihoodGuidance
from lightrail_generation.guidance.noisy_classifier import NoisyClassifier, keep, kept_classifier, trained_on_bins
from lightrail_generation.quality.sample_quality import SampleQuality

__all__ = ["Minority", "bins_of", "minority_scores", "neighbour_distances"]

VERSION = "1"  # of the scores: what was kept of others is made anew
ROWS = 512  # of data that are scored, and of samples whose neighbours are sought, at once
EXAMPLES = 2048
NEIGHBOURS = 5


@torch.no_grad()
def minority_scores(
    denoiser: Denoiser, states: Tensor, rho: float, draws: int, condition: Condition | None = None
) -> Tensor:
    """m(x) = E_z mean (x − D(α x + σ z))², one a sample: how much of it is lost where σ/α = ``rho``, ``[N]``.

    Args:
        denoiser: The network on its path.
        states: x, ``[N, *shape]``.
        rho: σ/α.
        draws: Of z, the same for a sample in any set.
        condition: What steers them, one row each.
    """
    level, found = denoiser.path.level_at_lam(-math.log(rho)), []
    for start in range(0, len(states), ROWS):
        rows = range(start, min(start + ROWS, len(states)))
        x = states[start : rows.stop].to(denoiser.device, denoiser.dtype)
        told = None if condition is None else {k: v[start : rows.stop].to(x.device) for k, v in condition.items()}
        noise, total = Noise(0, rows, tuple(x.shape[1:]), x.dtype, x.device), 0.0
        for draw in range(draws):
            noisy = level.alpha * x + level.sigma * noise.normal(0, draw)
            lost = denoiser.predict(noisy, level, told).data - x
            total = total + lost.flatten(1).double().square().mean(1)
        found.append(torch.as_tensor(total / draws).cpu())
    return torch.cat(found)


def bins_of(scores: Tensor, bins: int) -> Tensor:
    """Which of equally full bins each score falls into, from 0 for the lowest, ``[N]``.

    Example:
        >>> bins_of(torch.tensor([5.0, 1.0, 3.0, 2.0]), 2).tolist()
        [1, 0, 1, 0]
    """
    shares = torch.arange(1, bins, dtype=scores.dtype) / bins
    return torch.searchsorted(scores.quantile(shares), scores)


def neighbour_distances(samples: Tensor, data: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """The mean distance of each sample to its k nearest data, ``[N]``: the less dense the data there, the larger.

    Example:
        >>> neighbour_distances(torch.tensor([[0.0]]), torch.tensor([[1.0], [-2.0], [9.0]]), k=2).tolist()
        [1.5]
    """
    reference = data.flatten(1).double()
    parts = samples.flatten(1).double().split(ROWS)
    nearest = [torch.cdist(part, reference).topk(min(k, len(data)), largest=False).values for part in parts]
    return torch.cat(nearest).mean(1)


class Minority(LikelihoodGuidance):
    """Steers samples to where data are rare, by a classifier of how hard data are to restore.

    m(x) = E_z ‖x − D(α x + σ z)‖²/n;  s' = ∇ log p(x_t) + w ∇ log p(bin of m(x) | x_t)

    The data that the model was trained on are scored by what the denoiser loses of them, sorted into equally full
    bins, and a small classifier learns the bin of noisy states. That takes seconds, once: it is kept in the run folder
    as ``minority.safetensors``. Sampling then costs the classifier's gradient and no evaluation more.

    Args:
        scale: w, at least 0; 0 leaves the samples alone. A classifier of few data is too sure of itself, and more than
            2 may spoil the samples: look at what else is measured of them.
        bins: How many, at least 2.
        target: Which bin is wanted, from 0 for what is easiest to restore; ``None`` for the hardest.
        rho: σ/α at which data are scored, above 0; 0.2 is step 60 of 1000 of the usual linear schedule.
        draws: Of noise for each score, at least 1.
        max_rho: The noise σ/α above which it does not act, above 0, or ``None`` for everywhere but α = 0.

    Raises:
        ConfigurationError: An option is out of range.
        CompositionError: The model has no score, or its data are not known or fewer than the bins.

    Deviations:
        The paper measures what is lost by LPIPS, uses 100 bins, and trains on features of a large classifier for
        60,000 steps; here it is the mean square, ten bins, and a small network for 600 steps. A model of classes is
        asked with the labels of the data, so that what is rare is rare within its class.

    Example:
        >>> bins_of(torch.arange(10.0), 5).tolist()
        [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]

    Reference:
        S. Um, S. Lee and J. C. Ye (2024), Don't Play Favorites: Minority Guidance for Diffusion Models,
        arXiv 2301.12334, section 3.
    """

    traits: ClassVar[Traits] = Traits(
        rule="s' = ∇ log p(x) + w ∇ log p(top bin of E‖x − D(αx + σz)‖² | x)",
        paper="S. Um, S. Lee, J. C. Ye, 2024, Don't Play Favorites: Minority Guidance for Diffusion Models, "
        "arXiv 2301.12334",
        example={"bins": 4, "draws": 2},
        sampling_claims=(
            SamplingClaim(
                "samples lie where data are less dense than without guidance",
                metric="neighbour_distance",
                overrides=("run={digits}", "+guidance=[minority]", "guidance.minority.scale=2", "generate.count=200"),
                trained={"digits": ("experiment=digits_diffusion",)},
            ),
            # Any steering moves samples away from the data: the easiest bin says how much of it is that.
            SamplingClaim(
                "samples lie where data are less dense than with the same guidance to the easiest bin",
                metric="neighbour_distance",
                overrides=("run={digits}", "+guidance=[minority]", "guidance.minority.scale=2", "generate.count=200"),
                baseline=(
                    "run={digits}",
                    "+guidance=[minority]",
                    "guidance.minority.scale=2",
                    "guidance.minority.target=0",
                    "generate.count=200",
                ),
                trained={"digits": ("experiment=digits_diffusion",)},
            ),
        ),
    )

    def __init__(
        self,
        scale: float = 3.5,
        bins: int = 10,
        target: int | None = None,
        rho: float = 0.2,
        draws: int = 5,
        max_rho: float | None = 10.0,
    ) -> None:
        super().__init__(scale, max_rho)
        at_least(2, bins=bins)
        at_least(1, draws=draws)
        positive(rho=rho)
        self.target = bins - 1 if target is None else target
        if not 0 <= self.target < bins:
            raise ConfigurationError(
                "there is no such bin",
                found=f"target={target}",
                allowed=f"0 to {bins - 1}",
                remedy="Set target within that range, or leave it out for the last.",
            )
        self.bins = bins
        self.rho = rho
        self.draws = draws
        self._denoiser: Denoiser | None = None
        self._data: Tensor | None = None
        self._classifier: NoisyClassifier | None = None

    def prepare(self, denoiser: Denoiser, sampler: Sampler) -> None:
        super().prepare(denoiser, sampler)
        if denoiser is not self._denoiser:
            self._fit(denoiser)

    def log_gradient(self, prediction: Prediction, moment: Moment) -> Tensor:
        if self._classifier is None:
            self._fit(moment.denoiser)
        assert self._classifier is not None
        classifier = self._classifier.to(moment.x.device)
        with torch.enable_grad():
            x = moment.x.detach().requires_grad_()
            chosen = classifier(x, moment.level).log_softmax(-1)[:, self.target]
            (gradient,) = torch.autograd.grad(chosen.sum(), x)
        return gradient

    @torch.no_grad()
    def measure(self, generated: Generated) -> dict[str, float]:
        """``neighbour_distance``: the mean distance to the five nearest data; ``minority_score``: the mean of m."""
        if self._denoiser is None or self._data is None:
            return {}
        states = self._denoiser.encode(generated.samples.to(self._denoiser.device))
        label = (generated.condition or {}).get("label")
        condition = {"label": label} if isinstance(label, Tensor) and self._denoiser.classes else None
        scores = minority_scores(self._denoiser, states, self.rho, self.draws, condition)
        distances = neighbour_distances(generated.samples.cpu(), self._data)
        return {"neighbour_distance": float(distances.mean()), "minority_score": float(scores.mean())}

    def _fit(self, denoiser: Denoiser) -> None:
        """Scores the data and trains the classifier, or finds it in the run folder."""
        self._denoiser = denoiser
        self._data, labels = _data_of(denoiser)
        if len(self._data) < self.bins:
            raise CompositionError(
                "there are fewer data than bins",
                found=f"{len(self._data)} samples, bins={self.bins}",
                allowed="at least one sample a bin",
                remedy="Set fewer bins.",
            )
        states = denoiser.encode(self._data.to(denoiser.device))
        folder: Any = getattr(denoiser, "folder", None)
        path = None if folder is None else Path(folder) / "minority.safetensors"
        digest = "" if path is None else self._digest(denoiser, self._data)
        self._classifier = None if path is None else kept_classifier(path, digest, states.shape[1:], self.bins)
        if self._classifier is None:
            condition = None if labels is None else {"label": labels}
            scores = minority_scores(denoiser, states, self.rho, self.draws, condition)
            self._classifier = trained_on_bins(states.cpu(), bins_of(scores, self.bins), self.bins, denoiser.path)
            if path is not None:
                keep(self._classifier, path, digest)

    def _digest(self, denoiser: Denoiser, data: Tensor) -> str:
        words = f"{VERSION} {denoiser.fingerprint()} {self.bins} {self.rho} {self.draws} {tuple(data.shape)}"
        return hashlib.sha256(words.encode() + data.contiguous().numpy().tobytes()).hexdigest()[:32]


def _data_of(denoiser: Denoiser) -> tuple[Tensor, Tensor | None]:
    """What the model was trained on, with labels where it knows them, else data like it, on the CPU."""
    data: Any = getattr(denoiser, "data", None)
    if data is None:
        return denoiser.examples(EXAMPLES).cpu(), None
    known = SampleQuality.for_data(data, getattr(denoiser, "folder", None))
    return known.reference, known.labels if denoiser.classes else None
