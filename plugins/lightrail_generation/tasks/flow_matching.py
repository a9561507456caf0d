"""Flow matching, with the noise of a batch coupled to its data."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from lightrail.generation import Level, LinearFlow
from lightrail.options import one_of, positive
from lightrail.traits import Traits
from lightrail_generation.tasks.couplings import COUPLINGS, couple_by_class
from lightrail_generation.tasks.denoising import Example
from lightrail_generation.tasks.denoising_regression import DenoisingRegression
from lightrail_generation.tasks.time_sampling import TimeSampling

__all__ = ["FlowMatching"]


class FlowMatching(DenoisingRegression):
    """Learns the velocity of straight lines from noise to data, with the noise of a batch matched to its data.

    x = (1 − t) x0 + t z, loss = E ‖z − x0 − u(x, t)‖², (x0, z) from a coupling of the batch

    Time runs from the data, t = 0, to the noise, t = 1. A coupling that brings noise near its data makes the flow
    straighter and its targets less noisy; classes are coupled each among itself, so that the noise tells nothing of the
    label.

    Args:
        model: ``model(x, time, label)``, see :class:`DenoisingTask`.
        coupling: ``independent``; ``exact``: least Σ ‖x0 − z‖², which takes of the order of B³; ``stable``: no data and
            noise would both rather have each other; ``sinkhorn``: drawn from the entropic plan.
        regularisation: Of the entropic plan, as a share of the mean cost, above 0.
        time_sampling: ``uniform``, ``logit_normal`` or ``lognormal`` (of t/(1 − t)).
        time_mean: Of the normal distribution behind the last two.
        time_std: Its standard deviation, above 0.
        label_dropout: The share of labels that the network is not told, in [0, 1).
        center: Subtracted from the data; ``None`` to measure it.
        scale: What they are divided by; ``None`` to measure it.

    Raises:
        ConfigurationError: An option is out of range.

    Deviations:
        Only the batch of one process is coupled. Data and noise that are coupled give no score: samplers that need one,
        or that add noise, are right with ``independent`` only.

    Example:
        >>> FlowMatching(nn.Identity(), coupling="exact").gives
        ('data', 'noise', 'velocity', 'flow')

    Reference:
        Y. Lipman, R. T. Q. Chen, H. Ben-Hamu, M. Nickel and M. Le (2023), Flow Matching for Generative Modeling, arXiv
        2210.02747. A.-A. Pooladian, H. Ben-Hamu, C. Domingo-Enrich, B. Amos, Y. Lipman and R. T. Q. Chen (2023),
        Multisample Flow Matching: Straightening Flows with Minibatch Couplings, arXiv 2304.14772. A. Tong, K. Fatras,
        N. Malkin and others (2024), Improving and Generalizing Flow-Based Generative Models with Minibatch Optimal
        Transport, arXiv 2302.00482. P. Esser, S. Kulal, A. Blattmann and others (2024), Scaling Rectified Flow
        Transformers for High-Resolution Image Synthesis, arXiv 2403.03206, section 3.1, for ``logit_normal``.
    """

    traits: ClassVar[Traits] = Traits(
        rule="loss = E ‖z − x0 − u((1 − t) x0 + t z, t)‖²",
        paper="A.-A. Pooladian, H. Ben-Hamu, C. Domingo-Enrich, B. Amos, Y. Lipman, R. T. Q. Chen, 2023, Multisample "
        "Flow Matching: Straightening Flows with Minibatch Couplings, arXiv 2304.14772",
        example={"coupling": "exact"},
    )
    form = "flow"
    sampler_name = "flow_heun"

    def __init__(
        self,
        model: nn.Module,
        coupling: str = "independent",
        regularisation: float = 0.05,
        time_sampling: str = "uniform",
        time_mean: float | None = None,
        time_std: float | None = None,
        label_dropout: float = 0.1,
        center: float | None = None,
        scale: float | None = None,
    ) -> None:
        one_of(COUPLINGS, coupling=coupling)
        positive(regularisation=regularisation)
        super().__init__(model, label_dropout, center, scale)
        self.coupling = coupling
        self.regularisation = regularisation
        self.path = LinearFlow()
        self.time_sampling = TimeSampling(self.path, time_sampling, 0.0, 1.0, time_mean, time_std)
        if coupling != "independent":
            self.gives = ("data", "noise", "velocity", "flow")

    def answer(self, x: Tensor, level: Level, time: Tensor, label: Tensor | None) -> Tensor:
        return self.network(x, time, label)

    def weight(self, level: Level, t: Tensor) -> float:
        return 1.0

    def noise(self, example: Example) -> Tensor:
        z = super().noise(example)
        if self.coupling == "independent" or example.noise is not None:
            return z
        u = example.draws.uniform(len(z))
        return couple_by_class(example.x0, z, example.label, self.coupling, u, self.regularisation)
