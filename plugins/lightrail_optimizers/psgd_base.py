"""What the kinds of PSGD share: when to fit the preconditioner, and the update."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightrail.options import between, non_negative, one_of, positive
from lightrail.step import Closure
from lightrail.traits import Traits
from lightrail_optimizers.closure_answers import moving
from lightrail_optimizers.flat_vector import gradient_vector, move_, state_holder
from lightrail_optimizers.psgd_pairs import (
    Pair,
    draw_probe,
    exact_pairs,
    finite_difference_pairs,
    whitening_pair,
)
from lightrail_optimizers.sophia_rule import draw_directions
from lightrail_optimizers.tensorwise import MethodOptimizer, require_closure

__all__ = ["PAPER", "PSGD", "draw_uniforms", "psgd_traits_under", "starting_scale", "step_over"]

PAPER = "Pooladzandi, Li, 2024, Curvature-Informed SGD via General Purpose Lie-Group Preconditioners, arXiv:2402.04553"


def starting_scale(v: Tensor, h: Tensor) -> float:
    """``mean(v²)^(1/4) mean(h⁴)^(-1/8)``: the first Q is this times the identity. 1 where it is not finite.

    Example:
        >>> starting_scale(torch.ones(2), torch.full((2,), 16.0))
        0.25
    """
    largest = h.abs().max()
    relative = (h / largest).pow_(4).mean()  # the fourth power of h itself would leave single precision
    scale = float(v.square().mean() ** 0.25 / (relative**0.125 * largest**0.5))
    return scale if 0 < scale < float("inf") else 1.0


def step_over(step: float, size: Tensor) -> Tensor:
    """``step / size``; a size of 0 belongs to a gradient of 0."""
    return step / (size + torch.finfo(size.dtype).tiny)


def draw_uniforms(count: int, device: torch.device) -> list[float]:
    """Numbers between 0 and 1, the same on every rank."""
    distributed = torch.distributed
    alone = not (distributed.is_available() and distributed.is_initialized())
    # Alone, the host draws them without waiting for the device.
    like = torch.empty(count, dtype=torch.float64, device="cpu" if alone else device)
    return torch.special.ndtr(draw_directions([like], "gaussian")[0]).tolist()


def psgd_traits_under(traits: Traits, options: Mapping[str, Any]) -> Traits:
    """What a kind of PSGD needs under ``hvp``, ``update_probability`` and ``momentum``."""
    hvp = options.get("hvp", "exact")
    return dataclasses.replace(
        traits,
        needs_closure=hvp == "finite_difference",
        needs_second_derivatives=hvp == "exact",
        extra_evaluations=0.0 if hvp == "whitening" else float(options.get("update_probability", 1.0)),
        state=(traits.state or 0) + (options.get("momentum", 0.0) > 0),
    )


class PSGD(MethodOptimizer):
    """``x -= lr P g`` with ``P = Q^T Q`` fitted to the curvature; a subclass says what form Q has.

    It has ``_begin``, ``_fit`` and ``_precondition``. Their vectors run over all parameters of a group, and the tensors
    that make Q are kept in the state of one of these.
    """

    def __init__(self, params: Any, options: dict[str, Any]) -> None:
        non_negative(lr=options["lr"])
        between(0.0, 1.0, momentum=options["momentum"])
        between(0.0, 1.0, closed="both", update_probability=options["update_probability"])
        one_of(("exact", "finite_difference", "whitening"), hvp=options["hvp"])
        one_of(("second", "first"), normalizer=options["normalizer"])
        if options["preconditioner_lr"] is None:
            options["preconditioner_lr"] = 0.1 if options["normalizer"] == "second" else 0.01
        between(0.0, 1.0, closed="right", preconditioner_lr=options["preconditioner_lr"])
        positive(**{name: options[name] for name in ("initial_scale", "max_norm") if options[name] is not None})
        super().__init__(params, options)

    def _begin(self, group: Mapping[str, Any], like: Tensor, scale: float) -> dict[str, Tensor]:
        """The tensors of a Q that is ``scale`` times the identity, or nearly so."""
        raise NotImplementedError  # pragma: no cover

    def _fit(self, group: Mapping[str, Any], q: Mapping[str, Tensor], v: Tensor, h: Tensor) -> None:
        """Moves Q, in place."""
        raise NotImplementedError  # pragma: no cover

    def _precondition(self, q: Mapping[str, Tensor], g: Tensor) -> Tensor:
        """``Q^T Q g``, as a new vector."""
        raise NotImplementedError  # pragma: no cover

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step.

        Args:
            closure: A :class:`lightrail.Closure`. Steps at which no fit is due, and all of them under
                ``hvp=whitening``, take torch's own closure, or ``None`` with gradients in ``.grad``.

        Returns:
            The loss at the point where the step began; ``None`` without a closure.

        Raises:
            ClosureError: A fit is due, and the closure cannot evaluate again.
        """
        due = self._due()
        again = any(group["hvp"] != "whitening" for group in due)
        oracle = require_closure(self, closure, "fits its preconditioner at this step") if again else None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [group for group, x in moving(self, oracle) if any(p.numel() for p in x)]
        gradients = [self._gradient(group) for group in groups]
        pairs = self._pairs(oracle, due, groups, gradients)
        for index, (group, g) in enumerate(zip(groups, gradients, strict=True)):
            self._update(group, g, pairs.get(index))
        return loss

    def _due(self) -> list[dict[str, Any]]:
        """The groups that fit Q at this step: by chance, and the first time if that is to find its scale."""
        groups = [group for group in self.param_groups if group["params"]]
        by_chance = any(0 < group["update_probability"] < 1 for group in groups)
        coin = draw_uniforms(1, groups[0]["params"][0].device)[0] if by_chance else 0.5
        return [
            group
            for group in groups
            if coin < group["update_probability"]
            or (group["initial_scale"] is None and state_holder(group["params"]) not in self.state)
        ]

    def _gradient(self, group: Mapping[str, Any]) -> Tensor:
        g = gradient_vector(type(self).__name__, group["params"])
        return g.neg_() if group["maximize"] else g

    def _pairs(
        self, closure: Closure | None, due: list[dict[str, Any]], groups: list[dict[str, Any]], gradients: list[Tensor]
    ) -> dict[int, Pair]:
        """A direction and the Hessian times it for those of ``groups`` that are due, by their index."""
        probes = {
            index: draw_probe(group, g)
            for index, (group, g) in enumerate(zip(groups, gradients, strict=True))
            if any(group is other for other in due)
        }
        pairs: dict[int, Pair] = {i: whitening_pair(p) for i, p in probes.items() if groups[i]["hvp"] == "whitening"}
        for kind, find in (("exact", exact_pairs), ("finite_difference", finite_difference_pairs)):
            chosen = {i: probe for i, probe in probes.items() if groups[i]["hvp"] == kind}
            if chosen and closure is not None:
                pairs.update(zip(chosen, find(closure, list(chosen.values())), strict=True))
        return pairs

    def _update(self, group: dict[str, Any], g: Tensor, pair: Pair | None) -> None:
        """Fits Q where there is a pair, and moves the parameters of one group."""
        params = group["params"]
        holder = state_holder(params)
        kept = self.state[holder]
        if not kept:
            scale = group["initial_scale"] or (starting_scale(*pair) if pair else 1.0)
            kept.update({name: tensor.to(holder.dtype) for name, tensor in self._begin(group, g, scale).items()})
        q = {name: tensor.to(g.dtype) for name, tensor in kept.items() if name != "momentum"}
        if pair:
            self._fit(group, q, *pair)
            _keep(kept, q)
        if group["momentum"]:
            m = kept.setdefault("momentum", torch.zeros_like(g, dtype=holder.dtype)).to(g.dtype)
            g = m.lerp_(g, 1 - group["momentum"])
            _keep(kept, {"momentum": m})
        u = self._precondition(q, g)
        if group["max_norm"] is not None:
            norm = torch.linalg.vector_norm(u)
            u.mul_((group["max_norm"] / (norm + torch.finfo(norm.dtype).tiny)).clamp(max=1.0))
        move_(params, u, -float(group["lr"]))


def _keep(kept: dict[str, Tensor], changed: Mapping[str, Tensor]) -> None:
    """Writes back what was changed in a wider dtype."""
    for name, tensor in changed.items():
        if tensor is not kept[name]:
            kept[name].copy_(tensor)
