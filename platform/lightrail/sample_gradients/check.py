"""The proof at run time: gradients from one pass against those of samples evaluated one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointError

from lightrail.errors import CompositionError
from lightrail.sample_gradients.gradients import SampleGradients
from lightrail.sample_gradients.operands import DROPOUT_OF_RECURRENT, RECURRENT, transparent
from lightrail.sample_gradients.paths import PROBED, Path, survey, take
from lightrail.sample_gradients.recording import Recording
from lightrail.step.batches import leading_size

__all__ = ["TOLERANCE", "learn", "refuse_unseen"]

TOLERANCE = 1e-3  # relative; what mixes samples is wrong by far more, and rounding by far less
_COMPARED = 8  # samples: where a few happen to be alike, some that mix would pass
_TOLERANCE_IN_HALF = 5e-2


def learn(
    evaluate: Callable[[Any], Tensor],
    params: Sequence[Tensor],
    batch: Any,
    *,
    is_mean: bool = True,
    is_half: bool = False,
) -> tuple[Path, float]:
    """Learns where samples lie, and proves it: a few samples together must give what each of them gives alone.

    Random numbers are drawn once and repeated for each sample; dropout is left out of the comparison.

    Args:
        evaluate: The loss of a batch.
        params: The parameters.
        batch: At least one sample.
        is_mean: Whether the loss is a mean over samples; otherwise their sum.
        is_half: Whether ``evaluate`` computes in half precision, whatever the parameters are in.

    Returns:
        The path, and the largest relative difference between the two gradients of a sample; NaN where none of them
        was finite, which proves nothing.

    Raises:
        CompositionError: They differ: the loss of a sample depends on the others, or is no mean.
    """
    batch = take(batch, _probes(batch))
    path = survey(evaluate, params, batch)
    drawn = _Drawn()
    together, owners = _together(evaluate, params, path, batch, drawn, is_mean)
    found = _compared(together, evaluate, params, batch, drawn.numbers)
    if found.size.numel() and not found.is_finite.any():
        return path, float("nan")
    allowed = _allowed(params, is_half)
    wrong = found.wrong(params, allowed)
    if wrong:
        path = _interleaved(path, owners, wrong)
        together, _ = _together(evaluate, params, path, batch, _Repeated(drawn.numbers), is_mean)
        found = _compared(together, evaluate, params, batch, drawn.numbers)
    worst = _worst(found.apart, found.size)
    if not worst <= allowed:
        raise _mixing(found, worst)
    return path, worst


@dataclass(frozen=True)
class _Compared:
    """Squared lengths, one a parameter and sample ``[P, B]``; zero for a sample that is not finite.

    Args:
        apart: Of the difference of what a sample gives among others and alone.
        apart_as_sum: The same, were the loss a sum over samples.
        size: Of what it gives alone.
        is_finite: Which samples are ``[B]``.
    """

    apart: Tensor
    apart_as_sum: Tensor
    size: Tensor
    is_finite: Tensor

    def wrong(self, params: Sequence[Tensor], allowed: float) -> set[int]:
        """The parameters whose gradients are not those of the samples alone, by identity."""
        slack = torch.tensor([1e-14 * p.numel() for p in params], dtype=torch.float64)
        is_wrong = ~(self.apart <= allowed**2 * self.size + slack[:, None]).all(1)
        return {id(p) for p, wrong in zip(params, is_wrong.tolist(), strict=True) if wrong}


def _probes(batch: Any) -> list[int]:
    """A few samples, those first that are finite: one that is not proves nothing."""
    size = leading_size(batch) or 1
    finite = torch.ones(size, dtype=torch.bool)
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == size and leaf.is_floating_point():
            finite &= leaf.detach().reshape(size, -1).isfinite().all(1).cpu()
    order = (~finite).to(torch.int8).argsort(stable=True).tolist()[: max(1, int(finite.sum()))]
    return [order[i % len(order)] for i in range(max(PROBED[0], min(_COMPARED, len(order))))]


def _together(
    evaluate: Callable[[Any], Tensor],
    params: Sequence[Tensor],
    path: Path,
    batch: Any,
    numbers: TorchFunctionMode,
    is_mean: bool,
) -> tuple[SampleGradients, dict[int, list[Tensor]]]:
    recording = Recording(params, path)
    with torch.enable_grad():
        with numbers, recording:
            loss = evaluate(batch)
        try:
            loss.backward()
        except CheckpointError as error:
            raise _unseen("activation checkpointing, which evaluates a second time") from error
    pieces = recording.pieces()
    refuse_unseen(params)
    scale = float(leading_size(batch) or 1) if is_mean else 1.0
    return SampleGradients(params, pieces, scale), recording.owners


def _compared(
    together: SampleGradients,
    evaluate: Callable[[Any], Tensor],
    params: Sequence[Tensor],
    batch: Any,
    numbers: Sequence[Tensor],
) -> _Compared:
    """One sample after the other, so that no more than two gradients are held at a time."""
    count = len(together)
    shape = (len(params), count)
    apart, apart_as_sum, size = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    is_finite = torch.ones(count, dtype=torch.bool)
    for i in range(count):
        with torch.enable_grad():
            with _Repeated(numbers, i):
                loss = evaluate(take(batch, [i]))
            alone = torch.autograd.grad(loss, list(params), allow_unused=True)
        is_finite[i] = all(bool(each.isfinite().all()) for each in alone if each is not None)
        if not is_finite[i]:
            continue  # it is left out of any sum, and proves nothing
        chosen = torch.zeros(len(together), device=params[0].device)
        chosen[i] = 1
        for place, (mine, other) in enumerate(zip(together.weighted_sum(chosen), alone, strict=True)):
            other = torch.zeros_like(mine) if other is None else other.to(mine.dtype)
            apart[place, i] = (mine - other).square().sum(dtype=torch.float64)
            apart_as_sum[place, i] = (mine / count - other).square().sum(dtype=torch.float64)
            size[place, i] = other.square().sum(dtype=torch.float64)
    return _Compared(apart, apart_as_sum, size, is_finite)


def _interleaved(path: Path, owners: dict[int, list[Tensor]], wrong: set[int]) -> Path:
    """With samples lying the other way wherever shapes leave a choice and the result was wrong.

    What was made of parameters is no parameter itself, so its uses are all in doubt.
    """
    in_doubt = {
        index for index, found in owners.items() if any(id(each) in wrong or not each.is_leaf for each in found)
    }
    return tuple(
        call.interleaved() if index in in_doubt and call.has_choice else call for index, call in enumerate(path)
    )


def refuse_unseen(params: Sequence[Tensor]) -> None:
    """Refuses a gradient that reached a parameter past the recording, and would not have been clipped."""
    unseen = [p for p in params if p.grad is not None]
    if unseen:
        for p in unseen:
            p.grad = None
        raise _unseen(
            f"a gradient on a parameter of shape {tuple(unseen[0].shape)} from outside the watched operations: "
            "activation checkpointing, a scripted part, or a custom autograd function"
        )


def _unseen(found: str) -> CompositionError:
    return CompositionError(
        "a parameter was used where its samples' gradients cannot be seen",
        found=found,
        allowed="operations of torch, evaluated eagerly",
        remedy="Switch that off, or evaluate samples one by one with privacy.engine=one_by_one (slow).",
    )


def _worst(apart: Tensor, size: Tensor) -> float:
    """The largest over samples of ‖g_i - g'_i‖ / ‖g'_i‖; infinite where one is not a number."""
    both = apart.sum(0).sqrt() / size.sum(0).sqrt().clamp_min(1e-12)
    return float(both.nan_to_num(nan=float("inf")).max()) if both.numel() else 0.0


def _mixing(found: _Compared, worst: float) -> CompositionError:
    is_sum = _worst(found.apart_as_sum, found.size) <= TOLERANCE
    count = found.size.shape[1]
    told = f"the gradients of {count} samples evaluated together and alone differ by {worst:.2g} of their length"
    if is_sum:
        return CompositionError(
            "the loss is the sum over the samples of a batch, not their mean",
            found=told,
            allowed="a mean, or privacy.loss=sum",
            remedy="Say privacy.loss=sum, or let the loss average.",
        )
    return CompositionError(
        "the loss of a sample depends on the other samples of its batch",
        found=told,
        allowed="a loss that is the mean over samples of what each gives alone",
        remedy="Look for BatchNorm, contrastive losses, in-batch negatives, class weights that are normalised over the "
        "batch, means over tokens of sequences of unequal length. Nothing that mixes samples can be private as it is.",
    )


def _allowed(params: Sequence[Tensor], is_half: bool) -> float:
    """Half precision rounds sums over three samples and over one differently."""
    is_half = is_half or any(p.dtype in (torch.bfloat16, torch.float16) for p in params)
    return _TOLERANCE_IN_HALF if is_half or any(map(torch.is_autocast_enabled, ("cpu", "cuda"))) else TOLERANCE


_FACTORIES = {
    torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal, torch.bernoulli, torch.multinomial,
    torch.rand_like, torch.randn_like, torch.randint_like, torch.poisson,
    Tensor.normal_, Tensor.uniform_, Tensor.bernoulli_, Tensor.exponential_, Tensor.random_, Tensor.multinomial,
    Tensor.bernoulli, Tensor.log_normal_, Tensor.geometric_, Tensor.cauchy_,
}  # fmt: skip
_DROPOUTS = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
    torch.dropout, torch.feature_dropout, torch.alpha_dropout, torch.feature_alpha_dropout,
}  # fmt: skip


class _WithoutDropout(TorchFunctionMode):
    """Masks that cannot be told sample by sample are left out; every other random number is ``_drawn``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DROPOUTS:
            return args[0]
        inside = transparent(func)
        if inside is not None:
            with self:
                return inside(*args, **kwargs)
        if func in RECURRENT and len(args) > DROPOUT_OF_RECURRENT:
            args = (*args[:DROPOUT_OF_RECURRENT], 0.0, *args[DROPOUT_OF_RECURRENT + 1 :])
        if func is F.scaled_dot_product_attention:
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            elif "dropout_p" in kwargs:
                kwargs["dropout_p"] = 0.0
        found = func(*args, **kwargs)
        return self._draw(found) if func in _FACTORIES and isinstance(found, Tensor) else found

    def _draw(self, found: Tensor) -> Tensor:
        raise NotImplementedError


class _Drawn(_WithoutDropout):
    """Keeps the random numbers that are drawn for all samples together."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[Tensor] = []

    def _draw(self, found: Tensor) -> Tensor:
        self.numbers.append(found.detach().clone())
        return found


class _Repeated(_WithoutDropout):
    """Draws what was drawn for all samples, or for one of them among the others."""

    def __init__(self, numbers: Sequence[Tensor], sample: int = 0) -> None:
        super().__init__()
        self._numbers = iter(numbers)
        self._sample = sample

    def _draw(self, found: Tensor) -> Tensor:
        kept = next(self._numbers, None)
        if kept is None or kept.dim() != found.dim():
            return found
        moved = [axis for axis in range(found.dim()) if kept.shape[axis] != found.shape[axis]]
        with torch.no_grad():
            if not moved:
                return found.copy_(kept)
            axis = moved[0]
            rows = found.shape[axis]
            return found.copy_(kept.narrow(axis, self._sample * rows, rows)) if len(moved) == 1 else found
