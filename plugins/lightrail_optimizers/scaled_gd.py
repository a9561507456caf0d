"""ScaledGD: gradient descent on the factors of a matrix, each preconditioned by the other's Gram matrix."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightrail.errors import ConfigurationError
from lightrail.options import between, non_negative, one_of, positive
from lightrail.traits import Claim, Traits
from lightrail_optimizers.adamw_group import adamw_group_
from lightrail_optimizers.factor_pairs import Factor, checked_pairs, find_factors
from lightrail_optimizers.named_optimizer import NamedOptimizer
from lightrail_optimizers.named_parameters import named_groups
from lightrail_optimizers.tensor_lists import refuse_sparse

__all__ = ["ScaledGD", "scaled_gradient"]


def scaled_gradient(g: Tensor, r: Tensor, damping: float) -> Tensor:
    """``g (rᵀr + damping I)⁻¹``, the gradient of one factor scaled by the other.

    Args:
        g: [m, k], the gradient of L in ``X = L Rᵀ``.
        r: [n, k], the factor R.
        damping: >= 0; 0 needs r of full column rank.

    Raises:
        ConfigurationError: ``damping`` is 0 and the columns of r are dependent.

    Example:
        >>> scaled_gradient(torch.tensor([[8.0]]), torch.tensor([[2.0]]), damping=0.0).item()
        2.0
    """
    # SᵀS = rᵀr + damping I without forming rᵀr, whose condition number is the square of what QR meets.
    stacked = torch.cat([r, damping**0.5 * torch.eye(r.shape[1], dtype=r.dtype, device=r.device)])
    s = torch.linalg.qr(stacked, mode="r").R
    if not damping:
        diagonal = s.diagonal().abs()
        if bool(diagonal.min() <= torch.finfo(s.dtype).eps * diagonal.max()):
            raise ConfigurationError(
                "a factor has dependent columns, and damping is 0",
                found=f"a factor of shape {tuple(r.shape)}, smallest pivot {diagonal.min().item():g}",
                allowed="damping > 0, or factors of full rank",
                remedy="Set damping to a small positive number, such as 1e-6.",
            )
    half = torch.linalg.solve_triangular(s, g, upper=True, left=False)
    return torch.linalg.solve_triangular(s.mT, half, upper=False, left=False)


def _matrix(p: Tensor, turned: bool) -> Tensor:
    """[rows, k] in single precision at least."""
    flat = p.flatten(1)
    wide = flat if flat.dtype == torch.float64 else flat.float()
    return wide.mT if turned else wide


class ScaledGD(NamedOptimizer):
    """ScaledGD: descends on low-rank factors at a rate that their condition number does not slow; AdamW elsewhere.

    For ``X = L Rᵀ``: ``L -= lr G_L (RᵀR + damping I)⁻¹`` and ``R -= lr G_R (LᵀL + damping I)⁻¹``, both from the old
    factors. A LoRA adapter ``X = B A`` is such a pair with ``A = Rᵀ``. For ``X = F Fᵀ``, with one factor:
    ``F -= lr G (FᵀF + damping I)⁻¹``.

    Factors are found by their names; every other parameter gets AdamW. A schedule scales the learning rates of both.

    Args:
        params: ``(name, parameter)`` pairs, or parameter groups whose ``params`` are such pairs. A group may hold any
            option below but ``pairs``, ``symmetric`` and ``product``; the two factors of a pair may lie in different
            groups, each with its own ``lr``.
        lr: Of the factors, >= 0. Of the order of 1 over the smoothness of the loss in X: 1 or less for
            ``‖L Rᵀ - M‖²/2``, half of that for ``‖F Fᵀ - M‖²/2``.
        damping: Added to the Gram matrix, >= 0; for an overestimated rank of the order of the square of the smallest
            singular value that matters. It must be positive where a factor starts at zero, as LoRA's B does.
        pairs: ``[left, right]`` patterns of names, in which ``*`` stands for any text, the same in both names; the
            first entry that pairs a parameter holds. ``None`` for ``lora_B`` with ``lora_A``, ``left`` with ``right``
            and ``U`` with ``V``.
        symmetric: Patterns of names of single factors F; of these, parameters with one axis stay with AdamW.
        product: ``LRt`` for factors [m, k] and [n, k], ``LR`` for [m, k] and [k, n], as LoRA has them; ``auto`` tells
            by their shapes.
        maximize: Ascend.
        adamw_lr: AdamW's learning rate, >= 0.
        adamw_betas: Each in [0, 1).
        adamw_eps: > 0.
        adamw_weight_decay: Decoupled, >= 0; of AdamW's parameters only.

    Raises:
        ConfigurationError: An option out of range; parameters without names; a pair whose shapes do not fit. At the
            first step: no factor was found.

    Deviations:
        The paper treats ``F Fᵀ``; pairs are those of its predecessor, which has no damping. Axes of a parameter beyond
        the second are joined to the second, as for adapters of convolutions.

    Example:
        >>> left, right = (torch.nn.Parameter(torch.tensor([[v]])) for v in (1.0, 2.0))
        >>> optimizer = ScaledGD([("left", left), ("right", right)], lr=0.5, damping=0.0, product="LRt")
        >>> (left * right - 4).square().sum().div(2).backward()
        >>> optimizer.step()
        >>> left.item(), right.item(), round((left * right).item(), 4)
        (1.5, 3.0, 4.5)

    Reference:
        Xu, Shen, Chi and Ma, 2023, arXiv:2302.01186, Section 2 (one factor, damped); Tong, Ma and Chi, 2021,
        "Accelerating Ill-Conditioned Low-Rank Matrix Estimation via Scaled Gradient Descent", arXiv:2005.08898 (pairs);
        Zhang and Pilanci, 2024, "Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models", arXiv:2402.02347.
    """

    traits = Traits(
        rule="L -= lr G_L (RᵀR + damping I)⁻¹ and R likewise on the factors of X = L Rᵀ, AdamW elsewhere",
        paper="Xu, Shen, Chi, Ma, 2023, The Power of Preconditioning in Overparameterized Low-Rank Matrix Sensing, "
        "arXiv:2302.01186",
        state=0,  # on factors; 2 on what AdamW has
        needs_parameter_names=True,
        needs_whole_tensors=True,
        # The suites have no adapters: the two layers of their classifiers are the pair, other matrices single factors.
        example={
            "lr": 0.05,
            "adamw_lr": 0.01,
            "damping": 0.5,
            "pairs": [["2.weight", "0.weight"], ["4.weight", "0.weight"]],
            "symmetric": ["*"],
        },
        claim=Claim(
            sentence="recovers an ill-conditioned low-rank matrix sooner", baseline="sgd", problems=("matrix_sensing",)
        ),
    )
    _own = ("_pairs", "_symmetric", "_product", "_options", "_factors")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        damping: float = 1e-6,
        pairs: list[list[str]] | None = None,
        symmetric: list[str] | None = None,
        product: str = "auto",
        maximize: bool = False,
        adamw_lr: float = 1e-3,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.0,
    ) -> None:
        one_of(("auto", "LR", "LRt"), product=product)
        self._pairs = checked_pairs(pairs)
        self._symmetric = list(symmetric or ())
        self._product = product
        self._factors: list[Factor] = []
        self._options = {
            "lr": lr,
            "damping": damping,
            "maximize": maximize,
            "adamw_lr": adamw_lr,
            "adamw_betas": tuple(adamw_betas),
            "adamw_eps": adamw_eps,
            "adamw_weight_decay": adamw_weight_decay,
        }
        super().__init__(self._split(params), {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of ``(name, parameter)`` pairs, split as the others were; its factors pair among themselves."""
        for group in [param_group] if "are_factors" in param_group else self._split([param_group]):
            super().add_param_group(group)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step.

        Args:
            closure: Evaluates the loss and its gradient; ``None`` with gradients in ``.grad``.

        Returns:
            The loss that the closure gave.

        Raises:
            ConfigurationError: No factor was found among the parameters.
        """
        if not self._factors:
            self._refuse_no_factors()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._move_factors()
        for group in self.param_groups:
            if not group["are_factors"]:
                adamw_group_("ScaledGD", group, self.state)
        return loss

    def _move_factors(self) -> None:
        group_of = {p: group for group in self.param_groups for p in group["params"]}
        moves = []
        for p, turned, other, other_turned in self._factors:
            if p.grad is None or not p.numel():
                continue
            if p.grad.is_sparse:
                refuse_sparse("ScaledGD", p.grad)
            scaled = scaled_gradient(
                _matrix(p.grad, turned), _matrix(other, other_turned), float(group_of[p]["damping"])
            )
            moves.append((p, (scaled.mT if turned else scaled).reshape(p.shape)))
        for p, move in moves:  # after the last factor was read: both move from the old ones
            lr = float(group_of[p]["lr"])
            p.add_(move, alpha=lr if group_of[p]["maximize"] else -lr)

    # Which parameters are factors.

    def _split(self, params: Iterable[Any]) -> list[dict[str, Any]]:
        """Each group as its factors and as what AdamW has; none of them is empty."""
        groups = named_groups("ScaledGD", params)
        found = find_factors(
            [pair for group in groups for pair in group["params"]], self._pairs, self._symmetric, self._product
        )
        self._factors.extend(found)
        factors = {factor.p for factor in found}
        parts = []
        for group in groups:
            options = self._checked({**self._options, **{k: v for k, v in group.items() if k != "params"}})
            of_adamw = {k: options.pop(f"adamw_{k}") for k in ("lr", "betas", "eps", "weight_decay")}
            for are_factors, own in ((True, options), (False, {**options, **of_adamw})):
                pairs = [pair for pair in group["params"] if (pair[1] in factors) is are_factors]
                if pairs:
                    parts.append({**own, "params": pairs, "are_factors": are_factors})
        return parts

    def _checked(self, options: dict[str, Any]) -> dict[str, Any]:
        non_negative(**{k: options[k] for k in ("lr", "damping", "adamw_lr", "adamw_weight_decay")})
        positive(adamw_eps=options["adamw_eps"])
        for beta in options["adamw_betas"]:
            between(0.0, 1.0, adamw_betas=beta)
        return options

    def _refuse_no_factors(self) -> None:
        names = [name for name, _ in self.named()]
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        raise ConfigurationError(
            "ScaledGD found no factors to work on",
            found=f"parameters {', '.join(names[:6])}{more}",
            allowed="names that match " + " | ".join(f"{left} with {right}" for left, right in self._pairs),
            remedy="Name the factors: optimizer.pairs=[[LEFT,RIGHT]] or optimizer.symmetric=[NAME]; for a model "
            "without factors choose optimizer=adamw.",
        )
