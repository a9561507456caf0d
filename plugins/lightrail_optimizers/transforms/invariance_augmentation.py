"""Data augmentation as a constraint: the loss of transformed inputs stays below a bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightrail.errors import ClosureError, ConfigurationError
from lightrail.options import at_least, between, positive
from lightrail.step import Closure, Transform
from lightrail.traits import Traits
from lightrail_optimizers.added_gradient import add_gradient_
from lightrail_optimizers.batch_inputs import generator_of_rank, inputs_of, outputs_with_one_mask
from lightrail_optimizers.random_transformations import check_magnitudes, numbers_needed, transformed
from lightrail_optimizers.transforms.primal_dual import Multiplier

__all__ = ["InvarianceAugmentation", "losses_of_outputs", "metropolis"]

DEFAULT = {"shift": 0.125, "rotate": 15.0, "scale": 0.1}


def metropolis(
    propose: Callable[[int], Tensor], losses_of: Callable[[Tensor], Tensor], uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """The last state of a chain for each sample, whose distribution is proportional to the loss times the proposals'.

    The first proposal is the first state; another one, of loss l', takes the place of a state of loss l with
    probability ``min(1, l' / l)``.

    Args:
        propose: The inputs ``[B, …]`` of the k-th proposal, each drawn alike and for itself.
        losses_of: Their losses ``[B]``; negative ones count as 0.
        uniform: ``[B, K]``, uniform in [0, 1), for K proposals; the first column is not used.

    Returns:
        The inputs ``[B, …]``, and the share of the later proposals that were accepted: a 0-d tensor.

    Example:
        >>> proposals = [torch.tensor([1.0, 3.0]), torch.tensor([2.0, 1.0])]
        >>> x, accepted = metropolis(lambda k: proposals[k], lambda x: x, torch.tensor([[0.0, 0.9], [0.0, 0.9]]))
        >>> x.tolist(), accepted.item()
        ([2.0, 3.0], 0.5)
    """
    x = propose(0)
    if uniform.shape[1] == 1:
        return x, torch.ones(())
    losses = losses_of(x).clamp(min=0.0)
    accepted = []
    for k in range(1, uniform.shape[1]):
        other = propose(k)
        others = losses_of(other).clamp(min=0.0)
        is_taken = uniform[:, k].to(others) * losses <= others
        x = torch.where(is_taken.reshape(-1, *[1] * (x.dim() - 1)), other, x)
        losses = torch.where(is_taken, others, losses)
        accepted.append(is_taken)
    return x, torch.stack(accepted).float().mean()


def losses_of_outputs(output_loss: Callable[[Tensor, Any], Tensor], outputs: Tensor, batch: Any) -> Tensor:
    """The loss of each sample, ``[B]``, from a function that gives their mean.

    Args:
        output_loss: ``output_loss(outputs, batch)``.
        outputs: ``[B, …]``.
        batch: Tensors in tuples, lists and dictionaries; those with B along the leading axis are divided.

    Example:
        >>> squared = lambda outputs, batch: (outputs - batch["y"]).square().mean()
        >>> losses_of_outputs(squared, torch.tensor([[1.0], [3.0]]), {"y": torch.zeros(2, 1)}).tolist()
        [1.0, 9.0]
    """
    leaves, structure = pytree.tree_flatten(batch)
    own = [isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == len(outputs) for leaf in leaves]

    def of_one(output: Tensor, parts: list[Tensor]) -> Tensor:
        mine = iter(parts)
        sample = [next(mine)[None] if is_own else leaf for leaf, is_own in zip(leaves, own, strict=True)]
        return output_loss(output[None], pytree.tree_unflatten(sample, structure))

    parts = [leaf for leaf, is_own in zip(leaves, own, strict=True) if is_own]
    try:
        return torch.vmap(of_one)(outputs, parts)
    except RuntimeError:  # an operation, or a decision that depends on the data, that cannot be made for all at once
        return torch.stack([of_one(output, [part[i] for part in parts]) for i, output in enumerate(outputs)])


class InvarianceAugmentation(Transform):
    """Augments data as far as needed: the loss of transformed inputs is to stay below a bound.

    ``min E l(x)  s.t.  E_x E_{T ~ q(x)} l(T x) <= bound``, where q(x) is proportional to ``l(T x)``: transformations
    that the model handles worst are drawn most often. The optimizer steps with the gradient of
    ``l(x) + lambda l(T x)``, T drawn by a Metropolis-Hastings chain for each sample; then
    ``lambda = [lambda + dual_lr (l(T x) - bound)]_+``, as in :class:`PrimalDual`. lambda says how much augmentation is
    on.

    Args:
        transformations: The largest magnitude of each: ``shift`` (share of the image, < 1), ``rotate`` (degrees),
            ``scale`` (relative change of size, < 1), ``flip`` (probability of a left-right mirror image), and
            ``noise`` (standard deviation; for inputs of any shape). One transformation of a sample is all of them,
            with magnitudes drawn uniformly. ``null``: shift 0.125, rotate 15, scale 0.1. Or a callable
            ``f(inputs, generator)`` that returns inputs of the same shape, a node with ``_target_`` on the command
            line.
        bound: The largest loss of transformed inputs that is accepted, in units of the loss; ``inf`` is the optimizer
            alone, bit for bit.
        dual_lr: Step size of lambda, > 0.
        dual_every: Steps from one dual step to the next, >= 1; it takes the mean loss over them.
        proposals: Length of the chain, >= 1; 1 draws transformations uniformly.

    Raises:
        ConfigurationError: An unknown transformation, or an option out of range.
        ClosureError: The task offers no ``outputs`` and ``output_loss``, or the inputs (the first floating-point
            tensor of the batch) are no images ``[B, C, H, W]`` where the transformations need such.

    Guarantees:
        All proposals of a sample are compared under the same dropout masks, those of the step. lambda is never
        negative, and equal on all ranks; while it is 0 the gradient is untouched, bit for bit.

    Cost:
        Counted as one evaluation. In truth ``proposals`` forward passes, none for 1, and one evaluation: forward and
        backward while lambda is positive, forward while it is 0.

    Deviations:
        The published code draws one or two operations of a larger set that works on stored images; here the geometric
        ones are one affine map of tensors. Its defaults are bound 0.2 (SVHN) to 2.1 (CIFAR-100), a dual step size of
        1e-4 over about 80,000 steps, and two proposals.

    Example:
        >>> from lightrail import Closure, TransformedOptimizer
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> transform = InvarianceAugmentation(lambda x, generator: -x, bound=1.0, dual_lr=0.5, proposals=1)
        >>> optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=0.1), [transform])
        >>> outputs, output_loss = lambda x: w * x, lambda outputs, x: (outputs - 2).square().mean()
        >>> closure = Closure(
        ...     lambda x: output_loss(outputs(x), x), [w], torch.ones(4), outputs_fn=outputs, output_loss_fn=output_loss
        ... )
        >>> loss = optimizer.step(closure)
        >>> transform.logged()["slack"], transform.logged()["multiplier"]
        (-8.0, 4.0)

    Reference:
        Hounie, Chamon and Ribeiro, 2023, "Automatic Data Augmentation via Invariance-Constrained Learning",
        arXiv:2209.15031, Algorithm 1.
    """

    traits = Traits(
        rule="g = grad l(x) + lambda grad l(T x), T ~ l(T x); lambda = [lambda + dual_lr (l(T x) - bound)]_+",
        paper=(
            "Hounie, Chamon, Ribeiro, 2023, Automatic Data Augmentation via Invariance-Constrained Learning, "
            "arXiv:2209.15031"
        ),
        state=0,
        extra_evaluations=1,
        needs_outputs=True,
        is_stochastic=True,
        example={"transformations": {"noise": 0.5}, "bound": 0.1, "dual_lr": 0.5},
        exceptions={
            "takes_any_parameters": "the samples of its problem are row numbers: no inputs that could be transformed"
        },
    )

    def __init__(
        self,
        transformations: Mapping[str, float] | Callable[[Tensor, torch.Generator], Tensor] | None = None,
        bound: float = 0.2,
        dual_lr: float = 1e-3,
        dual_every: int = 1,
        proposals: int = 2,
    ) -> None:
        if transformations is None:
            transformations = DEFAULT
        if not callable(transformations):
            _require_some(transformations)
            check_magnitudes(transformations)
        between(-math.inf, math.inf, closed="right", bound=bound)
        positive(dual_lr=dual_lr)
        at_least(1, dual_every=dual_every, proposals=proposals)
        self.transformations = transformations
        self.proposals = proposals
        self.multiplier = Multiplier(float(bound), dual_lr, dual_every)
        self._accepted: list[Tensor] = []

    def before_step(self, params: list[Tensor], closure: Closure) -> None:
        if self.multiplier.bound == math.inf:
            return
        # One for the whole window, so that its micro-batches draw one after the other.
        generator = generator_of_rank(closure.params[0].device)
        self._accepted = []

        def loss(*batches: Any) -> Tensor:
            return self._transformed_loss(closure, generator, *batches)

        if self.multiplier.value:
            value, g = closure.gradient_of(loss)
            add_gradient_("invariance_augmentation", closure.params, g, self.multiplier.value)
        else:
            value = closure.value_of(loss)
        if not self.is_repeated:
            self.multiplier.measure(float(value))

    def _transformed_loss(self, closure: Closure, generator: torch.Generator, *batches: Any) -> Tensor:
        """The mean loss of a micro-batch whose samples have been transformed."""
        x, with_inputs = inputs_of("invariance_augmentation", *batches)
        outputs = outputs_with_one_mask(closure)
        with torch.no_grad():
            propose, uniform = self._drawn(x, generator)
            worst, accepted = metropolis(
                propose,
                lambda inputs: losses_of_outputs(closure.output_loss, outputs(with_inputs(inputs)), *batches),
                uniform,
            )
        self._accepted.append(accepted)
        return closure.output_loss(outputs(with_inputs(worst)), *batches)

    def _drawn(self, x: Tensor, generator: torch.Generator) -> tuple[Callable[[int], Tensor], Tensor]:
        """The proposals of a chain, and what decides whether they are accepted: all the random numbers of a batch."""
        own, count = self.transformations, self.proposals
        dtype = torch.promote_types(x.dtype, torch.float32)
        needed = 0 if callable(own) else numbers_needed(x, own)
        # In one draw, a row a sample: two micro-batches draw what the one batch draws that they make.
        numbers = torch.rand(len(x), count, 1 + needed, dtype=dtype, device=generator.device, generator=generator)
        numbers = numbers.to(x.device)
        if callable(own):
            return lambda k: _as_inputs(own(x, generator), x), numbers[:, :, 0]
        return lambda k: transformed(x, own, numbers[:, k, 1:]), numbers[:, :, 0]

    def state_dict(self) -> dict[str, Any]:
        return self.multiplier.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.multiplier.load_state_dict(state)

    def logged(self) -> dict[str, float]:
        if not self._accepted:
            return {}
        accepted = float(torch.stack(self._accepted).mean())
        return {"multiplier": self.multiplier.value, "slack": self.multiplier.slack, "accepted_fraction": accepted}


def _require_some(transformations: Mapping[str, float]) -> None:
    if not any(transformations.values()):
        raise ConfigurationError(
            "invariance_augmentation has no transformation",
            found=f"transformations={dict(transformations)}",
            allowed="at least one magnitude above 0",
            remedy="Set transform.invariance_augmentation.transformations={rotate: 15}; or leave the method out.",
        )


def _as_inputs(changed: Tensor, x: Tensor) -> Tensor:
    if not isinstance(changed, Tensor) or changed.shape != x.shape:
        raise ClosureError(
            "the transformation of invariance_augmentation does not give inputs of the shape that it was given",
            found=f"{tuple(changed.shape)}" if isinstance(changed, Tensor) else type(changed).__name__,
            allowed=f"a tensor {tuple(x.shape)}",
            remedy="Let f(inputs, generator) return one transformed sample for each one.",
        )
    return changed.to(x)
