"""What MASHA1 and MASHA2 share: an extragradient method whose second fields are compressed differences."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lightrail.errors import ConfigurationError
from lightrail.federated import Client, Compressor, Encoded, Heard, ServerMethod, State
from lightrail.federated.wire import Payload
from lightrail.options import between, positive
from lightrail_federated.participation import require_everyone

__all__ = ["Masha", "kept_share", "looked_ahead"]

_SENT = "sent "


def looked_ahead(z: Tensor, w: Tensor, field: Tensor, tau: float, gamma: float) -> Tensor:
    r"""Where the second field is asked for, z_½ = τ z + (1 - τ) w - γ F(w).

    Args:
        z: The iterate, ``[d]``.
        w: The reference point, ``[d]``.
        field: F(w), ``[d]``.
        tau: τ, in [0, 1).
        gamma: γ, positive.

    Example:
        >>> looked_ahead(torch.tensor([2.0]), torch.tensor([0.0]), torch.tensor([1.0]), 0.5, 0.25)
        tensor([0.7500])
    """
    return tau * z + (1 - tau) * w - gamma * field


def kept_share(compressor: Compressor | None, size: int) -> float:
    """The default of 1 - τ: the share of a vector that a compressor keeps; 1 without one.

    Args:
        compressor: Unbiased with variance ω, for 1/(1 + ω), or contractive with δ, which it is then.
        size: d.
    """
    if compressor is None:
        return 1.0
    return 1 / (1 + compressor.variance(size)) if compressor.is_unbiased else compressor.contraction(size)


class Masha(ServerMethod):
    """Rounds of MASHA: those of a new reference point, where all fields are sent whole, and compressed ones.

    Every client follows the iterate from what all of them are sent, and so has to be there in every round. A subclass
    says what is sent for a difference of fields, and what is stepped when it has arrived.

    Args:
        lr: γ; positive.
        tau: τ, in [0, 1); what the compressor keeps is 1 - τ where nothing is said.
        full_gradients: Whether a difference of fields is of all samples of the client, in place of a batch.
    """

    runs_optimizer: ClassVar[bool] = False

    def __init__(
        self, *, lr: float = 0.1, tau: float | None = None, full_gradients: bool = False, **common: Any
    ) -> None:
        super().__init__(**common)
        require_everyone(type(self).__name__.lower(), self)
        positive(lr=lr)
        if tau is not None:
            between(0.0, 1.0, closed="left", tau=tau)
        self.lr, self.tau, self.full_gradients = lr, tau, full_gradients

    def difference_sent(self, difference: Tensor, state: State, generator: torch.Generator) -> Tensor | Encoded:
        """What a client sends for F_k(z_½) - F_k(w), ``[d]``.

        Args:
            difference: It.
            state: The client's, for what the method remembers.
            generator: Of the compressor.
        """
        raise NotImplementedError

    def mean_sent(self, mean: Tensor, state: State, generator: torch.Generator) -> Tensor | Encoded:
        """What the server sends for the mean of what it received; as in :meth:`difference_sent`."""
        raise NotImplementedError

    def stepped(self, half: Tensor, arrived: Tensor) -> Tensor:
        """z⁺ from z_½ and what the server sent, as it arrived."""
        raise NotImplementedError

    def share(self, size: int) -> float:
        """1 - τ, with d entries."""
        return kept_share(self.compressor, size) if self.tau is None else 1 - self.tau

    def compressed(self, vector: Tensor, generator: torch.Generator) -> Tensor | Encoded:
        """A vector with the run's compressor around it, without a memory."""
        return vector if self.compressor is None else self.compressor.compress(vector, generator)

    def start(self, weights: Tensor) -> State:
        return {"weights": weights, "w": weights, "is_new": torch.tensor(1)}

    def message(self, server: State, round_index: int) -> Payload:
        common = {"is_new": server["is_new"]}
        if "half" not in server:
            return {**common, "weights": server["weights"]}
        if "was_new" in server:
            return {**common, "field": server["field"]}
        return {**common, "step": self._sent(server)}

    def client(self, client: Client, message: State, state: State) -> tuple[Payload, State]:
        if "weights" in message:
            state = {"w": message["weights"]}
            z = state["w"]
        else:
            self._check_follows(client, state)
            z = state["w"] if "field" in message else self.stepped(state["half"], message["step"])
        client.metrics["lr"] = self.lr
        state |= {"round": torch.tensor(client.round)}
        if int(message["is_new"]):
            own = client.gradient(z)
            return {"field": own}, {**state, "w": z, **({"own": own} if self.full_gradients else {})}
        state |= {name: message[name] for name in ("field",) if name in message}
        half = looked_ahead(z, state["w"], state["field"], 1 - self.share(z.numel()), self.lr)
        sent = self.difference_sent(self._difference(client, half, state), state, client.generator)
        return {"difference": sent}, {**state, "half": half}

    def _check_follows(self, client: Client, state: State) -> None:
        if "round" not in state or int(state["round"]) != client.round - 1:
            raise ConfigurationError(
                "a client missed a round, and cannot follow the steps that are sent",
                found=f"client {client.number} in round {client.round}",
                allowed="clients that are there in every round",
                remedy="Go on without it, or resume from a checkpoint of before.",
            )

    def _difference(self, client: Client, half: Tensor, state: State) -> Tensor:
        """F_k(z_½) - F_k(w), both of the same samples."""
        if self.full_gradients:
            return client.gradient(half) - state["own"]
        batch = next(client.batches())
        at_reference = client.gradient(state["w"], batch)
        return client.gradient(half, batch) - at_reference

    def server(self, server: State, mean: State, heard: Heard) -> State:
        if not mean:
            return server
        z, tau = server["weights"], 1 - self.share(server["weights"].numel())
        if int(server["is_new"]):
            half = looked_ahead(z, z, mean["field"], tau, self.lr)
            kept = {name: value for name, value in server.items() if not name.startswith(_SENT)}
            return {
                **kept, "w": z, "field": mean["field"], "half": half,
                "is_new": torch.tensor(0), "was_new": torch.tensor(1),
            }  # fmt: skip
        state = {name: value for name, value in server.items() if name != "was_new" and not name.startswith(_SENT)}
        sent = self.mean_sent(mean["difference"], state, heard.generator)
        z = self.stepped(server["half"], sent.decoded() if isinstance(sent, Encoded) else sent)
        is_new = float(torch.rand(1, generator=heard.generator)) < 1 - tau
        half = looked_ahead(z, server["w"], server["field"], tau, self.lr)
        parts = sent.parts if isinstance(sent, Encoded) else {"vector": sent}
        return {
            **state, "weights": z, "half": half, "is_new": torch.tensor(int(is_new)),
            **{_SENT + name: part for name, part in parts.items()},
        }  # fmt: skip

    def _sent(self, server: State) -> Tensor | Encoded:
        """What the server sends of its last step, out of its state."""
        parts = {name.removeprefix(_SENT): part for name, part in server.items() if name.startswith(_SENT)}
        if self.compressor is None:
            return parts["vector"]
        return Encoded(parts, server["weights"].numel(), server["weights"].dtype, self.compressor)
