"""Which tokens each sampler leaves, by hand."""

from __future__ import annotations

import pytest
import torch

from lightrail.errors import ConfigurationError
from lightrail_generation.samplers.text import Greedy, MinP, Temperature, TopK, TopP

P = torch.tensor([[0.1, 0.4, 0.3, 0.2]], dtype=torch.float64)


def left(sampler, p: torch.Tensor = P) -> list[float]:  # type: ignore[no-untyped-def]
    return [round(float(each), 6) for each in sampler.probabilities(p.log())[0]]


def test_greedy_takes_the_likeliest_and_of_equals_the_first() -> None:
    assert left(Greedy()) == [0, 1, 0, 0]
    assert left(Greedy(), torch.tensor([[0.2, 0.4, 0.4]])) == [0, 1, 0]


def test_temperature_is_a_power_of_the_probabilities() -> None:
    assert left(Temperature(1.0)) == [0.1, 0.4, 0.3, 0.2]
    squares = P**2 / (P**2).sum()
    torch.testing.assert_close(Temperature(0.5).probabilities(P.log()), squares)


def test_top_k_keeps_the_k_likeliest_and_their_equals() -> None:
    assert left(TopK(k=2)) == [0, 0.4, 0.3, 0]
    assert left(TopK(k=50)) == [0.1, 0.4, 0.3, 0.2]
    assert left(TopK(k=1), torch.tensor([[0.4, 0.4, 0.2]])) == [0.4, 0.4, 0]


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    assert left(TopP(p=0.39)) == [0, 0.4, 0, 0]
    assert left(TopP(p=0.41)) == [0, 0.4, 0.3, 0]
    assert left(TopP(p=0.01)) == [0, 0.4, 0, 0]
    assert left(TopP(p=1.0)) == [0.1, 0.4, 0.3, 0.2]


def test_min_p_keeps_what_is_near_the_likeliest() -> None:
    assert left(MinP(min_p=0.6)) == [0, 0.4, 0.3, 0]
    assert left(MinP(min_p=0.0)) == [0.1, 0.4, 0.3, 0.2]
    assert left(MinP(min_p=1.0)) == [0, 0.4, 0, 0]


def test_temperature_comes_before_the_restriction() -> None:
    # At τ = 0.5 the two likeliest hold 25/30 of the mass, at τ = 1 only 0.7.
    assert [each > 0 for each in left(TopP(p=0.8, temperature=0.5))] == [False, True, True, False]
    assert [each > 0 for each in left(TopP(p=0.8))] == [False, True, True, True]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Temperature(0.0),
        lambda: TopK(k=0),
        lambda: TopP(p=0.0),
        lambda: TopP(p=1.1),
        lambda: MinP(min_p=-0.1),
        lambda: MinP(min_p=0.1, temperature=-1),
    ],
)
def test_options_out_of_range_are_named(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigurationError, match="out of range"):
        make()
