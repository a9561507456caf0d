"""Negative-away steer attention: a text to stay away from, without another evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.generation import Denoiser, Guidance, Moment, Sampler, State
from lightrail.generation.guidance import Run
from lightrail.options import non_negative
from lightrail.traits import Traits

__all__ = ["NASA", "steering"]


class NASA(Guidance):
    """Takes what attends to an unwanted text away from what attends to the text, in each cross-attention.

    Z = softmax(Q K₊ᵀ/√d) V₊ − α softmax(Q K₋ᵀ/√d) V₋, before the projection that leaves the attention

    K₊ and V₊ are of the text that is asked for, K₋ and V₋ of the unwanted one. Only the cross-attention is done twice,
    so a model of a single step can be told what to leave out. Samples without a text, as those that ``cfg`` compares
    with, are left as they are.

    Args:
        prompt: The unwanted text; it must be given.
        alpha: α, at least 0; 0 is the run without it; near 1 little of the text itself is left.

    Raises:
        ConfigurationError: An option is out of range.
        CompositionError: The model reads no text, or mixes it with the image in other ways than by cross-attention, as
            Stable Diffusion 3 does; or no text is asked for.

    Deviations:
        None known in the rule; the default of α is not the paper's.

    Example:
        >>> from lightrail.generation import GaussianMixture
        >>> from lightrail_generation.samplers.ddim import DDIM
        >>> try:
        ...     NASA("blurry").prepare(GaussianMixture(), DDIM())
        ... except CompositionError as error:
        ...     print(error.what)
        GaussianMixture reads no text

    Reference:
        V. Nguyen, A. Nguyen, T. Dao, K. Nguyen, C. Pham, T. Tran and A. Tran (2024), SNOOPI: Supercharged One-step
        Diffusion Distillation with Proper Guidance, arXiv 2412.02687.
    """

    traits: ClassVar[Traits] = Traits(
        rule="Z = softmax(Q K₊ᵀ/√d) V₊ − α softmax(Q K₋ᵀ/√d) V₋",
        paper="V. Nguyen, A. Nguyen, T. Dao, K. Nguyen, C. Pham, T. Tran, A. Tran, 2024, SNOOPI: Supercharged One-step "
        "Diffusion Distillation with Proper Guidance, arXiv 2412.02687",
        example={"prompt": "blurry"},
    )

    def __init__(self, prompt: str | None = None, alpha: float = 0.3) -> None:
        if not isinstance(prompt, str):
            raise ConfigurationError(
                "the unwanted text is no text",
                found=f"prompt={prompt!r}",
                allowed="one text",
                remedy='Set guidance.nasa.prompt="blurry, low quality".',
            )
        non_negative(alpha=alpha)
        self.prompt = prompt
        self.alpha = alpha

    def prepare(self, denoiser: Denoiser, sampler: Sampler) -> None:
        if getattr(denoiser, "text", None) is None:
            raise CompositionError(
                f"{type(denoiser).__name__} reads no text",
                found=f"{type(denoiser).__name__} with nasa",
                allowed="a diffusers pipeline from text to images",
                remedy="Leave nasa out, or set denoiser=diffusers with the folder of such a pipeline.",
            )
        if not cross_attentions(denoiser.network):
            raise CompositionError(
                f"{type(denoiser.network).__name__} has no cross-attention to a text",
                found=f"{type(denoiser.network).__name__} with nasa",
                allowed="a network with cross-attention, as of Stable Diffusion 1, 2 and XL",
                remedy="Leave nasa out; with models of several steps cfg can be used.",
            )

    def around(self, run: Run, start: Tensor, moment: Moment) -> State:
        if not self.alpha:
            return run(start)
        denoiser, condition = moment.denoiser, moment.condition
        if condition is None:
            raise CompositionError(
                "there is no text to steer towards",
                found="generate.prompt=null with nasa",
                allowed="a text, or a list of texts",
                remedy='Write generate.prompt="a text".',
            )
        unwanted = denoiser.condition({"prompt": self.prompt}, [0])
        nothing = denoiser.unconditional(condition)
        assert unwanted is not None
        assert nothing is not None
        with steering(denoiser.network, unwanted["prompt"], nothing["prompt"][:1], self.alpha):
            return run(start)


def cross_attentions(network: nn.Module) -> list[Any]:
    """A network's attentions to a text, as diffusers builds them."""
    found = []
    for module in network.modules():
        leaves = getattr(module, "to_out", None)
        if getattr(module, "is_cross_attention", False) and isinstance(leaves, nn.ModuleList):
            found.append(module)
    return found


@contextmanager
def steering(network: nn.Module, unwanted: Tensor, nothing: Tensor, alpha: float) -> Iterator[None]:
    """While it lasts, each cross-attention stays away from a text; afterwards the network is what it was.

    Args:
        network: With cross-attention as diffusers builds it.
        unwanted: The text to stay away from, as the network reads it, ``[1, L, D]``.
        nothing: The text that says nothing, ``[1, L, D]``; samples with it are left as they are.
        alpha: α.
    """
    with ExitStack() as stack:
        for module in cross_attentions(network):
            steered = _Steered(module, unwanted, nothing, alpha)
            stack.callback(module.register_forward_pre_hook(steered.enter, with_kwargs=True).remove)
            stack.callback(module.to_out[0].register_forward_pre_hook(steered.leave).remove)
        yield


class _Steered:
    """One cross-attention: attends to the unwanted text first, and takes that away where the attention leaves."""

    def __init__(self, module: Any, unwanted: Tensor, nothing: Tensor, alpha: float) -> None:
        self.module = module
        self.unwanted = unwanted
        self.nothing = nothing
        self.alpha = alpha
        self.is_recording = False
        self.taken: Tensor | None = None

    def enter(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        text = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
        if text is None:
            return
        others = {name: each for name, each in kwargs.items() if name not in ("hidden_states", "attention_mask")}
        others["encoder_hidden_states"] = self.unwanted.to(text).expand(len(text), -1, -1)
        self.is_recording = True
        try:
            module.forward(states, **others)
        finally:
            self.is_recording = False
        says_something = (text != self.nothing.to(text)).flatten(1).any(1).view(-1, 1, 1)
        assert self.taken is not None
        self.taken = torch.where(says_something, self.alpha * self.taken, 0.0).to(self.taken.dtype)

    def leave(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.is_recording:
            self.taken = args[0]
            return None
        taken, self.taken = self.taken, None
        return args if taken is None else (args[0] - taken, *args[1:])
