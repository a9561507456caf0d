"""What is measured for an inverse problem: the user's own images, or data that a run was validated on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightrail.errors import DataError
from lightrail.generation.denoiser import Denoiser
from lightrail.generation.measurement import Measurement, Observed
from lightrail.generation.noise import Noise

__all__ = ["Observations"]

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
ARRAYS = (".npy", ".safetensors")


class Observations:
    """The measurements of a generation, those of a sample by its number.

    Args:
        operator: A, which has seen the shape of a sample.
        denoiser: What samples.
        request: The ``generate`` group: ``image``, samples that are measured here; or ``observed``, what was measured
            elsewhere; or neither, for data that the model was not trained on. A file, or a folder of several that are
            gone through in turn.
        count: How many samples are sought.
        seed: Of the generation, for the noise of the measurement.
    """

    def __init__(
        self, operator: Measurement, denoiser: Denoiser, request: Mapping[str, Any], count: int, seed: int
    ) -> None:
        self.operator = operator
        self._seed = seed
        self._device = denoiser.device
        self._dtype = torch.promote_types(denoiser.dtype, torch.float32)
        shape = sample_shape(denoiser)
        self._values: Tensor | None = None
        self._truth: Tensor | None = None
        if request["observed"] is not None:
            measured = tuple(operator.apply(torch.zeros((1, *shape))).shape[1:])
            found = _read(Path(request["observed"]), (measured, shape), "generate.observed")
            is_picture = tuple(found.shape[1:]) != measured
            self._values = operator.from_picture(found) if is_picture else found
        elif request["image"] is not None:
            self._truth = _read(Path(request["image"]), (shape,), "generate.image")
        else:
            self._truth = denoiser.examples(count).to(self._dtype)

    def of(self, numbers: Sequence[int]) -> Observed:
        """What was measured of these samples.

        Args:
            numbers: Which; of a population all have the number of the population.
        """
        if self._values is not None:
            rows = [number % len(self._values) for number in numbers]
            return Observed(self.operator, self._values[rows].to(self._device, self._dtype))
        assert self._truth is not None
        rows = [number % len(self._truth) for number in numbers]
        truth = self._truth[rows].to(self._device, self._dtype)
        noise = Noise(self._seed, rows, tuple(truth.shape[1:]), self._dtype, self._device)
        return Observed(self.operator, self.operator.observe(truth, noise), truth)


def sample_shape(denoiser: Denoiser) -> tuple[int, ...]:
    """The shape of one sample in the user's units."""
    zeros = torch.zeros((1, *denoiser.shape), dtype=denoiser.dtype, device=denoiser.device)
    with torch.no_grad():
        return tuple(denoiser.decode(zeros).shape[1:])


def _read(path: Path, shapes: Sequence[tuple[int, ...]], key: str) -> Tensor:
    """The images or arrays of a file or of a folder, ``[N, …]``, all of one of the shapes."""
    files = (
        sorted(each for each in path.iterdir() if each.suffix.lower() in (*IMAGES, *ARRAYS))
        if path.is_dir()
        else [path]
    )
    if not files or not all(file.is_file() for file in files):
        raise DataError(
            f"there is nothing to read at {key}",
            found=str(path),
            allowed=f"a file or a folder of files that end in {', '.join((*IMAGES, *ARRAYS))}",
            remedy=f"Set {key} to an image of yours.",
        )
    first = _read_one(files[0], shapes, key)
    rest = [_read_one(file, (tuple(first.shape[1:]),), key) for file in files[1:]]
    found = torch.cat([first, *rest])
    if not bool(found.isfinite().all()):
        raise DataError(
            f"{key} holds numbers that are not finite",
            found=str(path),
            allowed="finite numbers",
            remedy="Mend the file; what was not measured belongs into the operator, as a mask does.",
        )
    return found


def _read_one(file: Path, shapes: Sequence[tuple[int, ...]], key: str) -> Tensor:
    is_grey = all(len(shape) == 3 and shape[0] == 1 for shape in shapes if len(shape) == 3)
    read: Callable[[], Tensor] = {".npy": lambda: _array(file), ".safetensors": lambda: _tensor(file)}.get(
        file.suffix.lower(), lambda: _image(file, is_grey)
    )
    try:
        found = read()
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise DataError(
            f"{key} cannot be read",
            found=f"{file}: {str(error).partition(chr(10))[0]}",
            allowed=f"an image, or an array in a file that ends in {', '.join(ARRAYS)}",
            remedy=f"Set {key} to a file that opens elsewhere.",
        ) from error
    found = found[None] if tuple(found.shape) in shapes else found
    if tuple(found.shape[1:]) not in shapes:
        raise DataError(
            f"{key} has another size than the model's samples"
            if key == "generate.image"
            else f"{key} is not what the operator measures",
            found=f"{file} of shape {tuple(found.shape)}",
            allowed=" or ".join(f"{shape}{' (channels, height, width)' * (len(shape) == 3)}" for shape in shapes),
            remedy="Scale or crop the image to that size, or choose a model of that size.",
        )
    return found


def _image(file: Path, is_grey: bool) -> Tensor:
    """An image in [0, 1], ``[channels, height, width]``, grey where the model is."""
    import numpy as np
    from PIL import Image

    with Image.open(file) as opened:
        pixels = np.asarray(opened.convert("L" if is_grey else "RGB"))
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def _array(file: Path) -> Tensor:
    import numpy as np

    found = torch.from_numpy(np.load(file, allow_pickle=False))
    return torch.view_as_real(found).float() if found.is_complex() else found.float()


def _tensor(file: Path) -> Tensor:
    from lightrail.generation.sample_files import read_samples

    return read_samples(file)["samples"].float()
