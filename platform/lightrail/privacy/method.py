"""What a private method is: which gradients, how clipped, with what noise, at what cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from torch import Tensor

from lightrail.errors import ConfigurationError
from lightrail.inherited_options import signature_with_inherited
from lightrail.options import at_least, between, non_negative, one_of, positive
from lightrail.privacy.events import Event, joined
from lightrail.privacy.ledger import ADD_OR_REMOVE
from lightrail.traits import Traits

if TYPE_CHECKING:
    from lightrail.run.run import Run
    from lightrail.sample_gradients import SampleGradients

__all__ = ["DEFAULT_EPSILON", "PrivacyMethod", "PrivateHorizon", "Release", "check_target"]

DEFAULT_EPSILON = 8.0


@dataclass(frozen=True)
class PrivateHorizon:
    """What a method knows of its run before the first step.

    Args:
        records: Records in the training data, over all ranks; at least 1, and public.
        batch: Expected records a step, over all ranks: the data's own batch size times the ranks.
        steps: Optimizer steps of the whole run.
    """

    records: int
    batch: int
    steps: int


class Release(Protocol):
    """How a method gets its noise: the one way, so that nothing is released without being accounted for."""

    step: int
    """The step under way, from 0."""
    batch: int
    """Expected records of this step: what a sum is divided by. How many there are is private."""
    horizon: PrivateHorizon
    """The whole run."""
    noise: float
    """The noise multiplier of the run: given, or calibrated for the target."""

    def __call__(self, sums: Sequence[Tensor], *, sensitivity: float, noise: float) -> list[Tensor]:
        """Adds noise to sums over the samples of a step, and adds the sums over all ranks.

        Args:
            sums: Of vectors, one a sample, whose joint norm is at most ``sensitivity``; over this rank's samples.
            sensitivity: How far one sample can move ``sums``, jointly.
            noise: The noise multiplier: the standard deviation is ``noise * sensitivity``.

        Returns:
            The noisy sums over all ranks.
        """
        ...

    def summed(self, sums: Sequence[Tensor]) -> list[Tensor]:
        """The sums over all ranks, without noise: for what is never released."""
        ...


class PrivacyMethod:
    """A private method; options common to all are declared here, those of a method in its own constructor.

    For each micro-batch of a step :meth:`contribution` bounds what each sample can add, and for each step
    :meth:`gradient` turns the sum of these, with noise, into the gradient of the step. Everything else (drawing
    batches, the gradients of the samples, several ranks, the ledger) is the engine's.

    A method's constructor lists its own options and hands the rest on: ``def __init__(self, *, clip_norm: float = 1.0,
    **common: Any): super().__init__(**common)``; what the platform lists is both.

    Args:
        epsilon: What the whole run may cost; the noise is calibrated for it. 8 where neither it nor ``noise`` is given.
        delta: Chance that the guarantee fails, below 1/n; by default the largest power of ten up to 1/(10 n).
        noise: Noise multiplier, in place of a target: standard deviation over sensitivity, at least 0.
        accountant: ``pld`` (privacy loss distributions: tight) or ``rdp`` (Renyi: looser, and faster).
        sampling: ``poisson`` (every record by its own coin), ``shuffle`` (fixed batches, which amplify nothing), or
            ``full`` (every record in every step).
        max_physical_batch: Samples that a device evaluates at once at most; larger batches are cut. By default the
            data's batch size and room for what Poisson batches vary by.
        engine: ``one_pass`` (the gradients of all samples from one backward pass) or ``one_by_one`` (slow).
        loss: Whether the task's loss is the ``mean`` or the ``sum`` over samples.
        noise_source: Where an accelerator's noise is made: on the ``device``, keyed by the system, or by the
            ``system``'s stream on the processor.
        deterministic_noise: Noise from the run's seed, for debugging: the run is then marked as not private.
        public_metrics: Whether figures of the training data, which epsilon does not cover, are logged and shown.
        replace_batch_norm: Whether BatchNorm, which mixes samples, is replaced by GroupNorm, or refused; by default it
            is replaced in a model that nobody chose.
    """

    traits: ClassVar[Traits] = Traits(needs_per_sample_gradients=True)
    samplings: ClassVar[tuple[str, ...]] = ("poisson", "shuffle", "full")
    """Which samplings the method's accounting covers; the first is what it uses where none is said."""
    adjacency: ClassVar[str] = ADD_OR_REMOVE

    def __init__(
        self,
        *,
        epsilon: float | None = None,
        delta: float | None = None,
        noise: float | None = None,
        accountant: Literal["pld", "rdp"] = "pld",
        sampling: Literal["poisson", "shuffle", "full"] | None = None,
        max_physical_batch: int | None = None,
        engine: Literal["one_pass", "one_by_one"] = "one_pass",
        loss: Literal["mean", "sum"] = "mean",
        noise_source: Literal["device", "system"] = "device",
        deterministic_noise: bool = False,
        public_metrics: bool = True,
        replace_batch_norm: bool | None = None,
    ) -> None:
        check_target(epsilon, noise)
        if delta is not None:
            between(0.0, 1.0, closed="neither", delta=delta)
        if max_physical_batch is not None:
            at_least(1, max_physical_batch=max_physical_batch)
        self.epsilon = DEFAULT_EPSILON if epsilon is None and noise is None else epsilon
        self.delta, self.noise, self.accountant = delta, noise, accountant
        self.sampling = self.samplings[0] if sampling is None else sampling
        one_of(self.samplings, sampling=self.sampling)
        self.max_physical_batch, self.engine, self.loss = max_physical_batch, engine, loss
        self.noise_source, self.deterministic_noise = noise_source, deterministic_noise
        self.public_metrics, self.replace_batch_norm = public_metrics, replace_batch_norm

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.__signature__ = signature_with_inherited(cls)  # type: ignore[attr-defined]

    # What a method says of itself.

    @property
    def clipping(self) -> str:
        """How the contribution of a sample is bounded, in words, for the ledger."""
        raise NotImplementedError

    @property
    def assumptions(self) -> list[str]:
        """What its guarantee rests on beside the sampling, one sentence each."""
        return []

    def prepare(self, horizon: PrivateHorizon) -> None:
        """Called once, before anything is calibrated; refuses what cannot work."""

    def batch_at(self, step: int, horizon: PrivateHorizon) -> int:
        """The expected batch of a step."""
        return horizon.records if self.sampling == "full" else horizon.batch

    def noise_at(self, step: int, noise: float, horizon: PrivateHorizon) -> float:
        """The noise multiplier of all releases of a step together, where the run's is ``noise``."""
        return noise

    def events(self, noise: float, horizon: PrivateHorizon, first: int = 0) -> list[Event]:
        """What the steps from ``first`` on release, where the run's noise multiplier is ``noise``."""
        kind = type(self)
        changes = kind.batch_at is not PrivacyMethod.batch_at or kind.noise_at is not PrivacyMethod.noise_at
        steps = range(first, horizon.steps)
        if not changes:
            return [Event(noise, len(steps), self.batch_at(0, horizon), horizon.records)] if steps else []
        return joined(
            Event(self.noise_at(t, noise, horizon), 1, self.batch_at(t, horizon), horizon.records) for t in steps
        )

    # What a method does.

    def elsewhere(self, params: Sequence[Tensor]) -> list[Tensor] | None:
        """Another point at which the gradients of the same samples are needed; ``None`` for none in this step."""
        return None

    def contribution(self, here: SampleGradients, there: SampleGradients | None) -> list[Tensor]:
        """What the samples of a micro-batch add to the sums of a step, each bounded.

        Args:
            here: Their gradients.
            there: Their gradients at :meth:`elsewhere`.

        Returns:
            Sums, always as many and in the same shapes: they are added over the micro-batches of the step.
        """
        raise NotImplementedError

    def gradient(self, sums: list[Tensor], params: Sequence[Tensor], release: Release) -> list[Tensor]:
        """The gradient of a step.

        Args:
            sums: What the micro-batches contributed, on this rank.
            params: The parameters, before the update.
            release: Adds the noise, and accounts for it.

        Returns:
            One tensor a parameter.
        """
        raise NotImplementedError

    def nothing(self, params: Sequence[Tensor]) -> list[Tensor]:
        """What a rank without samples contributes: zeros."""
        return [p.new_zeros(p.shape) for p in params]

    def logged(self) -> dict[str, float]:
        """Figures of its own that are worth a curve, and are private or public: never those of single samples."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on exactly: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""

    def wrap(self, run: Run) -> Run:
        """The run, made private.

        Args:
            run: As it was composed.

        Raises:
            CompositionError: Something in it would not be private.
        """
        from lightrail.privacy.wrapping import made_private

        return made_private(self, run)


def check_target(epsilon: float | None, noise: float | None) -> None:
    """A target or a noise, and not both.

    Args:
        epsilon: What a run may cost; greater than 0.
        noise: Noise multiplier; at least 0.
    """
    if epsilon is not None and noise is not None:
        raise ConfigurationError(
            "both a target and a noise are given",
            found=f"epsilon={epsilon:g} noise={noise:g}",
            allowed="one of them: the noise is calibrated for the target, or the cost follows from the noise",
            remedy="Leave one of them out.",
        )
    if epsilon is not None:
        positive(epsilon=epsilon)
    if noise is not None:
        non_negative(noise=noise)
