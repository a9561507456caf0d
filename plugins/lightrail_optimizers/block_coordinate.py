"""Block coordinate descent: one block of parameters a step, chosen by a rule that looks at gradients and curvature."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightrail.errors import ConfigurationError
from lightrail.options import at_least, between, non_negative, one_of, positive
from lightrail.step import Closure
from lightrail.traits import Claim, Traits
from lightrail_optimizers.adamw_group import adamw_group_
from lightrail_optimizers.closure_answers import answers_for
from lightrail_optimizers.named_optimizer import BlockOptimizer
from lightrail_optimizers.sophia_rule import draw_directions
from lightrail_optimizers.tensor_lists import gather, global_norm
from lightrail_optimizers.tensorwise import require_closure

__all__ = ["BlockCoordinate", "largest_curvature"]

_LR = {"scaled": 1.0, "gradient": 0.1, "adamw": 1e-3}


def largest_curvature(product: Callable[[list[Tensor]], list[Tensor]], v: list[Tensor], iterations: int) -> float:
    """The largest magnitude of an eigenvalue of a symmetric H, from below: ``‖H v‖`` after power iterations on v.

    Args:
        product: ``H v`` for a list of tensors taken as one vector.
        v: Where to begin; not along an eigenvector of another eigenvalue.
        iterations: Products, >= 1.

    Example:
        >>> diagonal = torch.tensor([1.0, -3.0])
        >>> round(largest_curvature(lambda v: [diagonal * v[0]], [torch.ones(2)], iterations=12), 4)
        3.0
    """
    for _ in range(iterations):
        length = float(global_norm(v))
        if not length:
            return 0.0
        v = product(list(torch._foreach_div(v, length)))
    return float(global_norm(v))


class BlockCoordinate(BlockOptimizer):
    """Block coordinate descent: one layer a step, the one that promises most, by a step that fits its curvature.

    Block b moves by ``-lr g_b / L_b`` (``inner=scaled``), by ``-lr g_b`` (``gradient``) or by AdamW whose state lives
    only as long as its block is active (``adamw``). L_b bounds the curvature of block b. The block is the one with
    the largest ``‖g_b‖ / sqrt(L_b)`` (``select=gsl``, which promises ``‖g_b‖² / (2 L_b)``), the largest ``‖g_b‖``
    (``gs``, Gauss-Southwell), the next (``cyclic``) or any (``random``).

    Args:
        params: ``(name, parameter)`` pairs, or parameter groups whose ``params`` are such pairs. A group may have
            its own ``lr``, ``betas``, ``eps`` and ``weight_decay``.
        lr: Learning rate, >= 0. ``None`` for 1 with ``scaled``, 0.1 with ``gradient``, 0.001 with ``adamw``.
        select: ``gsl``, ``gs``, ``cyclic`` or ``random``.
        inner: ``scaled``, ``gradient`` or ``adamw``.
        blocks: ``None`` for one block a layer (parameters whose names agree up to the last dot); a number joins
            consecutive layers into so many blocks, at most as many as there are layers.
        switch_every: Steps for which a block stays active, >= 1; ``None`` for 1, and 100 with ``adamw``.
        lipschitz: L_b of each block, > 0, in the order of the parameters. ``None`` estimates them where they are
            needed, by power iteration with the Hessian of the step's batch, restricted to the block.
        refresh_every: Steps from one estimate to the next, >= 1.
        power_iterations: Products with the Hessian for one block's estimate, >= 1.
        least_lipschitz: The smallest L_b that an estimate gives, > 0: a block that is nearly flat moves by no more
            than ``lr g_b / least_lipschitz``.
        betas: AdamW's, each in [0, 1).
        eps: AdamW's, > 0.
        weight_decay: AdamW's, decoupled, >= 0.
        maximize: Ascend.

    Raises:
        ConfigurationError: An option out of range; parameters without names, complex, or with sparse gradients. At
            the first step: ``lipschitz`` has not one number a block.
        ClosureError: An estimate is due and the closure cannot give it.

    Deviations:
        Of the paper's rules these are the ones that networks can afford; its Newton steps on blocks, its message
        passing and its rules for single coordinates are left out. An estimate bounds the curvature where it was
        taken, not everywhere. ``inner=adamw`` is the method of BAdam; where the same block is chosen again, its state
        is kept. Gradients of the inactive blocks are computed nevertheless.

    Example:
        >>> a, b = (torch.nn.Parameter(torch.tensor(v)) for v in (1.0, 2.0))
        >>> optimizer = BlockCoordinate([("a.weight", a), ("b.weight", b)], select="gsl", lipschitz=[16.0, 1.0])
        >>> (8 * a.square() + b.square() / 2).backward()
        >>> optimizer.step()
        >>> a.item(), b.item()  # 16 / 4 outweighs 2 / 1
        (0.0, 2.0)

    Reference:
        Nutini, Laradji and Schmidt, 2022, arXiv:1712.08859, the rules GS and GSL; Luo, Yu and Li, 2024, "BAdam: A
        Memory Efficient Full Parameter Optimization Method for Large Language Models", arXiv:2404.02827.
    """

    traits = Traits(
        rule="x_b -= lr g_b / L_b for the block b with the largest ‖g_b‖ / sqrt(L_b)",
        paper="Nutini, Laradji, Schmidt, 2022, Let's Make Block Coordinate Descent Converge Faster: Faster Greedy "
        "Rules, Message-Passing, Active-Set Complexity, and Superlinear Convergence, arXiv:1712.08859",
        state=0,
        extra_evaluations=None,  # blocks power_iterations / refresh_every
        needs_second_derivatives=True,
        needs_parameter_names=True,
        needs_whole_tensors=True,
        is_stochastic=True,
        example={"refresh_every": 5},
        exceptions={"takes_groups_with_own_lr": "one block moves in a step, and in the check's step it is the first"},
        claim=Claim(
            sentence="greedy blocks lower the loss more than blocks in turn",
            baseline="block_coordinate",
            baseline_options={"select": "cyclic", "inner": "gradient"},
            options={"select": "gs", "inner": "gradient"},
            problems=("digits",),
        ),
    )
    _own = (
        *BlockOptimizer._own,
        "select",
        "inner",
        "switch_every",
        "lipschitz",
        "refresh_every",
        "power_iterations",
        "least_lipschitz",
    )

    @staticmethod
    def traits_under(options: Mapping[str, Any]) -> Traits:
        """No second derivatives where L_b is given or not needed."""
        given = {"select": "gsl", "inner": "scaled", "lipschitz": None, **options}
        declared = BlockCoordinate.traits
        if given["inner"] == "adamw":
            declared = dataclasses.replace(declared, state=None)  # 2 copies of the active block
        if _estimates(**{k: given[k] for k in ("select", "inner", "lipschitz")}):
            return declared
        return dataclasses.replace(
            declared,
            needs_second_derivatives=False,
            extra_evaluations=0.0,
            is_stochastic=given["select"] == "random",
        )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | None = None,
        select: str = "gsl",
        inner: str = "scaled",
        blocks: int | None = None,
        switch_every: int | None = None,
        lipschitz: list[float] | None = None,
        refresh_every: int = 100,
        power_iterations: int = 10,
        least_lipschitz: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        one_of(("gsl", "gs", "cyclic", "random"), select=select)
        one_of(tuple(_LR), inner=inner)
        lr = _LR[inner] if lr is None else lr
        switch_every = (100 if inner == "adamw" else 1) if switch_every is None else switch_every
        non_negative(lr=lr, weight_decay=weight_decay)
        positive(eps=eps, least_lipschitz=least_lipschitz)
        at_least(1, switch_every=switch_every, refresh_every=refresh_every, power_iterations=power_iterations)
        b1, b2 = betas
        between(0.0, 1.0, beta1=b1, beta2=b2)
        for bound in lipschitz or ():
            positive(lipschitz=bound)
        self.select, self.inner, self.switch_every = select, inner, switch_every
        self.lipschitz = None if lipschitz is None else [float(bound) for bound in lipschitz]
        self.refresh_every, self.power_iterations = refresh_every, power_iterations
        self.least_lipschitz = least_lipschitz
        options = {"lr": lr, "betas": (b1, b2), "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, options, blocks)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        # What the optimizer remembers as a whole travels with its first group; 0 is an L_b that is not known.
        memory = self.param_groups[0]
        memory.update(steps=memory.get("steps", 0), active=-1, estimates=[0.0] * len(self.blocks))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of one block.

        Args:
            closure: A :class:`lightrail.Closure` where L_b is to be estimated; torch's own closure, or ``None`` with
                gradients in ``.grad``, at other steps.

        Returns:
            The loss at the point where the step began; ``None`` without a closure.

        Raises:
            ClosureError: An estimate is due, and the closure cannot give it.
        """
        memory = self.param_groups[0]
        estimates = _estimates(self.select, self.inner, self.lipschitz)
        if estimates and memory["steps"] % self.refresh_every == 0:
            require_closure(self, closure, "estimates the curvature of its blocks at this step")
            memory["estimates"] = [0.0] * len(self.blocks)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        blocks = self.moving_blocks()
        if estimates:
            self._estimate(closure, blocks)
        if any(blocks) and (memory["active"] < 0 or memory["steps"] % self.switch_every == 0):
            self._switch(blocks)
        self._move(blocks)
        memory["steps"] += 1
        return loss

    # L_b.

    def _bounds(self) -> list[float]:
        """L_b of each block; 1 where the method does not ask for it."""
        count = len(self.blocks)
        if self.lipschitz is None:
            needed = _estimates(self.select, self.inner, None)
            return self.param_groups[0]["estimates"] if needed else [1.0] * count
        if len(self.lipschitz) != count:
            raise ConfigurationError(
                "lipschitz has not one number a block",
                found=f"{len(self.lipschitz)} numbers for {count} blocks",
                allowed=f"{count} numbers",
                remedy="Give one a block, in the order of the parameters, or leave optimizer.lipschitz out.",
            )
        return self.lipschitz

    def _estimate(self, closure: Any, blocks: list[list[Tensor]]) -> None:
        """Estimates what is not known of the blocks that have a gradient."""
        known = self.param_groups[0]["estimates"]
        unknown = [b for b, block in enumerate(blocks) if block and not known[b]]
        if not unknown:
            return
        oracle = require_closure(self, closure, "estimates the curvature of its blocks at this step")
        start = dict(zip(oracle.params, draw_directions(oracle.params, "gaussian"), strict=True))
        for b in unknown:
            product = _restricted(oracle, blocks[b])
            found = largest_curvature(product, [start[p] for p in blocks[b]], self.power_iterations)
            known[b] = max(found, self.least_lipschitz)

    # The active block.

    def _switch(self, blocks: list[list[Tensor]]) -> None:
        memory = self.param_groups[0]
        memory["active"] = self._choice(blocks, memory["active"])
        active = set(self.blocks[memory["active"]])
        for p in [p for p in self.state if p not in active]:
            del self.state[p]

    def _choice(self, blocks: list[list[Tensor]], last: int) -> int:
        """Which of the blocks that have a gradient is next."""
        candidates = [b for b, block in enumerate(blocks) if block]
        if self.select == "cyclic":
            return next((b for b in candidates if b > last), candidates[0])
        if self.select == "random":  # the largest of independent draws is any of them with equal probability
            like = torch.empty(len(candidates), device=blocks[candidates[0]][0].device)
            return candidates[int(draw_directions([like], "gaussian")[0].argmax())]
        norms = [global_norm([p.grad for p in blocks[b] if p.grad is not None]) for b in candidates]
        scores = torch.stack([norm.to(norms[0]) for norm in norms]).tolist()
        if self.select == "gsl":
            bounds = self._bounds()
            scores = [score / bounds[b] ** 0.5 for score, b in zip(scores, candidates, strict=True)]
        return candidates[scores.index(max(scores))]

    def _move(self, blocks: Sequence[list[Tensor]]) -> None:
        active = self.param_groups[0]["active"]
        members = set(blocks[active]) if active >= 0 else set()
        if not members:
            return
        bound = self._bounds()[active] if self.inner == "scaled" else 1.0
        for group in self.param_groups:
            part = {**group, "params": [p for p in group["params"] if p in members]}
            if self.inner == "adamw":
                adamw_group_("BlockCoordinate", part, self.state)
                continue
            by = float(group["lr"]) / bound
            for x, g in gather("BlockCoordinate", part, {p: {} for p in members}, ()):
                torch._foreach_add_(x, g, alpha=by if group["maximize"] else -by)


def _estimates(select: str, inner: str, lipschitz: object) -> bool:
    """Whether curvature is needed and not given."""
    return lipschitz is None and (select == "gsl" or inner == "scaled")


def _restricted(oracle: Closure, block: Sequence[Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
    """The product with the rows and columns of the Hessian that belong to a block."""

    def product(v: list[Tensor]) -> list[Tensor]:
        within = dict(zip(block, v, strict=True))
        full = [within[p] if p in within else torch.zeros_like(p) for p in oracle.params]
        return answers_for(block, oracle, oracle.hvp(full))

    return product
