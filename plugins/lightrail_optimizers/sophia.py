"""Sophia: momentum over an estimate of the Hessian's diagonal, clipped coordinate by coordinate."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightrail.options import at_least, one_of
from lightrail.step import Closure
from lightrail.traits import Claim, Traits
from lightrail_optimizers.sophia_base import Sophia
from lightrail_optimizers.sophia_rule import draw_directions, gauss_newton_bartlett, hutchinson

__all__ = ["SophiaG", "SophiaH"]

_CLAIM = Claim(sentence="the loss of AdamW in half of its steps", steps=0.5, problems=("docs_lm",))
_PAPER = (
    "Liu, Li, Hall, Liang, Ma, 2023, Sophia: A Scalable Stochastic Second-order Optimizer for Language Model "
    "Pre-training, arXiv:2305.14342"
)


class SophiaG(Sophia):
    """Sophia with the Gauss-Newton-Bartlett estimator: needs a task that can draw labels from its own prediction.

    ``m = b1 m + (1-b1) g``; at steps 1, k+1, 2k+1, … ``h = b2 h + (1-b2) B ĝ⊙ĝ`` with ĝ the gradient of the mean loss
    of B samples, labels drawn by the model; ``x *= 1 - lr wd``; ``x -= lr clip(m / max(gamma h, eps), 1)``.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, >= 0: no coordinate moves farther in a step.
        betas: ``(b1, b2)``, each in [0, 1).
        gamma: How much of the curvature is believed, >= 0; larger clips less. Tune it until :meth:`win_rate` is
            between 0.1 and 0.5.
        eps: The least curvature, > 0.
        weight_decay: Decoupled, >= 0.
        update_every: k, steps from one estimate to the next, >= 1.
        batch_size: B, the number of terms in the mean loss of one step: tokens for a language model, samples for a
            classifier, over all micro-batches and ranks. ``None`` asks the closure, which counts or raises: a wrong B
            would scale ``gamma`` in silence.
        form: ``paper``, or ``official`` for the authors' code.
        maximize: Ascend.
        foreach: One call for many tensors; ``False`` is the same bit for bit, tensor by tensor, with less memory.
        compile: Compile the update; a learning rate that moves does not compile it again.

    Raises:
        ConfigurationError: An option out of range; a complex parameter or a sparse gradient.
        ClosureError: An estimate is due and the closure is not a :class:`lightrail.Closure` that can sample.

    Deviations:
        ``form=official`` divides by ``gamma h + eps`` (set ``eps=1e-15`` to have the authors' constant) and estimates
        after steps k, 2k, …, so that the first k steps are sign steps. The authors' code keeps B out of the average
        and multiplies by it in the update, which is the same while B does not change; it estimates on the batch after
        the step's, and clips that gradient to norm 1, where this one takes the step's own batch and clips nothing.

    Example:
        >>> import torch
        >>> from lightrail import Closure
        >>> w = torch.nn.Parameter(torch.zeros(3))
        >>> x, y = torch.eye(3)[:2], torch.tensor([1.0, 0.0])
        >>> nll = torch.nn.functional.binary_cross_entropy_with_logits
        >>> def sampled_loss(generator):
        ...     logits = x @ w
        ...     return nll(logits, torch.bernoulli(logits.detach().sigmoid(), generator=generator))
        >>> optimizer = SophiaG([w], lr=0.1, weight_decay=0.0, batch_size=2)
        >>> closure = Closure(lambda: nll(x @ w, y), [w], sampled_loss_fn=sampled_loss)
        >>> round(optimizer.step(closure).item(), 4)
        0.6931
        >>> [round(v, 4) for v in w.tolist()]
        [0.1, -0.1, 0.0]

    Reference:
        Liu et al., 2023, arXiv:2305.14342, Algorithms 2 and 3.
    """

    traits = Traits(
        rule="x -= lr clip(m / max(gamma h, eps), 1), h the average of B g_sampled²",
        paper=_PAPER,
        state=2,
        extra_evaluations=0.1,
        needs_sampled_loss=True,
        is_stochastic=True,
        example={"lr": 0.01, "update_every": 2},
        claim=_CLAIM,
    )
    _own = ("batch_size", "_form")

    def __init__(
        self,
        params: Any,
        lr: float = 6e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        gamma: float = 0.05,
        eps: float = 1e-12,
        weight_decay: float = 0.2,
        update_every: int = 10,
        batch_size: int | None = None,
        form: str = "paper",
        maximize: bool = False,
        foreach: bool = True,
        compile: bool = False,
    ) -> None:
        one_of(("paper", "official"), form=form)
        if batch_size is not None:
            at_least(1, batch_size=batch_size)
        self.batch_size = batch_size
        self._form = form
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "gamma": gamma,
                "eps": eps,
                "weight_decay": weight_decay,
                "update_every": update_every,
                "maximize": maximize,
                "foreach": foreach,
                "compile": compile,
            },
        )

    def _estimate(self, closure: Closure) -> list[Tensor]:
        num_samples = closure.num_samples() if self.batch_size is None else self.batch_size
        return gauss_newton_bartlett(closure.sampled(), num_samples)


class SophiaH(Sophia):
    """Sophia with Hutchinson's estimator: needs a loss that can be differentiated twice.

    As :class:`SophiaG`, with ``ĥ = u ⊙ (∇²L u)``, u drawn anew at every estimate.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, >= 0: no coordinate moves farther in a step.
        betas: ``(b1, b2)``, each in [0, 1).
        gamma: How much of the curvature is believed, >= 0; larger clips less.
        eps: The least curvature, > 0; a negative estimate counts as this, and the coordinate moves by ``lr``.
        weight_decay: Decoupled, >= 0.
        update_every: k, steps from one estimate to the next, >= 1.
        distribution: Of u: ``gaussian`` as in the paper; ``rademacher``, signs, has less variance.
        maximize: Ascend.
        foreach: One call for many tensors; ``False`` is the same bit for bit, tensor by tensor, with less memory.
        compile: Compile the update; a learning rate that moves does not compile it again.

    Raises:
        ConfigurationError: An option out of range; a complex parameter or a sparse gradient.
        ClosureError: An estimate is due and the closure is not a :class:`lightrail.Closure`, or the loss has no second
            derivative.

    Guarantees:
        u comes from torch's global generator, so an exact resume repeats it, and is the same on all ranks.

    Example:
        >>> import torch
        >>> from lightrail import Closure
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> curvature = torch.tensor([1.0, 1e4])
        >>> optimizer = SophiaH([x], lr=0.1, weight_decay=0.0, distribution="rademacher")
        >>> loss = optimizer.step(Closure(lambda: (curvature * x**2).sum() / 2, [x]))
        >>> optimizer.state[x]["hessian"].tolist()  # (1 - b2) times the exact diagonal
        [0.009999999776482582, 100.0]

    Reference:
        Liu et al., 2023, arXiv:2305.14342, Algorithms 1 and 3.
    """

    traits = Traits(
        rule="x -= lr clip(m / max(gamma h, eps), 1), h the average of u⊙Hu",
        paper=_PAPER,
        state=2,
        extra_evaluations=0.1,
        needs_second_derivatives=True,
        is_stochastic=True,
        example={"lr": 0.01, "update_every": 2},
        claim=_CLAIM,
    )
    _own = ("distribution",)

    def __init__(
        self,
        params: Any,
        lr: float = 6e-4,
        betas: tuple[float, float] = (0.96, 0.99),
        gamma: float = 0.01,
        eps: float = 1e-12,
        weight_decay: float = 0.2,
        update_every: int = 10,
        distribution: str = "gaussian",
        maximize: bool = False,
        foreach: bool = True,
        compile: bool = False,
    ) -> None:
        one_of(("gaussian", "rademacher"), distribution=distribution)
        self.distribution = distribution
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "gamma": gamma,
                "eps": eps,
                "weight_decay": weight_decay,
                "update_every": update_every,
                "maximize": maximize,
                "foreach": foreach,
                "compile": compile,
            },
        )

    def _estimate(self, closure: Closure) -> list[Tensor]:
        u = draw_directions(closure.params, self.distribution)
        estimate = hutchinson(u, closure.hvp(u))
        ascends = {p for group in self.param_groups if group["maximize"] for p in group["params"]}
        return [-e if p in ascends else e for p, e in zip(closure.params, estimate, strict=True)]
