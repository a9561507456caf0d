"""What a recording holds on to while and after a loss is differentiated: no more than the gradients are made of."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightrail.errors import CompositionError
from lightrail.sample_gradients import Recording, SampleGradients
from lightrail.sample_gradients.convolution import Geometry
from lightrail.sample_gradients.paths import survey
from lightrail.sample_gradients.pieces import ConvolutionPiece, LinearPiece, Piece


def recorded(net: nn.Module, x: Tensor) -> tuple[Recording, Tensor]:
    params = list(net.parameters())
    path = survey(lambda batch: net(batch).square().mean(), params, x)
    recording = Recording(params, path)
    with recording:
        loss = net(x).square().mean()
    return recording, loss


def test_what_went_into_a_normalisation_is_free_once_its_gradients_are_known() -> None:
    torch.manual_seed(0)
    norm = nn.LayerNorm(5)
    path = survey(lambda batch: norm(batch * 2).square().mean(), list(norm.parameters()), torch.randn(3, 4, 5))
    recording = Recording(list(norm.parameters()), path)
    with recording:
        inside = torch.randn(3, 4, 5) * 2
        gone = weakref.ref(inside)
        loss = norm(inside).square().mean()
        del inside
    assert gone() is None  # held by storage, not by name
    loss.backward()
    assert recording._uses == {}
    assert [len(each) for each in recording.pieces()] == [1, 1]


def test_an_operation_that_is_differentiated_twice_is_refused_by_name() -> None:
    _, loss = recorded(nn.Linear(3, 2), torch.randn(4, 3))
    loss.backward(retain_graph=True)
    with pytest.raises(CompositionError, match="linear, which was differentiated twice"):
        loss.backward()


@pytest.mark.parametrize(("d", "p"), [(2, 9), (9, 2)])
def test_a_weighted_sum_is_that_of_the_gradients_whichever_operand_is_smaller(d: int, p: int) -> None:
    torch.manual_seed(0)
    piece = LinearPiece(torch.empty(p, d), torch.randn(4, 3, d), torch.randn(4, 3, p))
    c = torch.tensor([0.5, 0.0, 2.0, -1.0])
    expected = torch.einsum("b,bpd->pd", c, piece.per_sample())
    torch.testing.assert_close(piece.weighted_sum(c), expected)


@pytest.mark.parametrize(("channels", "size"), [(2, 12), (12, 4)])
def test_kernels_give_the_same_whether_kept_as_operands_or_as_gradients(channels: int, size: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    x = torch.randn(5, channels, size, size)
    recording, loss = recorded(conv, x)
    loss.backward()
    pieces = recording.pieces()
    assert type(pieces[0][0]) is (Piece if channels == 2 else ConvolutionPiece)
    found = SampleGradients([conv.weight], pieces, len(x))
    c = torch.tensor([1.0, 0.5, 0.0, -1.0, 2.0])
    (w,) = conv.parameters()
    alone = [torch.autograd.grad(F.conv2d(each[None], w, padding=1).square().mean(), w)[0] for each in x]
    torch.testing.assert_close(found.norms(), torch.stack([each.norm() for each in alone]), rtol=1e-4, atol=1e-6)
    expected = sum(factor * each for factor, each in zip(c, alone, strict=True))
    torch.testing.assert_close(found.weighted_sum(c)[0], expected, rtol=1e-4, atol=1e-6)


def test_the_operands_of_a_kernel_carry_weights_either_way() -> None:
    torch.manual_seed(0)
    geometry = Geometry([1, 1], [0, 0], [1, 1], 1)
    c = torch.tensor([2.0, 0.0, -1.0])
    for a, b in ((1, 6), (6, 1)):
        piece = ConvolutionPiece(torch.empty(b, a, 2, 2), torch.randn(3, a, 5, 5), torch.randn(3, b, 4, 4), geometry)
        expected = torch.einsum("b,b...->...", c, piece.per_sample())
        torch.testing.assert_close(piece.weighted_sum(c), expected)
