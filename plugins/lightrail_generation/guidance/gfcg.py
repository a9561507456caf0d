"""Gradient-free classifier guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightrail.errors import CompositionError
from lightrail.generation import Denoiser, Generated, Guidance, Moment, Prediction, Sampler
from lightrail.traits import SamplingClaim, Traits
from lightrail_generation.guidance.affine import NoiseInterval, affine, check_scale, condition_of
from lightrail_generation.guidance.judges import Classifier, LoadRun

__all__ = ["GFCG", "reference_and_doubt"]

_TRAINED = {
    "digits": ("experiment=digits_diffusion", "trainer.max_epochs=20"),
    "judge": ("trainer.max_epochs=5",),
}
_GFCG = ("+guidance=[gfcg]", "guidance.gfcg.run={judge}")
_COUNT = ("generate.count=1000", "generate.batch_size=500")
_CLAIMS = tuple(
    SamplingClaim(
        f"of a briefly trained model, at a scale of {scale} {promise} than with classifier-free guidance at {other}",
        metric=metric,
        overrides=("run={digits}", *_GFCG, f"guidance.gfcg.scale={scale}", *_COUNT),
        baseline=("run={digits}", "+guidance=[cfg]", f"guidance.cfg.scale={other}", *_COUNT),
        is_higher_better=is_higher_better,
        trained=_TRAINED,
    )
    for scale, other, metric, promise, is_higher_better in (
        (6, 1.5, "accuracy", "more samples are of the wanted class", True),
        (6, 1.5, "frechet", "samples are nearer to the data", False),
        (3, 3, "accuracy", "more samples are of the wanted class", True),
    )
)


def reference_and_doubt(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest class other than the one that is wanted, ``[B]``, and 1 − p(wanted), ``[B]``.

    Args:
        logits: ``[B, C]``.
        labels: The wanted classes, ``[B]``.

    Example:
        >>> logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
        >>> reference_and_doubt(logits, torch.tensor([1]))
        (tensor([0]), tensor([0.7000]))
    """
    is_wanted = torch.nn.functional.one_hot(labels.to(logits.device), logits.shape[1]).bool()
    reference = logits.masked_fill(is_wanted, -torch.inf).argmax(1)
    # The others' share, summed, where 1 − p would lose it.
    doubt = logits.softmax(1).masked_fill(is_wanted, 0).sum(1)
    return reference, doubt


class GFCG(Guidance):
    """Moves away from the class that a classifier confuses the sample with, the more so the less it is convinced.

    p = softmax c(D_y),  r = argmax_{k≠y} p_k,  w_t = 1 + (w − 1)(1 − p_y),  D = D_r + w_t (D_y − D_r)

    The classifier c sees the predicted data in the user's units, and no gradient goes through it. Two evaluations, of
    the wanted class and of the reference, and one forward pass of the classifier.

    Args:
        run: A run that trained the classifier (a folder, a checkpoint, or ``latest``), or
        function: a callable from samples to logits ``[B, C]``, or its dotted path.
        scale: w, at least 0, the scale where the classifier gives the wanted class no chance; 1 is no guidance.
        rho_low: It acts at levels with rho_low < σ/α ≤ rho_high; at least 0.
        rho_high: The noisiest level, above ``rho_low``; ``None`` for all.
        load_run: Loads a run; supplied by the platform.

    Raises:
        ConfigurationError: An option is out of range, or neither or both of ``run`` and ``function`` are given.
        CompositionError: The model knows fewer than two classes, the classifier other ones, or samples have no label.

    Deviations:
        Written from the paper's summary: a class that the classifier is confused with, and a scale that follows its
        probabilities, are the paper's; that the scale is linear in 1 − p_y, and 1 where the classifier is sure, is
        chosen here. Behind other guidance in a chain, D_y is what that made: ``[autoguidance, gfcg]`` joins the two at
        one evaluation more, where the paper lets the weaker model answer for the reference class.

    Example:
        >>> from lightrail.generation import GaussianMixture, sample
        >>> from lightrail_generation.guidance.mixture_classifier import MixtureClassifier
        >>> from lightrail_generation.samplers.ddim import DDIM
        >>> from lightrail_generation.time_grids.uniform import Uniform
        >>> mixture, sampler, guidance = GaussianMixture(), DDIM(steps=10), GFCG(function=MixtureClassifier())
        >>> grid, label = sampler.grid(mixture.path, Uniform()), {"label": torch.tensor([0, 1])}
        >>> sample(mixture, sampler, grid, range(2), condition=label, guidance=[guidance]).evaluations
        20

    Reference:
        R. Shenoy, Z. Pan, K. Balakrishnan, Q. Cheng, Y. Jeon, H. Yang and J. Kim (2024), Gradient-Free Classifier
        Guidance for Diffusion Model Sampling, arXiv 2411.15393.
    """

    traits: ClassVar[Traits] = Traits(
        rule="D = D_r + w_t (D_y − D_r), r = argmax_{k≠y} p_k, w_t = 1 + (w − 1)(1 − p_y)",
        paper="R. Shenoy, Z. Pan, K. Balakrishnan, Q. Cheng, Y. Jeon, H. Yang, J. Kim, 2024, Gradient-Free Classifier "
        "Guidance for Diffusion Model Sampling, arXiv 2411.15393",
        example={"function": "lightrail_generation.guidance.mixture_classifier.MixtureClassifier"},
        sampling_claims=_CLAIMS,
    )

    def __init__(
        self,
        run: str | None = None,
        function: str | Callable[[Tensor], Tensor] | None = None,
        scale: float = 5.0,
        rho_low: float = 0.0,
        rho_high: float | None = None,
        load_run: LoadRun | None = None,
    ) -> None:
        check_scale(scale)
        self.scale = scale
        self.interval = NoiseInterval(rho_low, rho_high)
        self.classifier = Classifier(run, function, load_run)

    def prepare(self, denoiser: Denoiser, sampler: Sampler) -> None:
        if denoiser.classes < 2:
            raise CompositionError(
                "gfcg moves from one class to another, and this model knows too few",
                found=f"{denoiser.classes} classes",
                allowed="a model of at least two classes",
                remedy="Leave gfcg out, or train with model.num_classes.",
            )

    def is_active(self, moment: Moment) -> bool:
        return self.scale != 1 and self.interval.meets(moment.level)

    def mix(self, named: Mapping[str, Prediction], moment: Moment) -> Prediction:
        condition, cond = condition_of(moment, "gfcg"), named["cond"]
        labels: Tensor = condition["label"]
        logits = self._logits(cond.data.detach(), moment.denoiser)
        reference, doubt = reference_and_doubt(logits, labels)
        asked = {**condition, "label": reference.to(labels)}
        away = moment.predict(cond.x, cond.level, asked)
        excess: Any = self.interval.scale(self.scale, moment.level) - 1
        w = 1 + excess * doubt.to(cond.x.device, torch.float64).view(-1, *[1] * (cond.x.ndim - 1))
        return affine(away, cond, w)

    @torch.no_grad()
    def _logits(self, states: Tensor, denoiser: Denoiser) -> Tensor:
        logits = self.classifier(denoiser.decode(states)).to(torch.promote_types(states.dtype, torch.float32))
        if logits.shape[1] != denoiser.classes:
            raise CompositionError(
                "the classifier does not know the classes of the model",
                found=f"{logits.shape[1]} classes, and the model's {denoiser.classes}",
                allowed="a classifier of the same classes",
                remedy="Name one that was trained on the data of the model.",
            )
        return logits

    @torch.no_grad()
    def measure(self, generated: Generated) -> dict[str, float]:
        """``judged_accuracy``: the share of samples that its classifier takes for the class that was asked for."""
        labels = (generated.condition or {}).get("label")
        if labels is None:
            return {}
        found = torch.cat([self.classifier(part).argmax(1).cpu() for part in generated.samples.split(512)])
        return {"judged_accuracy": float((found == labels.cpu()).double().mean())}
