"""Noise on the training inputs that dies away."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils import _pytree as pytree

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.options import between, one_of, positive
from lightrail.run.loops import progress_of
from lightrail.traits import Traits

__all__ = ["Mollification", "noise_power"]

KINDS = ("anneal", "constant")
SCHEDULES = ("sigmoid", "cosine", "linear")
SIGMOID_END, SIGMOID_TEMPERATURE = 3.0, 0.7


def noise_power(r: float, schedule: str = "sigmoid") -> float:
    """γ(r): the share of the inputs' variance that is noise, from 1 at r = 0 down to exactly 0 at r = 1.

    With S the logistic function, e = 3 and τ = 0.7, ``sigmoid`` is ``(S(e/τ) − S(r e/τ)) / (S(e/τ) − S(0))``,
    ``cosine`` is ``cos²(π r / 2)``, and ``linear`` is ``1 − r``.

    Example:
        >>> [round(noise_power(0.5, name), 4) for name in ("sigmoid", "cosine", "linear")]
        [0.188, 0.5, 0.5]
    """
    if r >= 1:
        return 0.0
    if schedule == "linear":
        return 1 - r
    if schedule == "cosine":
        return math.cos(math.pi * r / 2) ** 2
    top, here = (1 / (1 + math.exp(-x * SIGMOID_END / SIGMOID_TEMPERATURE)) for x in (1.0, r))
    return (top - here) / (top - 0.5)


class Mollification(Callback):
    """Trains on noisy inputs, with noise that is annealed to nothing: first the outline of the data, then the data.

    Of each training batch, the first floating-point tensor x becomes, with ε standard normal and drawn anew,

    √(1 − γ) x + √γ ε                      ``kind=anneal``
    x + noise √γ ε                         ``kind=anneal`` with ``noise`` (instance noise that decreases)
    x + noise ε                            ``kind=constant`` (instance noise of a fixed level)

    where γ falls from 1 at the first step to 0 at the fraction ``until`` of the run. Everything else in the batch, and
    every batch of a validation or a test, is as it was.

    Args:
        kind: ``anneal`` or ``constant``.
        schedule: Of γ, for ``kind=anneal``: ``sigmoid`` (most of the noise is gone early), ``cosine`` or ``linear``.
        until: The fraction of the run, in (0, 1], after which there is no noise, for ``kind=anneal``.
        noise: The standard deviation of instance noise, in the units of the inputs; ``None`` mixes inputs of unit
            variance with noise, so that the first batches are nothing but noise.

    Raises:
        ConfigurationError: An option is out of range, or ``kind=constant`` has no ``noise``.
        CompositionError: When training runs: it has no horizon to anneal over, or a batch has no floating-point tensor.

    Guarantees:
        All evaluations of a step see one noisy batch. Noise comes from torch's global generator, so an exactly resumed
        run repeats it. Under ``trainer.accumulate`` all micro-batches of a step have one level. Once the noise is gone,
        batches pass untouched and at no cost.

    Deviations:
        The published code leaves a noise of variance 10⁻⁹ at the end; here it is none.

    Example:
        >>> Mollification(until=0.25).at(step=0, steps=1000)
        (0.0, 1.0)
        >>> Mollification(until=0.25).at(step=250, steps=1000)
        (1.0, 0.0)

    Reference:
        B.-H. Tran, G. Franzese, P. Michiardi and M. Filippone (2023), One-Line-of-Code Data Mollification Improves
        Optimization of Likelihood-based Generative Models, NeurIPS; M. Chae, D. Kim, Y. Kim and L. Lin (2023), A
        Likelihood Approach to Nonparametric Estimation of a Singular Distribution Using Deep Generative Models, JMLR
        24, for instance noise.
    """

    traits: ClassVar[Traits] = Traits(
        rule="x ← √(1 − γ) x + √γ ε in training, γ from 1 to 0 over the first part of the run; or x ← x + noise ε",
        paper="B.-H. Tran, G. Franzese, P. Michiardi, M. Filippone, 2023, One-Line-of-Code Data Mollification Improves "
        "Optimization of Likelihood-based Generative Models",
        is_stochastic=True,
    )

    def __init__(
        self, kind: str = "anneal", schedule: str = "sigmoid", until: float = 0.5, noise: float | None = None
    ) -> None:
        super().__init__()
        one_of(KINDS, kind=kind)
        one_of(SCHEDULES, schedule=schedule)
        between(0, 1, closed="right", until=until)
        if noise is not None:
            positive(noise=noise)
        elif kind == "constant":
            raise ConfigurationError(
                "constant noise has no level",
                found=f"kind={kind}, noise=None",
                allowed="a number greater than 0 as noise, the standard deviation",
                remedy="Set noise, or choose kind=anneal.",
            )
        self.kind = kind
        self.schedule = schedule
        self.until = until
        self.noise = noise
        self._whole = math.inf
        self._level = 0.0
        self._strategy: Any = None

    def at(self, step: float, steps: float) -> tuple[float, float]:
        """What the inputs and what the noise are multiplied by.

        Args:
            step: Optimizer steps so far.
            steps: Those of the whole run.
        """
        if self.kind == "constant":
            return 1.0, float(self.noise or 0.0)
        power = noise_power(step / (self.until * steps), self.schedule)
        if self.noise is not None:
            return 1.0, self.noise * math.sqrt(power)
        return math.sqrt(1 - power), math.sqrt(power)

    def logged(self) -> dict[str, float]:
        """The standard deviation of the noise in the last batch."""
        return {"noise": self._level}

    # Lightning's hooks. The noise is added where a batch arrives on its device, after every hook of task and data, so
    # that it need not be told who of them has such hooks.

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.kind == "anneal":
            self._whole = progress_of(trainer)[1]
            if math.isinf(self._whole):
                raise CompositionError(
                    "callback 'mollification' has no horizon to anneal its noise over",
                    found=f"trainer.max_epochs={trainer.max_epochs} trainer.max_steps={trainer.max_steps}",
                    allowed="a number of steps or epochs",
                    remedy="Set trainer.max_steps or trainer.max_epochs, or use callback.mollification.kind=constant.",
                )
        self._begin(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()

    def _begin(self, trainer: Trainer, module: LightningModule) -> None:
        self._end()
        strategy: Any = trainer.strategy
        plain = strategy.batch_to_device

        def batch_to_device(batch: Any, *args: Any, **kwargs: Any) -> Any:
            batch = plain(batch, *args, **kwargs)
            # As dropout does: where the module is in evaluation mode, a batch is only looked at.
            if not (trainer.training and module.training):
                return batch
            return self._noisy(batch, progress_of(trainer)[0] if self.kind == "anneal" else 0)

        self._strategy, strategy.batch_to_device = strategy, batch_to_device

    def _end(self) -> None:
        if self._strategy is not None:
            del self._strategy.batch_to_device
            self._strategy = None

    def _noisy(self, batch: Any, done: float) -> Any:
        keep, self._level = self.at(done, self._whole)
        if self._level == 0:
            self._end()
            return batch
        leaves, structure = pytree.tree_flatten(batch)
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                leaves[index] = torch.randn_like(leaf).mul_(self._level).add_(leaf, alpha=keep)
                return pytree.tree_unflatten(leaves, structure)
        kinds = sorted({str(leaf.dtype) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in leaves})
        raise CompositionError(
            "callback 'mollification' finds nothing in a batch that noise could be added to",
            found=", ".join(kinds) or "an empty batch",
            allowed="inputs that are floating-point tensors: images, measurements",
            remedy="Leave out callback=mollification for tokens and other whole numbers.",
        )
