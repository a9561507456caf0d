"""Wasserstein distributionally robust federated averaging."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightrail import Claim, Traits
from lightrail.errors import CompositionError, ConfigurationError
from lightrail.federated import Client, Heard, ServerMethod, State
from lightrail.federated.wire import Payload
from lightrail.options import at_least, positive
from lightrail.step.batches import leading_size

__all__ = ["WAFL", "worst_inputs"]


def worst_inputs(
    z: Tensor,
    gradient: Callable[[Tensor], Tensor],
    gamma: float,
    alpha: float,
    steps: int,
    limits: tuple[float, float] | None = None,
) -> Tensor:
    r"""Inputs that are worse for the model, at a price for their distance: ascent on ℓ(u) - γ/2 ‖u - z‖².

    .. math:: u_0 = z, \qquad u_{r+1} = u_r + α (∇ℓ(u_r) - γ(u_r - z))

    Args:
        z: Inputs, of any shape.
        gradient: ∇ℓ at inputs of this shape, each of its own loss.
        gamma: γ, positive; greater than the curvature of ℓ in its input, or there is no maximum.
        alpha: α, positive.
        steps: How many.
        limits: The range in which inputs stay; ``None`` for none.

    Example:
        >>> z, theta, gamma = torch.tensor([2.0]), torch.tensor([1.0]), 3.0
        >>> worst_inputs(z, lambda u: u - theta, gamma, 0.5, 1), (gamma * z - theta) / (gamma - 1)
        (tensor([2.5000]), tensor([2.5000]))
    """
    u = z
    for _ in range(steps):
        u = u + alpha * (gradient(u) - gamma * (u - z))
        u = u if limits is None else u.clamp(*limits)
    return u


class WAFL(ServerMethod):
    r"""Federated averaging that prepares for shifted data: each batch is first made worse, at a price for the distance.

    The worst distribution within a Wasserstein ball around the data of all clients, with the multiplier γ in the place
    of the radius, leads to

    min_θ Σ_k (n_k/n) mean_i φ_γ(z_i, θ),   φ_γ(z, θ) = max_u ℓ(u, θ) - (γ/2) ‖u - z‖²

    with labels as they are. A client moves the inputs of each batch by some steps of ascent,
    u ← u + α(∇_u ℓ - γ(u - z)), and takes its step on ℓ(u, θ) with the run's optimizer; the server averages. Where γ is
    great this is federated averaging.

    Args:
        gamma: γ; positive. It has to be greater than the curvature of the loss in its input; ``input_range`` bounds the
            inner problem where it is not.
        ascent_lr: α; positive.
        ascent_steps: How many steps of ascent for each batch; at least 1.
        input_range: The least and the greatest value of an input, within which it stays; none where nothing is said.

    Raises:
        ConfigurationError: An option is out of range.
        CompositionError: In a round, where batches do not begin with inputs of floating point.

    Deviations:
        λ_k are the clients' shares of the samples. The gradient of each sample is that of its own loss, whatever the
        size of its batch, which holds for losses that are means over samples.

    Example:
        >>> from lightrail import compose
        >>> run = ["+federated=wafl", "federated.clients=4", "federated.gamma=0.5", "logger=[]"]
        >>> compose(run).composition.config.federated.gamma
        0.5

    Reference:
        T. A. Nguyen, T. D. Nguyen, L. T. Le, C. T. Dinh and N. H. Tran, On the Generalization of Wasserstein Robust
        Federated Learning, 2022. arXiv 2206.01432.
    """

    traits: ClassVar[Traits] = Traits(
        rule="u ← u + α(∇_u ℓ(u, θ) - γ(u - z)), R times; then federated averaging on u",
        paper="Nguyen et al. 2022, On the Generalization of Wasserstein Robust Federated Learning, arXiv 2206.01432",
        example={"clients": 4, "rounds": 2, "gamma": 0.5, "ascent_lr": 0.1},
        claim=Claim(
            sentence="Generalises better than FedAvg where the clients' data differ",
            baseline="fedavg",
            problems=("federated_digits",),
        ),
    )
    is_one_update: ClassVar[bool] = True

    def __init__(
        self,
        *,
        gamma: float = 0.5,
        ascent_lr: float = 0.1,
        ascent_steps: int = 10,
        input_range: tuple[float, float] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        positive(gamma=gamma, ascent_lr=ascent_lr)
        at_least(1, ascent_steps=ascent_steps)
        if input_range is not None and (len(input_range) != 2 or not input_range[0] < input_range[1]):
            raise ConfigurationError(
                "input_range is no range",
                found=f"input_range={list(input_range)}",
                allowed="two numbers, the least before the greatest",
                remedy="Set federated.input_range=[0,1], or leave it out.",
            )
        self.gamma, self.ascent_lr, self.ascent_steps = gamma, ascent_lr, ascent_steps
        self.input_range = None if input_range is None else (float(input_range[0]), float(input_range[1]))

    def client(self, client: Client, message: State, state: State) -> tuple[Payload, State]:
        client.train(change_batch=lambda batch: self.worsened(client, batch))
        return {"update": client.compressed("update", client.weights() - message["weights"], state)}, state

    def worsened(self, client: Client, batch: Any) -> Any:
        """A batch with inputs that are worse for the client's model as it is.

        Args:
            client: The client.
            batch: Inputs, and whatever comes with them.
        """
        if not isinstance(batch, tuple | list) or not isinstance(batch[0], Tensor) or not batch[0].is_floating_point():
            raise CompositionError(
                "federated 'wafl' moves inputs, and these cannot be moved",
                found=f"batches of {type(batch).__name__}",
                allowed="batches (inputs, ...) with inputs of floating point",
                remedy="Choose other data, or another method.",
            )
        rest = list(batch[1:])
        size = leading_size(batch) or 1

        def gradient(u: Tensor) -> Tensor:
            u = u.detach().requires_grad_()
            with torch.enable_grad(), client.model.silent():
                # The loss is a mean over the batch; each sample's own is so many times as steep.
                return size * torch.autograd.grad(client.model.loss([u, *rest]), u)[0]

        u = worst_inputs(batch[0], gradient, self.gamma, self.ascent_lr, self.ascent_steps, self.input_range)
        return [u.detach(), *rest]

    def server(self, server: State, mean: State, heard: Heard) -> State:
        return {**server, "weights": server["weights"] + mean["update"]} if mean else server
