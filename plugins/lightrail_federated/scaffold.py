"""SCAFFOLD: control variates against the drift of clients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from lightrail import Claim, Traits
from lightrail.errors import CompositionError
from lightrail.federated import Client, Heard, ServerMethod, State
from lightrail.federated.wire import Payload
from lightrail.options import positive
from lightrail.step import Closure, Transform

if TYPE_CHECKING:
    from lightrail.run.run import Run

__all__ = ["DriftCorrection", "Scaffold", "check_plain", "client_variate", "server_step"]


def client_variate(c_k: Tensor, c: Tensor, theta: Tensor, y: Tensor, eta: Tensor) -> Tensor:
    r"""A client's next control variate: the mean of the gradients on its way.

    .. math:: c_k^+ = c_k - c + \frac{\theta - y}{\sum_t \eta_t}

    Args:
        c_k: The client's ``[d]``.
        c: The server's ``[d]``.
        theta: θ, where the client began ``[d]``.
        y: Where it ended ``[d]``.
        eta: Σ_t η_t, of each parameter ``[d]``.

    Returns:
        ``[d]``; c_k where no step was made.

    Example:
        >>> one = torch.ones(1)
        >>> client_variate(0.5 * one, 0.25 * one, 3 * one, 1 * one, 0.5 * one)
        tensor([4.2500])

    Reference:
        Algorithm 1 of the paper, option II, whose K η_l is the same where all steps are equal.
    """
    return torch.where(eta > 0, c_k - c + (theta - y) / torch.where(eta > 0, eta, 1.0), c_k)


def server_step(
    theta: Tensor, c: Tensor, update: Tensor, change: Tensor, share: float, eta_g: float
) -> tuple[Tensor, Tensor]:
    r"""The server's step, and its control variate, which stays the mean of all clients'.

    .. math:: \theta^+ = \theta + \eta_g \frac{1}{|S|} \sum_{k \in S} (y_k - \theta), \qquad
              c^+ = c + \frac{|S|}{N} \cdot \frac{1}{|S|} \sum_{k \in S} (c_k^+ - c_k)

    Args:
        theta: θ ``[d]``.
        c: ``[d]``.
        update: The mean of y_k - θ ``[d]``.
        change: The mean of c_k⁺ - c_k ``[d]``.
        share: |S| / N, in (0, 1].
        eta_g: η_g, greater than 0.

    Returns:
        θ⁺ and c⁺.

    Example:
        >>> one = torch.ones(1)
        >>> server_step(one, one, 2 * one, 4 * one, share=0.25, eta_g=0.5)
        (tensor([2.]), tensor([2.]))
    """
    return theta + eta_g * update, c + share * change


class DriftCorrection(Transform):
    """Adds c - c_k to the gradient, and sums up the learning rates of the steps.

    Args:
        client: Whose parameters they are.
        correction: c - c_k ``[d]``.
    """

    def __init__(self, client: Client, correction: Tensor) -> None:
        self._params = client.model.params
        parts = correction.split(client.layout.sizes)
        self._parts = {id(p): v.view(p.shape).to(p) for p, v in zip(self._params, parts, strict=True)}
        self._eta = {id(p): 0.0 for p in self._params}

    def prepare(self, optimizer: Optimizer) -> None:
        check_plain(optimizer)
        self._optimizer = optimizer

    def before_step(self, params: list[Tensor], closure: Closure) -> None:
        for p in params:
            part = self._parts.get(id(p))
            if part is not None:
                p.grad = part.clone() if p.grad is None else p.grad.add_(part)

    def after_step(self, params: list[Tensor], previous: list[Tensor]) -> None:
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                if id(p) in self._eta:
                    self._eta[id(p)] += float(group["lr"])

    def eta(self, like: Tensor) -> Tensor:
        """Σ_t η_t of each entry ``[d]``."""
        return torch.cat([like.new_full((p.numel(),), self._eta[id(p)]) for p in self._params])


class Scaffold(ServerMethod):
    r"""Corrects what clients' data pull apart: each steps along its gradient less its own drift, plus that of all.

    .. math:: y \leftarrow y - \eta_t \, (g_k(y) - c_k + c), \qquad c_k^+ = c_k - c + \frac{\theta - y}{\sum_t \eta_t}

    .. math:: \theta \leftarrow \theta + \eta_g \frac{1}{|S|} \sum_{k \in S} (y_k - \theta), \qquad
              c \leftarrow c + \frac{1}{N} \sum_{k \in S} (c_k^+ - c_k)

    c_k stays at its client; at all times c is the mean of all c_k. With exact gradients it ends at the optimum of the
    mean of the clients' objectives, however many local steps there are, where FedAvg does not.

    Args:
        global_lr: η_g, greater than 0.

    Raises:
        ConfigurationError: ``global_lr`` is out of range.
        CompositionError: The optimizer is not plain SGD: with momentum or a history that divides, (θ - y) / Σ η_t is
            not a mean of gradients.

    Guarantees:
        Clients count alike, whatever their samples: only so is c the mean of all c_k. Weight decay is a part of the
        gradient. A client sends 2 d numbers, and is sent 2 d.

    Deviations:
        Σ_t η_t in place of K η_l, so that schedules and several learning rates are allowed; the two are the same where
        all steps are equal. Of the two options for c_k⁺ there is the second.

    Example:
        >>> from lightrail import compose
        >>> run = ["+federated=scaffold", "federated.clients=4", "federated.rounds=1", "optimizer=sgd", "logger=[]"]
        >>> compose(run).composition.config.federated.global_lr
        1.0

    Reference:
        S. P. Karimireddy, S. Kale, M. Mohri, S. J. Reddi, S. U. Stich and A. T. Suresh (2020), SCAFFOLD: Stochastic
        Controlled Averaging for Federated Learning, ICML, arXiv 1910.06378, algorithm 1.
    """

    traits: ClassVar[Traits] = Traits(
        rule="y ← y - η (g - c_k + c); c_k ← c_k - c + (θ - y) / Σ η; θ ← θ + η_g mean (y_k - θ)",
        paper="Karimireddy, Kale, Mohri, Reddi, Stich, Suresh, 2020, SCAFFOLD: Stochastic Controlled Averaging for "
        "Federated Learning, arXiv 1910.06378",
        example={"clients": 4, "rounds": 2},
        claim=Claim(
            sentence="At equal bytes, twice as many a round, no worse: FedAvg's loss in half the rounds",
            baseline="fedavg",
            steps=0.5,
            problems=("federated_digits",),
        ),
        verified=(
            "Ten different quadratics of five numbers, lr 0.1: within 2e-15 of the optimum with 5 and with 20 local "
            "steps, and with 3 of 10 clients a round, where FedAvg stays 0.070 and 0.126 away; c is the mean of all "
            "c_k to 1e-15.",
        ),
    )
    weighting: ClassVar[Literal["samples", "uniform"]] = "uniform"
    compressors: ClassVar[Literal["none", "any", "unbiased", "contractive"]] = "none"

    def __init__(self, *, global_lr: float = 1.0, **common: Any) -> None:
        super().__init__(**common)
        positive(global_lr=global_lr)
        self.global_lr = global_lr

    def wrap(self, run: Run) -> Run:
        if run.optimizer is not None:
            check_plain(run.optimizer(run.task))
        return super().wrap(run)

    def start(self, weights: Tensor) -> State:
        return {"weights": weights, "c": torch.zeros_like(weights)}

    def message(self, server: State, round_index: int) -> Payload:
        return {"weights": server["weights"], "c": server["c"]}

    def client(self, client: Client, message: State, state: State) -> tuple[Payload, State]:
        theta, c = message["weights"], message["c"]
        c_k = state.get("c_k", torch.zeros_like(c))
        correction = DriftCorrection(client, c - c_k)
        client.train([correction])
        y = client.weights()
        new = client_variate(c_k, c, theta, y, correction.eta(c))
        return {"update": y - theta, "change": new - c_k}, {**state, "c_k": new}

    def server(self, server: State, mean: State, heard: Heard) -> State:
        if not mean:
            return server
        share = len(heard.answered) / heard.clients
        theta, c = server["weights"], server["c"]
        theta, c = server_step(theta, c, mean["update"], mean["change"], share, self.global_lr)
        return {"weights": theta, "c": c}


def check_plain(optimizer: Optimizer) -> None:
    """Refuses an optimizer whose steps are not learning rates times gradients.

    Args:
        optimizer: Of a client.

    Raises:
        CompositionError: It is not SGD, or has momentum.
    """
    momenta = {group.get("momentum", 0) for group in optimizer.param_groups}
    if not isinstance(optimizer, SGD) or momenta != {0}:
        momentum = f", momentum={max(momenta):g}" if any(momenta) else ""
        raise CompositionError(
            "federated 'scaffold' reads gradients off the steps of its clients, which only plain SGD allows",
            found=f"{type(optimizer).__name__}{momentum}",
            allowed="torch.optim.SGD with momentum=0; any schedule and weight decay",
            remedy="Use optimizer=sgd optimizer.momentum=0, or federated=fedavg or fedadam.",
        )
