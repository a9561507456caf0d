"""What an optimizer's update costs: every installed one, beside torch's AdamW and the same method elsewhere."""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from lightrail.bench.table import Table
from lightrail.catalogue import available, load
from lightrail.errors import UserError
from lightrail.step import Closure
from lightrail.traits import Peer, Traits, traits_of

__all__ = ["StillClosure", "add_arguments", "measure"]

_REFERENCE = "AdamW(foreach)"
_DEPTH = 12
_LONG = 0.5  # seconds
_MOST_STATE = 100  # copies of the parameters; a method that keeps more is timed under its example's options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this bench."""
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="some optimizers, rather than all")
    parser.add_argument("--width", type=int, default=256, help="of the 12-layer GPT-2 shape; 768 is GPT-2 small")
    parser.add_argument("--without", nargs="*", default=[], metavar="LIBRARY", help="peers to leave out: heavyball, …")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, …")


def measure(options: argparse.Namespace) -> Table:
    """Times updates with gradients that stand still, each method in turn, round by round.

    Args:
        options: As :func:`add_arguments` describes.
    """
    shapes = gpt2_shapes(options.width)
    count = sum(torch.Size(shape).numel() for _, shape in shapes)
    table = Table(
        f"time of an update: {_DEPTH}-layer GPT-2 of width {options.width}, {count / 1e6:.1f} M parameters in "
        f"{len(shapes)} tensors, float32, {options.device}",
        "ms",
        f"medians of {options.rounds} rounds, ratios round by round. What a method asks its closure costs nothing "
        "here: the time is its own arithmetic.\nBound beside AdamW(foreach), for methods that treat each tensor by "
        "itself: 1.3 per byte of parameters, gradients and state. Bound beside the fastest peer: 1.",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        candidates = {
            _REFERENCE: _torch_adamw(foreach=True),
            "AdamW(fused)": _torch_adamw(fused=True),
            **dict(_ours(options)),
        }
        peers = {name: _peers_of(made.traits, options.without) for name, made in candidates.items()}
        _fill(table, candidates, peers, shapes, options)
    return table


def gpt2_shapes(width: int) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of GPT-2's parameters: 12 layers, a vocabulary of 16 widths."""
    shapes: list[tuple[str, tuple[int, ...]]] = [
        ("embedding.weight", (16 * width, width)),
        ("position", (width, width)),
    ]
    for layer in range(_DEPTH):
        for name, rows, columns in (
            ("read", 3 * width, width),
            ("write", width, width),
            ("expand", 4 * width, width),
            ("contract", width, 4 * width),
        ):
            shapes += [(f"layers.{layer}.{name}.weight", (rows, columns)), (f"layers.{layer}.{name}.bias", (rows,))]
        shapes += [(f"layers.{layer}.norm{i}.{part}", (width,)) for i in (1, 2) for part in ("weight", "bias")]
    return [*shapes, ("norm.weight", (width,)), ("norm.bias", (width,))]


class StillClosure(Closure):
    """A closure whose answers are ready: gradients, products and draws that stand still and cost nothing."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        super().__init__(lambda: torch.zeros(()), params)
        self._gradients = [1e-3 * torch.randn_like(p) for p in params]
        self._others = [1e-3 * torch.randn_like(p) for p in params]

    def __call__(self) -> Tensor:
        for p, gradient in zip(self.params, self._gradients, strict=True):
            p.grad = gradient
        return torch.ones(())

    def gradient(self) -> tuple[Tensor, list[Tensor]]:
        return torch.ones(()), self._others

    def loss(self) -> Tensor:
        return torch.zeros(())

    def hvp(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return self._others

    def sampled(self) -> list[Tensor]:
        return self._others

    def num_samples(self) -> int:
        return 32

    def groups(self, count: int) -> list[list[Tensor]]:
        return [self._others] * count

    def clusters(self, count: int) -> list[tuple[int, list[Tensor]]]:
        return [(8, self._others)] * count

    @contextmanager
    def at(self, points: Sequence[Tensor]) -> Iterator[Closure]:
        yield self


class _Made:
    """How one candidate is built."""

    def __init__(self, cls: Any, options: Mapping[str, Any], traits: Traits) -> None:
        self.cls, self.options, self.traits = cls, dict(options), traits

    def build(self, shapes: Sequence[tuple[str, tuple[int, ...]]], device: str) -> tuple[Any, list[Tensor]]:
        torch.manual_seed(0)
        named = [(name, nn.Parameter(0.02 * torch.randn(shape, device=device))) for name, shape in shapes]
        params: list[Tensor] = [p for _, p in named]
        given: Any = named if self.traits.needs_parameter_names else params
        return self.cls(given, **self.options), params


def _torch_adamw(**options: bool) -> _Made:
    return _Made(torch.optim.AdamW, options, Traits())


def _ours(options: argparse.Namespace) -> Iterator[tuple[str, _Made]]:
    seen = set()
    for name in sorted(available("optimizer"), key=len, reverse=True):
        try:
            cls = load("optimizer", name)
        except UserError as error:
            print(f"left out: {error.what}", file=sys.stderr)
            continue
        traits = traits_of(cls)
        if cls in seen or not traits.paper or (options.only and name not in options.only):
            continue
        seen.add(cls)
        yield name, _Made(cls, traits.example if (traits.state or 0) > _MOST_STATE else _with_rate(cls, traits), traits)


def _with_rate(cls: Any, traits: Traits) -> dict[str, Any]:
    """The defaults; what has none comes from the example, which also allows what a benchmark's shapes lack."""
    parameters = inspect.signature(cls).parameters
    own = {k: v for k, v in traits.example.items() if parameters[k].default is inspect.Parameter.empty or v is False}
    return {**own, "lr": 1e-4} if "lr" in parameters else own


def _peers_of(traits: Traits, without: Sequence[str]) -> dict[str, _Made]:
    found = {}
    for peer in traits.peers:
        if peer.target.partition(".")[0] in without:
            continue
        try:
            found[_label(peer)] = _Made(_import(peer.target), peer.options, Traits())
        except Exception as error:
            print(f"left out: {peer.target} ({str(error).splitlines()[0]})", file=sys.stderr)
    return found


@functools.cache
def _import(target: str) -> Any:
    module, name = target.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def _label(peer: Peer) -> str:
    options = ",".join(f"{key}={value}" for key, value in peer.options.items() if key not in ("lr", "consume_grad"))
    library, _, name = peer.target.partition(".")
    return f"{library} {name.rpartition('.')[2]}" + (f"({options})" if options else "")


def _fill(
    table: Table,
    candidates: Mapping[str, _Made],
    peers: Mapping[str, Mapping[str, _Made]],
    shapes: Sequence[tuple[str, tuple[int, ...]]],
    options: argparse.Namespace,
) -> None:
    """A method with its peers and the reference at a time: memory for all at once there is not."""
    for name, made in candidates.items():
        if name == _REFERENCE:
            continue
        together = {_REFERENCE: candidates[_REFERENCE], name: made, **peers.get(name, {})}
        samples, states = _time(together, shapes, options)
        if name not in samples:
            continue
        if not any(row.name == _REFERENCE for row in table.rows):
            table.add(_REFERENCE, samples[_REFERENCE])
        _add(table, name, made, samples, states)
        print(f"{name}: {median(samples[name]):.1f} ms", file=sys.stderr, flush=True)


def _add(table: Table, name: str, made: _Made, samples: Mapping[str, list[float]], states: Mapping[str, float]) -> None:
    mine = samples[name]
    bound = None
    if _is_tensorwise(made):
        bound = round(1.3 * (2 + states[name]) / (2 + states[_REFERENCE]), 2)
    label = f"{name}, state {states[name]:.3g} P"
    table.add(label, mine, _REFERENCE, bound, beside=samples[_REFERENCE])
    others = {peer: values for peer, values in samples.items() if peer not in (_REFERENCE, name)}
    for peer, values in others.items():
        table.add(f"  {peer}", values, _REFERENCE, beside=samples[_REFERENCE])
    if others:
        fastest = min(others, key=lambda peer: median(others[peer]))
        table.add(f"  {name} beside the fastest peer", mine, fastest, 1.0, beside=others[fastest])


def _is_tensorwise(made: _Made) -> bool:
    """Whether an update is a rule over lists, tensor by tensor, without matrix products."""
    if not callable(getattr(made.cls, "rule", None)):
        return False
    optimizer, params = made.build([("hidden.weight", (4, 4))], "cpu")
    with FlopCounterMode(display=False) as counter:
        optimizer.step(StillClosure(params))
    return counter.get_total_flops() == 0


def _time(
    together: Mapping[str, _Made], shapes: Sequence[tuple[str, tuple[int, ...]]], options: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, float]]:
    built = {}
    for name, made in together.items():
        try:
            optimizer, params = made.build(shapes, options.device)
            still = StillClosure(params)
            still()
            again = made.traits.evaluates_again
            for _ in range(2):  # state, and whatever compiles
                optimizer.step(still) if again else optimizer.step()
            built[name] = (optimizer, params, still if again else None)
        except Exception as error:
            print(f"left out: {name} ({type(error).__name__}: {str(error).splitlines()[0]})", file=sys.stderr)
    samples: dict[str, list[float]] = {name: [] for name in built}
    for _ in range(options.rounds):
        for name, (optimizer, params, still) in built.items():
            samples[name].append(1e3 * _once(optimizer, params, still, options.device))
    return samples, {name: _state(optimizer, params) for name, (optimizer, params, _) in built.items()}


def _once(optimizer: Any, params: Sequence[Tensor], still: StillClosure | None, device: str) -> float:
    gradients = [p.grad for p in params]

    def update() -> None:
        # Some libraries take the gradient away.
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient
        optimizer.step(still) if still is not None else optimizer.step()

    times: list[float] = []
    # The first of several finds the caches as the candidate before it left them; a slow update does not notice.
    while len(times) < 4 and sum(times) < _LONG:
        _wait(device)
        began = time.perf_counter()
        update()
        _wait(device)
        times.append(time.perf_counter() - began)
    return min(times)


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _state(optimizer: Any, params: Sequence[Tensor]) -> float:
    """Bytes of state over bytes of parameters."""
    tensors = {
        id(leaf): leaf
        for leaf in pytree.tree_leaves(dict(optimizer.state))
        if isinstance(leaf, Tensor) and leaf.numel() > 1
    }
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return held / sum(p.numel() * p.element_size() for p in params)
