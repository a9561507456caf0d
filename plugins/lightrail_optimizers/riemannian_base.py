"""What the Riemannian optimizers share: which parameters are points, how a point moves, and what it keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from lightrail.errors import ConfigurationError
from lightrail.options import at_least
from lightrail_optimizers.tensor_lists import count_step, gather, refuse_sparse
from lightrail_optimizers.tensorwise import TensorwiseOptimizer

__all__ = ["Manifold", "RiemannianOptimizer", "component_norm2", "moved", "riemannian_gradient"]


class Manifold(Protocol):
    """What is asked of a manifold of geoopt; the last axes of a tensor are one point of it."""

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor: ...
    def component_inner(self, x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor: ...
    def expmap(self, x: Tensor, u: Tensor) -> Tensor: ...
    def retr(self, x: Tensor, u: Tensor) -> Tensor: ...
    def expmap_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...
    def retr_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...
    def projx(self, x: Tensor) -> Tensor: ...
    def proju(self, x: Tensor, u: Tensor) -> Tensor: ...


def riemannian_gradient(manifold: Manifold, x: Tensor, g: Tensor, wd: float) -> Tensor:
    """The Riemannian gradient of the loss plus ``wd/2 ||x||²``, from the Euclidean gradient of the loss."""
    return manifold.egrad2rgrad(x, g + wd * x if wd else g)


def component_norm2(manifold: Manifold, x: Tensor, u: Tensor) -> Tensor:
    """``||u||²_x``, one number for each factor of a product of manifolds; rounding does not make it negative."""
    return manifold.component_inner(x, u).clamp_min(0)


def moved(manifold: Manifold, x: Tensor, u: Tensor, carried: Tensor | None, retraction: bool) -> tuple[Tensor, ...]:
    """The point that ``u`` leads to from ``x``, and there the tangent vector ``carried``, where there is one."""
    try:
        if carried is None:
            return ((manifold.retr if retraction else manifold.expmap)(x, u),)
        return (manifold.retr_transp if retraction else manifold.expmap_transp)(x, u, carried)
    except NotImplementedError as error:
        raise ConfigurationError(
            f"{type(manifold).__name__} lacks an operation that this step needs",
            found="retraction=True" if retraction else "no exponential map",
            allowed="a manifold with retraction and transport, and with an exponential map where retraction=False",
            remedy="Set retraction=True, or choose another manifold.",
        ) from error


class RiemannianOptimizer(TensorwiseOptimizer):
    """An optimizer whose parameters may be points of manifolds (``geoopt.ManifoldParameter``).

    Those are updated one by one by ``point_rule``, all others by ``rule``, both with the keywords of ``scalars``.

    - ``point_rule(manifold, x, g, *states, retraction, **scalars)``: the new point and the new states.
    - ``tangent_names``: which states are tangent vectors; the others hold one number a factor.

    Its groups hold ``retraction`` and ``stabilize_every``, too.
    """

    tangent_names: ClassVar[tuple[str, ...]] = ()
    point_rule: ClassVar[Callable[..., tuple[Tensor, ...]]]

    def __init__(self, params: Any, options: dict[str, Any]) -> None:
        if options["stabilize_every"] is not None:
            at_least(1, stabilize_every=options["stabilize_every"])
        super().__init__(params, options)

    def names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The states that a parameter of the group has."""
        return self.state_names

    def lists(self, group: dict[str, Any]) -> Iterator[tuple[list[Tensor], ...]]:
        flat = {**group, "params": [p for p in group["params"] if not hasattr(p, "manifold")]}
        cached = not group["compile"]
        return gather(type(self).__name__, flat, self.state, self.names(group), count_step, cached=cached)

    def update(self) -> None:
        super().update()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and hasattr(p, "manifold"):
                    self._update_point(group, p, p.manifold)

    def _update_point(self, group: dict[str, Any], p: Tensor, manifold: Manifold) -> None:
        assert p.grad is not None
        if p.grad.is_sparse:
            refuse_sparse(type(self).__name__, p.grad)
        kept, names = self.state[p], self.names(group)
        x, g = _wide(p), _wide(p.grad)
        if not kept:
            kept |= {name: self._start(manifold, x, name).to(p.dtype) for name in names}
        t = count_step(kept)
        scalars = self.scalars(group, t)
        scalars["lr"] = float(scalars["lr"])
        x, *states = type(self).point_rule(
            manifold,
            x,
            -g if group["maximize"] else g,
            *(_wide(kept[name]) for name in names),
            retraction=group["retraction"],
            **scalars,
        )
        if group["stabilize_every"] and t % group["stabilize_every"] == 0:
            x = manifold.projx(x)
            states = [
                manifold.proju(x, u) if n in self.tangent_names else u for n, u in zip(names, states, strict=True)
            ]
        p.copy_(x)
        kept |= {name: u.to(p.dtype) for name, u in zip(names, states, strict=True)}

    def _start(self, manifold: Manifold, x: Tensor, name: str) -> Tensor:
        nothing = torch.zeros_like(x)
        return nothing if name in self.tangent_names else manifold.component_inner(x, nothing).clone()


def _wide(tensor: Tensor) -> Tensor:
    """A plain tensor in single precision at least: no manifold is sound in half precision."""
    plain = tensor.detach().as_subclass(Tensor)
    return plain if plain.dtype in (torch.float32, torch.float64) else plain.float()
