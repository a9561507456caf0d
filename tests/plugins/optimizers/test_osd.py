"""Online Subspace Descent: the gradient of its projection, the order of its two updates, its limits and its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightrail.errors import ConfigurationError
from lightrail_optimizers import OSDSGD, Lion, OSDAdamW, OSDLion
from lightrail_optimizers.osd_base import online_pca_gradient

ALL = (OSDAdamW, OSDLion, OSDSGD)
SHAPES = [(6, 4), (4, 6), (5, 5)]


def matrices(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


def named(params: list[Tensor]) -> list[tuple[str, Tensor]]:
    return [(f"layers.{i}.weight", p) for i, p in enumerate(params)]


def give_gradients(step: int, *params: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
    return [p.grad.clone() for p in params if p.grad is not None]


def run(optimizer: torch.optim.Optimizer, params: list[Tensor], steps: range) -> None:
    for step in steps:
        give_gradients(step, *params)
        optimizer.step()


def pca_loss(g: Tensor, p: Tensor, orthogonality: float) -> Tensor:
    normalized = g / g.norm()
    return (normalized - normalized @ p @ p.T).square().sum() + orthogonality * (
        p.T @ p - torch.eye(p.shape[1], dtype=p.dtype)
    ).square().sum()


# The gradient of P.


@pytest.mark.parametrize("orthogonality", [0.0, 0.3])
@pytest.mark.parametrize(("rows", "columns", "rank"), [(7, 4, 2), (4, 4, 4), (5, 3, 1)])
def test_gradient_of_the_projection(rows, columns, rank, orthogonality):
    g = matrices((rows, columns))[0].detach()
    p = torch.randn(columns, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (expected,) = torch.autograd.grad(pca_loss(g, p, orthogonality), p)
    p = p.detach()
    torch.testing.assert_close(online_pca_gradient(g, p, g @ p, orthogonality), expected, rtol=0, atol=1e-10)
    # The loss is of the direction of the gradient alone.
    tiny = 1e-100 * g
    torch.testing.assert_close(online_pca_gradient(tiny, p, tiny @ p, orthogonality), expected, rtol=0, atol=1e-10)
    for less in (1e-160, 0.0):
        assert online_pca_gradient(less * g, p, less * g @ p).norm() <= online_pca_gradient(g, p, g @ p).norm()


def test_singular_vectors_are_stationary():
    g = matrices((7, 4))[0].detach()
    p = torch.linalg.svd(g).Vh[:2].T
    assert online_pca_gradient(g, p, g @ p).abs().max() < 1e-14


def subspace_after(steps: int, **options: Any) -> tuple[Tensor, Tensor]:
    """The basis after a stream of gradients with two strong directions, and those directions."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = 12, 8
    u = torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64)).Q
    singular = torch.tensor([3.0, 2.0, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05], dtype=torch.float64)
    (x,) = matrices((rows, columns))
    optimizer = OSDAdamW(named([x]), lr=1e-3, rank=2, **options)
    x.grad = torch.randn(rows, columns, generator=generator, dtype=torch.float64)  # its vectors are not those sought
    optimizer.step()
    for _ in range(steps):
        x.grad = (u * singular) @ v.T
        optimizer.step()
    return optimizer.state[x]["basis"], v[:, :2]


@pytest.mark.parametrize(("rule", "projection_lr"), [("sgd", 0.2), ("adamw", 5e-3)])
def test_the_projection_finds_the_leading_singular_vectors(rule, projection_lr):
    basis, leading = subspace_after(600, projection_optimizer=rule, projection_lr=projection_lr)
    cosines = torch.linalg.svdvals(torch.linalg.qr(basis).Q.T @ leading)
    assert cosines.min() > 0.9998
    # Orthonormal without a term that asks for it.
    torch.testing.assert_close(basis.T @ basis, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-3)
    before, _ = subspace_after(0)
    assert torch.linalg.svdvals(before.T @ leading).min() < 0.9


# One step after the other.


def projection_optimizer(name: str, p: nn.Parameter, decay: float) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW([p], weight_decay=decay)
    return Lion([p], weight_decay=decay) if name == "lion" else torch.optim.SGD([p])


@pytest.mark.parametrize("rule", ["adamw", "lion", "sgd"])
@pytest.mark.parametrize("shape", SHAPES)
def test_two_updates_by_hand(shape, rule):
    """Weights move in the span of P before P does; P's learning rate follows that of the weights."""
    (x,), is_tall = matrices(shape), shape[0] >= shape[1]
    w, lr, decay = x.detach().clone(), 0.05, 0.1 if rule != "sgd" else 0.0
    options: dict[str, Any] = {"rank": 3, "scale": 0.5, "weight_decay": 0.2, "orthogonality": 0.3}
    optimizer = OSDAdamW(
        named([x]), lr=lr, projection_optimizer=rule, projection_lr=0.02, projection_decay=decay, **options
    )
    m = v = torch.zeros((), dtype=torch.float64)
    p, of_p = nn.Parameter(torch.zeros(())), torch.optim.SGD([nn.Parameter(torch.zeros(()))])
    for t in range(1, 6):
        lr_t = optimizer.param_groups[0]["lr"] = lr / t
        (g,) = give_gradients(t, x)
        g = g if is_tall else g.T
        if t == 1:
            _, _, vh = torch.linalg.svd(g, full_matrices=False)
            p = nn.Parameter(vh[:3].T.clone())
            p.data *= torch.stack([column[column.abs().argmax()].sign() for column in p.data.T])
            of_p = projection_optimizer(rule, p, decay)
        r = g @ p.detach()
        m, v = 0.9 * m + 0.1 * r, 0.999 * v + 0.001 * r * r
        u = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8) @ p.detach().T
        w = w * (1 - lr_t * 0.2) - lr_t * 0.5 * (u if is_tall else u.T)
        if t > 1:
            of_p.param_groups[0]["lr"] = 0.02 * lr_t / lr
            of_p.zero_grad()
            pca_loss(g, p, 0.3).backward()
            of_p.step()
        optimizer.step()
        torch.testing.assert_close(x.detach(), w, rtol=0, atol=1e-9)
        torch.testing.assert_close(optimizer.state[x]["basis"], p.detach(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_full_basis_that_rests_is_sgd(shape, momentum):
    ours, theirs = matrices(shape), matrices(shape)
    optimizer = OSDSGD(named(ours), lr=0.05, momentum=momentum, rank=99, scale=1.0, projection_lr=0.0)
    run(optimizer, ours, range(6))
    run(torch.optim.SGD(theirs, lr=0.05, momentum=momentum), theirs, range(6))
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-12)
    assert optimizer.state[ours[0]]["basis"].shape == (min(shape), min(shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_lion_takes_the_sign_below_or_above(shape):
    for form, scale in (("paper", 0.5), ("official", 1.0)):
        (x,) = matrices(shape)
        w, m, is_tall = x.detach().clone(), torch.zeros((), dtype=torch.float64), shape[0] >= shape[1]
        optimizer = OSDLion(named([x]), lr=0.05, rank=2, scale=0.5, form=form, projection_lr=0.0, weight_decay=0.2)
        for t in range(4):
            (g,) = give_gradients(t, x)
            g = g if is_tall else g.T
            optimizer.step()
            p = optimizer.state[x]["basis"]
            u, m = 0.9 * m + 0.1 * g @ p, 0.99 * m + 0.01 * g @ p
            step = torch.sign(u) @ p.T if form == "paper" else torch.sign(u @ p.T)
            w = w * (1 - 0.05 * 0.2) - 0.05 * scale * (step if is_tall else step.T)
            torch.testing.assert_close(x.detach(), w, rtol=0, atol=1e-12)


def test_the_orthogonality_term_pulls_back():
    def defect(orthogonality: float) -> float:
        (x,) = matrices((8, 6))
        options: dict[str, Any] = {"projection_optimizer": "sgd", "projection_lr": 0.05, "rank": 3}
        optimizer = OSDAdamW(named([x]), orthogonality=orthogonality, **options)
        run(optimizer, [x], range(1))
        optimizer.state[x]["basis"].mul_(1.5)
        run(optimizer, [x], range(1, 15))
        basis = optimizer.state[x]["basis"]
        return float((basis.T @ basis - torch.eye(3, dtype=torch.float64)).norm())

    assert defect(1.0) < 0.2 * defect(0.0)


def test_a_first_gradient_of_zero_and_a_rate_of_zero():
    params = matrices((6, 4))
    optimizer = OSDAdamW(named(params), lr=0.0, rank=2)
    params[0].grad = torch.zeros_like(params[0])
    optimizer.step()
    run(optimizer, params, range(3))
    assert optimizer.state[params[0]]["basis"].isfinite().all()
    torch.testing.assert_close(params[0], matrices((6, 4))[0], rtol=0, atol=0)


# Memory, checkpoints, parameters.


def numbers_kept(optimizer: torch.optim.Optimizer) -> int:
    leaves = [t for kept in optimizer.state.values() for t in kept.values() if isinstance(t, Tensor)]
    return sum(t.numel() for t in leaves if t.numel() > 1)


@pytest.mark.parametrize("shape", [(40, 64), (64, 40)])
@pytest.mark.parametrize(
    ("plugin", "copies_of_r", "rule", "copies_of_p"),
    [(OSDAdamW, 2, "adamw", 3), (OSDAdamW, 2, "sgd", 1), (OSDSGD, 1, "lion", 2), (OSDLion, 1, "adamw", 3)],
)
def test_state_grows_with_the_rank(shape, plugin, copies_of_r, rule, copies_of_p):
    params, rank = matrices(shape), 8
    optimizer = plugin(named(params), rank=rank, projection_optimizer=rule)
    run(optimizer, params, range(3))
    assert numbers_kept(optimizer) == rank * (copies_of_r * 64 + copies_of_p * 40)
    adamw = torch.optim.AdamW(params)
    run(adamw, params, range(1))
    assert numbers_kept(optimizer) < 0.4 * numbers_kept(adamw)


@pytest.mark.parametrize("plugin", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumes_exactly(plugin, dtype, tmp_path):
    shapes = ((6, 4), (4, 6), (3,))
    whole, first, second = (matrices(*shapes, dtype=dtype) for _ in range(3))
    options: dict[str, Any] = {"rank": 2, "lr": 0.05}

    def scheduled(optimizer: torch.optim.Optimizer, params: list[Tensor], steps: range) -> None:
        for step in steps:
            optimizer.param_groups[0]["lr"] = 0.05 / (1 + step)
            run(optimizer, params, range(step, step + 1))

    scheduled(plugin(named(whole), **options), whole, range(6))
    optimizer = plugin(named(first), **options)
    scheduled(optimizer, first, range(3))
    torch.save([optimizer.state_dict(), [p.detach() for p in first]], tmp_path / "state")
    state, values = torch.load(tmp_path / "state", weights_only=True)
    # Built anew with a rate that a schedule has moved: the first rate is in the checkpoint.
    resumed = plugin(named(second), **options | {"lr": 0.0125})
    resumed.load_state_dict(state)
    with torch.no_grad():
        torch._foreach_copy_(second, values)
    scheduled(resumed, second, range(3, 6))
    for a, b in zip(second, whole, strict=True):
        assert torch.equal(a, b)


def test_all_other_parameters_have_adamw():
    ours, theirs = matrices((4, 3), (3,), (2, 2, 3)), matrices((4, 3), (3,), (2, 2, 3))
    options: dict[str, Any] = {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}
    run(OSDAdamW(named(ours), lr=0.05, **options), ours, range(4))
    run(torch.optim.AdamW(theirs[1:], lr=0.05, **options), theirs, range(4))
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"scale": -1.0},
        {"projection_optimizer": "adam"},
        {"projection_lr": -1.0},
        {"projection_decay": -1.0},
        {"orthogonality": -1.0},
        {"form": "papper"},
        {"betas": (1.0, 0.9)},
        {"lr": -1.0},
        {"adamw_weight_decay": -1.0},
    ],
)
def test_options_out_of_range_are_named(options):
    (name,) = options
    with pytest.raises(ConfigurationError) as error:
        OSDLion(named(matrices((2, 2))), **options)
    assert name in str(error.value)


def test_what_it_cannot_use_is_refused():
    with pytest.raises(ConfigurationError, match="OSDAdamW is built from named parameters"):
        OSDAdamW(matrices((2, 2)))
    with pytest.raises(ConfigurationError, match="OSDSGD found no hidden matrix"):
        OSDSGD([("lm_head.weight", matrices((2, 2))[0])])
