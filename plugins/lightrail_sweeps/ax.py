"""Bayesian optimisation by Ax and BoTorch, with a record of its own in the sweep's folder."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch

from lightrail import SweepMethod, Traits
from lightrail.errors import CheckpointError
from lightrail.files import replace_file
from lightrail.options import at_least
from lightrail.sweep import Choices, Dimension, Goal
from lightrail.sweep.method import finite
from lightrail_sweeps.seeds import seed_of_trial

__all__ = ["Ax"]

_OBJECTIVE = "goal"


class Ax(SweepMethod):
    """Ax: a Gaussian process of BoTorch's over the whole space, after a quasi-random start.

    Suited to few and costly trials; a proposal takes seconds. Trials run to their end. What it knows is ``ax.json`` in
    the sweep's folder; each proposal depends on the seed, the trial's number and what is told so far and on nothing
    else.

    Args:
        trials: How many configurations are tried, at least 1.
        startup: Trials of a Sobol sequence before the first that is inferred, at least 1.
        seed: Of the proposals.
        metric: Another metric than the task's own to go by, among those of validation.
        direction: ``min`` or ``max``: which of the metric is better; needed with ``metric``.
    """

    traits: ClassVar[Traits] = Traits(
        rule="x = argmax E[(f* - f(x))+] under a Gaussian process of f, in logarithms",
        paper="Balandat, Karrer, Jiang, Daulton, Letham, Wilson, Bakshy 2020, BoTorch: A Framework for Efficient "
        "Monte-Carlo Bayesian Optimization, arXiv:1910.06403",
        is_stochastic=True,
    )

    def __init__(
        self,
        space: Mapping[str, Dimension],
        folder: Path,
        goal: Goal,
        *,
        trials: int = 20,
        startup: int = 5,
        seed: int = 0,
        metric: str | None = None,
        direction: str | None = None,
    ) -> None:
        super().__init__(space, folder, goal, trials=trials, metric=metric, direction=direction)
        at_least(1, startup=startup)
        at_least(0, seed=seed)
        self.startup = startup
        self.seed = seed

    def ask(self, number: int) -> dict[str, str]:
        """The values of a trial; one that is on record is read from there."""
        record = self._record()
        if str(number) not in record:
            values = self._first(number) if number < self.startup else self._inferred(number, record)
            record[str(number)] = {"values": values, "state": "running", "value": None}
            self._write(record)
        return dict(record[str(number)]["values"])

    def tell(self, number: int, value: float | None) -> None:
        """How a trial ended; one that failed before may be told again, when it was tried again."""
        record, value = self._record(), finite(value)
        trial = record.get(str(number))
        if trial is None:
            raise CheckpointError(
                f"trial {number} was never asked for",
                found=f"{self._path} without it",
                allowed="the record with which the sweep began",
                remedy="Put the record back, or start the sweep anew.",
            )
        if trial["state"] == "running" or (trial["state"] == "failed" and value is not None):
            trial |= {"state": "failed" if value is None else "finished", "value": value}
            self._write(record)

    @property
    def _path(self) -> Path:
        return self.folder / "ax.json"

    def _record(self) -> dict[str, dict[str, Any]]:
        return json.loads(self._path.read_bytes()) if self._path.exists() else {}

    def _write(self, record: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(self._path, (json.dumps(record, indent=1) + "\n").encode())

    # What the next trial is.

    def _first(self, number: int) -> dict[str, str]:
        engine = torch.quasirandom.SobolEngine(len(self.space), scramble=True, seed=self.seed)
        point = engine.fast_forward(number).draw(1, dtype=torch.float64)[0].tolist()
        return {key: _at(self.space[key], share) for key, share in zip(self.space, point, strict=True)}

    def _inferred(self, number: int, record: Mapping[str, Any]) -> dict[str, str]:
        """Worked out by an experiment of this trial's own, which is shown all that is on record."""
        seed = seed_of_trial(self.seed, number)
        # What one word only can be said of has no place in a model.
        names = {key: f"x{place}" for place, key in enumerate(self.space) if _varies(self.space[key])}
        values = {key: _at(dimension, 0.0) for key, dimension in self.space.items()}
        if not names:
            return values
        with _quiet(), torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            client = self._experiment(names, seed)
            for each in record.values():
                _show(client, {name: _read(self.space[key], each["values"][key]) for key, name in names.items()}, each)
            found = next(iter(client.get_next_trials(max_trials=1).values()))
        return values | {key: _typed(self.space[key], found[name]) for key, name in names.items()}

    def _experiment(self, names: Mapping[str, str], seed: int) -> Any:
        client = import_module("ax.api.client").Client(random_seed=seed)
        client.configure_experiment(parameters=[_parameter(self.space[key], name) for key, name in names.items()])
        client.configure_optimization(objective=_OBJECTIVE if self.goal.mode == "max" else f"-{_OBJECTIVE}")
        client.configure_generation_strategy(
            method="fast",
            initialization_budget=self.startup,
            initialization_random_seed=seed,
            initialize_with_center=False,
            use_existing_trials_for_initialization=True,
            # Many jobs at once may ask before the first of them has ended.
            allow_exceeding_initialization_budget=True,
        )
        return client


def _show(client: Any, parameters: dict[str, Any], trial: Mapping[str, Any]) -> None:
    index = client.attach_trial(parameters=parameters)
    if trial["state"] == "finished":
        client.complete_trial(trial_index=index, raw_data={_OBJECTIVE: trial["value"]})
    elif trial["state"] == "failed":
        client.mark_trial_failed(trial_index=index)


def _varies(dimension: Dimension) -> bool:
    return not isinstance(dimension, Choices) or len(dimension.values) > 1


def _parameter(dimension: Dimension, name: str) -> Any:
    configs = import_module("ax.api.configs")
    if isinstance(dimension, Choices):
        return configs.ChoiceParameterConfig(name, list(dimension.values), parameter_type="str", is_ordered=False)
    bounds = (int(dimension.low), int(dimension.high)) if dimension.whole else (dimension.low, dimension.high)
    scaling = "log" if dimension.log else "linear"
    return configs.RangeParameterConfig(name, bounds, "int" if dimension.whole else "float", scaling=scaling)


def _at(dimension: Dimension, share: float) -> str:
    """The value at a share in [0, 1) of a dimension."""
    if isinstance(dimension, Choices):
        return dimension.values[int(share * len(dimension.values))]
    if dimension.log:
        return dimension.typed(dimension.low * (dimension.high / dimension.low) ** share)
    width = dimension.high - dimension.low + dimension.whole
    return dimension.typed(dimension.low + (int(share * width) if dimension.whole else share * width))


def _read(dimension: Dimension, text: str) -> Any:
    if isinstance(dimension, Choices):
        return text
    return int(text) if dimension.whole else float(text)


def _typed(dimension: Dimension, value: Any) -> str:
    return value if isinstance(dimension, Choices) else dimension.typed(value)


@contextmanager
def _quiet() -> Iterator[None]:
    """Ax's reports on itself, which each of its modules sets up anew, are not about the user's sweep."""
    former = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(former)
