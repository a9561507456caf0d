"""What a private run cannot go on with: sharded parameters, another notion of neighbours, a budget that is spent."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor, nn

from lightrail.errors import CheckpointError, CompositionError, NonFiniteLoss
from lightrail.privacy.ledger import Ledger
from lightrail.privacy.method import PrivacyMethod

__all__ = [
    "buffers_of",
    "check_budget",
    "check_buffers",
    "check_continuation",
    "check_finite",
    "check_strategy",
    "no_horizon",
    "sharded",
]

_SLACK = 1e-3  # relative: what a calibrated plan may exceed its target by, on a grid of privacy losses


def check_strategy(strategy: Strategy, method: PrivacyMethod) -> None:
    """Refuses a strategy under which a rank never sees whole parameters, or exchanges more than sums with noise.

    Args:
        strategy: Of the trainer.
        method: Of the run.

    Raises:
        CompositionError: It is neither one device, nor plain DDP, nor FSDP2 over ranks that share the data; or the
            method works on the parameters themselves, which FSDP2 divides.
    """
    # Others that inherit from DDP divide parameters, or exchange gradients in ways of their own.
    if isinstance(strategy, SingleDeviceStrategy) or type(strategy) is DDPStrategy:
        return
    # By then it has settled "auto".
    if not isinstance(strategy, ModelParallelStrategy) or strategy._tensor_parallel_size != 1:
        raise sharded(type(strategy).__name__)
    looks_elsewhere = type(method).elsewhere is not PrivacyMethod.elsewhere
    if looks_elsewhere or method.engine != "one_pass":
        raise CompositionError(
            "a method that looks at two points, or at samples one by one, needs whole parameters on every rank",
            found=f"{type(method).__name__}, privacy.engine={method.engine}, parameters sharded by FSDP2",
            allowed="privacy=dp_sgd or ngp with privacy.engine=one_pass, or trainer.strategy=ddp",
            remedy="Use trainer=ddp.",
        )


def sharded(strategy: str) -> CompositionError:
    """The refusal of a strategy, by its name."""
    return CompositionError(
        "a private run needs whole parameters on every rank, and exchanges nothing but sums with noise",
        found=f"trainer.strategy={strategy}",
        allowed="one device, or trainer.strategy=ddp",
        remedy="Use trainer=ddp; privacy.max_physical_batch decides how many samples must fit in memory at once.",
    )


def check_continuation(before: Ledger, now: Ledger) -> None:
    """Refuses to add up what means different things.

    Args:
        before: The ledger of the first part of a run.
        now: That of the rest.

    Raises:
        CheckpointError: They mean different things by neighbouring data, or draw batches in different ways.
    """
    if (before.adjacency, before.sampling) != (now.adjacency, now.sampling):
        raise CheckpointError(
            "the two parts of this run cannot be accounted together",
            found=f"sampling={now.sampling} ({now.adjacency})",
            allowed=f"sampling={before.sampling} ({before.adjacency}), as in the first part",
            remedy=f"Resume with privacy.sampling={before.sampling}.",
        )


def check_budget(ledger: Ledger, target: float | None, steps: int) -> None:
    """Refuses to go on where the rest of a run would exceed its target.

    Args:
        ledger: Of a run that goes on: what was spent, and the plan of the whole.
        target: Epsilon; ``None`` where the noise was given instead.
        steps: Of the whole run.

    Raises:
        CheckpointError: It would.
    """
    if target is None or not ledger.is_private or ledger.planned_epsilon <= target * (1 + _SLACK):
        return
    raise CheckpointError(
        "what is left of the privacy budget does not suffice for this run",
        found=f"epsilon {ledger.epsilon():.4g} spent, {ledger.planned_epsilon:.4g} after {steps:,} steps, with the "
        f"noise {ledger.noise:.4g} of the first part",
        allowed=f"epsilon {target:g}",
        remedy="Train for fewer steps, or raise privacy.epsilon knowingly.",
    )


def check_finite(named: Iterable[tuple[str, Tensor]]) -> None:
    """Refuses to save parameters that are not finite, which no noise of finite size explains.

    Args:
        named: Parameters and their names.

    Raises:
        NonFiniteLoss: One is not finite.
    """
    broken = [name for name, p in named if not bool(p.isfinite().all())]
    if broken:
        raise NonFiniteLoss(
            "the parameters are not finite any more",
            found=f"{broken[0]} and {len(broken) - 1} others" if len(broken) > 1 else broken[0],
            allowed="finite parameters",
            remedy="Lower optimizer.lr; noise of high dimension asks for smaller steps than plain gradients do.",
        )


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers of a module, those of metrics and single counters left out."""
    from torchmetrics import Metric

    return {
        f"{prefix}.{name}".lstrip("."): buffer.detach().clone()
        for prefix, owner in module.named_modules()
        if not isinstance(owner, Metric)
        for name, buffer in owner._buffers.items()
        if buffer is not None and (buffer.numel() > 1 or buffer.is_floating_point())
    }


def check_buffers(before: dict[str, Tensor], module: nn.Module) -> None:
    """Refuses a module that keeps something of a batch in its buffers: nothing bounds what it keeps of a sample.

    Args:
        before: From :func:`buffers_of`, before a batch was evaluated.
        module: After it was.

    Raises:
        CompositionError: A buffer has changed.
    """
    now = buffers_of(module)
    moved = [name for name, buffer in before.items() if name in now and not _same(buffer, now[name])]
    if moved:
        raise CompositionError(
            "a private run cannot have buffers that training moves: they keep the data, without noise",
            found=", ".join(moved),
            allowed="buffers that stay, and counters",
            remedy="Keep no running statistics of the data, codebooks or the like; or compute them without it.",
        )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def no_horizon(max_epochs: int | None) -> CompositionError:
    """The refusal of a run without an end."""
    return CompositionError(
        "a private run must know how long it is: its noise is calibrated for all of its steps",
        found=f"trainer.max_epochs={max_epochs} trainer.max_steps=-1",
        allowed="a number of epochs or of steps",
        remedy="Set trainer.max_epochs or trainer.max_steps.",
    )
