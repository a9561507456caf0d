"""The suite of batchings fails each of its checks on the batching that breaks it, and no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightrail import Batching, Closure, Portion, Traits
from lightrail.testing import BatchingSuite, examine
from lightrail.testing.suite import name_of


class Sound(Batching):
    """Grows by one sample for every gradient that it has seen."""

    traits = Traits(watches_gradient=True)

    def __init__(self, start: int = 2) -> None:
        super().__init__()
        self.size, self.most = start, 2

    def begin(self, extent: Any) -> None:
        self.most = extent.data_size

    def next(self, samples: int, step: int) -> Portion:
        return Portion(min(self.size, self.most))

    def observe(self, params: list[Tensor], closure: Closure) -> None:
        self.size += 1

    def state_dict(self) -> dict[str, Any]:
        return {"size": self.size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.size = state["size"]


class AsksForNothing(Sound):
    """Asks for no sample at all."""

    def next(self, samples: int, step: int) -> Portion:
        return Portion(0)


class AsksTooMuch(Sound):
    """Asks for ten samples, whatever the data have."""

    def next(self, samples: int, step: int) -> Portion:
        return Portion(10)


class Draws(Sound):
    """Draws a random number when it looks."""

    def observe(self, params: list[Tensor], closure: Closure) -> None:
        super().observe(params, closure)
        torch.rand(1)


class Edits(Sound):
    """Edits the gradient when it looks."""

    def observe(self, params: list[Tensor], closure: Closure) -> None:
        super().observe(params, closure)
        for p in params:
            if p.grad is not None:
                p.grad.mul_(2)


class Forgets(Sound):
    """Begins anew when it is resumed."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Silent(Sound):
    """Watches the gradient, and does not say so."""

    traits = Traits()


class LogsText(Sound):
    """Logs something that is no number."""

    def logged(self) -> dict[str, Any]:
        return {"size": "large"}


def failed(plugin: type[Batching]) -> set[str]:
    outcomes = {name_of(check): examine(check, plugin) for check in BatchingSuite.checks}
    return {name for name, outcome in outcomes.items() if outcome.state == "failed"}


def test_a_sound_batching_passes() -> None:
    assert failed(Sound) == set()


@pytest.mark.parametrize(
    ("plugin", "expected"),
    [
        (AsksForNothing, {"asks_for_what_the_data_have"}),
        (AsksTooMuch, {"refuses_what_the_data_cannot_fill"}),
        (Draws, {"keeps_its_hands_off"}),
        (Edits, {"keeps_its_hands_off"}),
        (Forgets, {"resumes_exactly"}),
        (Silent, {"builds_from_options"}),
        (LogsText, {"logs_numbers"}),
    ],
)
def test_each_fault_fails_its_check(plugin: type[Batching], expected: set[str]) -> None:
    assert failed(plugin) == expected
