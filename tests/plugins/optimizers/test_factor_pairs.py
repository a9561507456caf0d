"""Which parameters ScaledGD takes for factors: adapters, groups, names of one's own, and what becomes of the rest."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightrail import Closure
from lightrail.errors import ConfigurationError
from lightrail_optimizers import ScaledGD

CLOSE = {"rtol": 0, "atol": 1e-9}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors():
    return nn.Parameter(normal(5, 2)), nn.Parameter(normal(4, 2, seed=1))


class Adapted(nn.Module):
    """Two linear layers, each with an adapter named as PEFT names them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers: Any = nn.ModuleList()
        for fan_in, fan_out in ((6, 5), (5, 3)):
            layer: Any = nn.Module()
            layer.bias = nn.Parameter(torch.zeros(fan_out))
            layer.lora_A = nn.ModuleDict({"default": nn.Linear(fan_in, 2, bias=False)})
            up = nn.Linear(2, fan_out, bias=False)
            nn.init.zeros_(up.weight)
            layer.lora_B = nn.ModuleDict({"default": up})
            self.layers.append(layer)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(x + layer.lora_B["default"](layer.lora_A["default"](x))[..., :1] + layer.bias.mean())
            x = x[..., : layer.bias.numel()]
        return x


def names_of(optimizer):
    return [(group["are_factors"], group["param_names"]) for group in optimizer.param_groups]


def test_adapters_are_found_layer_by_layer_and_the_rest_is_adamws():
    model = Adapted().double()
    optimizer = ScaledGD(model.named_parameters(), lr=0.1, damping=1e-6, adamw_lr=0.01, adamw_weight_decay=0.1)
    (of_factors, found), (of_adamw, rest) = names_of(optimizer)
    assert of_factors
    assert not of_adamw
    assert rest == ["layers.0.bias", "layers.1.bias"]
    assert len(found) == 4
    twin = copy.deepcopy(model)
    reference = torch.optim.AdamW([p for name, p in twin.named_parameters() if "bias" in name], 0.01, weight_decay=0.1)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        p.grad = torch.ones_like(p)
        q.grad = torch.ones_like(q)
    with torch.no_grad():
        model.layers[0].lora_B["default"].weight.add_(normal(5, 2))
    a, b = (model.layers[0].lora_A["default"].weight, model.layers[0].lora_B["default"].weight)
    start = a.detach().clone()
    optimizer.step()
    reference.step()
    # A of the first layer is scaled by B of the first layer, not of another.
    gram = (b_before := b.detach() + 0.1 * torch.ones_like(b) @ _inverse(start @ start.T)).T @ b_before
    torch.testing.assert_close(a.detach(), start - 0.1 * _inverse(gram) @ torch.ones_like(a), rtol=1e-8, atol=1e-8)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        if p.ndim == 1:
            torch.testing.assert_close(p, q, **CLOSE)


def _inverse(gram):
    return torch.linalg.inv(gram + 1e-6 * torch.eye(len(gram), dtype=gram.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_that_starts_at_zero_trains(dtype):
    model, x = Adapted().to(dtype), torch.ones(4, 6, dtype=dtype)
    optimizer = ScaledGD(model.named_parameters(), lr=0.05, damping=1e-2)
    closure = lambda: Closure(lambda: (model(x) - 0.5).float().square().mean(), list(model.parameters()))  # noqa: E731
    a = model.layers[1].lora_A["default"].weight
    start = a.detach().clone()
    first = optimizer.step(closure())
    assert torch.equal(a, start)  # its gradient is zero as long as B is
    for _ in range(20):
        last = optimizer.step(closure())
    assert last < first / 2
    assert not torch.equal(a, start)


def test_convolutions_join_their_further_axes():
    b, a = nn.Parameter(normal(5, 2, 1, 1)), nn.Parameter(normal(2, 3, 3, 3, seed=1))
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    start = a.detach().clone()
    gram = b.detach().flatten(1).T @ b.detach().flatten(1)
    ScaledGD([("conv.lora_A.weight", a), ("conv.lora_B.weight", b)], lr=1.0, damping=0.0).step()
    expected = start.flatten(1) - torch.linalg.inv(gram) @ torch.ones(2, 27, dtype=torch.float64)
    torch.testing.assert_close(a.detach().flatten(1), expected, **CLOSE)


def test_factors_in_two_groups_have_their_own_learning_rates():
    left, right = factors()
    left.grad, right.grad = normal(5, 2, seed=4), normal(4, 2, seed=5)
    starts, gram = (left.detach().clone(), right.detach().clone()), left.detach().T @ left.detach()
    groups = [{"params": [("left", left)], "lr": 0.0}, {"params": [("right", right)], "lr": torch.tensor(2.0)}]
    ScaledGD(groups, damping=0.0).step()
    assert torch.equal(left, starts[0])
    torch.testing.assert_close(right.detach(), starts[1] - 2 * right.grad @ torch.linalg.inv(gram), **CLOSE)


def test_a_factor_without_a_gradient_stays_and_scales_the_other():
    left, right = factors()
    right.grad = normal(4, 2, seed=5)
    before, gram = left.detach().clone(), left.detach().T @ left.detach()
    expected = right.detach() - 0.1 * right.grad @ torch.linalg.inv(gram)
    ScaledGD([("left", left), ("right", right)], damping=0.0).step()
    assert torch.equal(left, before)
    torch.testing.assert_close(right.detach(), expected, **CLOSE)


def test_own_names_later_groups_and_copies():
    pairs = [(f"{name}.{side}", p) for name in "ab" for side, p in zip(("up", "down"), factors(), strict=True)]
    optimizer = ScaledGD([*pairs, ("a.left", nn.Parameter(normal(3)))], pairs=[["*.up", "*.down"]])
    assert names_of(optimizer) == [(True, ["a.up", "a.down", "b.up", "b.down"]), (False, ["a.left"])]
    optimizer.add_param_group({"params": [("c.up", factors()[0]), ("c.down", factors()[1])], "lr": 0.5})
    assert names_of(optimizer)[2] == (True, ["c.up", "c.down"])
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 1e-3, 0.5]
    twin = copy.deepcopy(optimizer)
    for each in (optimizer, twin):
        for group in each.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        each.step()
    for a, b in zip(optimizer.param_groups, twin.param_groups, strict=True):
        for p, q in zip(a["params"], b["params"], strict=True):
            assert p is not q
            assert torch.equal(p, q)


def test_a_vector_is_no_factor():
    layer = nn.Linear(3, 2)
    optimizer = ScaledGD(layer.named_parameters(), symmetric=["*"])
    assert names_of(optimizer) == [(True, ["weight"]), (False, ["bias"])]


def test_shapes_that_fit_no_product_or_two():
    square = [("left", nn.Parameter(normal(5, 2))), ("right", nn.Parameter(normal(2, 2)))]
    with pytest.raises(ConfigurationError, match="which product"):
        ScaledGD(square)
    ScaledGD(square, product="LR")
    with pytest.raises(ConfigurationError, match="fit a product"):
        ScaledGD([("left", nn.Parameter(normal(5, 2))), ("right", nn.Parameter(normal(4, 3)))])
    with pytest.raises(ConfigurationError, match="fit a product"):
        ScaledGD([("left", nn.Parameter(normal(2))), ("right", nn.Parameter(normal(2)))])
