"""The files of a generation: finished batches, so that nothing is lost, and what they make together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightrail.errors import DataError
from lightrail.files import replacing

__all__ = ["Batch", "SampleFiles", "read_samples"]


@dataclass(frozen=True)
class Batch:
    """Samples that are finished.

    Args:
        indices: Which.
        tensors: By name, one row a sample: ``samples``, ``start``, ``label`` and what else there is.
        evaluations: How often the network was asked for each of them.
        seconds: How long the batch took.
    """

    indices: range
    tensors: Mapping[str, Tensor]
    evaluations: int
    seconds: float


class SampleFiles:
    """``batches/`` while a generation goes on, ``samples.safetensors`` when it is done.

    Args:
        folder: The folder of the generation.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.batches = folder / "batches"
        self.samples = folder / "samples.safetensors"

    def write(self, batch: Batch) -> None:
        """Writes a finished batch, whole or not at all."""
        from safetensors.torch import save_file

        self.batches.mkdir(exist_ok=True)
        metadata = {"evaluations": str(batch.evaluations), "seconds": repr(batch.seconds)}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in batch.tensors.items()}
        with replacing(self._path(batch.indices)) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    def _path(self, indices: range) -> Path:
        return self.batches / f"{indices.start:08d}-{indices.stop:08d}.safetensors"

    def done(self) -> list[range]:
        """The samples that are finished, in order."""
        found = []
        for path in self.batches.glob("*.safetensors"):
            first, _, last = path.stem.partition("-")
            if first.isdigit() and last.isdigit():
                found.append(range(int(first), int(last)))
        return sorted(found, key=lambda indices: indices.start)

    def pending(self, count: int, batch_size: int) -> list[range]:
        """The batches that are still to be made, whatever size the finished ones had."""
        missing, reached = [], 0
        for indices in (*self.done(), range(count, count)):
            missing += [range(i, min(i + batch_size, indices.start)) for i in range(reached, indices.start, batch_size)]
            reached = max(reached, indices.stop)
        return missing

    def read(self) -> list[Batch]:
        """Every finished batch, in order."""
        from safetensors import safe_open

        batches = []
        for indices in self.done():
            with safe_open(self._path(indices), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            batches.append(Batch(indices, tensors, int(metadata["evaluations"]), float(metadata["seconds"])))
        return batches

    def join(self, metadata: Mapping[str, str]) -> None:
        """Writes ``samples.safetensors`` from all batches, which are then removed.

        Args:
            metadata: What is written into the file beside the tensors.
        """
        from safetensors.torch import save_file

        batches = self.read()
        names = batches[0].tensors.keys()
        tensors = {name: torch.cat([batch.tensors[name] for batch in batches]) for name in names}
        with replacing(self.samples) as temporary:
            save_file(tensors, temporary, metadata={name: str(value) for name, value in metadata.items()})
        for batch in batches:
            self._path(batch.indices).unlink(missing_ok=True)
        self.batches.rmdir()

    def finished(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors of ``samples.safetensors``, one row a sample, and what stands beside them."""
        from safetensors import safe_open

        with safe_open(self.samples, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def read_samples(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``samples.safetensors``, or of the folder that holds one.

    Raises:
        DataError: There is none, or it has no tensor ``samples``.
    """
    from safetensors.torch import load_file

    file = path / "samples.safetensors" if path.is_dir() else path
    try:
        tensors = load_file(file)
    except Exception as error:  # safetensors has an exception of its own for every way a file can be broken
        raise DataError(
            f"{file} cannot be read",
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            allowed="a samples.safetensors that `generate` wrote",
            remedy="Name the file, or the folder of a finished generation.",
        ) from error
    if "samples" not in tensors:
        raise DataError(
            f"{file} holds no samples",
            found=", ".join(sorted(tensors)) or "nothing",
            allowed="a tensor named samples, one row a sample",
            remedy="Name a samples.safetensors that `generate` wrote.",
        )
    return tensors
