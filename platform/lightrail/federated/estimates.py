"""What the server has of each client's vectors, where clients send how they changed (EF21)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from lightrail.federated.answers import Answer
from lightrail.federated.wire import FORGET, Wire

__all__ = ["Estimates"]


class Estimates:
    """g_k of each client, which client and server both keep, and move by what is sent.

    A client whose answer was lost or left out has moved its copy and the server has not: both then begin anew.

    Args:
        is_used: Whether clients send changes at all.
    """

    def __init__(self, is_used: bool) -> None:
        self._is_used = is_used
        self._known: dict[int, dict[str, Tensor]] = {}

    def told(self, client: int, wire: Wire) -> Wire:
        """A message to a client: of one whose vectors are not known here, with the word that they are not."""
        if not self._is_used or client in self._known:
            return wire
        return {**wire, FORGET: torch.ones(1, dtype=torch.uint8)}

    def updated(self, answers: Sequence[Answer], asked: Sequence[int]) -> list[Answer]:
        """The answers with whole vectors in the place of changes.

        Args:
            answers: That were accepted.
            asked: Who was asked.
        """
        if not self._is_used:
            return list(answers)
        found = [self._moved(each) for each in answers]
        for client in set(asked) - {each.client for each in answers}:
            self._known.pop(client, None)
        return found

    def _moved(self, answer: Answer) -> Answer:
        known = self._known.setdefault(answer.client, {})
        for name in answer.compressed:
            change = answer.vectors[name]
            known[name] = known.get(name, torch.zeros_like(change)) + change
        return dataclasses.replace(answer, vectors={**answer.vectors, **known})

    def state_dict(self) -> dict[int, dict[str, Tensor]]:
        """What is known, by client and name."""
        return {client: dict(vectors) for client, vectors in self._known.items()}

    def load_state_dict(self, state: dict[int, dict[str, Tensor]]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._known = {int(client): dict(vectors) for client, vectors in state.items()}
