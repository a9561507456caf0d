"""The weighted mean of what clients answer, of which the server learns nothing but that mean and who is in it.

Both parts speak in wires, so that what carries them may be one process or a network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from lightrail.errors import UserError
from lightrail.federated.fixed_point import FixedPoint, weighted_mean, with_weight
from lightrail.federated.secure_sum import PublicKeys, Revealed, SecureClient, SecureServer
from lightrail.federated.shamir import SHARE_BYTES
from lightrail.federated.transport import Failure, Reply, SumTerms
from lightrail.federated.wire import Wire

__all__ = ["Ask", "SecretPart", "summed"]

Ask = Callable[[str, Mapping[int, Wire]], Mapping[int, Wire]]
"""Sends each client its wire of a phase, and gives back what those answered that did."""

_MODULUS_BITS = 31
_LIKE, _OPEN = "like ", "open "
_T = TypeVar("_T")


class SecretPart:
    """A client's part in one masked mean: what it keeps back of its answer, and what it says in each phase.

    Args:
        client: Its number.
        answer: What it would send in the open. Whole numbers, which count batches, it does send so.
        samples: How many it has.
        threshold: How many clients must be left for anything to be told; at least 2, and more than half of all.

    Raises:
        ValueError: Its answer has entries that are not finite.
    """

    def __init__(self, client: int, answer: Wire, samples: int, threshold: int) -> None:
        secret = {name: answer[name] for name in sorted(answer) if answer[name].is_floating_point()}
        for name, vector in secret.items():
            if not bool(vector.isfinite().all()):
                raise ValueError(f"its '{name}' is not finite")
        self.samples = samples
        self._like = {f"{_LIKE}{name}": vector.new_empty((0, *vector.shape)) for name, vector in secret.items()}
        self._open = {f"{_OPEN}{name}": answer[name] for name in answer.keys() - secret.keys()}
        self._vector = torch.cat([v.detach().cpu().double().flatten() for v in secret.values()])
        self._client, self._threshold = SecureClient(client, threshold), threshold
        self._count = 0

    def begin(self) -> Wire:
        """Its public keys, the shapes of what it keeps back, and what it sends in the open."""
        keys = self._client.advertise()
        return {"channel": _letters(keys.channel), "mask": _letters(keys.mask), **self._like, **self._open}

    def answer(self, phase: str, wire: Wire) -> Wire:
        """What it answers in a phase.

        Args:
            phase: ``share``, ``mask`` or ``reveal``, in this order.
            wire: What the server sent.

        Raises:
            UserError: Too few clients are left.
            ValueError: The server does not keep to the protocol.
        """
        phases = {"share": self._share, "mask": self._mask, "reveal": self._reveal}
        if phase not in phases:
            raise ValueError(f"a masked sum has no phase '{phase}'")
        return phases[phase](wire)

    def _share(self, wire: Wire) -> Wire:
        rows = zip(wire["clients"].tolist(), wire["channel"], wire["mask"], strict=True)
        keys = {int(client): PublicKeys(_bytes(channel), _bytes(mask)) for client, channel, mask in rows}
        self._count = len(keys)
        if 2 * self._threshold <= self._count:
            raise ValueError(
                f"{self._threshold} of {self._count} clients are to be enough; two such groups could be asked for the "
                "two secrets of one client"
            )
        return _addressed(self._client.share(keys))

    def _mask(self, wire: Wire) -> Wire:
        most, largest = wire["terms"].tolist()
        weight = min(1.0, self.samples / most) if most else 1.0
        q = _form(self._count, largest).encode(with_weight(self._vector, weight))
        return {"masked": self._client.mask(q, _opened(wire))}

    def _reveal(self, wire: Wire) -> Wire:
        told = self._client.reveal([int(client) for client in wire["survivors"].tolist()])
        return {
            f"{kind}{part}": tensor
            for kind, shares in (("seed", told.seeds), ("key", told.keys))
            for part, tensor in _addressed({c: s.to_bytes(SHARE_BYTES, "big") for c, s in shares.items()}).items()
        }


def summed(
    replies: Sequence[Reply | Failure], ask: Ask, terms: SumTerms
) -> tuple[list[Reply | Failure], dict[str, Tensor]]:
    """The server's part: the mean over those clients that came to the end, who hold no vectors but masked ones.

    Args:
        replies: What clients began with: the message of each is from :meth:`SecretPart.begin`.
        ask: Carries the further phases.
        terms: Of the sum.

    Returns:
        An answer for each reply, its message the masked vector; and the means by name, none where too few were left.
    """
    begun = {each.client: each for each in replies if isinstance(each, Reply)}
    try:
        found = _SecretMean(terms, ask, begun).found()
    except (UserError, ValueError) as error:
        said = f"{error.what} ({error.found})" if isinstance(error, UserError) else str(error)
        return [Failure(client, f"no sum could be unmasked: {said}") for client in begun] + _failures(replies), {}
    lost = "it did not come to the end of the masked sum"
    answers: list[Reply | Failure] = [
        replace(reply, message={"masked": found.masked[client]})
        if client in found.masked
        else Failure(client, found.refused.get(client, lost))
        for client, reply in begun.items()
    ]
    return answers + _failures(replies), found.mean


def _failures(replies: Sequence[Reply | Failure]) -> list[Reply | Failure]:
    return [each for each in replies if isinstance(each, Failure)]


@dataclass(frozen=True)
class _Found:
    mean: dict[str, Tensor]
    masked: Mapping[int, Tensor]
    refused: Mapping[int, str]


class _SecretMean:
    """One masked mean at the server."""

    def __init__(self, terms: SumTerms, ask: Ask, begun: Mapping[int, Reply]) -> None:
        self._terms, self._ask = terms, ask
        self._server = SecureServer(terms.threshold)
        self._refused: dict[int, str] = {}
        self._begun = self._alike(begun)

    def _alike(self, begun: Mapping[int, Reply]) -> dict[int, Reply]:
        """Those whose vectors have the names, shapes and types of most."""
        forms = {client: _described(reply.message) for client, reply in begun.items()}
        usual = max(forms.values(), key=list(forms.values()).count, default="")
        self._refused = {
            client: f"it has {form}, where {usual} was expected" for client, form in forms.items() if form != usual
        }
        return {client: reply for client, reply in begun.items() if client not in self._refused}

    def found(self) -> _Found:
        keys = self._server.gather(self._read({c: r.message for c, r in self._begun.items()}, _keys_in))
        clients = sorted(keys)
        everybody = {
            "clients": torch.tensor(clients),
            "channel": torch.stack([_letters(keys[each].channel) for each in clients]),
            "mask": torch.stack([_letters(keys[each].mask) for each in clients]),
        }
        sent = self._read(self._ask("share", dict.fromkeys(clients, everybody)), lambda c, w: _opened(w, {*keys} - {c}))
        received = self._server.route(sent)
        most = max(self._begun[each].samples for each in sent) if self._terms.is_weighted else 0
        of_all = torch.tensor([most, self._terms.largest], dtype=torch.float64)
        masked = self._ask("mask", {c: {**_addressed(received[c]), "terms": of_all} for c in sent})
        size = sum(like[0].numel() for like in self._likes.values()) + 1
        survivors = self._server.collect(self._read(masked, lambda _, w: _masked_in(w, size)))
        left = {"survivors": torch.tensor(survivors)}
        revealed = self._read(self._ask("reveal", dict.fromkeys(survivors, left)), _revealed_in)
        total = self._server.unmask(revealed)
        vector = weighted_mean(_form(len(keys), self._terms.largest).decode(total))
        return _Found(
            {**self._divided(vector), **self._counted(survivors)},
            {each: masked[each]["masked"] for each in survivors},
            self._refused,
        )

    @property
    def _likes(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        first = next(iter(self._begun.values())).message
        # In the order in which clients join them, whatever the way has made of it.
        return {n.removeprefix(_LIKE): (t.shape[1:], t.dtype) for n, t in sorted(first.items()) if n.startswith(_LIKE)}

    def _divided(self, vector: Tensor) -> dict[str, Tensor]:
        likes = self._likes
        parts = vector.split([shape.numel() for shape, _ in likes.values()])
        return {
            name: part.view(shape).to(kind) for part, (name, (shape, kind)) in zip(parts, likes.items(), strict=True)
        }

    def _counted(self, survivors: Sequence[int]) -> dict[str, Tensor]:
        """Of whole numbers, which are sent in the open, the greatest."""
        wires = [self._begun[each].message for each in survivors]
        names = [name for name in wires[0] if name.startswith(_OPEN)]
        return {name.removeprefix(_OPEN): torch.stack([wire[name] for wire in wires]).amax(0) for name in names}

    def _read(self, found: Mapping[int, Wire], read: Callable[[int, Wire], _T]) -> dict[int, _T]:
        """What clients said, of those whose words can be read; the others have vanished."""
        read_of: dict[int, _T] = {}
        for client, wire in sorted(found.items()):
            try:
                read_of[client] = read(client, wire)
            except (KeyError, ValueError, TypeError, IndexError, RuntimeError, OverflowError) as error:
                self._refused[client] = f"its part in the masked sum cannot be read: {type(error).__name__}: {error}"
        return read_of


def _form(clients: int, largest: float) -> FixedPoint:
    # So few bits that the sum over all clients stays within the numbers modulo 2³².
    return FixedPoint(max(largest, 1.0), _MODULUS_BITS - clients.bit_length())


def _described(begun: Wire) -> str:
    """Names, shapes and types of what a client keeps back and of what it does not."""
    shown = {name.removeprefix(_LIKE): (t.shape[1:], t.dtype) for name, t in begun.items() if name.startswith(_LIKE)}
    shown |= {name.removeprefix(_OPEN): (t.shape, t.dtype) for name, t in begun.items() if name.startswith(_OPEN)}
    words = (
        f"{name} {list(shape)} {str(kind).removeprefix('torch.')}" for name, (shape, kind) in sorted(shown.items())
    )
    return ", ".join(words) or "nothing"


def _keys_in(_: int, wire: Wire) -> PublicKeys:
    return PublicKeys(_bytes(wire["channel"]), _bytes(wire["mask"]))


def _masked_in(wire: Wire, size: int) -> Tensor:
    masked = wire["masked"]
    if masked.dtype != torch.int32 or masked.shape != (size,):
        raise ValueError(f"{list(masked.shape)} {masked.dtype}, where [{size}] torch.int32 was expected")
    return masked


def _revealed_in(_: int, wire: Wire) -> Revealed:
    seeds, keys = (
        {client: int.from_bytes(share, "big") for client, share in _opened(wire, kind=kind).items()}
        for kind in ("seed", "key")
    )
    return Revealed(seeds, keys)


# Letters to several clients, as tensors: who each is for or from, and a row of bytes for each.


def _addressed(letters: Mapping[int, bytes]) -> Wire:
    rows = [_letters(letters[client]) for client in sorted(letters)]
    return {
        "to": torch.tensor(sorted(letters), dtype=torch.int64),
        "letters": torch.stack(rows) if rows else torch.empty(0, 0, dtype=torch.uint8),
    }


def _opened(wire: Wire, expected: set[int] | None = None, kind: str = "") -> dict[int, bytes]:
    letters = {
        int(client): _bytes(row) for client, row in zip(wire[f"{kind}to"].tolist(), wire[f"{kind}letters"], strict=True)
    }
    if expected is not None and letters.keys() != expected:
        raise ValueError(f"letters for {sorted(letters)}, where {sorted(expected)} were expected")
    return letters


def _letters(found: bytes) -> Tensor:
    return torch.frombuffer(bytearray(found), dtype=torch.uint8)


def _bytes(row: Tensor) -> bytes:
    if row.dtype != torch.uint8 or row.dim() != 1:
        raise ValueError(f"{list(row.shape)} {row.dtype} are no bytes")
    return bytes(row.tolist())
