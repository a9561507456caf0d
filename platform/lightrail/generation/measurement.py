"""The contract of a measurement: a linear operator with its adjoint, for inverse problems."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from lightrail.errors import CompositionError, PluginError
from lightrail.generation.conjugate_gradients import conjugate_gradients, dots
from lightrail.options import non_negative
from lightrail.traits import Traits

if TYPE_CHECKING:
    from lightrail.generation.denoiser import Denoiser
    from lightrail.generation.noise import Noise

__all__ = ["Measurement", "Observed", "StateMeasurement"]

# The step of the starting noise is −1; a measurement's noise is that of a step of its own.
NOISE_STEP = -3
ADJOINT_TOLERANCE = 1e-4


class Measurement(ABC):
    """A linear operator A on samples in the user's units: what is known of them is y = A x + s z.

    Subclasses write :meth:`apply` and :meth:`adjoint`.

    Args:
        noise: s, the standard deviation of the noise in y, at least 0, in the units of y.
    """

    traits: ClassVar[Traits] = Traits()

    def __init__(self, noise: float = 0.0) -> None:
        non_negative(noise=noise)
        self.noise = noise

    def prepare(self, shape: tuple[int, ...]) -> None:  # noqa: B027
        """Sees the shape of one sample once, before anything is measured; refuses one that it cannot measure."""

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """A x, ``[B, …]`` of real numbers, for samples ``[B, *shape]``."""

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """Aᵀ y, ``[B, *shape]``, with ⟨A x, y⟩ = ⟨x, Aᵀ y⟩."""

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """A⁺ y, ``[B, *shape]``: the smallest samples whose measurement is the nearest to y.

        By conjugate gradients, where an operator knows no better.
        """
        return conjugate_gradients(lambda x: self.adjoint(self.apply(x)), self.adjoint(y), steps=50)

    def picture(self, y: Tensor) -> Tensor:
        """What was measured, as samples that can be shown: Aᵀ y, where an operator knows no better."""
        return self.adjoint(y)

    def from_picture(self, picture: Tensor) -> Tensor:
        """y, from samples in which what was measured can be seen, ``[B, *shape]``, as with a masked photograph.

        Raises:
            CompositionError: It cannot be seen in a sample.
        """
        raise CompositionError(
            f"what {type(self).__name__} measures cannot be read from a picture of a sample",
            found="generate.observed with the size of a sample",
            allowed="what the operator measures",
            remedy="Give that, as an image or an array of its size; or generate.image for a sample to be measured.",
        )

    def observe(self, samples: Tensor, noise: Noise) -> Tensor:
        """y = A x + s z, the same for a sample in any batch.

        Args:
            samples: ``[B, *shape]``.
            noise: Random numbers by sample.
        """
        y = self.apply(samples)
        if self.noise == 0:
            return y
        keyed = type(noise)(noise.seed, noise.indices, tuple(y.shape[1:]), y.dtype, y.device)
        return y + self.noise * keyed.normal(NOISE_STEP)

    def check_adjoint(self, shape: tuple[int, ...]) -> None:
        """Compares ⟨A x, y⟩ with ⟨x, Aᵀ y⟩ for random x and y.

        Args:
            shape: Of one sample.

        Raises:
            PluginError: They differ, or the shapes do not match.
        """
        generator = torch.Generator().manual_seed(0)
        x = torch.randn((2, *shape), generator=generator, dtype=torch.float64)
        measured = self.apply(x)
        y = torch.randn(measured.shape, generator=generator, dtype=torch.float64)
        returned = self.adjoint(y)
        remedy = "Mend its adjoint, or let A be the transpose of it."
        if returned.shape != x.shape:
            raise PluginError(
                f"the adjoint of {type(self).__name__} gives samples of another shape",
                found=f"{tuple(returned.shape[1:])} for samples of shape {tuple(shape)}",
                allowed=f"{tuple(shape)}",
                remedy=remedy,
            )
        left, right = dots(measured, y), dots(x, returned)
        allowed = ADJOINT_TOLERANCE * measured.flatten(1).norm(dim=1) * y.flatten(1).norm(dim=1)
        if bool(((left - right).abs() > allowed).any()):
            raise PluginError(
                f"the adjoint of {type(self).__name__} is not that of its A",
                found=f"<A x, y> = {float(left[0]):.6g} and <x, A^T y> = {float(right[0]):.6g} for random x and y",
                allowed="equal numbers",
                remedy=remedy,
            )


@dataclass(frozen=True)
class Observed:
    """What was measured of the samples that are sought.

    Args:
        operator: A.
        value: y, one row a sample, ``[B, …]``.
        truth: The samples that were measured, where they are known.
    """

    operator: Measurement
    value: Tensor
    truth: Tensor | None = None

    def residual(self, samples: Tensor) -> Tensor:
        """y − A x for samples in the user's units, ``[B, …]``; a gradient goes through it."""
        return self.value - self.operator.apply(samples)

    def on_states(self, denoiser: Denoiser) -> StateMeasurement:
        """The same measurement of a model's states.

        Args:
            denoiser: Whose :meth:`~Denoiser.decode` must be affine, with one factor an entry.

        Raises:
            CompositionError: It is not, as with a latent model.
        """
        zeros = torch.zeros((1, *denoiser.shape), dtype=denoiser.dtype, device=denoiser.device)
        offset = denoiser.decode(zeros)
        probe = torch.linspace(-1.0, 0.75, zeros.numel(), dtype=zeros.dtype, device=zeros.device).view_as(zeros)
        scale = 2 * (denoiser.decode(zeros + 0.5) - offset) if offset.shape == zeros.shape else offset
        if offset.shape != zeros.shape or not torch.allclose(
            denoiser.decode(probe), scale * probe + offset, rtol=1e-2, atol=1e-3
        ):
            raise CompositionError(
                "what was measured cannot be carried over to the states of this model",
                found=f"{type(denoiser).__name__}, whose samples are not its states in other units",
                allowed="a model of the pixels themselves",
                remedy="Choose guidance that takes a gradient through the decoder, such as dps or stsl.",
            )
        value = self.value - self.operator.apply(offset.expand(len(self.value), *offset.shape[1:]))
        return StateMeasurement(self.operator, scale, value)

    def map(self, function: Callable[[Tensor], Tensor]) -> Observed:
        """With a function applied to each tensor that has one row a sample."""
        truth = None if self.truth is None else function(self.truth)
        return dataclasses.replace(self, value=function(self.value), truth=truth)


@dataclass(frozen=True)
class StateMeasurement:
    """A measurement of states, y = A S x, where S are the units.

    Args:
        operator: A.
        scale: S, one factor an entry, ``[1, *shape]``.
        value: y without what A makes of the state 0, ``[B, …]``.
    """

    operator: Measurement
    scale: Tensor
    value: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """A S x."""
        return self.operator.apply(self.scale * x)

    def adjoint(self, y: Tensor) -> Tensor:
        """S Aᵀ y."""
        return self.scale * self.operator.adjoint(y)

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """S⁻¹ A⁺ y; that of A S where S is one factor for all."""
        return self.operator.pseudo_inverse(y) / self.scale
