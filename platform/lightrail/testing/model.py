"""Conformance of models, on inputs made up from the dimensions that their signature asks for."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightrail.testing.building import accepts, check_is_documented, missing_options, refuses_unknown_options
from lightrail.testing.runs import require_close, require_equal, saved_and_loaded
from lightrail.testing.suite import Check, NotApplicable, Suite, known_exceptions, name_of, require

__all__ = ["DIMENSIONS", "ModelSuite", "filled"]

Options = Mapping[str, Any]
SAMPLES = 6
# Sizes of a small made-up task. Every one differs from the others, so that none is taken for another.
DIMENSIONS: Mapping[str, int] = {
    "in_channels": 1,
    "image_size": 8,
    "in_features": 7,
    "num_classes": 5,
    "out_features": 5,
    "vocab_size": 11,
    "context": 9,
}


def filled(plugin: Any, options: Options, dimensions: Mapping[str, int]) -> dict[str, Any]:
    """``options`` with every parameter that is a named dimension and was left open, as a run fills them."""
    parameters = inspect.signature(plugin).parameters
    left_open = [name for name, p in parameters.items() if p.default in (None, p.empty) and options.get(name) is None]
    return {**options, **{name: dimensions[name] for name in left_open if name in dimensions}}


def _build(plugin: Any, options: Options) -> nn.Module:
    torch.manual_seed(3)
    return plugin(**filled(plugin, options, DIMENSIONS))


def _moved(plugin: Any, options: Options) -> nn.Module:
    """A model a little off its initialisation, where many a network is constant on purpose."""
    model = _build(plugin, options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    return model


def _inputs(plugin: Any, options: Options) -> tuple[Tensor, ...]:
    """A batch of what the dimensions in the signature describe: tokens, pictures or rows; times and labels with them.

    A network that denoises has a parameter ``time`` of its ``forward``, and ``label`` where it knows classes.
    """
    parameters = {
        p.name: p.default is p.empty
        for p in list(inspect.signature(plugin.forward).parameters.values())[1:]
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }
    required = [name for name, is_required in parameters.items() if is_required]
    denoises = required[1:] == ["time"]
    if len(required) > 1 and not denoises:
        raise NotApplicable(f"forward takes more than one input: {', '.join(required)}")
    sizes = {**DIMENSIONS, **{name: options[name] for name in DIMENSIONS if options.get(name) is not None}}
    generator = torch.Generator().manual_seed(4)
    given = (_described(plugin, sizes, generator),)
    if denoises:
        given += (torch.rand(SAMPLES, generator=generator),)
        if "label" in parameters and accepts(plugin, "num_classes"):
            given += (torch.randint(sizes["num_classes"], (SAMPLES,), generator=generator),)
    return given


def _described(plugin: Any, sizes: Mapping[str, int], generator: torch.Generator) -> Tensor:
    if accepts(plugin, "vocab_size"):
        return torch.randint(sizes["vocab_size"], (SAMPLES, sizes["context"]), generator=generator)
    if accepts(plugin, "in_channels"):
        return torch.randn(SAMPLES, sizes["in_channels"], sizes["image_size"], sizes["image_size"], generator=generator)
    if accepts(plugin, "in_features"):
        return torch.randn(SAMPLES, sizes["in_features"], generator=generator)
    raise NotApplicable("its signature names no dimension of its input: vocab_size, in_channels or in_features")


def check_builds_from_options(plugin: Any, options: Options) -> None:
    """``plugin(**options)``, with open dimensions filled, is an nn.Module."""
    missing = missing_options(plugin, filled(plugin, options, DIMENSIONS), given=0)
    require(not missing, f"options without a default are neither dimensions nor in traits.example: {missing}")
    require(isinstance(_build(plugin, options), nn.Module), "it is no torch.nn.Module")


def check_rejects_unknown_options(plugin: Any, options: Options) -> None:
    """An option that the signature lacks is an error."""
    refuses_unknown_options(plugin, filled(plugin, options, DIMENSIONS))


def check_gives_one_output_a_sample(plugin: Any, options: Options) -> None:
    """The output is finite and has the batch as its leading axis; that of a network that denoises its input's shape."""
    inputs = _inputs(plugin, options)
    output = _output(_build(plugin, options), inputs)
    require(len(output) == SAMPLES, f"{SAMPLES} samples became an output of {tuple(output.shape)}")
    if len(inputs) > 1:
        require(output.shape == inputs[0].shape, f"states {tuple(inputs[0].shape)} became {tuple(output.shape)}")
    require(bool(output.isfinite().all()), "the output is not finite at initialisation")


def _output(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    output = model(*inputs)
    if not isinstance(output, Tensor):
        raise NotApplicable(f"its output is no tensor but {type(output).__name__}")
    return output


def check_gradient_reaches_every_parameter(plugin: Any, options: Options) -> None:
    """Every parameter that asks for a gradient gets one: none is left over."""
    model, inputs = _moved(plugin, options), _inputs(plugin, options)
    output = _output(model, inputs)
    (output * torch.randn_like(output)).sum().backward()
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    require(not idle, f"no gradient reaches {', '.join(idle)}")


def check_restores_its_state(plugin: Any, options: Options) -> None:
    """Another instance that loads its state, through a file of plain values, gives the same output."""
    model, inputs = _moved(plugin, options), _inputs(plugin, options)
    with torch.no_grad():
        _output(model, inputs)  # in training mode, so that running statistics are part of the state
        state = saved_and_loaded(model.state_dict())
        other = _build(plugin, options)
        for p in other.parameters():
            p.add_(1)
        other.load_state_dict(state)
        expected, found = _output(model.eval(), inputs), _output(other.eval(), inputs)
    require_equal([found], [expected], "a model that loads the state of another gives another output")


def check_is_deterministic_in_evaluation(plugin: Any, options: Options) -> None:
    """In evaluation mode the same input gives the same output, and nothing in the model moves."""
    model, inputs = _moved(plugin, options).eval(), _inputs(plugin, options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        first, second = _output(model, inputs), _output(model, inputs)
    require_equal([second], [first], "two evaluations of one input differ")
    for name, value in model.state_dict().items():
        require(torch.equal(value, before[name]), f"an evaluation moves '{name}'")


def check_keeps_samples_apart(plugin: Any, options: Options) -> None:
    """In evaluation mode a sample's output does not depend on its neighbours in the batch."""
    model, inputs = _moved(plugin, options).eval(), _inputs(plugin, options)
    with torch.no_grad():
        together, alone = _output(model, inputs)[:1], _output(model, tuple(each[:1] for each in inputs))
    require_close([alone], [together], "a sample alone and the same sample in a batch have other outputs", 1e-4)


def check_copies(plugin: Any, options: Options) -> None:
    """A deep copy gives the same output and shares no parameter."""
    model, inputs = _moved(plugin, options).eval(), _inputs(plugin, options)
    other = copy.deepcopy(model)
    with torch.no_grad():
        expected = _output(model, inputs)
        require_equal([_output(other, inputs)], [expected], "a deep copy gives another output")
        for p in other.parameters():
            p.zero_()
        require_equal([_output(model, inputs)], [expected], "a deep copy shares parameters with the original")


CHECKS: tuple[Check, ...] = (
    check_is_documented,
    check_builds_from_options,
    check_rejects_unknown_options,
    check_gives_one_output_a_sample,
    check_gradient_reaches_every_parameter,
    check_restores_its_state,
    check_is_deterministic_in_evaluation,
    check_keeps_samples_apart,
    check_copies,
)


class ModelSuite(Suite):
    """Every check of a model."""

    kind: ClassVar[str] = "model"
    checks: ClassVar[tuple[Check, ...]] = (*CHECKS, known_exceptions(frozenset(map(name_of, CHECKS))))
