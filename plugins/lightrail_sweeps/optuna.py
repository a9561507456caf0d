"""Optuna's samplers and pruners over a journal in the sweep's folder."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lightrail import SweepMethod, Traits
from lightrail.errors import CheckpointError
from lightrail.options import at_least, one_of
from lightrail.sweep import Choices, Dimension, Goal
from lightrail.sweep.method import finite
from lightrail_sweeps.journal_lock import JournalLock
from lightrail_sweeps.seeds import seed_of_trial

if TYPE_CHECKING:
    import optuna

__all__ = ["Optuna"]

SAMPLERS = ("tpe", "gp", "random")
PRUNERS = ("median", "hyperband", "none")
_NAME = "sweep"
_NUMBER, _HOPELESS = "number", "hopeless"


class Optuna(SweepMethod):
    """Optuna: a tree of Parzen estimators or a Gaussian process, with trials stopped early that fall behind.

    What it knows is Optuna's own journal, ``optuna.journal`` in the sweep's folder, which needs no server, may lie on
    NFS, and opens in Optuna's dashboard. Each proposal depends on the seed, the trial's number and what is told so far
    and on nothing else, so that a sweep that was stopped and resumed proposes what it would have proposed.

    Args:
        trials: How many configurations are tried, at least 1.
        sampler: ``tpe`` (Parzen estimators of good and of other trials), ``gp`` (Gaussian process) or ``random``.
        startup: Trials drawn at random before the first that is inferred, at least 0; a third of ``trials``, from 5 to
            10, where not given.
        pruner: When a trial is hopeless: ``median`` (its best value is worse than the median of finished trials at the
            same validation), ``hyperband`` (it is not among the best third at its rungs; wants 50 trials and more), or
            ``none``.
        warmup: Validations of a trial before ``median`` may stop it, at least 0.
        seed: Of the proposals.
        metric: Another metric than the task's own to go by, among those of validation.
        direction: ``min`` or ``max``: which of the metric is better; needed with ``metric``.
    """

    traits: ClassVar[Traits] = Traits(
        rule="x = argmax l(x)/g(x): densities of the better and of the other trials",
        paper="Akiba, Sano, Yanase, Ohta, Koyama 2019, Optuna: A Next-generation Hyperparameter Optimization "
        "Framework, arXiv:1907.10902",
        is_stochastic=True,
    )

    def __init__(
        self,
        space: Mapping[str, Dimension],
        folder: Path,
        goal: Goal,
        *,
        trials: int = 20,
        sampler: str = "tpe",
        startup: int | None = None,
        pruner: str = "median",
        warmup: int = 1,
        seed: int = 0,
        metric: str | None = None,
        direction: str | None = None,
    ) -> None:
        super().__init__(space, folder, goal, trials=trials, metric=metric, direction=direction)
        one_of(SAMPLERS, sampler=sampler)
        one_of(PRUNERS, pruner=pruner)
        at_least(0, warmup=warmup, seed=seed, startup=0 if startup is None else startup)
        self.sampler = sampler
        self.startup = min(10, max(5, trials // 3)) if startup is None else startup
        self.pruner = pruner
        self.warmup = warmup
        self.seed = seed

    def ask(self, number: int) -> dict[str, str]:
        """The values of a trial; one that is in the journal is read from there."""
        import optuna

        known = self._find(number)
        if known is None:
            # Only the whole proposal goes into the journal, in one line: a kill leaves all of it or nothing.
            texts = self._proposed(number)
            params = {key: _read(self.space[key], text) for key, text in texts.items()}
            known = optuna.trial.create_trial(
                state=optuna.trial.TrialState.RUNNING,
                params=params,
                distributions=self._distributions,
                user_attrs={_NUMBER: number},
            )
            self._study.add_trial(known)
        return {key: _typed(self.space[key], value) for key, value in known.params.items()}

    def tell(self, number: int, value: float | None) -> None:
        """How a trial ended; one that failed before may be told again, when it was tried again."""
        from optuna.trial import TrialState, create_trial

        trial, value = self._trial(number), finite(value)
        if trial.state == TrialState.RUNNING:
            if _HOPELESS in trial.user_attrs:
                self._study.tell(trial.number, state=TrialState.PRUNED)
            elif value is None:
                self._study.tell(trial.number, state=TrialState.FAIL)
            else:
                self._study.tell(trial.number, value)
        elif trial.state == TrialState.FAIL and value is not None:
            again = {"params": trial.params, "distributions": trial.distributions, "user_attrs": trial.user_attrs}
            self._study.add_trial(create_trial(state=TrialState.COMPLETE, value=value, **again))

    def is_hopeless(self, number: int, validation: int, value: float) -> bool:
        """Whether the pruner gives a trial up; what it reports is there for the others to be compared with."""
        trial = self._trial(number)
        if self.pruner == "none" or finite(value) is None or trial.state.is_finished():
            return False
        if _HOPELESS in trial.user_attrs:
            return True
        self._storage.set_trial_intermediate_value(trial._trial_id, validation, value)
        hopeless = self._study.pruner.prune(self._study, self._trial(number))
        if hopeless:
            self._storage.set_trial_user_attr(trial._trial_id, _HOPELESS, validation)
        return hopeless

    # What stands in the journal.

    @cached_property
    def _storage(self) -> optuna.storages.JournalStorage:
        import optuna
        from optuna.storages.journal import JournalFileBackend

        self.folder.mkdir(parents=True, exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path = self.folder / "optuna.journal"
        lock: Any = JournalLock(path)
        return optuna.storages.JournalStorage(JournalFileBackend(str(path), lock))

    @cached_property
    def _study(self) -> optuna.Study:
        import optuna

        with _without_advice():
            return optuna.create_study(
                storage=self._storage,
                study_name=_NAME,
                direction="minimize" if self.goal.mode == "min" else "maximize",
                sampler=optuna.samplers.RandomSampler(),
                pruner=self._make_pruner(),
                load_if_exists=True,
            )

    def _find(self, number: int) -> optuna.trial.FrozenTrial | None:
        """The last record of a trial."""
        trials = reversed(self._study.get_trials(deepcopy=False))
        return next((trial for trial in trials if trial.user_attrs.get(_NUMBER) == number), None)

    def _trial(self, number: int) -> optuna.trial.FrozenTrial:
        found = self._find(number)
        if found is None:
            raise CheckpointError(
                f"trial {number} was never asked for",
                found=f"{self.folder / 'optuna.journal'} without it",
                allowed="the journal with which the sweep began",
                remedy="Put the journal back, or start the sweep anew.",
            )
        return found

    # What the next trial is.

    @cached_property
    def _distributions(self) -> dict[str, Any]:
        return {key: _distribution(dimension) for key, dimension in self.space.items()}

    def _proposed(self, number: int) -> dict[str, str]:
        """Worked out on a copy in memory, by a sampler of this trial's own."""
        import optuna

        with _without_advice():
            copy = optuna.create_study(
                study_name=_NAME,
                direction=self._study.direction,
                sampler=self._make_sampler(number),
                pruner=self._study.pruner,
            )
            copy.add_trials(self._study.get_trials(deepcopy=False))
            proposed = copy.ask(fixed_distributions=self._distributions)
        return {key: _typed(self.space[key], value) for key, value in proposed.params.items()}

    def _make_sampler(self, number: int) -> optuna.samplers.BaseSampler:
        from optuna import samplers

        seed = seed_of_trial(self.seed, number)
        if self.sampler == "random":
            return samplers.RandomSampler(seed=seed)
        if self.sampler == "gp":
            independent = samplers.RandomSampler(seed=seed)
            return samplers.GPSampler(seed=seed, n_startup_trials=self.startup, independent_sampler=independent)
        # Trials under way count as bad ones: jobs in parallel spread out.
        return samplers.TPESampler(seed=seed, n_startup_trials=self.startup, multivariate=True, constant_liar=True)

    def _make_pruner(self) -> optuna.pruners.BasePruner:
        from optuna import pruners

        if self.pruner == "median":
            return pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=self.warmup + 1)
        return pruners.HyperbandPruner() if self.pruner == "hyperband" else pruners.NopPruner()


def _distribution(dimension: Dimension) -> Any:
    from optuna import distributions

    if isinstance(dimension, Choices):
        return distributions.CategoricalDistribution(dimension.values)
    if dimension.whole:
        return distributions.IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return distributions.FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def _typed(dimension: Dimension, value: Any) -> str:
    return value if isinstance(dimension, Choices) else dimension.typed(value)


def _read(dimension: Dimension, text: str) -> Any:
    if isinstance(dimension, Choices):
        return text
    return int(text) if dimension.whole else float(text)


@contextmanager
def _without_advice() -> Iterator[None]:
    """Optuna says of good parts of itself that they may change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
