"""PSGD's rules beside explicit matrices, and where they lead."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from lightrail_optimizers import flat_vector
from lightrail_optimizers.psgd_base import starting_scale
from lightrail_optimizers.psgd_diag import fit_diag, precondition_diag
from lightrail_optimizers.psgd_lra import balance_lra, fit_lra, precondition_lra
from lightrail_optimizers.psgd_xmat import fit_xmat, precondition_xmat

CLOSE = {"rtol": 0, "atol": 1e-9}
NORMALIZERS = ("second", "first")


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def drawn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# Explicit matrices: slow and plain.


def q_of_xmat(a: Tensor, b: Tensor) -> Tensor:
    return torch.diag(a) + torch.diag(b).flip(1)


def q_of_lra(U: Tensor, V: Tensor, d: Tensor) -> Tensor:
    return (torch.eye(len(d), dtype=d.dtype) + U @ V.T) @ torch.diag(d)


def lie_gradient(Q: Tensor, v: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``a a^T - b b^T``, and ``a = Q h``, ``b = Q^-T v``."""
    a, b = Q @ h, torch.linalg.inv(Q).T @ v
    return torch.outer(a, a) - torch.outer(b, b), a, b


def fitted_xmat(a: Tensor, b: Tensor, v: Tensor, h: Tensor, step: float, normalizer: str) -> Tensor:
    """The next Q."""
    Q = q_of_xmat(a, b)
    gradient, p, q = lie_gradient(Q, v, h)
    shape = torch.eye(len(a), dtype=torch.bool)
    E = gradient * (shape | shape.flip(1))
    size = (p**2 + q**2).max() if normalizer == "second" else E.abs().max()
    return Q - step / size * E @ Q


def fitted_lra(
    U: Tensor, V: Tensor, d: Tensor, v: Tensor, h: Tensor, step: float, moves_u: bool, normalizer: str
) -> Tensor:
    """The next Q."""
    Q = q_of_lra(U, V, d)
    P = Q.T @ Q
    Ph, inverse_Pv = P @ h, torch.linalg.inv(P) @ v
    gradient = Ph * h - v * inverse_Pv
    second = normalizer == "second"
    size = ((Ph**2 + v**2) * (h**2 + inverse_Pv**2)).sqrt().max() if second else gradient.abs().max()
    d_new = d - step / size * d * gradient
    E, a, b = lie_gradient(Q, v, h)
    A = torch.eye(len(d), dtype=d.dtype) + U @ V.T
    X = V if moves_u else U
    if second:
        size = a.norm() * (X @ X.T @ a).norm() + b.norm() * (X @ X.T @ b).norm()
    else:
        size = torch.linalg.matrix_norm(E @ X @ X.T)
    direction = E @ V @ V.T @ A if moves_u else U @ U.T @ E @ A
    return (A - step / size * direction) @ torch.diag(d_new)


def criterion(Q: Tensor, v: Tensor, h: Tensor) -> Tensor:
    """``h^T P h + v^T P^-1 v``."""
    P = Q.T @ Q
    return h @ P @ h + v @ torch.linalg.solve(P, v)


# One fit.


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("size", [1, 2, 6, 7])
def test_xmat_takes_the_step_of_the_explicit_matrix(size, normalizer):
    a, b, v, h = drawn(size).abs() + 0.5, 0.3 * drawn(size, seed=1), drawn(size, seed=2), 3 * drawn(size, seed=3)
    if size % 2:
        b[size // 2] = 0
    expected = fitted_xmat(a, b, v, h, 0.1, normalizer)
    fit_xmat(a, b, v, h, step=0.1, normalizer=normalizer)
    torch.testing.assert_close(q_of_xmat(a, b), expected, **CLOSE)
    torch.testing.assert_close(precondition_xmat(a, b, v), expected.T @ expected @ v, **CLOSE)
    if size % 2:
        assert b[size // 2] == 0  # the middle is the diagonal's


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("moves_u", [True, False])
@pytest.mark.parametrize(("size", "rank"), [(1, 1), (2, 3), (7, 2)])
def test_lra_takes_the_step_of_the_explicit_matrix_with_u_or_v_never_both(size, rank, moves_u, normalizer):
    U, V = 0.3 * drawn(size, rank), 0.3 * drawn(size, rank, seed=1)
    d, v, h = drawn(size, seed=2).abs() + 0.5, drawn(size, seed=3), 3 * drawn(size, seed=4)
    expected = fitted_lra(U, V, d, v, h, 0.1, moves_u, normalizer)
    still, moved = (V, U) if moves_u else (U, V)
    kept, before = still.clone(), moved.clone()
    fit_lra(U, V, d, v, h, step=0.1, moves_u=moves_u, normalizer=normalizer)
    torch.testing.assert_close(q_of_lra(U, V, d), expected, **CLOSE)
    torch.testing.assert_close(precondition_lra(U, V, d, v), expected.T @ expected @ v, **CLOSE)
    assert torch.equal(still, kept)
    assert not torch.equal(moved, before)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_the_diagonal_is_the_x_without_its_other_half_and_the_low_rank_without_rank(normalizer):
    size = 6
    d, v, h = drawn(size).abs() + 0.5, drawn(size, seed=1), 3 * drawn(size, seed=2)
    zeros, of_lra = torch.zeros(size, 2, dtype=torch.float64), d.clone()
    gradient = (d * h) ** 2 - (v / d) ** 2
    divisor = ((d * h) ** 2 + (v / d) ** 2).max() if normalizer == "second" else gradient.abs().max()
    expected = d - 0.1 / divisor * d * gradient
    fit_lra(zeros, zeros.clone(), of_lra, v, h, step=0.1, moves_u=True, normalizer=normalizer)
    fit_diag(d, v, h, step=0.1, normalizer=normalizer)
    torch.testing.assert_close(d, expected, **CLOSE)
    torch.testing.assert_close(of_lra, expected, **CLOSE)
    torch.testing.assert_close(precondition_diag(d, v), precondition_xmat(d, torch.zeros_like(d), v), **CLOSE)


def test_the_steps_go_down_the_criterion():
    size, step = 7, 1e-4
    v, h = drawn(size), 3 * drawn(size, seed=1)
    d, b, U, V = drawn(size, seed=2).abs() + 0.5, 0.2 * drawn(size, seed=3), 0.3 * drawn(size, 2), 0.3 * drawn(size, 2)
    b[size // 2] = 0
    first = criterion(q_of_xmat(d, b), v, h)
    a = d.clone()
    fit_xmat(a, b, v, h, step=step)
    assert criterion(q_of_xmat(a, b), v, h) < first
    for moves_u in (True, False):
        first = criterion(q_of_lra(U, V, d), v, h)
        fit_lra(U, V, d, v, h, step=step, moves_u=moves_u)
        assert criterion(q_of_lra(U, V, d), v, h) < first


@pytest.mark.parametrize("size", [10, 11])
def test_blocks_make_no_difference(size, monkeypatch):
    def fits():
        U, V = 0.3 * drawn(2, size).T, 0.3 * drawn(2, size, seed=1).T
        a, b, c, d = drawn(4, size, seed=2).abs() / 4 + torch.tensor([[1.0], [0.0], [1.0], [1.0]])
        b[size // 2] *= 1 - size % 2
        v, h = drawn(2, size, seed=3)
        fit_xmat(a, b, v, h, step=0.1)
        fit_diag(c, v, h, step=0.1)
        for moves_u in (True, False):
            fit_lra(U, V, d, v, h, step=0.1, moves_u=moves_u)
        return a, b, c, U, V, d, precondition_xmat(a, b, v), precondition_lra(U, V, d, v)

    expected = fits()
    monkeypatch.setattr(flat_vector, "_BLOCK", 3)
    for found, whole in zip(fits(), expected, strict=True):
        torch.testing.assert_close(found, whole, **CLOSE)


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_single_precision_bears_large_and_small_curvature(scale):
    v, h = drawn(2, 8).float()
    h, q = h * scale, starting_scale(v, h * scale)
    a, b, d = torch.full((8,), q), torch.zeros(8), torch.full((8,), q)
    U, V = 0.1 * drawn(8, 2).float(), 0.1 * drawn(8, 2, seed=1).float()
    for t in range(4):
        fit_xmat(a, b, v, h, step=0.1)
        fit_lra(U, V, d, v, h, step=0.1, moves_u=t % 2 == 0)
    for tensor in (a, b, d, U, V):
        assert tensor.isfinite().all()
    assert not torch.equal(a, torch.full((8,), q))


def test_no_curvature_and_no_direction_leave_q_as_it_is():
    zeros, ones = torch.zeros(3), torch.ones(3)
    a, b, d, c, U, V = ones.clone(), zeros.clone(), ones.clone(), ones.clone(), torch.ones(3, 1), torch.ones(3, 1)
    fit_xmat(a, b, zeros, zeros, step=0.1)
    fit_diag(c, zeros, zeros, step=0.1)
    fit_lra(U, V, d, zeros, zeros, step=0.1, moves_u=True)
    for q in (a, c, d, U[:, 0], V[:, 0]):
        assert torch.equal(q, ones)


def test_balancing_gives_equal_norms_and_the_same_product():
    U, V = 5 * drawn(6, 2), drawn(6, 2, seed=1)
    product = U @ V.T
    balance_lra(U, V)
    torch.testing.assert_close(U @ V.T, product, **CLOSE)
    torch.testing.assert_close(U.norm(), V.norm(), **CLOSE)


def test_the_starting_scale():
    v, h = doubles(1.0, -2.0, 0.5), doubles(3.0, 0.1, -4.0)
    expected = (5.25 / 3) ** 0.25 * ((81 + 1e-4 + 256) / 3) ** -0.125
    assert starting_scale(v, h) == pytest.approx(expected, rel=1e-12)
    assert starting_scale(v.float(), 1e-12 * h.float()) == pytest.approx(1e6 * expected, rel=1e-5)
    assert starting_scale(v, 0 * h) == starting_scale(0 * v, h) == 1.0


# Where many fits lead.


def fitted(fit, matrix, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for t in range(count):
        v = torch.randn(len(matrix), generator=generator, dtype=torch.float64)
        fit(v, matrix @ v, t % 2 == 0)


def fit_turn(U, V, d, v, h, moves_u):
    fit_lra(U, V, d, v, h, step=0.1, moves_u=moves_u)


def test_all_three_find_the_inverse_magnitudes_of_a_diagonal_hessian():
    hessian, one = torch.diag(doubles(1.0, -4.0, 0.25)), torch.eye(3, dtype=torch.float64)
    a, b, c, d = torch.ones(3).double(), torch.zeros(3).double(), torch.ones(3).double(), torch.ones(3).double()
    U, V = 0.2 * drawn(3, 1), 0.2 * drawn(3, 1, seed=1)
    fitted(lambda v, h, _: fit_xmat(a, b, v, h, step=0.1), hessian, 600)
    fitted(lambda v, h, _: fit_diag(c, v, h, step=0.1), hessian, 600)
    steps = iter(20 / (200 + t) for t in range(1000))
    fitted(lambda v, h, turn: fit_lra(U, V, d, v, h, step=next(steps), moves_u=turn), hessian, 1000)
    expected = torch.diag(doubles(1.0, 0.25, 4.0))
    torch.testing.assert_close(torch.stack([precondition_xmat(a, b, e) for e in one]), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.stack([precondition_diag(c, e) for e in one]), expected, rtol=0, atol=1e-6)
    # Off the diagonal a single v says little where curvature has both signs: there this one never comes to rest.
    of_lra = torch.stack([precondition_lra(U, V, d, e) for e in one])
    torch.testing.assert_close(of_lra.diagonal(), expected.diagonal(), rtol=0.05, atol=0)


def test_full_rank_finds_the_inverse_of_a_dense_hessian_and_a_small_rank_does_not():
    basis, _ = torch.linalg.qr(drawn(4, 4))
    hessian = basis @ torch.diag(doubles(0.2, 0.5, 2.0, 5.0)) @ basis.T
    errors = []
    for rank in (1, 4):
        U, V, d = 0.2 * drawn(4, rank), 0.2 * drawn(4, rank, seed=1), torch.ones(4).double()
        fit = functools.partial(fit_turn, U, V, d)
        fitted(fit, hessian, 1000)
        Q = q_of_lra(U, V, d)
        errors.append(float((Q.T @ Q @ hessian - torch.eye(4)).norm()))
    assert errors[1] < 1e-3
    assert errors[0] > 0.1


@pytest.mark.parametrize("size", [4, 5])
def test_xmat_finds_an_inverse_of_its_own_shape_with_both_signs_of_curvature(size):
    a, b = doubles(3.0, 1.0, 2.0, 5.0, 0.5)[:size], doubles(1.0, -0.5, 0.0, 0.5, 1.0)[:size]
    hessian = torch.diag(a) + torch.diag((b + b.flip(0)) / 2).flip(1)
    if size % 2:
        hessian[2, 2] = -2.0
    q, r = torch.ones(size).double(), torch.zeros(size).double()
    fitted(lambda v, h, _: fit_xmat(q, r, v, h, step=0.1), hessian, 1500)
    assert r.abs().max() > 0.01  # it left the diagonal, where it began
    values, vectors = torch.linalg.eigh(hessian)
    expected = vectors @ torch.diag(1 / values.abs()) @ vectors.T
    found = torch.stack([precondition_xmat(q, r, e) for e in torch.eye(size, dtype=torch.float64)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
