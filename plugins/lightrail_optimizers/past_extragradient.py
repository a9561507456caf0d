"""Past extragradient: extragradient that looks ahead along the gradient it has already."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightrail.errors import ConfigurationError
from lightrail.options import non_negative
from lightrail.step.sharded import copy_tensors
from lightrail.traits import Claim, Traits
from lightrail_optimizers.tensor_lists import add_scaled_
from lightrail_optimizers.tensorwise import TensorwiseOptimizer

__all__ = ["PastExtragradient", "past_extragradient"]


def past_extragradient(x_half: list[Tensor], g: list[Tensor], x: list[Tensor], *, lr: float | Tensor) -> None:
    """One update, in place: ``x -= lr g``; ``x_half = x - lr g``.

    Args:
        x_half: ``x_{t+1/2}``, where the gradient was taken; becomes ``x_{t+3/2}``.
        g: The gradient there.
        x: ``x_t``; becomes ``x_{t+1}``.
        lr: Learning rate.
    """
    add_scaled_(x, g, -lr)
    copy_tensors(x_half, x)
    add_scaled_(x_half, g, -lr)


class PastExtragradient(TensorwiseOptimizer):
    """Past extragradient, for games: extragradient at the cost of one gradient a step.

    ``x_{t+1/2} = x_t - lr g_{t-1/2}``; ``x_{t+1} = x_t - lr g_{t+1/2}``, where ``g_{t+1/2}`` is the gradient at
    ``x_{t+1/2}`` and the first half point is the start.

    While it trains, the parameters are at the half point; :meth:`eval` takes them to ``x_t``, :meth:`train` back.
    Every player has to move from the same point: give one optimizer all players, with the gradient of each player's
    own loss in ``.grad``, as tasks with ``players()`` that move at once do.

    Args:
        params: Parameters or parameter groups; in a game, a group a player.
        lr: Learning rate, >= 0; below 1/(2L) for a field with Lipschitz constant L.
        maximize: Ascend.
        foreach: One call for many tensors; ``False`` is the same bit for bit, tensor by tensor, with less memory.
        compile: Compile the update; a learning rate that moves does not compile it again.

    Raises:
        ConfigurationError: An option out of range; a complex parameter or a sparse gradient; a step at ``x_t``.

    Deviations:
        Without constraints, so without projections. Then the half points are those of
        :class:`~lightrail_optimizers.optimistic_sgd.OptimisticSGD` from ``g_0 = 0``.

    Example:
        >>> from lightrail import Closure
        >>> x, y = (torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64)) for _ in range(2))
        >>> losses = {"x": lambda: x * y, "y": lambda: -x * y}
        >>> optimizer = PastExtragradient([x, y], lr=0.1)
        >>> closure = Closure(lambda player: losses[player](), [x, y], players={"x": [x], "y": [y]})
        >>> loss = optimizer.step(closure)
        >>> x.item(), y.item()
        (0.8, 1.2000000000000002)
        >>> optimizer.eval()
        >>> x.item(), y.item()
        (0.9, 1.1)

    Reference:
        Hsieh, Iutzeler, Malick, Mertikopoulos, 2019, "On the convergence of single-call stochastic extra-gradient
        methods", arXiv:1908.08465, Section 3 (PEG); Popov, 1980, doi:10.1007/BF01141092.
    """

    traits = Traits(
        rule="x_{t+1/2} = x_t - lr g_{t-1/2}; x_{t+1} = x_t - lr g_{t+1/2}",
        paper=(
            "Hsieh, Iutzeler, Malick, Mertikopoulos, 2019, On the convergence of single-call stochastic "
            "extra-gradient methods, arXiv:1908.08465"
        ),
        state=1,
        has_evaluation_point=True,
        example={"lr": 0.01},
        claim=Claim(
            sentence="reaches the solution that descent and ascent circle", baseline="sgd", problems=("bilinear_game",)
        ),
    )
    # x_t, while the parameters are at the half point; the half point, while they are at x_t.
    state_names = ("other_point",)
    rule = staticmethod(past_extragradient)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        maximize: bool = False,
        foreach: bool = True,
        compile: bool = False,
    ) -> None:
        non_negative(lr=lr)
        super().__init__(params, {"lr": lr, "maximize": maximize, "foreach": foreach, "compile": compile})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        # In the group, so that it travels with a checkpoint.
        self.param_groups[-1].setdefault("at_half_point", True)

    def scalars(self, group: dict[str, Any], t: int) -> dict[str, Any]:
        return {"lr": group["lr"]}

    def apply_rule(self, group: dict[str, Any], t: int, *lists: list[Tensor]) -> None:
        if t == 1:
            x_half, _, x = lists
            copy_tensors(x, x_half)
        super().apply_rule(group, t, *lists)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """One step from the half point; ``closure`` and what it returns as for any optimizer.

        Raises:
            ConfigurationError: The parameters are at ``x_t``.
        """
        if not all(group["at_half_point"] for group in self.param_groups):
            raise ConfigurationError(
                "PastExtragradient steps from its half point, and the parameters are at x_t",
                found="step() after eval()",
                allowed="step() after train()",
                remedy="Call train() on the optimizer before the gradient is computed.",
            )
        return super().step(closure)

    def eval(self) -> None:
        """Takes the parameters to ``x_t``, where the method is to be judged."""
        self._move(to_half_point=False)

    def train(self) -> None:
        """Takes the parameters back to the half point."""
        self._move(to_half_point=True)

    @torch.no_grad()
    def _move(self, to_half_point: bool) -> None:
        for group in self.param_groups:
            if group["at_half_point"] is to_half_point:
                continue
            group["at_half_point"] = to_half_point
            for p in group["params"]:
                if p in self.state:  # one that has never had a gradient is at both points
                    here = p.clone()
                    p.copy_(self.state[p]["other_point"])
                    self.state[p]["other_point"].copy_(here)
