"""A guard around validation metrics, so that choosing by them again and again does not overfit the validation data."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.options import at_least, non_negative
from lightrail.traits import Traits
from lightrail_privacy.thresholdout_rule import ThresholdoutRule, shared_rule
from lightrail_privacy.training_means import as_many_training_samples, training_means

__all__ = ["Thresholdout"]

# Metrics that are means of one number in [0, 1] a record, by the names that they usually have.
USUAL = re.compile(r"(^|[_/])(accuracy|acc|error_rate|top_?\d+)($|[_/])")


class Thresholdout(Callback):
    """Lets a run ask its validation data many times over without overfitting them.

    At each validation every guarded metric φ is asked for: with T̂ = T + Lap(2s) and η = Lap(4s), what everybody is told
    (loggers, progress, the best checkpoint, early stopping, a schedule, the table of a sweep) is

    φ(hold) + Lap(s)  where |φ(hold) − φ(train)| > T̂ + η,  else φ(train)

    φ(train) is measured by ``validation_step`` on as many training samples as there are held-out ones, the same each
    time, with the weights that are validated. An answer of the first kind spends one of ``budget``, and when none is
    left the run stops. All other validation metrics (losses, whatever is not bounded or logged elsewhere than in
    ``validation_step``) are withheld, even from loggers: one look at them would undo the guard. The test is left alone.

    The promise holds where nothing else of the validation data is looked at, and for all runs that share a ``ledger``:
    let those of a sweep share one. A resumed run goes on with what its checkpoint says; a ledger is never set back.
    An answer from the training data is an exact one: differential privacy of the training does not cover it.

    Args:
        metrics: Those that are guarded, by name; each a mean over records of values in [0, 1]. ``None`` for what is
            called accuracy, acc, error_rate or top5.
        threshold: T, at least 0; ``None`` for 4 / √n with n held-out samples.
        scale: s, at least 0; ``None`` for 1 / √n.
        budget: Answers that may come from the held-out data, at least 1.
        deterministic: Whether the noise can be repeated: for tests, without a guarantee. Else it comes from the system,
            whatever the seed of the run.
        ledger: A JSON file in which runs on the same validation data share one budget and one T̂; ``None`` for a budget
            of this run's own.

    Raises:
        ConfigurationError: An option is out of range, or a metric is not in [0, 1] or not logged.
        CompositionError: When training starts: the best checkpoint or another callback goes by a metric that is not
            guarded, the data cannot be measured, or there are several processes.
        BudgetExhausted: At a validation: the budget is spent.

    Deviations:
        An answer is clipped to [0, 1], which what follows could do as well.

    Example:
        >>> Thresholdout(budget=20).guards()
        {'thresholdout': {'budget': 20, 'left': 20, 'queries': 0}}

    Reference:
        C. Dwork, V. Feldman, M. Hardt, T. Pitassi, O. Reingold and A. Roth (2015), Generalization in Adaptive Data
        Analysis and Holdout Reuse, NeurIPS, arXiv 1506.02629, section 4 (algorithm Thresholdout).
    """

    traits: ClassVar[Traits] = Traits(
        rule="φ(hold) + Lap(s) where |φ(hold) − φ(train)| > T̂ + Lap(4s), T̂ = T + Lap(2s); else φ(train)",
        paper="C. Dwork, V. Feldman, M. Hardt, T. Pitassi, O. Reingold, A. Roth, 2015, Generalization in Adaptive Data "
        "Analysis and Holdout Reuse, arXiv 1506.02629",
        is_stochastic=True,
    )

    def __init__(
        self,
        metrics: list[str] | None = None,
        threshold: float | None = None,
        scale: float | None = None,
        budget: int = 100,
        deterministic: bool = False,
        ledger: str | None = None,
    ) -> None:
        super().__init__()
        at_least(1, budget=budget)
        for name, value in (("threshold", threshold), ("scale", scale)):
            if value is not None:
                non_negative(**{name: value})
        self.metrics = None if metrics is None else list(metrics)
        self.threshold, self.scale, self.budget = threshold, scale, budget
        self.deterministic = deterministic
        self.ledger = None if ledger is None else Path(ledger).expanduser()
        self.rule: ThresholdoutRule | None = None
        self._saved: dict[str, Any] = {}
        self._answers: dict[str, float] = {}
        self._train: dict[str, float] = {}
        self._loader: DataLoader[Any] | None = None

    def is_guarded(self, name: str) -> bool:
        """Whether a metric of this name is answered for."""
        return bool(USUAL.search(name)) if self.metrics is None else name in self.metrics

    # What is said of it.

    def guards(self) -> dict[str, dict[str, int]]:
        """What is spent and what is left, as plain values."""
        state = self.rule.state_dict() if self.rule is not None else self._saved
        left = state.get("left", self.budget)
        return {"thresholdout": {"budget": self.budget, "left": left, "queries": state.get("queries", 0)}}

    def logged(self) -> dict[str, float]:
        """What is left of the budget, and the questions asked."""
        said = self.guards()["thresholdout"]
        return {"left": said["left"], "queries": said["queries"]}

    def state_dict(self) -> dict[str, Any]:
        return self._saved if self.rule is None else self.rule.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved, self.rule = dict(state_dict), None

    # Before training.

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name, _ = getattr(pl_module, "monitor", None) or ("val_loss", "min")
        self._refuse_unguarded(name, "the best checkpoint")
        for each in trainer.callbacks:  # type: ignore[attr-defined]
            monitored = getattr(each, "monitor", None)
            if isinstance(monitored, str) and not monitored.startswith("train"):
                self._refuse_unguarded(monitored, f"callback {type(each).__name__}")
        if trainer.world_size > 1:
            raise CompositionError(
                "callback 'thresholdout' works in one process",
                found=f"{trainer.world_size} processes",
                allowed="trainer.devices=1",
                remedy="Set trainer.devices=1, or leave thresholdout out.",
            )

    def _refuse_unguarded(self, name: str, who: str) -> None:
        if self.is_guarded(name):
            return
        raise CompositionError(
            f"{who} goes by '{name}', which thresholdout does not guard",
            found=name,
            allowed=", ".join(self.metrics or ()) or "a mean over records of values in [0, 1], such as val_accuracy",
            remedy="Let the task's `monitor` be a guarded metric, or name it in callback.thresholdout.metrics if it is "
            "a mean of bounded values; a loss is none.",
        )

    # At each validation.

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if _is_guarding(trainer):
            self._answers = {}
            self._withhold(trainer)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        # By now every callback has moved the weights to where they are validated.
        if batch_idx == 0 and _is_guarding(trainer):
            if self._loader is None:
                held_out, self._loader = as_many_training_samples(trainer)
                self.rule = self._made(held_out)
            self._train = training_means(trainer, pl_module, self._loader)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not _is_guarding(trainer):
            return
        hold = {name: float(value) for name, value in self._raw(False)["callback"].items() if self.is_guarded(name)}
        self._check(hold)
        for name in [name for name in hold if name in self._train]:
            self._answers[name] = min(1.0, max(0.0, self._ask(hold[name], self._train[name])))

    def _made(self, held_out: int) -> ThresholdoutRule:
        """The rule, as it stood when the checkpoint was written."""
        if self._saved and self.ledger is None:
            return ThresholdoutRule(**self._saved)
        s = 1 / math.sqrt(held_out)
        return ThresholdoutRule(
            threshold=4 * s if self.threshold is None else self.threshold,
            scale=s if self.scale is None else self.scale,
            budget=self.budget,
            is_deterministic=self.deterministic,
        )

    def _ask(self, hold: float, train: float) -> float:
        assert self.rule is not None
        if self.ledger is None:
            return self.rule.ask(hold, train)
        with shared_rule(self.ledger, self.rule) as self.rule:
            return self.rule.ask(hold, train)

    def _check(self, hold: dict[str, float]) -> None:
        wanted = list(hold) if self.metrics is None else self.metrics
        missing = [name for name in wanted if name not in hold or name not in self._train]
        if missing and self.metrics is not None:
            raise ConfigurationError(
                f"metric '{missing[0]}' is not logged by validation_step",
                found=", ".join(missing),
                allowed=", ".join(self._train) or "a mean that validation_step logs",
                remedy="Name metrics that validation_step logs, over the epoch, as a mean.",
            )
        for name, value in [*hold.items(), *((name, self._train[name]) for name in hold if name in self._train)]:
            if not 0 <= value <= 1:
                raise ConfigurationError(
                    f"metric '{name}' cannot be guarded by thresholdout",
                    found=f"{name}={value}",
                    allowed="a mean over records of values in [0, 1]",
                    remedy="Leave it out of callback.thresholdout.metrics.",
                )

    def _withhold(self, trainer: Trainer) -> None:
        """Nothing but answers leaves what Lightning gathers in a validation, whoever asks."""
        results: Any = trainer._results
        if getattr(results.metrics, "guard", None) is self:
            return
        raw: Callable[[bool], dict[str, dict[str, Any]]] = results.metrics

        def metrics(on_step: bool) -> dict[str, dict[str, Any]]:
            # Also after an error: what is written of a run that failed is read as well.
            found = {} if on_step else raw(on_step)
            return {
                kind: {
                    name: self._like(value, name)
                    for name, value in found.get(kind, {}).items()
                    if name in self._answers
                }
                for kind in ("callback", "log", "pbar")
            }

        metrics.guard = self  # type: ignore[attr-defined]
        self._raw = raw
        results.metrics = metrics

    def _like(self, value: Any, name: str) -> Any:
        answer = self._answers[name]
        return torch.full_like(value, answer) if isinstance(value, Tensor) else answer


def _is_guarding(trainer: Trainer) -> bool:
    return trainer.state.fn == "fit" and trainer.validating and not trainer.sanity_checking
