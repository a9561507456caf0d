"""The penalty on kernels: the distance of the whole matrix of a convolution from an orthogonal one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from lightrail import Closure, TransformedOptimizer
from lightrail.errors import CompositionError, ConfigurationError
from lightrail_optimizers import SAM, OrthogonalConv
from lightrail_optimizers.transforms.orthogonal_conv import orthogonality_residual


def kernel(*shape):
    torch.manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.float64) / 3


def matrix(weight, size, stride=1, dilation=1, groups=1):
    """The matrix of a circular convolution of an image of ``size`` pixels a side, from the images of the unit vectors.

    Row ``(i, u)`` has ``K[i, c, a]`` at the place ``(c, S u + D a)``, modulo the size.
    """
    d = weight.dim() - 2
    channels = weight.shape[1] * groups
    units = torch.eye(channels * size**d, dtype=weight.dtype).view(-1, channels, *[size] * d)
    wide = F.pad(units, [0, dilation * (weight.shape[-1] - 1)] * d, mode="circular")
    convolution = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[d]
    return convolution(wide, weight, stride=stride, dilation=dilation, groups=groups).flatten(1).t()


def squared_distance(t):
    """Of the matrix from an orthogonal one: of its rows where it is wide, of its columns where it is tall."""
    gram = t @ t.t() if t.shape[0] <= t.shape[1] else t.t() @ t
    return (gram - torch.eye(len(gram), dtype=t.dtype)).square().sum()


@pytest.mark.parametrize(
    ("shape", "stride", "positions"),
    [
        ((2, 3, 3), 1, 5),
        ((2, 3, 3), 1, 8),
        ((5, 2, 3), 1, 5),  # more channels out than in: the columns
        ((4, 3, 5), 2, 5),
        ((3, 2, 4), 2, 4),
        ((7, 2, 4), 3, 3),  # tall: 7 > 2 * 3
        ((3, 2, 1), 1, 4),
        ((2, 2, 2), 2, 3),
        ((2, 3, 3, 3), 1, 5),
        ((4, 2, 3, 3), 1, 6),
        ((5, 2, 3, 3), 2, 3),
        ((9, 2, 3, 3), 2, 3),  # tall: 9 > 2 * 2²
        ((2, 1, 2, 2, 2), 1, 3),
    ],
)
def test_it_is_the_distance_of_the_whole_matrix_for_each_position(shape, stride, positions):
    weight = kernel(*shape)
    d = len(shape) - 2
    t = matrix(weight, positions * stride, stride)
    assert t.shape == (shape[0] * positions**d, shape[1] * (positions * stride) ** d)
    found = orthogonality_residual(weight, [stride] * d)
    assert found.item() * positions**d == pytest.approx(squared_distance(t).item(), rel=1e-11)


@pytest.mark.parametrize(
    ("shape", "stride", "dilation", "groups"),
    [
        ((6, 2, 3), 1, 1, 3),
        ((6, 1, 3), 2, 1, 2),
        ((3, 2, 3), 1, 2, 1),
        ((4, 2, 3), 2, 3, 2),
        ((4, 2, 3), 2, 2, 1),
        ((4, 1, 3, 3), 1, 1, 4),
    ],
)
def test_groups_and_dilation_too(shape, stride, dilation, groups):
    weight = kernel(*shape)
    d, positions = len(shape) - 2, 10
    t = matrix(weight, positions * stride, stride, dilation, groups)
    # The matrix has a block a group: each is to be orthogonal by itself.
    blocks = t.view(groups, len(t) // groups, groups, -1)
    expected = sum(squared_distance(blocks[g, :, g]).item() for g in range(groups))
    found = orthogonality_residual(weight, [stride] * d, [dilation] * d, groups)
    assert found.item() * positions**d == pytest.approx(expected, rel=1e-11)


def test_strides_may_differ_between_the_axes():
    weight = kernel(2, 2, 3, 4)
    units = torch.eye(2 * 6 * 12, dtype=torch.float64).view(-1, 2, 6, 12)
    t = F.conv2d(F.pad(units, [0, 3, 0, 2], mode="circular"), weight, stride=(1, 3)).flatten(1).t()
    found = orthogonality_residual(weight, (1, 3))
    assert found.item() * 6 * 4 == pytest.approx(squared_distance(t).item(), rel=1e-11)


@pytest.mark.parametrize("shape", [(3, 5), (5, 5), (5, 3)])
def test_an_orthogonal_matrix_as_a_kernel_of_one_pixel_has_no_penalty(shape):
    weight = nn.init.orthogonal_(torch.empty(*shape, dtype=torch.float64))
    assert orthogonality_residual(weight[:, :, None, None]).item() == pytest.approx(0.0, abs=1e-12)
    w = (2 * weight).requires_grad_()
    smaller = min(shape)  # singular values of 2: (4 - 1)² each, or as many less the surplus of rows
    assert orthogonality_residual(w[:, :, None, None]).item() == pytest.approx(9.0 * smaller, abs=1e-12)


def test_a_shift_is_orthogonal_and_a_mean_is_not():
    shift = torch.zeros(2, 2, 3, 3, dtype=torch.float64)
    shift[0, 1, 0, 2] = shift[1, 0, 1, 1] = 1
    assert orthogonality_residual(shift).item() == 0.0
    assert orthogonality_residual(torch.full((1, 1, 3), 1 / 3, dtype=torch.float64)).item() == pytest.approx(
        (1 / 3 - 1) ** 2 + 2 * (2 / 9) ** 2 + 2 * (1 / 9) ** 2, abs=1e-12
    )


def test_the_gradient_of_a_matrix_by_hand():
    w = kernel(3, 4)
    layer = nn.Linear(4, 3, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(w)
    transform = OrthogonalConv(strength=0.5, layers=["*"])
    transform.attach(layer)
    layer.weight.grad = torch.ones_like(layer.weight)
    with torch.no_grad():
        transform.before_step([layer.weight], Closure(lambda: torch.zeros(()), [layer.weight]))
    expected = 1 + 0.5 * 4 * (w @ w.t() - torch.eye(3).double()) @ w
    torch.testing.assert_close(layer.weight.grad, expected, rtol=0, atol=1e-12)
    penalty = (w @ w.t() - torch.eye(3).double()).square().sum().item()
    assert transform.logged() == {"residual": pytest.approx(penalty, abs=1e-12)}


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 6, 3, stride=2, groups=2),
        nn.Flatten(),
        nn.Linear(6 * 4, 3),
    )


def batch_of(step):
    torch.manual_seed(100 + step)
    return torch.randn(6, 2, 6, 6), torch.randint(3, (6,))


def train(model, transforms, steps=3, loss_of=None, optimizer_class=torch.optim.SGD):
    for transform in transforms:
        transform.attach(model)
    optimizer = TransformedOptimizer(optimizer_class(model.parameters(), lr=0.1), transforms)
    loss_of = loss_of or (lambda batch: F.cross_entropy(model(batch[0]), batch[1]))
    for step in range(steps):
        optimizer.step(Closure(loss_of, list(model.parameters()), batch_of(step)))
    return [p.detach().clone() for p in model.parameters()]


def penalised(model, strength):
    def loss(batch):
        first, second = model[0], model[2]
        penalty = orthogonality_residual(first.weight) + orthogonality_residual(second.weight, (2, 2), (1, 1), 2)
        return F.cross_entropy(model(batch[0]), batch[1]) + strength * penalty

    return loss


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_training_is_that_of_the_loss_with_the_penalty_added(optimizer_class):
    ours, theirs = network(), network()
    found = train(ours, [OrthogonalConv(0.3)], optimizer_class=optimizer_class)
    expected = train(theirs, [], loss_of=penalised(theirs, 0.3), optimizer_class=optimizer_class)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


def test_the_gradient_at_another_point_has_the_penalty_of_that_point():
    ours, theirs = network(), network()
    found = train(ours, [OrthogonalConv(0.3), SAM(rho=0.5)])
    expected = train(theirs, [SAM(rho=0.5)], loss_of=penalised(theirs, 0.3))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-6)


def test_no_strength_is_the_optimizer_alone():
    plain = train(network(), [])
    assert all(torch.equal(a, b) for a, b in zip(train(network(), [OrthogonalConv(0.0)]), plain, strict=True))


def test_descent_makes_kernels_orthogonal():
    torch.manual_seed(0)
    model = nn.Conv2d(6, 4, 3)
    transform = OrthogonalConv(1.0)
    transform.attach(model)
    optimizer = TransformedOptimizer(torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9), [transform])
    for _ in range(300):
        optimizer.step(Closure(lambda: 0 * model.weight.sum(), list(model.parameters())))
    assert transform.logged()["residual"] < 1e-3
    values = torch.linalg.svdvals(matrix(model.weight.detach().double(), 6))
    assert values.min() > 0.99
    assert values.max() < 1.01


def test_only_the_layers_that_are_named_and_each_kernel_once():
    stem, head, mixing = nn.Conv1d(2, 2, 3), nn.Linear(2, 2), nn.Conv1d(2, 2, 3)
    mixing.weight = stem.weight
    model = nn.ModuleDict({"stem": stem, "head": head, "mixing": mixing})
    weights = {"stem": stem.weight, "head": head.weight, "mixing": mixing.weight}

    def moved(layers):
        transform = OrthogonalConv(1.0, layers)
        transform.attach(model)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        transform.before_step([], Closure(lambda: torch.zeros(()), []))
        slopes = {name: torch.zeros(1) if w.grad is None else w.grad.clone() for name, w in weights.items()}
        return {name for name, slope in slopes.items() if bool(slope.any())}, slopes["stem"]

    names, once = moved(None)
    assert names == {"stem", "mixing"}
    kernel_alone = stem.weight.detach().clone().requires_grad_()
    assert torch.equal(once, torch.autograd.grad(orthogonality_residual(kernel_alone), kernel_alone)[0])
    assert moved(["head"])[0] == {"head"}
    assert moved(["st*", "head"])[0] == {"stem", "head", "mixing"}
    again = moved(["*"])
    assert again[0] == {"stem", "head", "mixing"}
    assert torch.equal(again[1], once)


def test_frozen_kernels_half_precision_and_other_layouts():
    frozen, layer = nn.Conv2d(2, 3, 3).bfloat16(), nn.Conv2d(3, 3, 3).bfloat16()
    model = nn.Sequential(frozen, layer)
    layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
    frozen.weight.requires_grad_(False)
    transform = OrthogonalConv(1.0)
    transform.attach(model)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.zeros_like(layer.weight)
    transform.before_step([], Closure(lambda: torch.zeros(()), []))
    assert frozen.weight.grad is None
    found = layer.weight.grad
    assert found is not None
    assert found.dtype == torch.bfloat16
    wide = before.float().contiguous().requires_grad_()
    (expected,) = torch.autograd.grad(orthogonality_residual(wide), wide)
    assert torch.equal(found, expected.bfloat16())
    assert torch.equal(layer.weight, before)


def test_refusals():
    with pytest.raises(CompositionError, match="found no convolution"):
        OrthogonalConv().attach(nn.Linear(2, 2))
    with pytest.raises(ConfigurationError, match="no layer is called 'stem'") as caught:
        OrthogonalConv(layers=["0", "stem"]).attach(network())
    assert "0, 2, 4" in str(caught.value)
    with pytest.raises(CompositionError, match="cannot reach the kernel of '0'"):
        OrthogonalConv().attach(nn.Sequential(parametrizations.weight_norm(nn.Conv1d(2, 2, 3))))
    with pytest.raises(CompositionError, match="has seen no module"):
        OrthogonalConv().before_step([], Closure(lambda: torch.zeros(()), []))
    with pytest.raises(ConfigurationError, match="complex"):
        OrthogonalConv().attach(nn.Conv1d(2, 2, 3, dtype=torch.complex64))
    with pytest.raises(ConfigurationError):
        OrthogonalConv(strength=-1.0)
