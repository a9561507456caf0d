"""Muon on hidden matrices and AdamW on everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from lightrail.errors import ConfigurationError, PluginError
from lightrail.options import at_least, between, non_negative
from lightrail.step import CombinedOptimizer
from lightrail.traits import Claim, Traits
from lightrail_optimizers.named_parameters import EMBEDDING_AND_OUTPUT_NAMES, is_hidden_matrix, named_groups

__all__ = ["Muon"]


class Muon(CombinedOptimizer):
    """Muon, an orthogonalized momentum, on the hidden matrices; AdamW on the rest.

    ``b = momentum b + (1-momentum) g``; ``x *= 1 - lr wd``; ``x -= lr sqrt(max(1, rows/columns)) NS(b)``, where NS
    brings all singular values near 1 by Newton-Schulz iterations. Both parts are torch's own optimizers.

    Muon takes matrices only: a parameter goes to AdamW where it is not two-dimensional (biases, norms, and also the
    four-dimensional weights of convolutions) or where its name says embedding or output. A schedule scales the
    learning rates of both.

    Args:
        params: ``(name, parameter)`` pairs, or parameter groups whose ``params`` are such pairs. A group may hold any
            option below but ``adamw_names``.
        lr: Muon's learning rate, >= 0.
        momentum: In [0, 1).
        nesterov: Whether the momentum looks ahead.
        ns_steps: Newton-Schulz iterations, >= 1.
        weight_decay: Muon's, decoupled, >= 0.
        adamw_lr: AdamW's learning rate, >= 0.
        adamw_betas: Each in [0, 1).
        adamw_weight_decay: >= 0.
        adamw_names: Patterns in the manner of file names; a matrix stays with AdamW where one matches its full name or
            a part of it between dots. ``None`` for those of embeddings and output layers. The last layer of an
            ``nn.Sequential`` has no telling name: give its number here.

    Raises:
        ConfigurationError: Parameters without names, an option out of range, or no matrix for Muon.
        PluginError: This version of torch has no Muon.

    Example:
        >>> model = torch.nn.ModuleDict({"hidden": torch.nn.Linear(4, 4), "head": torch.nn.Linear(4, 2)})
        >>> optimizer = Muon(model.named_parameters())
        >>> [(group["lr"], len(group["params"])) for group in optimizer.param_groups]
        [(0.02, 1), (0.0003, 3)]

    Reference:
        Jordan et al., 2024, "Muon: An optimizer for hidden layers in neural networks",
        https://kellerjordan.github.io/posts/muon.
    """

    traits = Traits(
        rule="x -= lr sqrt(max(1, rows/columns)) NewtonSchulz(momentum) on hidden matrices, AdamW elsewhere",
        paper="Jordan et al., 2024, Muon: An optimizer for hidden layers in neural networks",
        state=1,  # on matrices; 2 on what AdamW has
        claim=Claim(
            sentence="a lower loss than AdamW's, for hidden matrices",
            problems=("docs_lm",),
            options={"adamw_lr": 3e-3},
        ),
        needs_parameter_names=True,
        needs_whole_tensors=True,
        example={"lr": 0.01, "adamw_lr": 0.01},
    )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        weight_decay: float = 0.0,
        adamw_lr: float = 3e-4,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_weight_decay: float = 0.0,
        adamw_names: list[str] | None = None,
    ) -> None:
        self._names = EMBEDDING_AND_OUTPUT_NAMES if adamw_names is None else tuple(adamw_names)
        self._options = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "weight_decay": weight_decay,
            "adamw_lr": adamw_lr,
            "adamw_betas": tuple(adamw_betas),
            "adamw_weight_decay": adamw_weight_decay,
        }
        matrices, rest = self._split(named_groups("Muon", params))
        if not matrices:
            raise ConfigurationError(
                "Muon found no hidden matrix to work on",
                found="no two-dimensional parameter outside embeddings and output layers",
                allowed="a model with at least one hidden linear layer",
                remedy="Choose optimizer=adamw, or narrow optimizer.adamw_names.",
            )
        super().__init__(
            [_torch_muon()(matrices), *([torch.optim.AdamW(rest)] if rest else [])],
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of ``(name, parameter)`` pairs, split as the others were."""
        matrices, rest = self._split(named_groups("Muon", [param_group]))
        for group in matrices:
            self.optimizers[0].add_param_group(group)
        for group in rest:
            if len(self.optimizers) == 1:
                self.optimizers.append(torch.optim.AdamW([group]))
            else:
                self.optimizers[1].add_param_group(group)

    def _split(self, groups: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Muon's groups and AdamW's groups; none of them is empty."""
        matrices, rest = [], []
        for group in groups:
            options = self._checked({**self._options, **{k: v for k, v in group.items() if k != "params"}})
            pairs = group["params"]
            for_muon = [p for name, p in pairs if is_hidden_matrix(name, p, self._names)]
            for_adamw = [p for name, p in pairs if not is_hidden_matrix(name, p, self._names)]
            if for_muon:
                own = {k: v for k, v in options.items() if not k.startswith("adamw_")}
                matrices.append({"params": for_muon, **own})
            if for_adamw:
                own = {k.removeprefix("adamw_"): v for k, v in options.items() if k.startswith("adamw_")}
                rest.append({"params": for_adamw, **own})
        return matrices, rest

    def _checked(self, options: dict[str, Any]) -> dict[str, Any]:
        non_negative(**{k: options[k] for k in ("lr", "weight_decay", "adamw_lr", "adamw_weight_decay")})
        between(0.0, 1.0, momentum=options["momentum"])
        for beta in options["adamw_betas"]:
            between(0.0, 1.0, adamw_betas=beta)
        at_least(1, ns_steps=options["ns_steps"])
        return options


def _torch_muon() -> Callable[..., Optimizer]:
    if not hasattr(torch.optim, "Muon"):
        raise PluginError(
            "this version of torch has no Muon",
            found=f"torch {torch.__version__}",
            allowed="torch 2.9 or newer",
            remedy="Upgrade torch, or choose another optimizer.",
        )
    return torch.optim.Muon
