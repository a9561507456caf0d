"""Skip guidance: away from what the same network says without some of its layers."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightrail.errors import CompositionError, ConfigurationError, closest
from lightrail.generation import Denoiser, Guidance, Moment, Prediction, Sampler
from lightrail.options import between, non_negative, one_of
from lightrail.traits import Traits
from lightrail_generation.guidance.affine import NoiseInterval
from lightrail_generation.guidance.cfg import rescaled

__all__ = ["STG", "middle_block", "skipping"]

MODES = ("residual", "attention")


class STG(Guidance):
    """Away from what the network says when it skips some of its layers, a weak model that costs no training.

    D = D_g + k (D_c − D_skip), for f > 0 times f std(D_c)/std(D) + 1 − f

    D_c is the conditional prediction, D_skip the same without the layers, and D_g what the whole chain makes: alone
    D_c, with ``cfg``, before or behind it, uncond + w (cond − uncond). One evaluation is added.

    Args:
        scale: k, at least 0; 0 is the run without it.
        layers: What is skipped: names of modules of the network, such as ``blocks.2``, or patterns of them, in which
            ``*``, ``?`` and ``[…]`` stand for a part of a name between dots: ``blocks.*``; ``None`` for the middle one
            of the blocks, as the network lists them in an attribute ``blocks`` (modules, or names in order),
            ``transformer_blocks`` or ``mid_block``.
        mode: ``residual`` replaces what a layer gives by what it takes; ``attention`` lets each token of the layer's
            self-attention attend to itself alone, so that attention gives the values.
        rescale: f, how far the deviation of the network's answer is brought back to that of the conditional one, in
            [0, 1]; 0.7 is usual.
        rho_low: It acts at levels with rho_low < σ/α ≤ rho_high; at least 0.
        rho_high: The noisiest level, above ``rho_low``; ``None`` for all.

    Raises:
        ConfigurationError: An option is out of range, or no module of the network has such a name.
        CompositionError: The model has no network whose layers could be skipped, or does not name its blocks; a layer
            gives another shape than it takes (``residual``), or has no self-attention that is seen (``attention``).

    Deviations:
        The published code rescales by deviations of the whole batch; here each sample has its own. Both rescale the
        network's own output, whatever it predicts. It runs the three predictions as one batch; here the one that skips
        is a call of its own, so that it works with any network.

    Example:
        >>> from lightrail.generation import GaussianMixture
        >>> from lightrail_generation.models.point_mlp import PointMLP
        >>> from lightrail_generation.samplers.ddim import DDIM
        >>> mixture, sampler = GaussianMixture(), DDIM(steps=10)
        >>> mixture.network = PointMLP(2, 3, depth=4)  # as a trained run has one
        >>> STG(layers="blocks.2").prepare(mixture, sampler)
        >>> try:
        ...     STG(layers="blocks.7").prepare(mixture, sampler)
        ... except ConfigurationError as error:
        ...     print(error.found)
        layers=blocks.7

    Reference:
        J. Hyung, K. Kim, S. Hong, M.-J. Kim and J. Choo (2024), Spatiotemporal Skip Guidance for Enhanced Video
        Diffusion Sampling, arXiv 2411.18664.
    """

    traits: ClassVar[Traits] = Traits(
        rule="D = D_g + k (D_c − D_skip), D_skip from the same network without some of its layers",
        paper="J. Hyung, K. Kim, S. Hong, M.-J. Kim, J. Choo, 2024, Spatiotemporal Skip Guidance for Enhanced Video "
        "Diffusion Sampling, arXiv 2411.18664",
        example={"scale": 1.0},
    )
    asks = ("skip",)

    def __init__(
        self,
        scale: float = 1.0,
        layers: str | Sequence[str] | None = None,
        mode: str = "residual",
        rescale: float = 0.0,
        rho_low: float = 0.0,
        rho_high: float | None = None,
    ) -> None:
        non_negative(scale=scale)
        one_of(MODES, mode=mode)
        between(0, 1, closed="both", rescale=rescale)
        self.scale = scale
        self.layers = (layers,) if isinstance(layers, str) else None if layers is None else tuple(layers)
        self.mode = mode
        self.rescale = rescale
        self.interval = NoiseInterval(rho_low, rho_high)

    def prepare(self, denoiser: Denoiser, sampler: Sampler) -> None:
        self._chosen(denoiser)

    def is_active(self, moment: Moment) -> bool:
        return self.scale > 0 and self.interval.meets(moment.level)

    def evaluate(self, name: str, moment: Moment) -> Prediction:
        """What the network says without the layers."""
        with skipping(self._chosen(moment.denoiser), self.mode):
            return moment.denoiser.predict(moment.x, moment.level, moment.condition, moment.network_time)

    def mix(self, named: Mapping[str, Prediction], moment: Moment) -> Prediction:
        """Keeps both predictions until all others are mixed."""
        moment.memory["cond"], moment.memory["skip"] = named["plain"], named["skip"]
        return named["cond"]

    def correct(self, prediction: Prediction, moment: Moment) -> Prediction:
        # In the form of the network's answer: the sum is the same in each, the deviations are not.
        form = moment.denoiser.form
        cond, skip = (moment.memory.pop(name).get(form) for name in ("cond", "skip"))
        # As a scale, 1 stands for no guidance: where a sample's own level is outside, nothing is added.
        k = self.interval.scale(1 + self.scale, prediction.level) - 1
        guided = prediction.get(form) + ((cond - skip) * k).to(cond.dtype)
        if self.rescale:
            guided = rescaled(guided, cond, self.rescale)
        if isinstance(k, Tensor):
            guided = torch.where(k > 0, guided, prediction.get(form))
        return Prediction(prediction.x, prediction.level, form, guided)

    def _chosen(self, denoiser: Denoiser) -> dict[str, nn.Module]:
        network = denoiser.network
        if not isinstance(network, nn.Module):
            raise CompositionError(
                f"{type(denoiser).__name__} has no layers that could be skipped",
                found="no network",
                allowed="a trained run, or denoiser=diffusers",
                remedy="Leave stg out, or generate from a run: generate run=FOLDER.",
            )
        wanted = self.layers or (middle_block(network),)
        modules = {name: module for name, module in network.named_modules() if name}
        chosen: dict[str, nn.Module] = {}
        for pattern in wanted:
            found = [name for name in modules if _fits(name, pattern)]
            if not found:
                raise ConfigurationError(
                    "the network has no such layer",
                    found=f"layers={pattern}",
                    allowed=", ".join(_shown(modules)),
                    remedy=f"{closest(pattern, modules)}Choose names of its modules, or a pattern such as blocks.*",
                )
            chosen |= {name: modules[name] for name in found}
        return chosen


def middle_block(network: nn.Module) -> str:
    """The name of the middle one of a network's blocks.

    Args:
        network: With ``blocks`` (modules, or names in order), ``transformer_blocks`` or ``mid_block``.

    Raises:
        CompositionError: It has none of them.
    """
    for attribute in ("blocks", "transformer_blocks"):
        blocks = getattr(network, attribute, None)
        if isinstance(blocks, nn.ModuleList | nn.Sequential):
            blocks = [f"{attribute}.{i}" for i in range(len(blocks))]
        if isinstance(blocks, list | tuple) and blocks:
            return str(blocks[len(blocks) // 2])
    if isinstance(getattr(network, "mid_block", None), nn.Module):
        return "mid_block"
    raise CompositionError(
        f"{type(network).__name__} does not say what its blocks are",
        found="no attribute blocks, transformer_blocks or mid_block",
        allowed="names of its modules in layers",
        remedy=f"Set layers, for instance to one of {', '.join(_shown(dict(network.named_modules())))}.",
    )


def _fits(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


@contextmanager
def skipping(layers: Mapping[str, nn.Module], mode: str) -> Iterator[None]:
    """While it lasts, the layers are skipped; afterwards the network is what it was, whatever happened.

    Args:
        layers: By name.
        mode: ``residual`` or ``attention``.
    """
    with ExitStack() as stack:
        if mode == "residual":
            for name, layer in layers.items():
                stack.callback(layer.register_forward_hook(_passing(name), with_kwargs=True).remove)
            yield
            return
        attending = _ValuesOnly()
        for layer in layers.values():
            for module in layer.modules():
                # Diffusers tells attention to a text from that to itself by this attribute.
                is_other = bool(getattr(module, "is_cross_attention", False))
                if module is layer or is_other:
                    stack.callback(module.register_forward_pre_hook(attending.entered(not is_other)).remove)
                    stack.callback(module.register_forward_hook(attending.left).remove)
        with attending:
            yield
        if not attending.count:
            raise CompositionError(
                "the layers have no self-attention that could be skipped",
                found=f"layers={', '.join(_shown(layers))} without torch's scaled_dot_product_attention",
                allowed="layers with self-attention",
                remedy="Choose others in layers, or mode=residual.",
            )


class _ValuesOnly(TorchFunctionMode):
    """Within a layer, self-attention gives its values."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.within: list[bool] = []

    def entered(self, skips: bool) -> Any:
        return lambda module, args: self.within.append(skips)

    def left(self, module: nn.Module, args: Any, output: Any) -> None:
        self.within.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.within and self.within[-1]:
            query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs))[:3]
            if query.shape[-2] == key.shape[-2] and query.shape[:-1] == value.shape[:-1]:
                self.count += 1
                return value
        return func(*args, **kwargs)


def _passing(name: str) -> Any:
    """A hook that gives what its layer takes."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        taken = [each for each in bound.values() if isinstance(each, Tensor)]
        if isinstance(output, Tensor):
            return _taken(name, output, taken[:1])
        if isinstance(output, tuple) and all(each is None or isinstance(each, Tensor) for each in output):
            return tuple(None if each is None else _taken(name, each, taken) for each in output)
        raise _cannot_be_skipped(name, type(output).__name__)

    return hook


def _taken(name: str, output: Tensor, taken: Sequence[Tensor]) -> Tensor:
    """The one that was taken in the place of what was given; several are told apart by their shapes."""
    fitting = [each for each in taken if each.shape == output.shape]
    if len(fitting) != 1:
        shapes = ", ".join(str(tuple(each.shape)) for each in taken)
        raise _cannot_be_skipped(name, f"{tuple(output.shape)}, and takes {shapes or 'no tensor'}")
    return fitting[0]


def _cannot_be_skipped(name: str, found: str) -> CompositionError:
    return CompositionError(
        "a layer cannot be skipped that does not give what it takes",
        found=f"layers={name}, which gives {found}",
        allowed="layers whose output has the shape of their input",
        remedy="Choose others in layers, such as the blocks between changes of size, or mode=attention.",
    )


def _shown(names: Mapping[str, Any]) -> list[str]:
    listed = [name for name in names if name]
    return [*listed[:20], *(["…"] if len(listed) > 20 else [])]
