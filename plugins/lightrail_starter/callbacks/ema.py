"""An exponential moving average of the weights."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.options import at_least, between
from lightrail.step.sharded import copy_tensors
from lightrail.traits import Claim, Traits, traits_of

__all__ = ["EMA"]


class EMA(Callback):
    """Trains as usual, and validates, tests and saves an exponential moving average of the weights.

    After each ``every``-th step from ``start_step`` on, as the t-th update:

    a ← (1 − β_t) a + β_t x,  β_t = max(1 − decay, t^−power) with ``power``, max(1 − decay, 9 / (9 + t)) with
    ``warmup``, else 1 − decay

    The first update copies the weights. Until then the weights themselves are evaluated. Power 1 is the mean of all
    points since ``start_step``, until the floor 1 − ``decay`` is reached; a smaller one forgets the early points
    faster, and its memory goes on growing with the run. Floating-point buffers
    (BatchNorm's statistics) are averaged as the weights are; others are taken as they stand.

    In a checkpoint, ``state_dict`` holds the average and ``current_model_state`` the weights that training goes on
    from, so a resumed run equals one that was never stopped, bit for bit.

    Args:
        decay: Of the average, in [0, 1); 1 / (1 − decay) updates are its longest memory. With ``power`` also 1, for one
            that grows without end.
        start_step: The optimizer step, counted from 0, after which the first update may come.
        every: Optimizer steps from one update to the next, at least 1.
        warmup: Whether the memory starts short and grows, so that the first weights are forgotten in a short run;
            ``None`` for yes, unless ``power`` is given.
        power: How fast the weight of a new point falls, in (0, 1]; ``None`` for ``warmup``'s rule.

    Raises:
        ConfigurationError: An option is out of range, or both ``warmup`` and ``power`` are asked for.
        CompositionError: When training starts: the optimizer or a transform keeps an average of its own.

    Example:
        >>> EMA(decay=0.99).decay
        0.99
        >>> [EMA(power=1).weight(t) for t in (1, 2, 4)]
        [1.0, 0.5, 0.25]

    Reference:
        B. Polyak and A. Juditsky (1992), Acceleration of Stochastic Approximation by Averaging, SIAM Journal on Control
        and Optimization 30(4), for the uniform average; A. Block, D. J. Foster, A. Krishnamurthy, M. Simchowitz and
        C. Zhang (2024), Butterfly Effects of SGD Noise: Error Amplification in Behavior Cloning and Autoregression, for
        ``power``; ``warmup`` follows practice.
    """

    traits: ClassVar[Traits] = Traits(
        claim=Claim(
            sentence="a cloned policy's cost in closed loop varies less from checkpoint to checkpoint",
            baseline="sgd",
            baseline_options={"lr": 0.03},
            problems=("behaviour_cloning",),
            options={"decay": 0.99},
            tuned=False,
        ),
        rule="a ← (1 − β_t) a + β_t x, β_t = max(1 − decay, t^−power or 9 / (9 + t)); a is evaluated, x is trained",
        paper="A. Block, D. J. Foster, A. Krishnamurthy, M. Simchowitz, C. Zhang, 2024, Butterfly Effects of SGD "
        "Noise: Error Amplification in Behavior Cloning and Autoregression",
        state=1.0,
    )

    def __init__(
        self,
        decay: float = 0.999,
        start_step: int = 0,
        every: int = 1,
        warmup: bool | None = None,
        power: float | None = None,
    ) -> None:
        super().__init__()
        between(0, 1, closed="left" if power is None else "both", decay=decay)
        at_least(0, start_step=start_step)
        at_least(1, every=every)
        if power is not None:
            between(0, 1, closed="right", power=power)
            if warmup:
                raise ConfigurationError(
                    "warmup and power are two rules for one weight",
                    found=f"warmup={warmup}, power={power}",
                    allowed="one of the two",
                    remedy="Leave warmup out: with power, too, the memory starts short and grows.",
                )
        self.decay = decay
        self.start_step = start_step
        self.every = every
        self.warmup = power is None if warmup is None else warmup
        self.power = power
        self._updates = 0
        self._last_update = 0
        self._is_swapped = False
        # Where each distinct tensor of the module's state stands, and which of them each name means.
        self._places: list[tuple[dict[str, Any], str]] = []
        self._names: dict[str, int] = {}
        # The average; while it stands in the module, the weights that training goes on from.
        self._other: list[Tensor] = []

    # Averaging.

    def weight(self, t: int) -> float:
        """β_t: how much the t-th point, counted from 1, weighs against the average of those before it."""
        if self.power is not None:
            return max(1 - self.decay, t**-self.power)
        return 1 - min(self.decay, t / (9 + t)) if self.warmup else 1 - self.decay

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._go_to(training=True)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in trainer.optimizers:
            methods = [getattr(optimizer, "optimizer", optimizer), *getattr(optimizer, "transforms", ())]
            movers = [type(each).__name__ for each in methods if traits_of(each).has_evaluation_point]
            if movers:
                raise CompositionError(
                    "callback 'ema' and another method both want the weights evaluated at a point of their own",
                    found=f"{', '.join(movers)}, which evaluates another point than it trains",
                    allowed="one of the two",
                    remedy="Leave out callback=ema, or choose another optimizer or transform.",
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._find(pl_module)
        # A checkpoint is loaded before the module moves to its device.
        self._other = [other.to(t.device) for other, t in zip(self._other, self._current(), strict=False)]

    def _find(self, module: LightningModule) -> None:
        """Lists every distinct tensor of the module's state once, whatever names it has there."""
        self._places, self._names = [], {}
        seen: dict[int, int] = {}
        for prefix, owner in module.named_modules(remove_duplicate=False):
            for home, left_out in ((owner._parameters, ()), (owner._buffers, owner._non_persistent_buffers_set)):
                for key, tensor in home.items():
                    if tensor is None or key in left_out:
                        continue
                    if id(tensor) not in seen:
                        seen[id(tensor)] = len(self._places)
                        self._places.append((home, key))
                    self._names[f"{prefix}.{key}" if prefix else key] = seen[id(tensor)]

    def _current(self) -> list[Tensor]:
        """What stands in the module; looked up each time, since a module may put a new tensor in a buffer's place."""
        return [home[key] for home, key in self._places]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        is_due = step - self._last_update >= self.every if self._updates else step > self.start_step
        if is_due:
            self._last_update = step
            self._update()

    @torch.no_grad()
    def _update(self) -> None:
        pairs = list(zip(self._other, self._current(), strict=False))
        if not pairs:
            self._other = [tensor.detach().clone() for tensor in self._current()]
        self._updates += 1
        floating = [pair for pair in pairs if pair[0].is_floating_point()]
        if floating:
            average, current = map(list, zip(*floating, strict=True))
            torch._foreach_lerp_(average, current, self.weight(self._updates))
        for average, current in pairs:
            if not average.is_floating_point():
                average.copy_(current)

    # Evaluating.

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._go_to(training=False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._go_to(training=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the average in the module, for the test and for the user."""
        self._go_to(training=False)

    @torch.no_grad()
    def _go_to(self, *, training: bool) -> None:
        if self._is_swapped != training or not self._other:
            return
        current = self._current()
        kept = [tensor.detach().clone() for tensor in current]
        copy_tensors(current, self._other)
        self._other = kept
        self._is_swapped = not training

    # Saving.

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self._updates, "last_update": self._last_update}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._updates = state_dict["updates"]
        self._last_update = state_dict["last_update"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Puts the average where a checkpoint's weights are looked for, and the training point beside it."""
        if not self._other:
            return
        saved, names = checkpoint["state_dict"], self._names
        other = {name: self._other[names[name]] if name in names else value for name, value in saved.items()}
        average, training = (saved, other) if self._is_swapped else (other, saved)
        checkpoint["state_dict"], checkpoint["current_model_state"] = average, training

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Goes back to the training point; only a fit does, since a test wants the average."""
        mine = checkpoint.get("callbacks", {}).get(self.state_key)
        if trainer.state.fn != "fit" or not mine or not mine["updates"]:
            return
        self._find(pl_module)
        average = {place: checkpoint["state_dict"][name] for name, place in self._names.items()}
        self._other = [average[place].clone() for place in range(len(average))]
        pl_module.load_state_dict(checkpoint["current_model_state"])
