"""MuP: learning rates and first weights that suit a narrow model suit a wide one as well."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.options import one_of, positive
from lightrail.step import CombinedOptimizer, Transform
from lightrail.step.update_size import scales_with_gradient
from lightrail.traits import Traits, traits_of
from lightrail_optimizers.learning_rate_groups import divide_groups
from lightrail_optimizers.width_ratios import (
    Width,
    Widths,
    initial_factor,
    is_constant,
    learning_rate_factor,
    widths_beside,
    widths_by_ratio,
)

__all__ = ["MuP"]


class MuP(Transform):
    """Maximal update parametrization: what suits a narrow model, learning rate first of all, suits a wide one.

    With ``m_in`` and ``m_out`` a weight's fan-in and fan-out over those in a base model, where SGD and Adam stand for
    optimizers whose update does and does not grow with the gradient:

    ================================  ===================  ==============  ==========
    over that in the base model       first deviation      rate for SGD    for Adam
    ================================  ===================  ==============  ==========
    hidden weights                    ``1 / sqrt(m_in)``   ``m_out/m_in``  ``1/m_in``
    weights of the last layer         ``1 / m_in``         ``1/m_in``      ``1/m_in``
    the first weights, biases, gains  1                    ``m_out``       1
    ================================  ===================  ==============  ==========

    Weight decay is divided by what the learning rate is multiplied by. A last layer that shares the weights of an
    embedding divides its input by ``m_in`` instead. A module with an attribute ``attention_scale``, which is to be 1
    over the root of its heads' width, has it multiplied by its ratio to the base model's: 1/d in place of 1/sqrt(d).

    The fresh weights are scaled when the model is attached, and the optimizer's groups divided when it is made, so a
    schedule has to scale learning rates relatively, as all of lightrail's do. torch's Muon orthogonalizes its updates,
    which needs no change of its learning rate.

    Args:
        base: The narrower model that was tuned: under ``train`` the options in which it differs
            (``transform.mup.base.width=32``), in a loop of your own the module itself, with fresh weights.
        ratio: In place of ``base``, how many times wider than some base every hidden layer is, > 0, for a model that
            is a chain: the first linear layer, convolution or embedding reads the input, the last writes the output.
            Its weights are then taken to be drawn as PyTorch draws them.
        rule: ``sgd``, ``adam``, or ``auto``: as the optimizer's update does or does not grow with the gradient. For
            methods that multiply the gradient by matrices of their own (psgd, mfac) neither column is derived.
        rebuild: The model once more, with other options; given by ``train``.

    Raises:
        ConfigurationError: Neither ``base`` nor ``ratio``, or both; or an option out of range.
        CompositionError: The models differ by more than widths; a width cannot be told; an attention whose heads are
            wider cannot be rescaled; ``attach`` was not called; or the optimizer's groups cannot have learning rates
            of their own.

    Guarantees:
        A model of the base's own width is trained as without MuP, bit for bit. Which law the model draws its weights
        by (the same deviation at every width, ``fan_in^-1/2`` or ``fan_out^-1/2``) is found by comparing the models.

    Deviations:
        The published package multiplies by ``1/m_in`` in the forward pass of a last layer that it has to be given, and
        raises that layer's weights and its rate for SGD; here all of it is in the weights and rates, so that a
        checkpoint holds an ordinary model. Where the last layer is tied or attention rescaled, it holds one that needs
        MuP attached. Random biases of linear layers and convolutions are taken to be PyTorch's own, of deviation
        ``fan_in^-1/2``, and brought to the base's.

    Example:
        >>> from lightrail import TransformedOptimizer
        >>> def model(width):
        ...     return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, width), nn.Linear(width, 1))
        >>> wide = model(64)
        >>> mup = MuP(base=model(16))
        >>> mup.attach(wide)
        >>> optimizer = TransformedOptimizer(torch.optim.Adam(wide.parameters(), lr=0.01), [mup])
        >>> [(group["lr"], [tuple(p.shape) for p in group["params"]]) for group in optimizer.param_groups]
        [(0.01, [(64, 3), (64,), (64,), (1,)]), (0.0025, [(64, 64), (1, 64)])]

    Reference:
        Yang and Hu, 2021, "Feature Learning in Infinite-Width Neural Networks", arXiv:2011.14522, Table 1; for Adam
        and relative to a base model: Yang et al., 2022, "Tensor Programs V", arXiv:2203.03466, Table 3.
    """

    traits = Traits(
        rule="rate and first deviation by fan-in and fan-out over a base model's: hidden, for Adam, 1/m and 1/sqrt(m)",
        paper="Yang, Hu, 2021, Feature Learning in Infinite-Width Neural Networks, arXiv:2011.14522",
        state=0,
        needs_module=True,
        example={"ratio": 4.0},
        exceptions={"takes_any_parameters": "the parameters of that check belong to no layer, and so have no width"},
    )

    def __init__(
        self,
        base: Mapping[str, Any] | nn.Module | None = None,
        ratio: float | None = None,
        rule: Literal["auto", "sgd", "adam"] = "auto",
        rebuild: Callable[..., nn.Module] | None = None,
    ) -> None:
        one_of(("auto", "sgd", "adam"), rule=rule)
        if (base is None) == (ratio is None):
            raise ConfigurationError(
                "mup is relative to a narrower model",
                found="neither base nor ratio" if base is None else "base and ratio",
                allowed="base, the options or the module of that model; or ratio, how many times wider this one is",
                remedy="Set, for example, transform.mup.base.width=32.",
            )
        if ratio is not None:
            positive(ratio=ratio)
        if isinstance(base, Mapping) and rebuild is None:
            raise ConfigurationError(
                "mup cannot make the base model",
                found=f"base={dict(base)}, and no model to make once more with these options",
                allowed="options of the run's model, under train; in a loop of your own, or where the task makes its "
                "own model, a module",
                remedy="Pass MuP(base=narrow_model), or set transform.mup.ratio.",
            )
        self.base = base
        self.ratio = ratio
        self.rule = rule
        self.rebuild = rebuild
        self._widths: Widths | None = None

    def attach(self, module: nn.Module) -> None:
        if self._widths is not None:
            raise CompositionError(
                "mup has scaled its weights already",
                found="a second attach(module)",
                allowed="one, while the weights are fresh",
                remedy="Make a MuP for every model.",
            )
        if self.ratio is not None:
            _refuse_attention(module)
            widths, scales = widths_by_ratio(module, self.ratio), []
        else:
            base = self._base_model()
            model = _counterpart(module, base)
            widths, scales = widths_beside(model, base), _attention_scales(model, base)
        _add_others(widths, module)
        _scale_weights(widths)
        for layer, scale in scales:
            layer.attention_scale = scale  # type: ignore[assignment]
        for layer, m in widths.readouts:
            if m != 1:
                layer.register_forward_pre_hook(_Divide(m))
        widths.base.clear()
        self._widths = widths

    def _base_model(self) -> nn.Module:
        if isinstance(self.base, nn.Module):
            return self.base
        assert self.base is not None
        assert self.rebuild is not None
        return self.rebuild(**self.base)

    def prepare(self, optimizer: Optimizer) -> None:
        if isinstance(optimizer, CombinedOptimizer):
            for each in optimizer.optimizers:
                self.prepare(each)
            return
        factors = self._factors(optimizer)
        if all(factor == 1 for factor in factors.values()):
            return
        if self.rule == "auto" and traits_of(type(optimizer)).sets_step_size:
            name = type(optimizer).__name__
            raise CompositionError(
                f"{name} chooses its own step size, for which mup has no rule",
                found=f"{name}, and transform.mup.rule=auto",
                allowed="an optimizer that is given its learning rate",
                remedy="Choose another optimizer; or a rule, if the learning rates of its groups scale its steps.",
            )
        divide_groups("mup", optimizer, factors)

    def _factors(self, optimizer: Optimizer) -> dict[Tensor, float]:
        widths = {p: self._width(p) for group in optimizer.param_groups for p in group["params"]}
        if self.rule == "auto" and isinstance(optimizer, getattr(torch.optim, "Muon", ())):
            return dict.fromkeys(widths, 1.0)
        grows = scales_with_gradient(optimizer) if self.rule == "auto" else self.rule == "sgd"
        return {p: learning_rate_factor(width, grows) for p, width in widths.items()}

    def _width(self, p: Tensor) -> Width:
        if self._widths is None or p not in self._widths.of:
            raise CompositionError(
                "mup has not seen a parameter of the optimizer",
                found="no attach(module) before the optimizer"
                if self._widths is None
                else f"a parameter of shape {tuple(p.shape)} that is not the module's",
                allowed="parameters of the module that attach was given",
                remedy="In your own loop, call transform.attach(model) first, and optimize that model's parameters.",
            )
        return self._widths.of[p]


class _Divide:
    """Divides what a layer reads."""

    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0] / self.by, *inputs[1:])


def _counterpart(module: nn.Module, base: nn.Module) -> nn.Module:
    """The part of a module whose parameters have the names of the base model's: all of it, or a task's model."""
    names = _names(base)
    for part in module.modules():
        if _names(part) == names:
            return part
    nearest = max(map(_names, module.modules()), key=lambda own: len(own & names))
    raise CompositionError(
        "the base model of mup is another kind of model",
        found=f"only there: {_some(names - nearest)}; only here: {_some(nearest - names)}",
        allowed="parameters of the same names, with other widths",
        remedy="Change only widths in transform.mup.base: not depth, and nothing that adds or takes away parameters.",
    )


def _names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_parameters(remove_duplicate=False)}


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "") if names else "none"


def _add_others(widths: Widths, module: nn.Module) -> None:
    """Parameters of the task beside its model: single numbers are the same at every width."""
    for name, p in module.named_parameters():
        if p in widths.of:
            continue
        if p.numel() > 1 and p.requires_grad:
            raise CompositionError(
                f"the width of '{name}' cannot be told",
                found=f"a parameter of shape {tuple(p.shape)} that is not the model's",
                allowed="a task whose parameters, but for single numbers, are its model's",
                remedy="In your own loop, give MuP a base that has the same parameters.",
            )
        widths.of[p] = Width()


@torch.no_grad()
def _scale_weights(widths: Widths) -> None:
    for p, width in widths.of.items():
        if p in widths.biases:
            factor = 1.0 if is_constant(p) else math.sqrt(widths.biases[p])
        else:
            factor = initial_factor(width, p, widths.base.get(p))
        if factor != 1:
            p.mul_(factor)


def _attention_scales(model: nn.Module, base: nn.Module) -> list[tuple[nn.Module, float]]:
    """What ``attention_scale`` is to be where the heads are wider than in the base model."""
    theirs = dict(base.named_modules())
    found = []
    for name, layer in model.named_modules():
        other = theirs.get(name)
        if isinstance(layer, nn.MultiheadAttention) and layer.head_dim != getattr(other, "head_dim", None):
            raise CompositionError(
                f"mup cannot rescale the attention of '{name}'",
                found=f"torch's MultiheadAttention with heads of width {layer.head_dim}, another one in the base model",
                allowed="heads of the same width in both, or a module with an attribute attention_scale",
                remedy="Let the number of heads grow with the width.",
            )
        scale, before = (getattr(each, "attention_scale", None) for each in (layer, other))
        if isinstance(scale, float) and isinstance(before, float) and scale != before:
            found.append((layer, scale * scale / before))
    return found


def _refuse_attention(module: nn.Module) -> None:
    for name, layer in module.named_modules():
        if isinstance(layer, nn.MultiheadAttention) or hasattr(layer, "attention_scale"):
            raise CompositionError(
                "a ratio does not tell how wide the heads of the base model are",
                found=f"ratio, and attention in '{name}'",
                allowed="a base model",
                remedy="Set transform.mup.base in place of ratio.",
            )
