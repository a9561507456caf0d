"""Keeps what the gradient of each sample is made of, while an ordinary loss is evaluated and differentiated."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lightrail.sample_gradients.generic import Used, pieces_of
from lightrail.sample_gradients.operands import DROPOUT_OF_RECURRENT, RECURRENT, Call, cannot_separate, transparent
from lightrail.sample_gradients.paths import Path, consumes, makes_something, tensors_in
from lightrail.sample_gradients.pieces import Piece
from lightrail.sample_gradients.shared import SharedPiece

__all__ = ["Recording"]


class Recording(TorchFunctionMode):
    """Inside it, operations see parameters without gradients; what they would have been given is kept instead.

    Evaluate the loss inside the context, leave it, and differentiate as ever: no gradient arrives at a parameter, so
    one that does is the gradient of a use that was not seen.

    Args:
        params: The parameters.
        path: What the evaluation goes through, from :func:`learn`.

    Example:
        >>> from lightrail.sample_gradients.paths import survey
        >>> layer = torch.nn.Linear(2, 1)
        >>> path = survey(lambda x: layer(x).mean(), list(layer.parameters()), torch.ones(1, 2))
        >>> with Recording(list(layer.parameters()), path) as recording:
        ...     loss = layer(torch.tensor([[1.0, 0.0], [0.0, 3.0]])).mean()
        >>> loss.backward()
        >>> [piece.per_sample().tolist() for piece in recording.pieces()[0]]
        [[[[0.5, 0.0]], [[0.0, 1.5]]]]
    """

    def __init__(self, params: Sequence[Tensor], path: Path) -> None:
        super().__init__()
        self.params = list(params)
        self._path = path
        self._index = 0
        self._of_parameters = {id(p): p for p in self.params}
        # Whatever is made of parameters alone keeps its graph, down to them.
        self._made_into: set[int] = set()
        self._uses: dict[int, Used] = {}  # those whose gradients have not all arrived
        self._pieces: list[Piece] = []
        self.owners: dict[int, list[Tensor]] = {}  # of each operation of the path, by its position
        self._anchor = torch.zeros((), requires_grad=True, device=self.params[0].device if self.params else None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not consumes(self._of_parameters, args, kwargs) or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        inside = transparent(func)
        if inside is not None:
            with self:
                return inside(*args, **kwargs)
        call = self._path[self._index] if self._index < len(self._path) else None
        if call is not None and call.func == func:
            self._index += 1
            return self._make(func, args, kwargs) if call.is_of_parameters else self._use(call, args, kwargs)
        found = func(*args, **kwargs)
        if makes_something(tensors_in(found), self._of_parameters):
            raise cannot_separate(f"{getattr(func, '__name__', func)}, which the model did not use with fewer samples")
        return found

    def _make(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._made_into.update(id(each) for each in tensors_in((args, kwargs)))
        found = func(*args, **kwargs)
        self._of_parameters.update({id(each): each for each in tensors_in(found) if each.requires_grad})
        return found

    def _use(self, call: Call, args: Any, kwargs: Any) -> Any:
        _refuse_dropout_inside(call.func, args)
        leaves, structure = pytree.tree_flatten((args, kwargs))
        owners = {i: leaf for i, leaf in enumerate(leaves) if id(leaf) in self._of_parameters}
        bare = [leaf.detach() if i in owners else leaf for i, leaf in enumerate(leaves)]
        self.owners[self._index - 1] = list(owners.values())
        func, operands = _without_writing(call.func, bare)
        bare_args, bare_kwargs = pytree.tree_unflatten(bare, structure)
        found = call.func(*bare_args, **bare_kwargs)
        place = self._index - 1
        self._uses[place] = Used(call, func, operands, structure, owners, found)
        results, nesting = pytree.tree_flatten(found)
        index = 0
        for i, output in enumerate(results):
            if not isinstance(output, Tensor):
                continue
            if output.is_floating_point():
                results[i] = self._heard(output, partial(self._receive, place, index))
            index += 1
        return pytree.tree_unflatten(results, nesting)

    def _heard(self, output: Tensor, receive: Any) -> Tensor:
        """The output, such that its gradient is received."""
        if output.requires_grad:
            output.register_hook(receive)
            return output
        kind = _AnchoredView if output._is_view() else _Anchored
        return kind.apply(self._anchor, output, receive)  # type: ignore[return-value]

    def _receive(self, place: int, index: int, gradient: Tensor) -> None:
        used = self._uses.get(place)
        if used is None or index in used.gradients:
            name = getattr(self._path[place].func, "__name__", "an operation")
            raise cannot_separate(f"{name}, which was differentiated twice")
        used.gradients[index] = gradient.detach()
        if len(used.gradients) == used.expected:
            # What the pieces do not keep is free for the rest of the backward pass.
            del self._uses[place]
            self._pieces.extend(pieces_of(used))

    def pieces(self) -> list[list[Piece]]:
        """After the backward pass: for each parameter, what its samples' gradients are the sum of."""
        for used in self._uses.values():
            if used.gradients:
                self._pieces.extend(pieces_of(used))
        self._uses = {}
        found: dict[int, list[Piece]] = {id(p): [] for p in self.params}
        for piece in self._pieces:
            if id(piece.owner) in found:
                found[id(piece.owner)].append(piece)
            else:
                self._hand_down(piece, found)
        self._pieces = []
        self._share(found)
        return [found[id(p)] for p in self.params]

    def _share(self, found: dict[int, list[Piece]]) -> None:
        """A gradient that did reach a parameter is that of a penalty on it, the same for every sample."""
        count = next((pieces[0].count for pieces in found.values() if pieces), 0)
        for p in self.params:
            if count and p.grad is not None and id(p) in self._made_into:
                found[id(p)].append(SharedPiece(p, p.grad / count, count))
                p.grad = None

    def _hand_down(self, piece: Piece, found: dict[int, list[Piece]]) -> None:
        """From something made of parameters to the parameters, sample by sample."""
        gradients = torch.autograd.grad(
            piece.owner, self.params, piece.per_sample(), is_grads_batched=True, retain_graph=True, allow_unused=True
        )
        for p, gradient in zip(self.params, gradients, strict=True):
            if gradient is not None:
                found[id(p)].append(Piece(p, gradient))


def _refuse_dropout_inside(func: Any, args: Any) -> None:
    """The masks between the layers of a recurrent network are drawn inside it, and could not be repeated."""
    if func in RECURRENT and len(args) > DROPOUT_OF_RECURRENT and args[DROPOUT_OF_RECURRENT] and args[4] > 1:
        raise cannot_separate(f"dropout inside {func.__name__}; nn.Dropout between layers of one each does the same")


def _without_writing(func: Any, leaves: list[Any]) -> tuple[Any, list[Any]]:
    """An operation and its operands as they were before it, for one that writes into the first."""
    name = getattr(func, "__name__", "")
    kept = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    if name.endswith("_") and not name.endswith("__") and hasattr(Tensor, name[:-1]):
        kept[0] = kept[0].clone()
        return getattr(Tensor, name[:-1]), kept
    if name.startswith("__i") and hasattr(Tensor, f"__{name[3:]}"):
        kept[0] = kept[0].clone()
        return getattr(Tensor, f"__{name[3:]}"), kept
    return func, kept


class _Anchored(torch.autograd.Function):
    """Makes the output of an operation without differentiable operands hear its gradient."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, output: Tensor, receive: Any) -> Tensor:  # type: ignore[override]
        ctx.receive = receive
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        ctx.receive(gradient)
        return None, None, None


class _AnchoredView(_Anchored):
    """The same for a view, which such a function may not write into."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, output: Tensor, receive: Any) -> Tensor:  # type: ignore[override]
        ctx.receive = receive
        return output.clone()
