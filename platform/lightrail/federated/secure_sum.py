"""A sum of vectors of which nobody sees a single one.

Each pair of clients agrees on a mask that one of them adds and the other takes away; each client adds a mask of its
own besides. Shares of the secrets behind the masks lie with all clients, so that t of them can take away the masks of
a sum whoever has vanished. Who runs the server sees no vector as long as it keeps to the protocol and fewer than t
clients tell it their shares; there are no signatures, and so no guard against a server that makes up clients.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightrail.federated.masks import agreed_seed, new_key, opened, pair_mask, private_key, public_bytes, sealed, stream
from lightrail.federated.shamir import SHARE_BYTES, TooFewClients, joined_secret, require_enough, shared_secret
from lightrail.options import at_least

__all__ = ["PublicKeys", "Revealed", "SecureClient", "SecureServer", "TooFewClients"]


@dataclass(frozen=True)
class PublicKeys:
    """What a client advertises: 32 bytes each.

    Args:
        channel: For what clients tell each other.
        mask: For the masks of pairs.
    """

    channel: bytes
    mask: bytes


@dataclass(frozen=True)
class Revealed:
    """What a client tells the server in the end.

    Args:
        seeds: Its shares of the seeds of those who sent a vector, by client.
        keys: Its shares of the mask keys of those who vanished, by client.
    """

    seeds: Mapping[int, int]
    keys: Mapping[int, int]


@dataclass
class SecureClient:
    """The client's part: :meth:`advertise`, :meth:`share`, :meth:`mask`, :meth:`reveal`, in this order, for one sum.

    Args:
        index: Its number, from 0.
        threshold: t, at least 2.

    Example:
        >>> clients = [SecureClient(i, threshold=2) for i in range(2)]
        >>> keys = {each.index: each.advertise() for each in clients}
        >>> len(clients[0].share(keys)[1]) > 64
        True

    Reference:
        K. Bonawitz, V. Ivanov, B. Kreuter, A. Marcedone, H. B. McMahan, S. Patel, D. Ramage, A. Segal and K. Seth
        (2017), Practical Secure Aggregation for Privacy-Preserving Machine Learning, CCS, figure 4 without its
        signatures and its consistency check.
    """

    index: int
    threshold: int
    _channel: Any = field(default_factory=new_key, init=False, repr=False)
    _mask: Any = field(default_factory=new_key, init=False, repr=False)
    _seed: bytes = field(default_factory=lambda: secrets.token_bytes(32), init=False, repr=False)
    _keys: Mapping[int, PublicKeys] = field(default_factory=dict, init=False, repr=False)
    _own: tuple[int, int] = field(default=(0, 0), init=False, repr=False)
    _received: dict[int, bytes] | None = field(default=None, init=False, repr=False)
    _told: frozenset[int] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        at_least(0, index=self.index)
        at_least(2, threshold=self.threshold)

    def advertise(self) -> PublicKeys:
        """Two public keys, for everybody."""
        return PublicKeys(public_bytes(self._channel), public_bytes(self._mask))

    def share(self, keys: Mapping[int, PublicKeys]) -> dict[int, bytes]:
        """Shares of its seed and of its mask key, sealed for each other client.

        Args:
            keys: Those of all clients, its own among them.

        Raises:
            TooFewClients: There are fewer than t.
            ValueError: Its own keys are not among them.
        """
        if keys.get(self.index) != self.advertise():
            raise ValueError(f"the keys of client {self.index} are not those that it advertised")
        require_enough(keys, self.threshold, "advertised keys")
        self._keys = dict(keys)
        points = [each + 1 for each in keys]
        of_seed = shared_secret(self._seed, points, self.threshold)
        of_key = shared_secret(self._mask.private_bytes_raw(), points, self.threshold)
        self._own = of_seed[self.index + 1], of_key[self.index + 1]
        return {
            other: sealed(
                agreed_seed(self._channel, keys[other].channel, "channel"),
                of_seed[other + 1].to_bytes(SHARE_BYTES, "big") + of_key[other + 1].to_bytes(SHARE_BYTES, "big"),
                _route(self.index, other),
            )
            for other in keys
            if other != self.index
        }

    def mask(self, q: Tensor, received: Mapping[int, bytes]) -> Tensor:
        r"""Its vector behind its masks, which alone is uniform.

        .. math:: y_i = q_i + \mathrm{PRG}(b_i) + \sum_{j > i} \mathrm{PRG}(s_{ij}) - \sum_{j < i} \mathrm{PRG}(s_{ij})
            \pmod{2^{32}}

        Args:
            q: int32 ``[d]``, modulo 2³².
            received: What others sealed for it, by client; those who sent nothing have vanished.

        Raises:
            TooFewClients: Fewer than t are left, itself among them.
            ValueError: It masked a vector before, or some sender never advertised keys.
        """
        if self._received is not None:
            raise ValueError(
                f"client {self.index} has masked a vector; two behind one mask would tell their difference"
            )
        if not set(received) <= set(self._keys) - {self.index}:
            raise ValueError(f"client {self.index} has shares of clients that advertised no keys")
        require_enough([*received, self.index], self.threshold, "sent their shares")
        self._received = dict(received)
        masked = q + stream(self._seed, q.numel())
        for other in received:
            masked += pair_mask(self._mask, self._keys[other].mask, self.index, other, q.numel())
        return masked

    def reveal(self, survivors: Collection[int]) -> Revealed:
        """Shares of the seeds of the survivors, and of the mask keys of those who vanished.

        Args:
            survivors: Those whose vectors the server has.

        Raises:
            TooFewClients: There are fewer than t survivors.
            ValueError: The server asked before with other survivors, names strangers, or a message was changed.
        """
        require_enough(survivors, self.threshold, "sent their vectors")
        present = {*(self._received or ()), self.index}
        if not set(survivors) <= present:
            raise ValueError(f"survivors {sorted(set(survivors) - present)} never sent their shares")
        if self._told not in (None, frozenset(survivors)):
            raise ValueError("both secrets of one client are asked for, which would tell its vector")
        self._told = frozenset(survivors)
        shares = {each: self._shares_of(each) for each in present}
        return Revealed(
            {each: shares[each][0] for each in sorted(present & self._told)},
            {each: shares[each][1] for each in sorted(present - self._told)},
        )

    def _shares_of(self, other: int) -> tuple[int, int]:
        if other == self.index or self._received is None:
            return self._own
        seed = agreed_seed(self._channel, self._keys[other].channel, "channel")
        plain = opened(seed, self._received[other], _route(other, self.index))
        return int.from_bytes(plain[:SHARE_BYTES], "big"), int.from_bytes(plain[SHARE_BYTES:], "big")


@dataclass
class SecureServer:
    """The server's part: :meth:`gather`, :meth:`route`, :meth:`collect`, :meth:`unmask`, in this order, for one sum.

    Args:
        threshold: t, at least 2; more than half of the clients, or a server could ask two halves for two secrets.
    """

    threshold: int
    _keys: Mapping[int, PublicKeys] = field(default_factory=dict, init=False, repr=False)
    _present: frozenset[int] = field(default=frozenset(), init=False)
    _masked: Mapping[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        at_least(2, threshold=self.threshold)

    def gather(self, advertised: Mapping[int, PublicKeys]) -> Mapping[int, PublicKeys]:
        """What clients advertised, for all of them."""
        require_enough(advertised, self.threshold, "advertised keys")
        self._keys = dict(advertised)
        return self._keys

    def route(self, sent: Mapping[int, Mapping[int, bytes]]) -> dict[int, dict[int, bytes]]:
        """What each client receives, of what each sent."""
        require_enough(sent, self.threshold, "sent their shares")
        self._present = frozenset(sent)
        return {to: {sender: sent[sender][to] for sender in sent if sender != to} for to in sent}

    def collect(self, masked: Mapping[int, Tensor]) -> list[int]:
        """Takes in masked vectors, int32 ``[d]``, and names the survivors."""
        require_enough(masked, self.threshold, "sent their vectors")
        if not set(masked) <= self._present:
            raise ValueError(f"clients {sorted(set(masked) - self._present)} sent a vector, but no shares")
        shapes = {(each.dtype, tuple(each.shape)) for each in masked.values()}
        if len(shapes) > 1 or next(iter(shapes))[0] != torch.int32:
            raise ValueError(f"masked vectors are int32 of one length, not {sorted(map(str, shapes))}")
        self._masked = dict(masked)
        return sorted(masked)

    def unmask(self, revealed: Mapping[int, Revealed]) -> Tensor:
        """The sum of the survivors' q modulo 2³², int32 ``[d]``.

        Args:
            revealed: What clients told, by client; t of them are enough.

        Raises:
            TooFewClients: Fewer than t told their shares.
            ValueError: The shares do not fit the keys that were advertised.
        """
        require_enough(revealed, self.threshold, "told their shares")
        total = torch.stack([*self._masked.values()]).sum(0, dtype=torch.int32)
        size = total.numel()
        for each in self._masked:
            total -= stream(joined_secret(self._points(each, {i: r.seeds for i, r in revealed.items()})), size)
        for gone in self._present - set(self._masked):
            secret = joined_secret(self._points(gone, {i: r.keys for i, r in revealed.items()}))
            key = private_key(secret)
            if public_bytes(key) != self._keys[gone].mask:
                raise ValueError(f"the shares of client {gone} do not make the key that it advertised")
            for each in self._masked:
                # What the survivor added for this pair is the opposite of what the vanished one would have.
                total += pair_mask(key, self._keys[each].mask, gone, each, size)
        return total

    def _points(self, client: int, shares: Mapping[int, Mapping[int, int]]) -> dict[int, int]:
        told = {teller + 1: each[client] for teller, each in sorted(shares.items()) if client in each}
        require_enough(told, self.threshold, f"told their shares of client {client}")
        return dict(list(told.items())[: self.threshold])


def _route(sender: int, receiver: int) -> bytes:
    return f"{sender} to {receiver}".encode()
