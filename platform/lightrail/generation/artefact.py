"""What a search found: values with the key of what they were fitted for, in a file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightrail.errors import CompositionError, DataError
from lightrail.files import replacing, tells_unwritable
from lightrail.generation.noise_path import NoisePath

if TYPE_CHECKING:
    from lightrail.generation.denoiser import Denoiser
    from lightrail.generation.time_grid import Grid

__all__ = ["Artefact", "path_key"]

FORMAT = 1
# A tensor with more numbers than this lies beside the file.
SMALL = 4096


def path_key(path: NoisePath) -> dict[str, Any]:
    """A noise path as numbers, by which it is known again: its ends, and λ at five times between."""
    times = torch.linspace(path.t_min, min(path.t_max, path.t_finite), 5, dtype=torch.float64)
    lam = [round(float(value), 9) for value in path.lam(times)]
    return {"name": type(path).__name__, "t_min": path.t_min, "t_max": path.t_max, "lam": lam}


def _is_same_path(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    numbers = [[each["t_min"], each["t_max"], *each["lam"]] for each in (a, b)]
    # Another machine's logarithm may differ in the last digit.
    return all(math.isclose(x, y, rel_tol=1e-6, abs_tol=1e-6) for x, y in zip(*numbers, strict=True))


@dataclass(frozen=True)
class Artefact:
    """What a search found.

    Args:
        search: Its name.
        key: What it was found for: ``model`` (a fingerprint), ``path``, ``sampler``, ``options``, ``steps``, ``grid``
            (times) and ``condition``.
        values: What it found, by name: numbers, words, lists, mappings and tensors.
        before: Scores of what it began with, on samples that the search never saw.
        after: Those of what it found.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "found.json"
        ...     Artefact("mine", {"steps": 3}, {"ratios": [1.0, 1.2]}).save(path)
        ...     Artefact.load(path).values["ratios"]
        [1.0, 1.2]
    """

    search: str
    key: Mapping[str, Any]
    values: Mapping[str, Any]
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Writes it as JSON, whole or not at all; large tensors as ``.safetensors`` beside it.

        Raises:
            RunFolderError: It cannot be written.
        """
        from safetensors.torch import save

        with tells_unwritable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        beside: dict[str, Tensor] = {}
        document: dict[str, Any] = {
            "format": FORMAT,
            "search": self.search,
            "key": self.key,
            "before": self.before,
            "after": self.after,
            "values": {name: _written(value, name, beside) for name, value in self.values.items()},
        }
        if beside:
            content = save(beside)
            document["tensors"] = {"file": f"{path.stem}.safetensors", "sha256": hashlib.sha256(content).hexdigest()}
            with replacing(path.with_suffix(".safetensors")) as temporary:
                temporary.write_bytes(content)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(document, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Artefact:
        """Reads one.

        Raises:
            DataError: There is none, or it is damaged.
        """
        path = Path(path)
        try:
            document = json.loads(path.read_text())
            beside = _tensors_beside(path, document.get("tensors"))
            values = {name: _read(value, beside) for name, value in document["values"].items()}
            return cls(document["search"], document["key"], values, document["before"], document["after"])
        except FileNotFoundError as error:
            raise _unreadable(path, f"no file {error.filename}") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _unreadable(path, f"{type(error).__name__}: {error}") from error

    def check(
        self, *, denoiser: Denoiser | None = None, path: NoisePath | None = None, steps: int | None = None
    ) -> None:
        """Whether it was found for this.

        Args:
            denoiser: The model that it is to be used with.
            path: Its noise path, where nothing else of it is known.
            steps: How many steps are to be taken.

        Raises:
            CompositionError: It was found for another model, another path or another number of steps.
        """
        path = denoiser.path if denoiser is not None else path
        if denoiser is not None and denoiser.fingerprint() != self.key["model"]:
            raise self._misfit("model", self.key["model"], denoiser.fingerprint(), "the model that it was found for")
        if path is not None and not _is_same_path(path_key(path), self.key["path"]):
            found = f"{type(path).__name__}, t_max={path.t_max:g}"
            wanted = f"{self.key['path']['name']}, t_max={self.key['path']['t_max']:g}"
            raise self._misfit("noise path", wanted, found, "a model on the noise path that it was found on")
        if steps is not None and steps != self.key["steps"]:
            raise self._misfit("number of steps", self.key["steps"], steps, f"sampler.steps={self.key['steps']}")

    def check_grid(self, grid: Grid, times: Sequence[float] | None = None) -> None:
        """Whether it is for this time grid.

        Args:
            grid: The levels that are to be visited.
            times: Those that it is for; by default those that it was found on.

        Raises:
            CompositionError: It is for another.
        """
        wanted = [float(t) for t in (self.key["grid"] if times is None else times)]
        pairs = zip(grid, wanted, strict=False)
        if len(wanted) != len(grid) or any(abs(here.t - t) > 1e-6 * max(1.0, abs(t)) for here, t in pairs):
            found = ", ".join(f"{level.t:.4g}" for level in grid)
            known = ", ".join(f"{t:.4g}" for t in wanted)
            raise self._misfit("time grid", f"t = {known}", f"t = {found}", "the times that it is for")

    def _misfit(self, what: str, wanted: object, found: object, allowed: str) -> CompositionError:
        return CompositionError(
            f"what the search '{self.search}' found is for another {what}",
            found=f"{found}; the file is for {wanted}",
            allowed=allowed,
            remedy=f"Search again for this one: lightrail search {self.search} …, with the same options as the run.",
        )


def _written(value: Any, name: str, beside: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        if value.numel() > SMALL:
            beside[name] = value.contiguous()
            return {"tensor": name}
        return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, Mapping):
        return {key: _written(each, f"{name}.{key}", beside) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_written(each, f"{name}.{index}", beside) for index, each in enumerate(value)]
    return value


def _read(value: Any, beside: Mapping[str, Tensor]) -> Any:
    if isinstance(value, Mapping) and "tensor" in value:
        stored = value["tensor"]
        return beside[stored] if isinstance(stored, str) else torch.tensor(stored, dtype=getattr(torch, value["dtype"]))
    if isinstance(value, Mapping):
        return {key: _read(each, beside) for key, each in value.items()}
    return [_read(each, beside) for each in value] if isinstance(value, list) else value


def _tensors_beside(path: Path, entry: Mapping[str, str] | None) -> dict[str, Tensor]:
    from safetensors.torch import load

    if entry is None:
        return {}
    content = (path.parent / entry["file"]).read_bytes()
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise ValueError(f"{entry['file']} is not the one that was written with it")
    return load(content)


def _unreadable(path: Path, found: str) -> DataError:
    return DataError(
        f"the file of a search cannot be read: {path.name}",
        found=f"{path}: {found}",
        allowed="a file that `lightrail search` wrote, with its .safetensors beside it where it has one",
        remedy="Name that file, or search again.",
    )
