"""A small classifier of noisy states, trained in seconds, which is told how noisy they are."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lightrail.errors import RunFolderError
from lightrail.files import replace_file
from lightrail.generation import Level, NoisePath
from lightrail_generation.quality.classifier import FeatureClassifier

__all__ = ["NoisyClassifier", "keep", "kept_classifier", "trained_on_bins"]

VERSION = "1"  # of the network and its training: files of another are made anew
STEPS, BATCH = 600, 128
RATE, DECAY = 3e-3, 0.05
CLEANEST, NOISIEST = 4.0, -5.0  # log(α/σ) within which it learns


class NoisyClassifier(nn.Module):
    """A classifier of noisy states that is told how noisy they are.

    Args:
        shape: Of one state.
        bins: Classes, at least 2.

    Example:
        >>> from lightrail.generation import LinearFlow
        >>> NoisyClassifier((1, 8, 8), 10)(torch.zeros(3, 1, 8, 8), LinearFlow().level(0.5)).shape
        torch.Size([3, 10])
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, shape: Sequence[int], bins: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("variance", torch.ones(()))
        self.network = FeatureClassifier((shape[0] + 1, *shape[1:]), bins)

    def forward(self, x: Tensor, level: Level) -> Tensor:
        """Logits ``[N, bins]`` of states ``[N, *shape]``."""
        alpha, sigma, lam = (
            torch.as_tensor(each, dtype=self.mean.dtype, device=x.device).view(-1, *[1] * (x.ndim - 1))
            for each in (level.alpha, level.sigma, level.lam)
        )
        seen = (x.to(self.mean.dtype) - alpha * self.mean) / (alpha**2 * self.variance + sigma**2).sqrt()
        told = (lam.clamp(NOISIEST, CLEANEST) / CLEANEST).expand(len(x), 1, *x.shape[2:])
        return self.network(torch.cat((seen, told), 1))


def trained_on_bins(states: Tensor, labels: Tensor, bins: int, path: NoisePath) -> NoisyClassifier:
    """A classifier of noised states, the same for the same states; no random numbers of the caller's are used.

    Args:
        states: ``[N, *shape]``, on the CPU.
        labels: ``[N]`` int64 below ``bins``.
        bins: Classes.
        path: Whose noise.
    """
    ends = path.lam(torch.tensor([path.t_finite, path.t_min], dtype=torch.float64)).clamp(NOISIEST, CLEANEST)
    # Gradients are needed even where the caller only samples.
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(0)
        states, labels = states.float().clone(), labels.clone()
        classifier = NoisyClassifier(states.shape[1:], bins)
        classifier.mean.copy_(states.mean())
        classifier.variance.copy_(states.var().clamp(min=1e-12))
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=RATE, weight_decay=DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
        for _ in range(STEPS):
            rows = torch.randint(len(states), (min(BATCH, len(states)),))
            lam = ends[0] + (ends[1] - ends[0]) * torch.rand(len(rows), dtype=torch.float64)
            level = path.levels(path.t_of_lam(lam), states.ndim)
            x = (level.alpha * states[rows] + level.sigma * torch.randn_like(states[rows])).float()
            optimizer.zero_grad()
            F.cross_entropy(classifier(x, level), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return classifier.eval().requires_grad_(False)


def keep(classifier: NoisyClassifier, path: Path, digest: str) -> None:
    """Writes it to a file, with what it was made of; a folder that cannot be written does no harm."""
    with contextlib.suppress(RunFolderError):
        state = {name: value.contiguous() for name, value in classifier.state_dict().items()}
        replace_file(path, save(state, metadata={"digest": f"{VERSION} {digest}"}))


def kept_classifier(path: Path, digest: str, shape: Sequence[int], bins: int) -> NoisyClassifier | None:
    """The classifier in the file, if it was made of the same."""
    if not path.is_file():
        return None
    with contextlib.suppress(SafetensorError, OSError), safe_open(str(path), framework="pt") as file:
        if (file.metadata() or {}).get("digest") != f"{VERSION} {digest}":
            return None
        with torch.random.fork_rng(devices=[]):
            classifier = NoisyClassifier(shape, bins)
        classifier.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        return classifier.eval().requires_grad_(False)
    return None
