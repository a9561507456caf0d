"""Federated averaging that hides each client's whole contribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightrail import Traits
from lightrail.federated import ClientHorizon, ServerPrivacy
from lightrail.options import between, positive
from lightrail.privacy.accounting import calibrated, checked_accountant, epsilon_of
from lightrail.privacy.announcement import announce
from lightrail.privacy.continuation import all_spent
from lightrail.privacy.events import Event, joined
from lightrail.privacy.ledger import ADD_OR_REMOVE, ZERO_OUT, Ledger, check_delta, default_delta
from lightrail.privacy.method import DEFAULT_EPSILON, check_target
from lightrail.privacy.noise import DeterministicNoise, NoiseSource, SystemNoise
from lightrail.privacy.refusals import check_budget, check_continuation

__all__ = ["DPFedAvg", "clipped_sum", "private_mean"]


def clipped_sum(updates: Sequence[Tensor], S: float) -> Tensor:
    r"""The sum of vectors, each shortened to S where it is longer.

    .. math:: \sum_k \min(1, S / \|\Delta_k\|_2) \, \Delta_k

    Args:
        updates: Δ_k ``[d]`` each; at least one. One that is not finite adds nothing.
        S: The largest norm, greater than 0.

    Returns:
        ``[d]``, in double precision: one vector more moves it by at most S.

    Example:
        >>> clipped_sum([torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.5])], S=1.0)
        tensor([0.6000, 1.3000], dtype=torch.float64)
    """
    total = torch.zeros_like(updates[0], dtype=torch.float64)
    for each in updates:
        update = each.double()
        norm = float(update.norm())
        # What is not finite, or so long that its norm is not, has no direction that could be kept.
        if bool(torch.isfinite(update).all()) and norm < float("inf"):
            total.add_(update, alpha=1.0 if norm <= S else S / norm)
    return total


def private_mean(updates: Sequence[Tensor], S: float, z: float, expected: int, source: NoiseSource) -> Tensor:
    r"""The mean of clipped updates with noise, over a divisor that does not depend on who came.

    .. math:: \frac{1}{q N} \Big( \sum_k \min(1, S / \|\Delta_k\|) \, \Delta_k + z S \, \mathcal{N}(0, I) \Big)

    Args:
        updates: Δ_k ``[d]`` each; at least one.
        S: The largest norm, greater than 0.
        z: The noise multiplier, at least 0.
        expected: q N, how many clients are expected, at least 1.
        source: Of the noise.

    Returns:
        ``[d]``, in the type of the updates.

    Example:
        >>> private_mean([torch.tensor([3.0, 4.0])], 1.0, 0.0, 2, DeterministicNoise(0))
        tensor([0.3000, 0.4000])
    """
    total = clipped_sum(updates, S)
    source.add_to([total], z * S)
    return (total / expected).to(updates[0].dtype)


class DPFedAvg(ServerPrivacy):
    r"""Clips the update of each client, and adds Gaussian noise to their sum: a client's data, all of it, is hidden.

    .. math:: \theta \leftarrow \theta + \frac{1}{q N} \Big( \sum_{k \in R} \min(1, S / \|\Delta_k\|) \, \Delta_k
              + z S \, \mathcal{N}(0, I) \Big)

    with R a Poisson sample of the N clients at the rate q. Clients count alike, whatever their samples, and the divisor
    is fixed; both are needed for the sum to move by no more than S with one client. A server with momentum, or FedAdam,
    costs nothing on top.

    Args:
        epsilon: What the whole run may cost; the noise is calibrated for it. 8 where neither it nor ``noise`` is given.
        delta: Chance that the guarantee fails, below 1/N; by default the largest power of ten up to 1/(10 N).
        noise: z, the noise multiplier, in place of a target; at least 0, and 0 hides nothing.
        clip_norm: S, greater than 0.
        accountant: ``pld`` (privacy loss distributions: tight) or ``rdp`` (Renyi: looser, and faster).
        deterministic_noise: Noise and coins from the run's seed, for debugging: the run is then marked as not private.

    Raises:
        ConfigurationError: An option is out of range, both a target and a noise are given, or no noise meets the
            target.
        CheckpointError: A run that goes on would exceed its target.

    Guarantees:
        With federated.sampling=poisson clients are drawn by coins that nobody can foretell, and the account is
        amplified; with ``fixed`` every round is accounted as if all clients took part. A round in which nobody answers
        is noise, and costs the same. Noise does not depend on the seed of the run.

    Deviations:
        q N is a whole number: federated.fraction times federated.clients, rounded. The sum is over the weights as one
        vector, clipped at once.

    Example:
        >>> method = DPFedAvg(noise=1.0, delta=1e-4)
        >>> method.begin(ClientHorizon(100, 5, is_poisson=True, rounds=200, seed=0))
        >>> round(method.ledger().planned_epsilon, 4)
        3.9993

    Reference:
        H. B. McMahan, D. Ramage, K. Talwar and L. Zhang (2018), Learning Differentially Private Recurrent Language
        Models, ICLR, arXiv 1710.06963, algorithm 1, with the estimator of a fixed divisor.
    """

    traits: ClassVar[Traits] = Traits(
        rule="θ ← θ + (Σ_k clip(Δ_k, S) + z S N(0, I)) / (q N)",
        paper="McMahan, Ramage, Talwar, Zhang, 2018, Learning Differentially Private Recurrent Language Models, "
        "arXiv 1710.06963",
        example={"noise": 1.0, "delta": 1e-3},
        verified=(
            "N = 100, q = 0.05, z = 1, 200 rounds, delta 1e-4: epsilon 3.999309 by privacy loss distributions and "
            "4.595007 by Renyi divergences.",
        ),
    )

    def __init__(
        self,
        *,
        epsilon: float | None = None,
        delta: float | None = None,
        noise: float | None = None,
        clip_norm: float = 1.0,
        accountant: Literal["pld", "rdp"] = "pld",
        deterministic_noise: bool = False,
    ) -> None:
        positive(clip_norm=clip_norm)
        checked_accountant(accountant)
        if delta is not None:
            between(0.0, 1.0, closed="neither", delta=delta)
        check_target(epsilon, noise)
        self.epsilon = DEFAULT_EPSILON if epsilon is None and noise is None else epsilon
        self.delta, self.noise, self.clip_norm = delta, noise, clip_norm
        self.accountant, self.deterministic_noise = accountant, deterministic_noise

    # The plan.

    def begin(self, horizon: ClientHorizon, resumed: dict[str, Any] | None = None) -> None:
        self._horizon = horizon
        is_seeded = self.deterministic_noise
        self._source: NoiseSource = DeterministicNoise(horizon.seed, 0) if is_seeded else SystemNoise()
        self._coins: NoiseSource = DeterministicNoise(horizon.seed, 1) if is_seeded else SystemNoise()
        self._ledger = self._begun() if resumed is None else self._continued(resumed)
        assert self._ledger.noise is not None
        self._z = self._ledger.noise
        announce(self._ledger)

    def _rounds_of(self, z: float, count: int) -> Event:
        clients = self._horizon.clients
        # Of a fixed number of clients nothing is amplified: it is as if all took part.
        return Event(z, count, self._horizon.expected if self._horizon.is_poisson else clients, clients)

    def _begun(self) -> Ledger:
        delta, rounds = self._delta(), self._horizon.rounds
        if self.noise is not None:
            return self._new_ledger(self.noise, [self._rounds_of(self.noise, rounds)])
        assert self.epsilon is not None
        z = calibrated(lambda z: [self._rounds_of(z, rounds)], self.epsilon, delta, accountant=self.accountant)
        return self._new_ledger(z, [self._rounds_of(z, rounds)])

    def _delta(self) -> float:
        clients = self._horizon.clients
        return check_delta(default_delta(clients) if self.delta is None else self.delta, clients)

    def _new_ledger(self, z: float, planned: list[Event]) -> Ledger:
        horizon = self._horizon
        are_all = horizon.expected == horizon.clients
        fixed = (
            []
            if horizon.is_poisson or are_all
            else ["So many clients take part in every round, which amplifies nothing: each round counts as if all did."]
        )
        return Ledger(
            delta=self._delta(),
            noise=z,
            planned=planned,
            accountant=self.accountant,
            target_epsilon=self.epsilon,
            clip=f"flat, norm {self.clip_norm:g}, of each client's whole update",
            # Another client would take the place of one that is gone, where their number is fixed.
            adjacency=ADD_OR_REMOVE if horizon.is_poisson or are_all else ZERO_OUT,
            sampling="poisson" if horizon.is_poisson else "full",
            is_private=self._source.is_secret and z > 0,
            assumptions=[
                "A record is a client: all of its samples, and a step is a round.",
                "The guarantee covers the weights that the server releases; it sees each client's update. Figures of "
                "the clients' training, and the record of who took part in which round, are not covered.",
                f"Noise: {self._source.name}.",
                *fixed,
            ],
        )

    def _continued(self, state: dict[str, Any]) -> Ledger:
        before = Ledger.from_dict(state)
        z = before.noise if self.noise is None else self.noise
        assert z is not None
        left = max(0, self._horizon.rounds - sum(event.steps for event in before.events))
        ledger = self._new_ledger(z, [self._rounds_of(z, left)])
        check_continuation(before, ledger)
        ledger.events, remarks = all_spent(before, self._horizon.written)
        ledger.planned = joined([*ledger.events, *ledger.planned])
        ledger.is_private = ledger.is_private and before.is_private
        ledger.assumptions = list(dict.fromkeys([*before.assumptions, *ledger.assumptions, *remarks]))
        check_budget(ledger, self.epsilon, self._horizon.rounds)
        self._source.load_state_dict(state["noise_source"])
        self._coins.load_state_dict(state["coins"])
        return ledger

    # A round.

    def drawn(self) -> list[int]:
        horizon = self._horizon
        return self._coins.bernoulli(horizon.clients, horizon.expected, horizon.clients).nonzero()[:, 0].tolist()

    def mean(self, updates: Sequence[Tensor]) -> Tensor:
        self._ledger.record(self._rounds_of(self._z, 1))
        return private_mean(updates, self.clip_norm, self._z, self._horizon.expected, self._source)

    # The account.

    def spent(self) -> float:
        if not self._ledger.is_private:
            return float("inf")
        # A grid that costs a tenth of the time, and only says more.
        return epsilon_of(self._ledger.events, self._ledger.delta, self.accountant, interval=1e-3)

    def ledger(self) -> Ledger:
        return self._ledger

    def state_dict(self) -> dict[str, Any]:
        sources = {"noise_source": self._source.state_dict(), "coins": self._coins.state_dict()}
        return {**self._ledger.to_dict(), **sources}
