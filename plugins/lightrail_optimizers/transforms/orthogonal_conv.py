"""Orthogonal convolutions by a penalty on their kernels."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.options import non_negative
from lightrail.step import Closure, Transform
from lightrail.traits import Traits
from lightrail_optimizers.tensor_lists import refuse_complex

__all__ = ["OrthogonalConv", "orthogonality_residual"]

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

Sizes = Sequence[int]
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Layer = Convolution | nn.Linear


def orthogonality_residual(
    kernel: Tensor, stride: Sizes | None = None, dilation: Sizes | None = None, groups: int = 1
) -> Tensor:
    """``L(K) = ||conv(K, K, padding=P, stride=S) - I||_F² - max(0, M - C S²)``: how far K is from orthogonal.

    ``P = floor((k-1)/S) S``; I is 1 where a channel meets itself unshifted. With circular padding on an image of N S
    by N S pixels, N S >= 2k-1, the matrix T of the convolution has ``||T T' - 1||_F² = N² L(K)``; or ``T' T`` in place
    of ``T T'`` where it has more rows than columns.

    Args:
        kernel: ``[M, C / groups, k, ...]``, for one to three dimensions of space.
        stride: S, one a dimension; 1 where not given.
        dilation: One a dimension; 1 where not given.
        groups: Each is orthogonal by itself; their L add up.

    Returns:
        A 0-d tensor, at least 0 up to rounding.

    Example:
        >>> orthogonality_residual(torch.eye(3)[:, :, None, None]).item()
        0.0
        >>> orthogonality_residual(torch.full((1, 1, 2), 0.5)).item()  # correlations 1/4, 1/2, 1/4 with itself
        0.375
    """
    d = kernel.dim() - 2
    stride, dilation = list(stride or [1] * d), list(dilation or [1] * d)
    kernel = _spread(kernel, dilation)
    rows, columns = kernel.shape[0] // groups, kernel.shape[1]
    padding = [(k - 1) // s * s for k, s in zip(kernel.shape[2:], stride, strict=True)]
    # Channel i of group j, for every j side by side, as images; a group of filters sees its own part of them.
    images = kernel.view(groups, rows, *kernel.shape[1:]).transpose(0, 1).flatten(1, 2)
    found = _CONVOLUTIONS[d](images, kernel, padding=padding, stride=stride, groups=groups)
    found = found.view(rows, groups, rows, *found.shape[2:]).clone()
    unshifted = [p // s for p, s in zip(padding, stride, strict=True)]
    same = torch.arange(rows, device=kernel.device)
    found[(same, slice(None), same, *unshifted)] -= 1
    surplus = max(0, rows - columns * torch.Size(stride).numel())
    return found.square().sum() - groups * surplus


def _spread(kernel: Tensor, dilation: Sizes) -> Tensor:
    """The kernel with its zeros written out."""
    if all(each == 1 for each in dilation):
        return kernel
    sizes = [(k - 1) * each + 1 for k, each in zip(kernel.shape[2:], dilation, strict=True)]
    spread = kernel.new_zeros(*kernel.shape[:2], *sizes)
    spread[(..., *(slice(None, None, each) for each in dilation))] = kernel
    return spread


class OrthogonalConv(Transform):
    """Draws convolutions towards orthogonal ones, which keep the norm of what passes through them.

    ``g += strength grad sum_l L(K_l)`` with ``L(K) = ||conv(K, K, padding=P, stride=S) - I||_F²``,
    ``P = floor((k-1)/S) S``, over the kernels of all convolutions of the module, whatever padding they use themselves.

    The whole matrix of a convolution is never built. The price is a convolution of every kernel with itself, and its
    backward pass, whatever the size of the batch.

    Args:
        strength: Factor of the penalty, >= 0; 0 is the optimizer without it, bit for bit.
        layers: Patterns in the manner of file names; a layer is drawn where one matches its full name or a part of it
            between dots. Linear layers may be named too, and count as convolutions of size 1. ``None`` for every
            convolution (``Conv1d``, ``Conv2d``, ``Conv3d``; transposed ones are left as they are).

    Raises:
        ConfigurationError: ``strength`` is out of range, or a pattern matches no layer.
        CompositionError: The module has no convolution; a kernel is computed by a parametrization; ``attach`` was not
            called.

    Guarantees:
        Nothing of the model is evaluated. A kernel that is frozen, or has no gradient at a step, does not move.

    Deviations:
        The paper treats one and two dimensions without groups and dilation. Here each group is orthogonal by itself,
        and a dilated kernel is one with its zeros written out. Published code takes the norm without its square.

    Example:
        >>> from lightrail import Closure, TransformedOptimizer
        >>> model = nn.Conv2d(1, 1, 1, bias=False)
        >>> _ = nn.init.constant_(model.weight, 0.5)
        >>> transform = OrthogonalConv(strength=0.1)
        >>> transform.attach(model)
        >>> optimizer = TransformedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), [transform])
        >>> loss = optimizer.step(Closure(lambda: 0 * model.weight.sum(), list(model.parameters())))
        >>> round(model.weight.item(), 6)  # 0.5 less 0.1 times the slope of (K² - 1)²
        0.65

    Reference:
        Achour, Malgouyres and Mamalet, 2022, "Existence, Stability and Scalability of Orthogonal Convolutional Neural
        Networks", arXiv:2108.05623, L_orth. The penalty: Wang, Chen, Chakraborty and Yu, 2020, "Orthogonal
        Convolutional Neural Networks", arXiv:1911.12207.
    """

    traits = Traits(
        rule="g += strength grad ||conv(K, K) - I||_F²",
        paper=(
            "Achour, Malgouyres, Mamalet, 2022, Existence, Stability and Scalability of Orthogonal Convolutional "
            "Neural Networks, arXiv:2108.05623"
        ),
        state=0,
        needs_module=True,
        needs_whole_tensors=True,
        example={"layers": ["*"]},
        exceptions={"takes_any_parameters": "the parameters of that check belong to no layer"},
    )

    def __init__(self, strength: float = 0.1, layers: list[str] | None = None) -> None:
        non_negative(strength=strength)
        self.strength = strength
        self.layers = layers
        self._found: list[Layer] | None = None
        self._residuals: list[Tensor] = []

    def attach(self, module: nn.Module) -> None:
        chosen = _convolutions(module) if self.layers is None else _named(module, self.layers)
        distinct: dict[Tensor, Layer] = {}
        for name, layer in chosen.items():
            if not isinstance(layer.weight, nn.Parameter):
                raise CompositionError(
                    f"orthogonal_conv cannot reach the kernel of '{name}'",
                    found="a weight that a parametrization computes",
                    allowed="a layer whose weight is a parameter",
                    remedy="Remove the parametrization, or leave the layer out of transform.orthogonal_conv.layers.",
                )
            refuse_complex("OrthogonalConv", [layer.weight])
            distinct.setdefault(layer.weight, layer)
        self._found = list(distinct.values())

    def before_step(self, params: list[Tensor], closure: Closure) -> None:
        if self._found is None:
            raise CompositionError(
                "orthogonal_conv has seen no module",
                found="a step before attach(module)",
                allowed="attach(module), once, before the first step",
                remedy="In your own loop, call transform.attach(model) before you build the optimizer.",
            )
        moving = [(layer, g) for layer in self._found if (g := layer.weight.grad) is not None]
        if self.strength == 0 or not moving:
            return
        with torch.enable_grad():
            kernels = [_wide(layer.weight).requires_grad_() for layer, _ in moving]
            residuals = [_residual(layer, kernel) for (layer, _), kernel in zip(moving, kernels, strict=True)]
            slopes = torch.autograd.grad(residuals, kernels)
        for (_, g), slope in zip(moving, slopes, strict=True):
            g.add_(slope.to(g.dtype), alpha=self.strength)
        self._residuals = [each.detach() for each in residuals]

    def logged(self) -> dict[str, float]:
        """The mean of L over the layers, before the step."""
        if not self._residuals:
            return {}
        return {"residual": sum(map(float, self._residuals)) / len(self._residuals)}


def _wide(kernel: Tensor) -> Tensor:
    """A copy in single precision at least."""
    return kernel.detach().to(torch.promote_types(kernel.dtype, torch.float32), copy=True)


def _residual(layer: Layer, kernel: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return orthogonality_residual(kernel[:, :, None])
    return orthogonality_residual(kernel, layer.stride, layer.dilation, layer.groups)


def _convolutions(module: nn.Module) -> dict[str, Layer]:
    found: dict[str, Layer] = {name: m for name, m in module.named_modules() if isinstance(m, Convolution)}
    if not found:
        raise CompositionError(
            "orthogonal_conv found no convolution",
            found=f"{type(module).__name__} without a Conv1d, Conv2d or Conv3d",
            allowed="a model with convolutions, or linear layers that are named",
            remedy="Choose a convolutional model, or name linear layers: transform.orthogonal_conv.layers=['*'].",
        )
    return found


def _named(module: nn.Module, patterns: Sequence[str]) -> dict[str, Layer]:
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, Layer)}
    found: dict[str, Layer] = {}
    for pattern in patterns:
        hits = [name for name in layers if any(fnmatchcase(word, pattern) for word in [name, *name.split(".")])]
        if not hits:
            raise ConfigurationError(
                f"no layer is called '{pattern}'",
                found=f"layers={list(patterns)}",
                allowed=", ".join(layers) or "the names of convolutions and linear layers; there are none",
                remedy="Name a layer of the model, or leave transform.orthogonal_conv.layers out.",
            )
        found |= {name: layers[name] for name in hits}
    return found
