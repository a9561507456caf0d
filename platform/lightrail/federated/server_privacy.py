"""What makes the server's releases private for each client: a client's whole contribution is hidden, not a sample's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lightrail.privacy.ledger import Ledger

__all__ = ["ClientHorizon", "ServerPrivacy"]


@dataclass(frozen=True)
class ClientHorizon:
    """What is known before the first round, and public.

    Args:
        clients: How many there are.
        expected: Clients of a round, in expectation where each takes part by its own coin.
        is_poisson: Whether each takes part by its own coin; otherwise a fixed number does, which amplifies nothing
            that is accounted for here.
        rounds: Of the whole run.
        seed: Of the run.
        written: The account that a run which goes on had written; ``None`` where it begins.
    """

    clients: int
    expected: int
    is_poisson: bool
    rounds: int
    seed: int
    written: Path | None = None


class ServerPrivacy:
    """Bounds what each client can move, adds noise, and keeps the account; extend it, with options in ``__init__``.

    The records of the account are clients, and a step is a round.
    """

    def begin(self, horizon: ClientHorizon, resumed: dict[str, Any] | None = None) -> None:
        """Called once, before the first round; calibrates the noise and says what the run will cost.

        Args:
            horizon: What is known of the run.
            resumed: What :meth:`state_dict` told, where a run goes on: what was spent stays spent.

        Raises:
            ConfigurationError: The target cannot be met.
            CheckpointError: What is left of the budget does not suffice.
        """
        raise NotImplementedError

    def drawn(self) -> list[int]:
        """Who takes part in a round, each client by a coin that nobody can foretell; in order.

        Coins of the run's seed, which is public, would amplify nothing.
        """
        raise NotImplementedError

    def mean(self, updates: Sequence[Tensor]) -> Tensor:
        """The private mean of a round's updates: all clients count alike, and the divisor does not depend on who came.

        Args:
            updates: One vector ``[d]`` a client that answered.

        Returns:
            (Σ_k clip(Δ_k, S) + z S ξ) / expected, ``[d]``.
        """
        raise NotImplementedError

    def nothing(self, like: Tensor) -> Tensor:
        """The private mean of a round in which nobody answered: noise alone.

        Args:
            like: The weights ``[d]``.
        """
        return self.mean([like.new_zeros(like.shape)])

    def spent(self) -> float:
        """Epsilon of the rounds so far."""
        raise NotImplementedError

    def ledger(self) -> Ledger:
        """The account, as ``privacy.json`` holds it."""
        raise NotImplementedError

    def logged(self) -> dict[str, float]:
        """Figures of its own that are worth a curve."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on with its account."""
        raise NotImplementedError
