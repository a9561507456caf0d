"""DiceSGD: what clipping cuts off is kept, and fed back clipped, so that clipping leaves no bias."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from lightrail.errors import ConfigurationError
from lightrail.options import one_of, positive
from lightrail.privacy import PrivacyMethod, Release
from lightrail.sample_gradients import SampleGradients
from lightrail.traits import Claim, Traits
from lightrail_privacy.clipping import flat_factors

if TYPE_CHECKING:
    from lightrail.run.run import Run

__all__ = ["DiceSGD", "charged_sensitivity", "clipped", "next_error"]


def charged_sensitivity(C1: float, C2: float, G: float) -> float:
    r"""What the theorem charges a step for, in units of the sum over samples.

    .. math:: \sqrt{C_1^2 + 2 \min(C_2, G)^2}

    Args:
        C1: Norm to which the gradient of a sample is clipped, greater than 0.
        C2: Norm to which the feedback is clipped, greater than 0.
        G: Norm that no sample's gradient exceeds, greater than 0.

    Returns:
        The length that the noise multiplier is relative to.

    Example:
        >>> round(charged_sensitivity(1.0, 1.0, 10.0), 6), charged_sensitivity(1.0, 6.0, 2.0)
        (1.732051, 3.0)
    """
    return math.sqrt(C1**2 + 2 * min(C2, G) ** 2)


def clipped(e: Sequence[Tensor], C: float) -> list[Tensor]:
    r"""One vector, in parts, shortened to at most C.

    .. math:: \min(1, C / \|e\|) \, e

    Args:
        e: The parts.
        C: Greater than 0.

    Returns:
        New tensors.

    Example:
        >>> [part.tolist() for part in clipped([torch.tensor([3.0]), torch.tensor([4.0])], 10.0)]
        [[3.0], [4.0]]
    """
    norm = torch.stack([part.norm() for part in e]).norm()
    factor = flat_factors(norm, C)
    return [factor * part for part in e]


def next_error(e: Sequence[Tensor], fed_back: Sequence[Tensor], cut_off: Sequence[Tensor], B: int) -> list[Tensor]:
    r"""What is owed after a step: what was owed, less what was fed back, and what clipping cut off meanwhile.

    .. math:: e_{t+1} = e_t - \mathrm{clip}(e_t, C_2) + \frac1B \sum_i (g_i - \mathrm{clip}(g_i, C_1))

    Args:
        e: :math:`e_t`.
        fed_back: :math:`\mathrm{clip}(e_t, C_2)`.
        cut_off: The sum.
        B: Expected records of the step.

    Returns:
        :math:`e_{t+1}`, new tensors.
    """
    return [a - b + c / B for a, b, c in zip(e, fed_back, cut_off, strict=True)]


class DiceSGD(PrivacyMethod):
    r"""Clips the gradient of each sample, and gives back in later steps what the clipping cut off.

    .. math::

        g = \frac1B \sum_{i \in S} \mathrm{clip}(g_i, C_1) + \mathrm{clip}(e_t, C_2) + w, \qquad
        w \sim \mathcal{N}\Big(0, \frac{z^2 (C_1^2 + 2 \min(C_2, G)^2)}{B^2} I\Big)

    with :math:`e_0 = 0` and :math:`e_{t+1} = e_t + \frac1B \sum_i g_i - (g - w)`.

    **The guarantee is conditional.** The feedback e is a sum over all earlier batches, and no noise is ever added to
    it. The theorem that gives epsilon assumes that no sample's gradient is longer than G, it covers the released
    parameters alone, and a step of its proof, which takes gradients at different iterates for equal, has been
    questioned. Without it, one record can move a step by C1 + 2 C2 B, and batches that are drawn at random amplify
    nothing. It therefore asks for ``accounting=paper`` and ``assume_grad_bound=G``, and says in the ledger what epsilon
    rests on. ``dp_sgd`` needs none of this.

    Args:
        clip_norm: C1, greater than 0.
        feedback_norm: C2, at least C1; by default C1.
        accounting: ``paper``: that the conditional guarantee will do. It must be given.
        assume_grad_bound: G, greater than 0: the norm that no sample's gradient exceeds. It must be given.

    Raises:
        ConfigurationError: An option is out of range, or the condition of the guarantee has not been accepted.

    Guarantees:
        Without noise, and with C1 above the norm of every gradient, e stays 0 and the steps are those of ``dp_sgd``. A
        sample whose gradient is not finite adds nothing. The feedback is private and stands in no checkpoint, as
        checkpoints are what is released: a resumed run starts again with e = 0.

    Deviations:
        A gradient longer than G adds to the feedback as if its length were G, so that the assumption of the theorem is
        kept by force rather than trusted; within G nothing changes. The expected batch stands for the true one, which
        is private. The authors' code keeps the feedback in units of the sum, where a norm of C2 is too small by the
        factor B for the bias to vanish; it leaves the feedback out of the first step, shrinks it to about C2 after
        each, and adds noise relative to :math:`C_1 \sqrt{1 + 2 C_2 / C_1}`. This is the algorithm as printed.

    Example:
        >>> from lightrail.sample_gradients.pieces import Piece
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> gradients = SampleGradients([w], [[Piece(w, torch.tensor([[3.0, 4.0], [0.5, 0.0]]))]])
        >>> method = DiceSGD(accounting="paper", assume_grad_bound=10.0, noise=1.0)
        >>> [total.tolist() for total in method.contribution(gradients, None)]  # what stays, and what is cut off
        [[1.100000023841858, 0.800000011920929], [2.4000000953674316, 3.200000047683716]]

    Reference:
        X. Zhang, Z. Bu, Z. S. Wu and M. Hong (2024), Differentially Private SGD Without Clipping Bias: An
        Error-Feedback Approach, ICLR, arXiv 2311.14632, algorithm 1 (DiceSGD).
    """

    traits: ClassVar[Traits] = Traits(
        rule="g = Σ clip(g_i, C1)/B + clip(e, C2) + z √(C1² + 2 min(C2, G)²) N(0, I)/B; e ← e + Σ g_i/B − (g − noise)",
        paper="X. Zhang, Z. Bu, Z. S. Wu, M. Hong, 2024, Differentially Private SGD Without Clipping Bias: An "
        "Error-Feedback Approach, arXiv 2311.14632",
        state=1,
        needs_per_sample_gradients=True,
        example={"accounting": "paper", "assume_grad_bound": 10.0},
        exceptions={
            "shows_nothing_but_what_is_released": "the feedback is never made private: its guarantee is conditional",
            "resumes_with_its_ledger": "the feedback is private, so that no checkpoint holds it",
        },
        verified=(
            "Mean of 150 zeros and 50 eights, which is 2, by whole batches without noise: clipping at 1 and 0.1 ends "
            "at 0.333 and 0.033; with the feedback both end at 2.000, the second after swinging between 0.4 and 2.5.",
        ),
        claim=Claim(
            sentence="a lower loss than DP-SGD's at the same epsilon and clipping norm",
            baseline="dp_sgd",
            problems=("private_digits",),
            options={"epsilon": 3.0, "accounting": "paper", "assume_grad_bound": 11.4, "clip_norm": 0.1},
            baseline_options={"epsilon": 3.0, "clip_norm": 0.1},
        ),
    )
    # A batch of a fixed order would leave its mark in the feedback of a whole epoch.
    samplings: ClassVar[tuple[str, ...]] = ("poisson", "full")

    def __init__(
        self,
        *,
        clip_norm: float = 1.0,
        feedback_norm: float | None = None,
        accounting: Literal["paper"] | None = None,
        assume_grad_bound: float | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        positive(clip_norm=clip_norm)
        C2 = clip_norm if feedback_norm is None else feedback_norm
        _check_feedback(C2, clip_norm)
        if accounting is not None:
            one_of(("paper",), accounting=accounting)
        if accounting is None or assume_grad_bound is None:
            raise _not_accepted(accounting, assume_grad_bound)
        positive(assume_grad_bound=assume_grad_bound)
        self.clip_norm, self.feedback_norm = clip_norm, C2
        self.accounting, self.assume_grad_bound = accounting, assume_grad_bound
        self._error: list[Tensor] | None = None

    @property
    def clipping(self) -> str:
        return f"flat, norm {self.clip_norm:g}; feedback of what is cut off, norm {self.feedback_norm:g}"

    @property
    def assumptions(self) -> list[str]:
        G = self.assume_grad_bound
        return [
            "Conditional: epsilon is what the theorem of DiceSGD says of the released parameters. Its feedback, a sum "
            "over earlier batches, is never made private, and a step of the proof, which takes gradients at different "
            "iterates for equal, has been questioned.",
            f"Conditional: no sample's gradient is longer than {G:g}; longer ones add to the feedback as if they were "
            f"{G:g} long.",
            "The feedback is private: no checkpoint holds it, and a resumed run starts again without.",
        ]

    def wrap(self, run: Run) -> Run:
        run = super().wrap(run)
        notes = [*run.notes, "privacy: the guarantee of dice_sgd is conditional; privacy.json says on what it rests"]
        if run.resumed is not None:
            notes.append(
                "privacy: the feedback of dice_sgd starts again at zero: it is private, and no checkpoint has it"
            )
        return dataclasses.replace(run, notes=notes)

    def contribution(self, here: SampleGradients, there: SampleGradients | None) -> list[Tensor]:
        norms = here.norms()
        kept = flat_factors(norms, self.clip_norm)
        whole = flat_factors(norms, max(self.assume_grad_bound, self.clip_norm))
        return [*here.weighted_sum(kept), *here.weighted_sum(whole - kept)]

    def gradient(self, sums: list[Tensor], params: Sequence[Tensor], release: Release) -> list[Tensor]:
        kept, cut_off = sums[: len(params)], release.summed(sums[len(params) :])
        e = [torch.zeros_like(each) for each in cut_off] if self._error is None else self._error
        sensitivity = charged_sensitivity(self.clip_norm, self.feedback_norm, self.assume_grad_bound)
        noisy = release(kept, sensitivity=sensitivity, noise=release.noise)
        fed_back = clipped(e, self.feedback_norm)
        self._error = next_error(e, fed_back, cut_off, release.batch)
        return [each / release.batch + part for each, part in zip(noisy, fed_back, strict=True)]

    def nothing(self, params: Sequence[Tensor]) -> list[Tensor]:
        return [*super().nothing(params), *super().nothing(params)]


def _check_feedback(C2: float, C1: float) -> None:
    positive(feedback_norm=C2)
    if C2 < C1:
        raise ConfigurationError(
            "feedback that is clipped below the gradients never catches up with what they lose",
            found=f"feedback_norm={C2:g} with clip_norm={C1:g}",
            allowed=f"feedback_norm of at least {C1:g}",
            remedy="Leave feedback_norm out for that of clip_norm, or raise it.",
        )


def _not_accepted(accounting: str | None, bound: float | None) -> ConfigurationError:
    given = {"accounting": accounting, "assume_grad_bound": bound}
    return ConfigurationError(
        "the guarantee of dice_sgd is conditional, and the condition has not been accepted",
        found=", ".join(f"no {name}" for name, value in given.items() if value is None),
        allowed="accounting=paper together with assume_grad_bound=G: epsilon then holds if the paper's theorem does, "
        "and for gradients of single samples no longer than G; its feedback is never made private",
        remedy="Add privacy.accounting=paper privacy.assume_grad_bound=G, or take privacy=dp_sgd, which needs neither.",
    )
