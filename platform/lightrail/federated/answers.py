"""What clients answer is checked before it is used: a client may be broken, old, or hostile."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightrail.federated.compressor import Compressor
from lightrail.federated.transport import Failure, Reply
from lightrail.federated.wire import compressed_names, unpacked

__all__ = ["Answer", "Answers"]


@dataclass(frozen=True)
class Answer:
    """An answer that was accepted.

    Args:
        client: Its number.
        vectors: What it sent, by name.
        samples: How many it has.
        metrics: Figures of its training.
        compressed: Which of the vectors were compressed.
    """

    client: int
    vectors: Mapping[str, Tensor]
    samples: int
    metrics: Mapping[str, float]
    compressed: frozenset[str] = frozenset()


class Answers:
    """Sorts the answers of a round into those that are used and those that are not.

    Args:
        compressor: Of the run.
        size: Entries of a compressed vector.
        dtype: Of a compressed vector.
        largest_update: How many times longer than the median of its round an answer may be.
    """

    def __init__(self, compressor: Compressor | None, size: int, dtype: torch.dtype, largest_update: float) -> None:
        self._compressor, self._size, self._dtype = compressor, size, dtype
        self._largest = largest_update
        self._usual = 0.0  # the median length of the last round with enough answers to tell

    def accepted(self, replies: Sequence[Reply | Failure]) -> tuple[list[Answer], list[Failure]]:
        """The answers that are used, by the number of the client, and the others with the reason.

        Args:
            replies: Whatever came back.
        """
        answers: list[Answer] = []
        failures = [each for each in replies if isinstance(each, Failure)]
        for reply in sorted((each for each in replies if isinstance(each, Reply)), key=lambda each: each.client):
            try:
                answers.append(self._answer(reply))
            except ValueError as error:
                failures.append(Failure(reply.client, str(error)))
        answers, odd = self._of_usual_names(answers)
        answers, long = self._of_usual_length(answers)
        return answers, sorted([*failures, *odd, *long], key=lambda each: each.client)

    def _answer(self, reply: Reply) -> Answer:
        vectors = unpacked(reply.message, self._compressor, self._size, self._dtype)
        for name, vector in vectors.items():
            if vector.is_floating_point() and not bool(torch.isfinite(vector).all()):
                raise ValueError(f"its '{name}' is not finite")
        if type(reply.samples) is not int or reply.samples < 1:
            raise ValueError(f"it says that it has {reply.samples!r} samples")
        metrics = {name: float(value) for name, value in reply.metrics.items()}
        return Answer(reply.client, vectors, reply.samples, metrics, compressed_names(reply.message))

    def _of_usual_names(self, answers: list[Answer]) -> tuple[list[Answer], list[Failure]]:
        """Without those whose vectors have other names, shapes or types than most."""
        if not answers:
            return [], []
        forms = [tuple(sorted((n, tuple(v.shape), str(v.dtype)) for n, v in each.vectors.items())) for each in answers]
        usual = max(forms, key=forms.count)
        failures = [
            Failure(each.client, f"it sent {_described(form)}, where {_described(usual)} was expected")
            for each, form in zip(answers, forms, strict=True)
            if form != usual
        ]
        return [each for each, form in zip(answers, forms, strict=True) if form == usual], failures

    def _of_usual_length(self, answers: list[Answer]) -> tuple[list[Answer], list[Failure]]:
        lengths = {each.client: _length(each.vectors) for each in answers}
        if len(answers) >= 3:
            self._usual = statistics.median(lengths.values())
        usual = self._usual
        if usual <= 0:
            return answers, []
        failures = [
            Failure(client, f"its answer is {length / usual:.3g} times as long as usual")
            for client, length in lengths.items()
            if length > self._largest * usual
        ]
        left_out = {each.client for each in failures}
        return [each for each in answers if each.client not in left_out], failures


def _length(vectors: Mapping[str, Tensor]) -> float:
    return sum(float(v.double().square().sum()) for v in vectors.values() if v.is_floating_point()) ** 0.5


def _described(form: Sequence[tuple[str, tuple[int, ...], str]]) -> str:
    return ", ".join(f"{name} {list(shape)} {kind.removeprefix('torch.')}" for name, shape, kind in form) or "nothing"
