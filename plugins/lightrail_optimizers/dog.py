"""DoG: the distance from the start over the root of the summed squared gradients, as the step size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lightrail.options import non_negative, positive
from lightrail.traits import Claim, Traits
from lightrail_optimizers.iterate_average import IterateAverage, average_, polynomial_weight
from lightrail_optimizers.own_step_size import refuse_schedule
from lightrail_optimizers.tensor_lists import count_step, gather

__all__ = ["DoG", "LDoG", "dog"]

_PAPER = (
    "Ivgi, Hinder, Carmon, 2023, DoG is SGD's Best Friend: A Parameter-Free Dynamic Step Size Schedule, "
    "arXiv:2302.12022"
)
_RULE = "x -= lr max_i≤t ||x_i - x_0|| / sqrt(eps + sum_i≤t ||g_i||²) g"


def dog(rbar: Tensor, sum_squares: Tensor, *, distance: Tensor, gradient_norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``r̄ = max(r̄, ||x-x_0||)``; ``G = G + ||g||²``; ``eta = r̄ / sqrt(G)``.

    Args:
        rbar: r̄ so far: the greatest distance, or the first guess at one.
        sum_squares: G so far.
        distance: ``||x-x_0||`` before the step.
        gradient_norm: ``||g||`` there.

    Returns:
        ``(r̄, G, eta)``, new tensors in the shape of the old: one entry for each norm that was taken.

    Example:
        >>> rbar, G, eta = dog(torch.tensor(0.1), torch.tensor(0.0), distance=torch.tensor(3.0),
        ...                    gradient_norm=torch.tensor(6.0))
        >>> rbar.item(), G.item(), eta.item()
        (3.0, 36.0, 0.5)
    """
    rbar = torch.maximum(rbar, distance)
    sum_squares = sum_squares + gradient_norm.square()
    return rbar, sum_squares, rbar / sum_squares.sqrt()


class DoG(IterateAverage):
    """SGD with a step size that is neither given nor tuned: distance travelled over gradients seen.

    ``r̄ = max(r̄, ||x-x_0||)``; ``G = G + ||g||²``; ``x -= lr r̄ / sqrt(G) g``, with norms over all parameters of a
    group, from ``r̄ = reps_rel (1 + ||x_0||)`` and ``G = eps``. Since the step size does not decay, what is evaluated is
    an average: ``x̄ = (1-c) x̄ + c x`` with ``c = (1+average_gamma) / (t+average_gamma)``. ``eval()`` goes to x̄ and
    ``train()`` back to x.

    Args:
        params: Parameters or parameter groups.
        lr: Multiplies the step size, >= 0; the method is meant at 1, and no schedule may change it.
        reps_rel: The first distance relative to ``1 + ||x_0||``, > 0: so small that the first step does no harm; 1e-4
            with BatchNorm. Parameters in bfloat16 need at least 1e-2: they cannot represent a smaller step.
        eps: Added to the sum of squares, > 0.
        weight_decay: Added to the gradient as ``weight_decay x``, >= 0.
        init_eta: The first step size, > 0, in place of ``reps_rel``.
        average: Whether to keep x̄; without it, x is evaluated, a copy of the parameters is saved and results are
            worse.
        average_gamma: How soon x̄ forgets, >= 0; 0 is the plain mean, 8 weighs mostly the last eighth.

    Raises:
        ConfigurationError: An option out of range, a schedule, a complex parameter or a sparse gradient.
        UserError: A step at the evaluation point.

    Deviations:
        A parameter without a gradient is left out of both norms (the published code fails on it); one that gets its
        first gradient later starts its distance there. With ``init_eta`` the first distance is set so that the first
        step size is ``lr init_eta``; the published code sets that step alone, the same but for ``eps``. BatchNorm
        statistics are those of x, not of x̄.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = DoG([w], reps_rel=0.1)
        >>> w.grad = torch.tensor([30.0, 40.0])
        >>> optimizer.step()  # of length 0.1 (1 + 5), however long the gradient
        >>> [round(value, 3) for value in w.tolist()]
        [2.64, 3.52]

    Reference:
        Ivgi, Hinder and Carmon, 2023, arXiv:2302.12022, equation (DoG) and Section 4; the average is that of Shamir and
        Zhang, 2013, arXiv:1212.1824.
    """

    traits = Traits(
        rule=_RULE,
        paper=_PAPER,
        state=2,
        needs_whole_tensors=True,
        sets_step_size=True,
        has_evaluation_point=True,
        example={"reps_rel": 1e-2},
        claim=Claim(
            sentence="as good as SGD with a tuned rate, with none",
            baseline="sgd",
            margin=0.02,
            options={"reps_rel": 1e-4},
        ),
    )

    @staticmethod
    def traits_under(options: Mapping[str, Any]) -> Traits:
        """Without the average there is one point and one copy of the parameters."""
        if options.get("average", True):
            return DoG.traits
        return replace(DoG.traits, state=1, has_evaluation_point=False)

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        reps_rel: float = 1e-6,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        init_eta: float | None = None,
        average: bool = True,
        average_gamma: float = 8.0,
    ) -> None:
        non_negative(lr=lr, weight_decay=weight_decay, average_gamma=average_gamma)
        positive(reps_rel=reps_rel, eps=eps)
        if init_eta is not None:
            positive(init_eta=init_eta)
        super().__init__(
            params,
            {
                "lr": lr,
                "reps_rel": reps_rel,
                "eps": eps,
                "weight_decay": weight_decay,
                "init_eta": init_eta,
                "average": average,
                "average_gamma": average_gamma,
            },
        )

    def update(self) -> None:
        """Takes the norms of a group, then moves its parameters by what follows from them."""
        for group in self.param_groups:
            refuse_schedule(self, group)
            chunks = self._chunks(group)
            if not chunks:
                continue
            step_sizes = iter(self._step_sizes(group, chunks))
            for x, g, _, *average in chunks:
                _descend(x, g, list(islice(step_sizes, len(x))))
                if average:
                    average_(average[0], x, polynomial_weight(self.state[x[0]]["step"], group["average_gamma"]))

    def _chunks(self, group: dict[str, Any]) -> list[tuple[list[Tensor], ...]]:
        """``(x, g, x_0)`` and x̄ where there is one; ``g`` with weight decay."""
        names = ("initial", "average") if group["average"] else ("initial",)
        chunks = []
        for x, g, initial, *rest in gather(type(self).__name__, group, self.state, names, count_step):
            if self.state[x[0]]["step"] == 1:
                torch._foreach_copy_(initial, x)
            if group["weight_decay"]:
                g = list(torch._foreach_add(g, x, alpha=group["weight_decay"]))
            chunks.append((x, g, initial, *rest))
        return chunks

    def _step_sizes(self, group: dict[str, Any], chunks: list[tuple[list[Tensor], ...]]) -> list[Tensor]:
        """One for each parameter of the chunks, in their order; keeps r̄ and G."""
        params = [p for chunk in chunks for p in chunk[0]]
        distance = self._joined([n for x, _, initial, *_ in chunks for n in _norms(torch._foreach_sub(x, initial))])
        gradient_norm = self._joined([n for _, g, *_ in chunks for n in _norms(g)])
        places = self._places(group, params)
        # In the group rather than in the state of a parameter, where loading would round them to its precision.
        rbars, sums = (list(group.get(key, [None] * len(group["params"]))) for key in ("rbar", "sum_squares"))
        if any(rbars[i] is None for i in places):
            first_sum = torch.full_like(gradient_norm, group["eps"])
            if group["init_eta"] is None:
                first_rbar = group["reps_rel"] * (1 + self._joined(_norms(params)))
            else:
                first_rbar = group["init_eta"] * (first_sum + gradient_norm.square()).sqrt()
            for i, r, s in zip(places, first_rbar.unbind(), first_sum.unbind(), strict=True):
                rbars[i], sums[i] = (r, s) if rbars[i] is None else (rbars[i], sums[i])
        kept = [torch.stack([values[i].to(distance) for i in places]) for values in (rbars, sums)]
        rbar, sum_squares, eta = dog(*kept, distance=distance, gradient_norm=gradient_norm)
        for i, r, s in zip(places, rbar.unbind(), sum_squares.unbind(), strict=True):
            rbars[i], sums[i] = r, s
        group["rbar"], group["sum_squares"] = rbars, sums
        return list((eta * float(group["lr"])).expand(len(params)).unbind())

    def _joined(self, norms: list[Tensor]) -> Tensor:
        """The norms of the vectors that have a step size of their own, from those of tensors; here of one vector."""
        return torch.linalg.vector_norm(_stacked(norms)).reshape(1)

    def _places(self, group: dict[str, Any], params: list[Tensor]) -> list[int]:
        """Where in the group what belongs to those vectors is kept."""
        return [0]


class LDoG(DoG):
    """DoG tensor by tensor: every parameter has a step size of its own.

    ``r̄ = max(r̄, ||x-x_0||)``; ``G = G + ||g||²``; ``x -= lr r̄ / sqrt(G) g``, with norms over each tensor, from
    ``r̄ = reps_rel (1 + ||x_0||)`` and ``G = eps``. Evaluated at the same average as :class:`DoG`.

    Args:
        params: Parameters or parameter groups.
        lr: Multiplies the step sizes, >= 0; the method is meant at 1, and no schedule may change it.
        reps_rel: The first distance of a tensor relative to ``1 + ||x_0||``, > 0; 1e-4 with BatchNorm, 1e-8 where the
            first steps do harm (large pretrained transformers). Parameters in bfloat16 need at least 1e-2.
        eps: Added to the sums of squares, > 0.
        weight_decay: Added to the gradient as ``weight_decay x``, >= 0.
        init_eta: The first step size of every tensor, > 0, in place of ``reps_rel``.
        average: Whether to keep x̄; without it, x is evaluated, a copy of the parameters is saved and results are
            worse.
        average_gamma: How soon x̄ forgets, >= 0; 0 is the plain mean, 8 weighs mostly the last eighth.

    Raises:
        ConfigurationError: An option out of range, a schedule, a complex parameter or a sparse gradient.
        UserError: A step at the evaluation point.

    Deviations:
        As for :class:`DoG`.

    Example:
        >>> a, b = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(()))
        >>> optimizer = LDoG([a, b], reps_rel=0.1)
        >>> a.grad, b.grad = torch.tensor([30.0, 40.0]), torch.tensor(-1e-2)
        >>> optimizer.step()
        >>> [round(value, 3) for value in [*a.tolist(), b.item()]]
        [-0.06, -0.08, 0.1]

    Reference:
        Ivgi, Hinder and Carmon, 2023, arXiv:2302.12022, Section 4.
    """

    traits = replace(
        DoG.traits,
        rule=f"{_RULE}, tensor by tensor",
        claim=Claim(
            sentence="better than SGD with a tuned rate, with none", baseline="sgd", options={"reps_rel": 1e-4}
        ),
    )

    @staticmethod
    def traits_under(options: Mapping[str, Any]) -> Traits:
        """As for :class:`DoG`."""
        return replace(DoG.traits_under(options), rule=LDoG.traits.rule, claim=LDoG.traits.claim)

    def _joined(self, norms: list[Tensor]) -> Tensor:
        return _stacked(norms)

    def _places(self, group: dict[str, Any], params: list[Tensor]) -> list[int]:
        index = {p: i for i, p in enumerate(group["params"])}
        return [index[p] for p in params]


def _norms(tensors: Any) -> list[Tensor]:
    """One norm a tensor, in double precision where the device has it: r̄ and G are sums over a whole run."""
    wide = [t if t.dtype in (torch.float32, torch.float64) else t.float() for t in tensors]
    return [n.float() if n.device.type == "mps" else n.double() for n in torch._foreach_norm(wide)]


def _stacked(norms: list[Tensor]) -> Tensor:
    return torch.stack([n.to(norms[0].device) for n in norms])


def _descend(x: list[Tensor], g: list[Tensor], step_sizes: list[Tensor]) -> None:
    """``x -= eta g``; no device waits for another to tell it eta."""
    if x[0].device.type == "cpu":
        for x_i, g_i, eta in zip(x, g, torch.stack(step_sizes).tolist(), strict=True):
            x_i.add_(g_i, alpha=-eta)
    else:
        torch._foreach_sub_(x, torch._foreach_mul(g, [eta.to(x[0].device) for eta in step_sizes]))
