"""The parameters of a group as one vector."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightrail.errors import ConfigurationError
from lightrail_optimizers import flat_vector
from lightrail_optimizers.flat_vector import (
    blocks,
    clear_missing_,
    flatten,
    gradient_vector,
    move_,
    state_holder,
    unflatten,
    working_dtype,
)


def made():
    """A transposed matrix, a scalar, an empty tensor and a vector, with a gradient each but the vector."""
    values = (torch.arange(6.0).reshape(2, 3).t(), torch.tensor(7.0), torch.zeros(0, 2), torch.tensor([8.0, 9.0]))
    params = [nn.Parameter(value) for value in values]
    for p in params[:3]:
        p.grad = 10 * p.detach()
    return params


def test_a_vector_holds_every_entry_in_row_major_order_and_goes_back():
    params = made()
    vector = flatten(params)
    assert vector.tolist() == [0.0, 3.0, 1.0, 4.0, 2.0, 5.0, 7.0, 8.0, 9.0]
    assert not vector.requires_grad
    for p, back in zip(params, unflatten(vector, params), strict=True):
        assert torch.equal(p, back)
    vector.zero_()
    assert params[0].any()  # it was a copy


def test_missing_gradients_are_zeros_and_what_misses_one_stays():
    params = made()
    g = gradient_vector("Method", params)
    assert g.tolist() == [0.0, 30.0, 10.0, 40.0, 20.0, 50.0, 70.0, 0.0, 0.0]
    before = flatten(params)
    move_(params, torch.ones(9), -0.5)
    assert (flatten(params) - before).tolist() == [-0.5] * 7 + [0.0, 0.0]
    assert params[0].stride() == (1, 3)
    ones = torch.ones(9)
    clear_missing_(ones, params)
    assert ones.tolist() == [1.0] * 7 + [0.0, 0.0]
    for p in params:
        p.grad = None
    assert not gradient_vector("Method", params).any()
    move_(params, ones, 1.0)


def test_gradients_are_copied():
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.ones(2)
    gradient_vector("Method", [p]).zero_()
    assert p.grad.tolist() == [1.0, 1.0]


def test_half_precision_makes_a_vector_in_single_precision_and_goes_back_to_half():
    half, single, double = (torch.ones(2, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64))
    assert working_dtype([half]) == working_dtype([half, single]) == torch.float32
    assert working_dtype([half, double]) == torch.float64
    vector = flatten([half, single])
    assert vector.dtype == torch.float32
    assert [t.dtype for t in unflatten(vector, [half, single])] == [torch.bfloat16, torch.float32]
    p = nn.Parameter(half.clone())
    p.grad = half.clone()
    move_([p], torch.full((2,), 2.0), -0.25)
    assert p.tolist() == [0.5, 0.5]
    clear_missing_(vector, [nn.Parameter(half), nn.Parameter(single)])
    assert not vector.any()


def test_the_state_of_a_group_is_under_the_first_of_the_widest_whatever_has_a_gradient():
    half, single, other = (nn.Parameter(torch.ones(1, dtype=d)) for d in (torch.bfloat16, torch.float32, torch.float32))
    assert state_holder([half, single, other]) is single
    other.grad = torch.ones(1)
    assert state_holder([half, single, other]) is single
    assert state_holder([half]) is half


def test_blocks_cover_all_and_are_one_on_an_accelerator(monkeypatch):
    monkeypatch.setattr(flat_vector, "_BLOCK", 4)
    assert blocks(10, torch.device("cpu")) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert blocks(8, torch.device("cpu")) == [slice(0, 4), slice(4, 8)]
    assert blocks(0, torch.device("cpu")) == blocks(0, torch.device("cuda")) == []
    assert blocks(10, torch.device("cuda")) == [slice(0, 10)]


def test_a_sparse_gradient_is_refused_by_name():
    p = nn.Parameter(torch.zeros(3, 2))
    p.grad = torch.eye(3, 2).to_sparse()
    with pytest.raises(ConfigurationError, match="Method does not take sparse"):
        gradient_vector("Method", [p])
