"""A small classifier whose features samples are measured in, trained in seconds on the data themselves."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lightrail.errors import RunFolderError
from lightrail.files import replace_file

__all__ = ["FeatureClassifier", "trained_classifier"]

VERSION = "1"  # of the network and its training: files of another are made anew
STEPS, BATCH = 400, 64
RATE, DECAY = 3e-3, 0.05
FEATURES = 64
BLUR = 0.1  # standard deviations of noise on what it is trained on, so that small errors of samples mean little


class FeatureClassifier(nn.Module):
    """Convolutions for images ``[C, H, W]``, fully connected layers for anything else.

    Args:
        shape: Of one sample.
        num_classes: Labels, at least 2.

    Example:
        >>> classifier = FeatureClassifier((1, 8, 8), num_classes=10)
        >>> classifier.features(torch.zeros(5, 1, 8, 8)).shape, classifier(torch.zeros(5, 1, 8, 8)).shape
        (torch.Size([5, 64]), torch.Size([5, 10]))
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, shape: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.shape = tuple(shape)
        # Samples are seen with mean 0 and deviation 1, as the data have them.
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("deviation", torch.ones(()))
        self.body = _convolutions(shape) if len(shape) == 3 else _layers(shape)
        self.head = nn.Linear(FEATURES, num_classes)

    def features(self, samples: Tensor) -> Tensor:
        """What the last layer looks at, ``[N, 64]``."""
        return self.body((samples - self.mean) / self.deviation)

    def forward(self, samples: Tensor) -> Tensor:
        """Logits ``[N, num_classes]``."""
        return self.head(self.features(samples))


def _convolutions(shape: Sequence[int]) -> nn.Module:
    channels, *sides = shape
    stride = 2 if min(sides) > 16 else 1
    layers = _convolution(channels, 32, stride)
    channels, sides = 32, [-(-side // stride) for side in sides]
    while min(sides) > 4:
        layers += [nn.MaxPool2d(2), *_convolution(channels, FEATURES, 1)]
        channels, sides = FEATURES, [side // 2 for side in sides]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * sides[0] * sides[1], FEATURES), nn.ReLU())


def _convolution(channels: int, width: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, width, 3, stride, padding=1), nn.GroupNorm(8, width), nn.ReLU()]


def _layers(shape: Sequence[int]) -> nn.Module:
    size = torch.Size(shape).numel()
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(size, 128),
        nn.ReLU(),
        nn.Linear(128, 128),
        nn.ReLU(),
        nn.Linear(128, FEATURES),
        nn.ReLU(),
    )


def trained_classifier(
    samples: Tensor, labels: Tensor, num_classes: int, folder: Path | None = None
) -> FeatureClassifier:
    """A classifier of these samples, the same for the same samples; no random numbers of the caller's are used.

    Args:
        samples: ``[N, …]`` in their own units.
        labels: ``[N]`` int64 below ``num_classes``.
        num_classes: Labels, at least 2.
        folder: Where it is kept, as ``quality.safetensors``, and found again; a folder that cannot be written does no
            harm.
    """
    path = None if folder is None else folder / "quality.safetensors"
    digest = _digest(samples, labels, num_classes)
    classifier = None if path is None else _found(path, digest, tuple(samples.shape[1:]), num_classes)
    if classifier is not None:
        return classifier
    # Gradients are needed even where the caller evaluates.
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(0)
        classifier = _trained(samples.clone(), labels.clone(), num_classes)
    if path is not None:
        with contextlib.suppress(RunFolderError):
            state = {name: value.contiguous() for name, value in classifier.state_dict().items()}
            replace_file(path, save(state, metadata={"digest": digest}))
    return classifier


def _trained(samples: Tensor, labels: Tensor, num_classes: int) -> FeatureClassifier:
    classifier = FeatureClassifier(samples.shape[1:], num_classes)
    classifier.mean.copy_(samples.mean())
    classifier.deviation.copy_(samples.std().clamp(min=1e-6))
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    for _ in range(STEPS):
        rows = torch.randint(len(samples), (min(BATCH, len(samples)),))
        batch = samples[rows]
        batch = batch + BLUR * classifier.deviation * torch.randn_like(batch)
        optimizer.zero_grad()
        F.cross_entropy(classifier(batch), labels[rows]).backward()
        optimizer.step()
        schedule.step()
    return classifier.eval().requires_grad_(False)


def _digest(samples: Tensor, labels: Tensor, num_classes: int) -> str:
    digest = hashlib.sha256(f"{VERSION} {num_classes} {tuple(samples.shape)}".encode())
    digest.update(samples.contiguous().numpy().tobytes())
    digest.update(labels.contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def _found(path: Path, digest: str, shape: Sequence[int], num_classes: int) -> FeatureClassifier | None:
    """The classifier in the file, if it is one of these very samples."""
    if not path.is_file():
        return None
    with contextlib.suppress(SafetensorError, OSError), safe_open(str(path), framework="pt") as file:
        if (file.metadata() or {}).get("digest") != digest:
            return None
        with torch.random.fork_rng(devices=[]):
            classifier = FeatureClassifier(shape, num_classes)
        classifier.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        return classifier.eval().requires_grad_(False)
    return None
