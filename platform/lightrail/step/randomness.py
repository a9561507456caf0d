"""The state of every random number generator that a training step may draw from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["RandomState"]


class RandomState:
    """A picture of the Python, NumPy, torch and accelerator generators, to go back to.

    Capturing and restoring changes nothing that is drawn; two evaluations that start from one captured state draw the
    same dropout masks.

    Example:
        >>> state = RandomState.capture()
        >>> first = torch.rand(3)
        >>> state.restore()
        >>> torch.equal(first, torch.rand(3))
        True
    """

    __slots__ = ("accelerator", "numpy", "python", "torch")

    def __init__(self, python: Any, numpy: Any, torch_: torch.Tensor, accelerator: list[torch.Tensor]) -> None:
        self.python = python
        self.numpy = numpy
        self.torch = torch_
        self.accelerator = accelerator

    @classmethod
    def capture(cls) -> RandomState:
        """The generators as they stand now."""
        accelerator = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls(random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state(), accelerator)

    def restore(self) -> None:
        """Puts every generator back to this state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.accelerator and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(self.accelerator)

    @classmethod
    @contextmanager
    def kept(cls) -> Iterator[None]:
        """Whatever is drawn or seeded inside, every generator is afterwards as it was before.

        Example:
            >>> with RandomState.kept():
            ...     inside = torch.rand(3)
            >>> torch.equal(inside, torch.rand(3))
            True
        """
        outside = cls.capture()
        try:
            yield
        finally:
            outside.restore()

    @staticmethod
    def seed(seed: int) -> None:
        """Seeds every generator that is in use.

        Args:
            seed: At least 0.
        """
        random.seed(seed)
        np.random.seed(seed % 2**32)
        # torch.manual_seed asks every kind of accelerator, which takes longer than a small step.
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)

    @staticmethod
    def forget_seed() -> None:
        """Seeds every generator with numbers of the system, so that nobody can repeat what is drawn from here on."""
        torch.seed()
        random.seed()
        np.random.seed()

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors only, so that a checkpoint loads with ``weights_only=True``."""
        version, words, gauss = self.python
        inner = self.numpy["state"]
        return {
            "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
            "numpy": {
                "bit_generator": self.numpy["bit_generator"],
                "key": torch.from_numpy(inner["key"].astype(np.int64)),
                "pos": int(inner["pos"]),
                "has_gauss": int(self.numpy["has_gauss"]),
                "gauss": float(self.numpy["gauss"]),
            },
            "torch": self.torch.clone(),
            "accelerator": [state.clone() for state in self.accelerator],
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> RandomState:
        """The inverse of :meth:`state_dict`."""
        python, numpy = state["python"], state["numpy"]
        return cls(
            (python["version"], tuple(python["words"].tolist()), python["gauss"]),
            {
                "bit_generator": numpy["bit_generator"],
                "state": {"key": numpy["key"].numpy().astype(np.uint32), "pos": numpy["pos"]},
                "has_gauss": numpy["has_gauss"],
                "gauss": numpy["gauss"],
            },
            state["torch"].cpu(),
            [accelerator.cpu() for accelerator in state["accelerator"]],
        )
