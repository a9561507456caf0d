"""Langevin dynamics that moves from client to client, with conducive gradients."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lightrail import Traits
from lightrail.federated import Client, Heard, ServerMethod, State
from lightrail.federated.wire import Payload
from lightrail.options import at_least, one_of, positive
from lightrail_federated.participation import require_everyone, steps_of_visit

__all__ = ["FSGLD", "conducive_gradient", "langevin_step", "score"]


def score(prior_precision: float, theta: Tensor, gradient: Tensor, samples: int, f: float) -> Tensor:
    r"""An unbiased estimate of ∇log p(θ | x) at the client that was drawn.

    .. math:: v = -λθ - (N_s / f_s) \, ∇ℓ

    Args:
        prior_precision: λ of the prior N(0, 1/λ).
        theta: θ ``[d]``.
        gradient: ∇ℓ of the mean loss of a batch of the client, -log p(x|θ) a sample; ``[d]``.
        samples: N_s, how many the client has.
        f: f_s, the probability with which it is drawn.

    Example:
        >>> score(0.5, torch.tensor([2.0]), torch.tensor([0.1]), 10, 0.5)
        tensor([-3.])
    """
    return -prior_precision * theta - (samples / f) * gradient


def conducive_gradient(
    theta: Tensor, eta: Tensor, precision: Tensor, own_eta: Tensor, own_precision: Tensor, f: float
) -> Tensor:
    r"""What takes the pull of a client's own data away, without a bias: Σ_s f_s h_s = 0.

    .. math:: h_s(θ) = ∇\log q(θ) - \tfrac{1}{f_s} ∇\log q_s(θ), \qquad ∇\log q_s(θ) = η_s - Λ_s θ

    with Gaussians q_s of precision Λ_s and mean μ_s, η_s = Λ_s μ_s, and q = Π_s q_s, whose Λ and η are the sums.

    Args:
        theta: θ ``[d]``.
        eta: Σ_s η_s ``[d]``.
        precision: Σ_s Λ_s, its diagonal ``[d]``.
        own_eta: η_s ``[d]``.
        own_precision: Λ_s, its diagonal ``[d]``.
        f: f_s, the probability with which the client is drawn.

    Example:
        >>> one = torch.ones(1)
        >>> conducive_gradient(3 * one, 4 * one, 2 * one, 2 * one, 1 * one, 0.5)
        tensor([0.])
    """
    return (eta - precision * theta) - (own_eta - own_precision * theta) / f


def langevin_step(theta: Tensor, v: Tensor, h: float, noise: Tensor) -> Tensor:
    r"""θ + (h/2) v + √h ξ.

    Args:
        theta: θ ``[d]``.
        v: An estimate of ∇log p(θ | x) ``[d]``.
        h: The step size, positive.
        noise: ξ ~ N(0, I) ``[d]``.

    Example:
        >>> langevin_step(torch.tensor([1.0]), torch.tensor([2.0]), 0.25, torch.tensor([1.0]))
        tensor([1.7500])
    """
    return theta + 0.5 * h * v + h**0.5 * noise


class FSGLD(ServerMethod):
    r"""Federated stochastic gradient Langevin dynamics: one chain, whose state is a sample of the posterior.

    In the first round every client s fits a Gaussian q_s to its likelihood: it trains with the run's optimizer, takes
    where it ended as the mean, and N_s times the mean of squared gradients of single samples there as the diagonal of
    the precision. From then on one client is drawn in each round, each with f_s = 1/S, and moves the chain by

    v = ∇log p(θ) + (N_s/f_s) mean_B ∇log p(x|θ),   h_s = ∇log q(θ) - (1/f_s) ∇log q_s(θ),   q = Π_s q_s
    θ ← θ + (h/2)(v + h_s) + √h ξ,   ξ ~ N(0, I)

    for ``local_steps`` steps (or ``local_epochs`` passes). The loss is taken as -log p(x|θ) of a sample, the prior as
    N(0, 1/λ). Surrogates that fit badly cost variance, not bias; without them this is distributed SGLD, in which long
    visits drag the chain to each client's own posterior. Nothing here is differentially private. Gradients of single
    samples are taken to fit the surrogates, so that a model with BatchNorm needs ``surrogate=none``.

    Args:
        lr: h; positive; 1e-5 to 1e-4 for posteriors of some hundred samples.
        prior_precision: λ; positive.
        surrogate: ``gaussian``, or ``none`` for distributed SGLD.
        fit_samples: How many samples the precision of a surrogate is estimated from; at least 1.

    Deviations:
        How surrogates are fitted is left open in the paper; here as above. The parameters of q, two vectors, are sent
        with every message, in place of once. There is one chain.

    Example:
        >>> from lightrail import compose
        >>> run = ["+federated=fsgld", "federated.clients=4", "federated.lr=1e-5", "logger=[]"]
        >>> compose(run).composition.config.federated.lr
        1e-05

    Reference:
        K. El Mekkaoui, D. Mesquita, P. Blomstedt and S. Kaski, Federated Stochastic Gradient Langevin Dynamics, UAI
        2021. arXiv 2004.11231.
    """

    traits: ClassVar[Traits] = Traits(
        rule="θ ← θ + (h/2)(∇log p(θ) + (N_s/f_s) mean ∇log p(x|θ) + ∇log q(θ) - (1/f_s) ∇log q_s(θ)) + √h ξ",
        paper="El Mekkaoui et al. 2021, Federated Stochastic Gradient Langevin Dynamics, arXiv 2004.11231",
        is_stochastic=True,
        example={"clients": 4, "rounds": 3, "lr": 1e-5},
        verified=(
            "Five clients with 200 numbers each around -4 to 4, batches of 10, lr 1e-4, a posterior with deviation "
            "0.0316: 1000 chains have 0.059 with surrogates and 2.94 without in visits of 200 steps, 0.060 and 0.47 in "
            "visits of one.",
        ),
        exceptions={
            "goes_on_without_a_client": "it visits one client at a time, and a round without that one is none",
        },
    )
    compressors: ClassVar[Literal["none"]] = "none"
    weighting: ClassVar[Literal["uniform"]] = "uniform"

    def __init__(
        self,
        *,
        lr: float = 1e-5,
        prior_precision: float = 1.0,
        surrogate: Literal["gaussian", "none"] = "gaussian",
        fit_samples: int = 256,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        require_everyone("fsgld", self)
        positive(lr=lr, prior_precision=prior_precision)
        one_of(("gaussian", "none"), surrogate=surrogate)
        at_least(1, fit_samples=fit_samples)
        self.lr, self.prior_precision = lr, prior_precision
        self.surrogate, self.fit_samples = surrogate, fit_samples

    def _fits(self, round_index: int) -> bool:
        return round_index == 0 and self.surrogate == "gaussian"

    def chosen(self, round_index: int, generator: torch.Generator) -> list[int]:
        if self._fits(round_index):
            return list(range(self.clients))
        return [int(torch.randint(self.clients, (1,), generator=generator))]

    def start(self, weights: Tensor) -> State:
        return {"weights": weights, "eta": torch.zeros_like(weights), "precision": torch.zeros_like(weights)}

    def message(self, server: State, round_index: int) -> Payload:
        has_surrogate = self.surrogate == "gaussian" and not self._fits(round_index)
        return server if has_surrogate else {"weights": server["weights"]}

    def client(self, client: Client, message: State, state: State) -> tuple[Payload, State]:
        if self._fits(client.round):
            fitted = self.fitted(client)
            return fitted, {**fitted}
        theta, f = message["weights"], 1 / self.clients
        batches = client.batches()
        for _ in range(steps_of_visit(self, client)):
            gradient = client.gradient(theta, next(batches))
            v = score(self.prior_precision, theta, gradient, client.samples, f)
            if "eta" in message:
                own = [state.get(name, torch.zeros_like(theta)) for name in ("eta", "precision")]
                v = v + conducive_gradient(theta, message["eta"], message["precision"], *own, f)
            noise = torch.randn(theta.shape, generator=client.generator, dtype=theta.dtype)
            theta = langevin_step(theta, v, self.lr, noise)
        client.metrics["lr"] = self.lr
        return {"theta": theta}, state

    def fitted(self, client: Client) -> State:
        """η_s and the diagonal of Λ_s of a Gaussian that stands for the client's likelihood, ``[d]`` each."""
        client.train()
        mode = client.weights()
        own = client.loader(shuffled=False)
        count = min(self.fit_samples, client.samples)
        chosen = torch.randperm(client.samples, generator=client.generator)[:count].tolist()
        singles = DataLoader(Subset(own.dataset, chosen), batch_size=1, collate_fn=own.collate_fn)
        squares = torch.zeros_like(mode)
        for batch in singles:
            squares += client.gradient(mode, batch) ** 2
        precision = client.samples / count * squares
        return {"eta": precision * mode, "precision": precision}

    def server(self, server: State, mean: State, heard: Heard) -> State:
        if "theta" in mean:
            return {**server, "weights": mean["theta"]}
        # Sums, of which the mean was taken.
        return {**server, **{name: vector * len(heard.answered) for name, vector in mean.items()}}
