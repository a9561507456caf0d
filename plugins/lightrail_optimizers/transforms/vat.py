"""VAT: outputs that stay the same where a small change of the inputs would alter them most."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from lightrail.errors import ClosureError
from lightrail.options import at_least, non_negative, one_of, positive
from lightrail.step import Closure, Transform
from lightrail.traits import Traits
from lightrail_optimizers.added_gradient import add_gradient_
from lightrail_optimizers.batch_inputs import generator_of_rank, inputs_of, outputs_with_one_mask

__all__ = ["VAT", "divergence", "virtual_adversarial"]


def divergence(clean: Tensor, changed: Tensor, kind: str) -> Tensor:
    """How far the predictions of changed inputs are from those of the clean ones: a mean over the samples.

    ``kl``: ``KL(p || q)`` for logits along the last axis. ``squared``: half the squared distance, which is the KL of
    Gaussians of variance 1.

    Example:
        >>> divergence(torch.zeros(1, 2), torch.tensor([[3.0, -4.0]]), "squared").item()
        12.5
        >>> divergence(torch.zeros(1, 2), torch.ones(1, 2), "kl").item()
        0.0
    """
    working = torch.promote_types(clean.dtype, torch.float32)
    clean, changed = clean.to(working), changed.to(working)
    if kind == "squared":
        return (changed - clean).square().reshape(len(clean), clean[0].numel()).sum(1).mean() / 2
    log_p, log_q = F.log_softmax(clean, -1), F.log_softmax(changed, -1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()


def virtual_adversarial(
    divergence_at: Callable[[Tensor], Tensor], d: Tensor, *, eps: float, xi: float, iterations: int
) -> Tensor:
    """The change r of norm eps for which D grows most, to second order: ``d = grad_r D(r) at r = xi d / ||d||``.

    D and its gradient vanish at 0, so that such a gradient is about ``xi H d``, and repeating it is the power method
    for the dominant eigenvector of the Hessian H.

    Args:
        divergence_at: D, as a function of r.
        d: Where the power method starts, in the shape of the inputs: one direction for each sample.
        eps: The norm of each sample's r.
        xi: The length of the finite difference.
        iterations: Gradients of D; with 0, r is along the start.

    Returns:
        ``r = eps d / ||d||`` for each sample; 0 where D does not change.

    Example:
        >>> H = torch.diag(torch.tensor([1.0, 9.0]))
        >>> r = virtual_adversarial(lambda r: (r @ H * r).sum() / 2, torch.ones(1, 2), eps=2.0, xi=1.0, iterations=5)
        >>> [round(v, 3) for v in r[0].tolist()]
        [0.0, 2.0]
    """
    for _ in range(iterations):
        with torch.enable_grad():
            r = (xi * _unit(d)).requires_grad_()
            value = divergence_at(r)
            found = torch.autograd.grad(value, r, allow_unused=True)[0] if value.requires_grad else None
        if found is None:
            raise ClosureError(
                "vat finds no way from the inputs to the outputs",
                found=f"outputs without a gradient in the first floating-point tensor of the batch, {tuple(d.shape)}",
                allowed="a batch whose first floating-point tensor is what the model looks at",
                remedy="Put the inputs first in the batch; without real-valued ones, leave the method out.",
            )
        d = found
    return eps * _unit(d)


def _unit(d: Tensor) -> Tensor:
    """Each sample's direction at length 1; zero stays zero."""
    working = torch.promote_types(d.dtype, torch.float32)
    flat = d.detach().reshape(len(d), d[0].numel()).to(working)
    # The largest entry comes out first: the squares of a tiny gradient would vanish.
    largest = flat.abs().amax(1, keepdim=True)
    flat = torch.where(largest > 0, flat / largest, 0.0)
    norm = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    return torch.where(norm > 0, flat / norm, 0.0).reshape(d.shape).to(d.dtype)


class VAT(Transform):
    """Virtual adversarial training: penalises how much the worst small change of the inputs changes the outputs.

    ``grad += strength grad mean KL(p(y|x) || p(y|x+r))``, where p(y|x) is held fixed, and r of norm eps is the
    direction in which the divergence grows most, by the power method (:func:`virtual_adversarial`). Labels play no
    part in it.

    Args:
        strength: Weight of the penalty, >= 0; 0 is the optimizer alone, bit for bit.
        eps: Norm of each sample's change, > 0, in units of the inputs; the option to tune.
        xi: Length of the finite difference in the power method, > 0, in units of the inputs.
        iterations: Of the power method, >= 0; 0 takes a random direction.
        divergence: ``kl`` for logits along the last axis; ``squared`` for real-valued outputs; ``auto`` takes
            ``kl`` where the last tensor of the batch beside the inputs (its targets) holds whole numbers, and
            ``squared`` where it holds real ones or there is none.

    Raises:
        ConfigurationError: An option out of range.
        ClosureError: The task offers no ``outputs``, or the batch has no real-valued inputs (tokens).

    Guarantees:
        The inputs are the first floating-point tensor of the batch. All outputs that are compared have the same
        dropout masks, those of the step.

    Cost:
        Counted as one evaluation. In truth a forward pass, ``iterations`` forward and backward passes to the inputs,
        and a forward and backward pass to the parameters.

    Deviations:
        The published code takes xi = 1e-6, which in single precision is below the rounding of the outputs; the
        default here is 1e-2. It draws new dropout masks for each output.

    Example:
        >>> from lightrail import Closure, TransformedOptimizer
        >>> w = torch.nn.Parameter(torch.tensor([[2.0]]))
        >>> optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=0.1), [VAT(eps=0.5)])
        >>> outputs = lambda x: x @ w
        >>> closure = Closure(lambda x: 0 * outputs(x).sum(), [w], torch.zeros(3, 1), outputs_fn=outputs)
        >>> loss = optimizer.step(closure)
        >>> round(w.item(), 4)  # at inputs 0 the penalty is (eps w)² / 2
        1.95

    Reference:
        Miyato, Maeda, Koyama and Ishii, 2019, "Virtual Adversarial Training: A Regularization Method for Supervised
        and Semi-Supervised Learning", arXiv:1704.03976, Algorithm 1.
    """

    traits = Traits(
        rule="g += strength grad mean KL(p(y|x) || p(y|x+r)); r = eps * dominant direction",
        paper=(
            "Miyato, Maeda, Koyama, Ishii, 2019, Virtual Adversarial Training: A Regularization Method for Supervised "
            "and Semi-Supervised Learning, arXiv:1704.03976"
        ),
        state=0,
        extra_evaluations=1,
        needs_outputs=True,
        is_stochastic=True,
        example={"eps": 0.5},
        exceptions={
            "takes_any_parameters": "the samples of its problem are row numbers: no inputs that could change a little"
        },
    )

    def __init__(
        self,
        strength: float = 1.0,
        eps: float = 1.0,
        xi: float = 1e-2,
        iterations: int = 1,
        divergence: str = "auto",
    ) -> None:
        non_negative(strength=strength)
        positive(eps=eps, xi=xi)
        at_least(0, iterations=iterations)
        one_of(("auto", "kl", "squared"), divergence=divergence)
        self.strength = strength
        self.eps = eps
        self.xi = xi
        self.iterations = iterations
        self.divergence = divergence
        self._value: Tensor | None = None

    def before_step(self, params: list[Tensor], closure: Closure) -> None:
        if self.strength == 0:
            return
        # One for the whole window, so that its micro-batches draw one after the other.
        generator = generator_of_rank(closure.params[0].device)
        self._value, g = closure.gradient_of(lambda *batches: self._penalty(closure, generator, *batches))
        add_gradient_("vat", closure.params, g, self.strength)

    def _penalty(self, closure: Closure, generator: torch.Generator, *batches: Any) -> Tensor:
        """The mean divergence of a micro-batch, as a function of the parameters."""
        x, with_inputs = inputs_of("vat", *batches)
        outputs = outputs_with_one_mask(closure)
        with torch.no_grad():
            clean = outputs(*batches)
        kind = _divergence_for(x, *batches) if self.divergence == "auto" else self.divergence
        d = torch.randn(x.shape, dtype=x.dtype, device=generator.device, generator=generator).to(x.device)
        r = virtual_adversarial(
            lambda r: divergence(clean, outputs(with_inputs(x + r)), kind),
            d,
            eps=self.eps,
            xi=self.xi,
            iterations=self.iterations,
        )
        return divergence(clean, outputs(with_inputs(x + r)), kind)

    def logged(self) -> dict[str, float]:
        return {} if self._value is None else {"divergence": float(self._value)}


def _divergence_for(x: Tensor, batch: Any) -> str:
    """What suits the targets: the last tensor of the batch that is not the inputs."""
    targets = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf is not x]
    return "squared" if not targets or targets[-1].is_floating_point() else "kl"
