"""Prodigy, from pytorch_optimizer."""

from __future__ import annotations

from typing import Any

from lightrail.errors import ConfigurationError
from lightrail.options import between, non_negative, positive
from lightrail.traits import Claim, Traits
from lightrail_optimizers.library_optimizer import LibraryOptimizer, missing_library

try:
    import pytorch_optimizer
except ModuleNotFoundError as error:
    raise missing_library("optimizer 'prodigy'", error) from error

__all__ = ["Prodigy"]


class Prodigy(LibraryOptimizer, pytorch_optimizer.Prodigy):
    """AdamW that estimates its learning rate from how far it has come.

    ``m = b1 m + (1-b1) d g``; ``v = b2 v + (1-b2) d² g²``; ``r = b3 r + (1-b3) lr d² ⟨g, x_0 - x⟩``;
    ``s = b3 s + (1-b3) lr d² g``; ``d = max(d, r / ||s||_1)``; ``x -= lr d m / (sqrt(v) + d eps)``. A cosine schedule
    over ``lr`` is what the authors recommend. Needs the extra ``optimizers``.

    Args:
        params: Parameters or parameter groups.
        lr: Multiplies the estimate, >= 0; leave it at 1. The same in every group.
        betas: ``(b1, b2)``, each in [0, 1).
        beta3: Of the estimate, in [0, 1); ``None`` for ``sqrt(b2)``.
        d0: The first estimate, > 0: small; it only grows.
        d_coef: Multiplies the estimate, > 0: what to tune, between 0.5 and 2.
        growth_rate: The largest factor by which the estimate grows in a step, > 1.
        weight_decay: Decoupled, >= 0.
        bias_correction: Adam's.
        safeguard_warmup: Leave ``lr`` out of s, so that a warm-up does not inflate the estimate.
        eps: Relative to d, >= 0.

    Raises:
        ConfigurationError: An option out of range, groups of unequal ``lr``, a complex parameter or a sparse gradient.
        PluginError: The extra ``optimizers`` is not installed.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = Prodigy([w], d0=0.01)
        >>> w.grad = torch.tensor([5.0, -3.0])
        >>> optimizer.step()  # as Adam's first without bias correction: d0 (1-b1) / sqrt(1-b2) each
        >>> [round(value, 4) for value in w.tolist()]
        [0.9684, 2.0316]

    Reference:
        Mishchenko and Defazio, 2023, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner", arXiv:2306.06101,
        Algorithm 4. The update is that of the library pytorch_optimizer.
    """

    traits = Traits(
        rule="x -= lr d Adam(d g), d = max(d, ⟨g, x_0 - x⟩ averaged / ||g averaged||_1)",
        paper=(
            "Mishchenko, Defazio, 2023, Prodigy: An Expeditiously Adaptive Parameter-Free Learner, arXiv:2306.06101"
        ),
        state=4,
        needs_whole_tensors=True,
        example={"d0": 1e-3},
        exceptions={
            "takes_groups_with_own_lr": "one estimate is made for all groups, with one lr; others are refused by name",
        },
        claim=Claim(sentence="as good as tuned AdamW, with no tuning", margin=0.02, tuned=False),
    )

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float | None = None,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = float("inf"),
        weight_decay: float = 0.0,
        bias_correction: bool = False,
        safeguard_warmup: bool = False,
        eps: float = 1e-8,
    ) -> None:
        non_negative(lr=lr, weight_decay=weight_decay, eps=eps)
        b1, b2 = betas
        between(0.0, 1.0, beta1=b1, beta2=b2)
        if beta3 is not None:
            between(0.0, 1.0, beta3=beta3)
        positive(d0=d0, d_coef=d_coef)
        between(1.0, float("inf"), closed="right", growth_rate=growth_rate)
        pytorch_optimizer.Prodigy.__init__(
            self,
            params,
            lr=lr,
            betas=(b1, b2),
            beta3=beta3,
            d0=d0,
            d_coef=d_coef,
            growth_rate=growth_rate,
            weight_decay=weight_decay,
            bias_correction=bias_correction,
            safeguard_warmup=safeguard_warmup,
            eps=eps,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "maximize": self.maximize, "_compiled_update_foreach": None}

    def step(self, closure: Any = None) -> Any:
        """One step.

        Args:
            closure: Evaluates the loss and its gradient; ``None`` with gradients in ``.grad``.

        Returns:
            The loss that the closure gave.

        Raises:
            ConfigurationError: The groups have unequal learning rates, which one estimate cannot follow.
        """
        rates = {float(group["lr"]) for group in self.param_groups}
        if len(rates) > 1:
            raise ConfigurationError(
                "Prodigy estimates one learning rate for all groups",
                found=f"groups with lr {', '.join(f'{rate:g}' for rate in sorted(rates))}",
                allowed="the same lr in every group",
                remedy="Give the groups one lr, or choose optimizer=adamw.",
            )
        return super().step(closure)
