"""A mean of which the server learns nothing else: what it is, who may vanish on the way, and what crosses."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

pytest.importorskip("cryptography")

from lightrail.federated.secret_mean import SecretPart, summed
from lightrail.federated.transport import Failure, Reply, SumTerms
from lightrail.federated.wire import Wire

Spoil = Callable[[str, dict[int, Wire]], Mapping[int, Wire]]
ANSWERS: list[Wire] = [
    {"update": torch.tensor([[1.0, -2.0], [0.5, 3.0]]), "buffers": torch.tensor([0.25], dtype=torch.float64)},
    {"update": torch.tensor([[3.0, 0.0], [-0.5, 1.0]]), "buffers": torch.tensor([0.75], dtype=torch.float64)},
    {"update": torch.tensor([[0.0, 1.0], [2.5, -1.0]]), "buffers": torch.tensor([-1.0], dtype=torch.float64)},
    {"update": torch.tensor([[8.0, 1.0], [0.0, -3.0]]), "buffers": torch.tensor([4.0], dtype=torch.float64)},
]
SAMPLES = [10, 30, 20, 5]


def carried_out(
    answers: list[Wire], *, is_weighted: bool = True, threshold: int = 3, spoil: Spoil = lambda phase, found: found
) -> tuple[dict[int, Reply | Failure], dict[str, Tensor], list[Wire]]:
    """By client: what the server has of it; the mean; and everything that the server has seen."""
    parts = {c: SecretPart(c, each, SAMPLES[c], threshold) for c, each in enumerate(answers)}
    seen = [part.begin() for part in parts.values()]

    def ask(phase: str, messages: Mapping[int, Wire]) -> Mapping[int, Wire]:
        found = spoil(phase, {client: parts[client].answer(phase, wire) for client, wire in messages.items()})
        seen.extend(found.values())
        return found

    begun = [Reply(c, wire, SAMPLES[c], {}) for c, wire in enumerate(seen)]
    found, mean = summed(begun, ask, SumTerms(threshold, is_weighted, 8.0))
    return {each.client: each for each in found}, mean, seen


def mean_of(clients: list[int], name: str, *, is_weighted: bool = True) -> Tensor:
    weights = [SAMPLES[c] if is_weighted else 1 for c in clients]
    return sum(w * ANSWERS[c][name].double() for w, c in zip(weights, clients, strict=True)) / sum(weights)  # type: ignore[return-value]


@pytest.mark.parametrize("is_weighted", [True, False])
def test_the_mean_is_that_of_the_answers(is_weighted: bool) -> None:
    found, mean, _ = carried_out(ANSWERS, is_weighted=is_weighted)
    assert set(mean) == {"update", "buffers"}
    for name, value in mean.items():
        assert value.dtype == ANSWERS[0][name].dtype
        expected = mean_of([0, 1, 2, 3], name, is_weighted=is_weighted)
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-6)
    assert all(isinstance(each, Reply) and list(each.message) == ["masked"] for each in found.values())


def test_entries_beyond_the_range_are_clipped_and_the_sum_of_all_does_not_overflow() -> None:
    answers: list[Wire] = [{"update": torch.tensor([1e6, -1e6, 8.0])} for _ in range(4)]
    _, mean, _ = carried_out(answers, is_weighted=False)
    torch.testing.assert_close(mean["update"], torch.tensor([8.0, -8.0, 8.0]), rtol=0, atol=1e-6)


def without(client: int, phase: str) -> Spoil:
    return lambda asked, found: {c: wire for c, wire in found.items() if asked != phase or c != client}


@pytest.mark.parametrize(("phase", "in_it"), [("share", [0, 1, 3]), ("mask", [0, 1, 3]), ("reveal", [0, 1, 2, 3])])
def test_a_client_may_vanish_in_any_phase(phase: str, in_it: list[int]) -> None:
    found, mean, _ = carried_out(ANSWERS, spoil=without(2, phase))
    torch.testing.assert_close(mean["update"].double(), mean_of(in_it, "update"), rtol=0, atol=1e-6)
    assert sorted(c for c, each in found.items() if isinstance(each, Reply)) == in_it


@pytest.mark.parametrize(
    ("phase", "nonsense"),
    [
        ("share", {"to": torch.tensor([0]), "letters": torch.zeros(1, 94, dtype=torch.uint8)}),
        ("mask", {"masked": torch.zeros(3, dtype=torch.int32)}),
        ("mask", {"masked": torch.zeros(6)}),
        ("mask", {}),
    ],
)
def test_who_speaks_nonsense_is_left_out(phase: str, nonsense: Wire) -> None:
    def spoil(asked: str, found: dict[int, Wire]) -> dict[int, Wire]:
        return {**found, 1: nonsense} if asked == phase else found

    found, mean, _ = carried_out(ANSWERS, spoil=spoil)
    torch.testing.assert_close(mean["update"].double(), mean_of([0, 2, 3], "update"), rtol=0, atol=1e-6)
    left_out = found[1]
    assert isinstance(left_out, Failure)
    assert "cannot be read" in left_out.reason


def test_of_too_few_nothing_is_learnt() -> None:
    def spoil(asked: str, found: dict[int, Wire]) -> dict[int, Wire]:
        return {c: wire for c, wire in found.items() if asked != "mask" or c < 2}

    found, mean, _ = carried_out(ANSWERS, spoil=spoil)
    assert mean == {}
    reasons = {each.reason for each in found.values() if isinstance(each, Failure)}
    assert len(found) == 4
    assert reasons == {"no sum could be unmasked: too few clients are left to unmask a sum (2 that sent their vectors)"}


def test_who_has_other_vectors_than_most_is_left_out() -> None:
    answers = [*ANSWERS[:3], {"update": torch.zeros(7)}]
    found, mean, _ = carried_out(answers)
    assert mean["update"].shape == (2, 2)
    odd = found[3]
    assert isinstance(odd, Failure)
    assert odd.reason.startswith("it has update [7] float32, where buffers [1] float64, update [2, 2] float32")


def test_what_is_not_finite_is_not_masked() -> None:
    with pytest.raises(ValueError, match="its 'update' is not finite"):
        SecretPart(0, {"update": torch.tensor([1.0, float("nan")])}, 10, 2)


def test_batches_are_counted_in_the_open_and_the_greatest_is_kept() -> None:
    answers = [{**each, "counts": torch.tensor([100 + c, 7])} for c, each in enumerate(ANSWERS)]
    _, mean, _ = carried_out(answers)
    assert mean["counts"].tolist() == [103, 7]


def test_the_server_sees_no_vector() -> None:
    """The same answers twice: what crosses has nothing in common but shapes and numbers of clients."""
    (_, first_mean, first), (_, second_mean, second) = carried_out(ANSWERS), carried_out(ANSWERS)
    assert torch.equal(first_mean["update"], second_mean["update"])
    for one, other in zip(first, second, strict=True):
        for name in one.keys() - {"to", "seedto", "keyto"}:
            assert one[name].numel() == 0 or not torch.equal(one[name], other[name])


def everybody_of(parts: list[SecretPart]) -> Wire:
    keys = [part.begin() for part in parts]
    everybody = {n: torch.stack([each[n] for each in keys]) for n in ("channel", "mask")}
    return {"clients": torch.arange(len(parts)), **everybody}


def test_half_of_the_clients_are_not_enough() -> None:
    parts = [SecretPart(c, each, 1, 2) for c, each in enumerate(ANSWERS)]
    with pytest.raises(ValueError, match="2 of 4 clients are to be enough"):
        parts[0].answer("share", everybody_of(parts))


def test_both_secrets_of_a_client_are_not_told() -> None:
    parts = [SecretPart(c, each, 1, 2) for c, each in enumerate(ANSWERS[:3])]
    everybody = everybody_of(parts)
    sent = [part.answer("share", everybody) for part in parts]
    own = 0
    letters = [sent[c]["letters"][sent[c]["to"].tolist().index(own)] for c in (1, 2)]
    parts[own].answer(
        "mask",
        {
            "to": torch.tensor([1, 2]),
            "letters": torch.stack(letters),
            "terms": torch.tensor([1.0, 8.0], dtype=torch.float64),
        },
    )
    parts[own].answer("reveal", {"survivors": torch.tensor([0, 1])})
    with pytest.raises(ValueError, match="both secrets of one client"):
        parts[own].answer("reveal", {"survivors": torch.tensor([0, 1, 2])})
    with pytest.raises(ValueError, match="no phase 'tell'"):
        parts[own].answer("tell", {})
