"""Windows of gradients, whole, sparse and of low rank: what they hold, and their products, against dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightrail_optimizers.compressed_window import LowRankWindow, TopKWindow
from lightrail_optimizers.gradient_window import DenseWindow, solve_shifted


def gradients(count, d, seed=0):
    return np.random.default_rng(seed).standard_normal((count, d))


def close(found, expected, tolerance=1e-9):
    scale = max(1.0, float(np.abs(np.asarray(expected)).max()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)


def test_wide_half_precision_windows_are_read_in_parts():
    d = 300_000  # more than one part of three rows
    rows = torch.as_tensor(np.array(gradients(3, d))).bfloat16()
    window, wide = DenseWindow(rows), rows.double()
    x, w = torch.as_tensor(gradients(1, d, seed=3)[0]).float(), torch.tensor([0.5, -2.0, 1.0])
    close(window.products(3, x), wide @ x.double(), 1e-4)
    close(window.combination(w), wide.t() @ w.double(), 1e-5)
    close(window.products(2, x), wide[:2] @ x.double(), 1e-4)
    close(window.combination(w[:2]), wide[:2].t() @ w[:2].double(), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_sparse_window_in_several_parts_is_its_dense_matrix(dtype):
    d, m, k = 400_000, 7, 150_000
    rows = torch.as_tensor(gradients(m, d)).float()
    window = TopKWindow(torch.zeros(m, k, dtype=dtype), torch.zeros(m, k, dtype=torch.int32), [d], [k])
    dense = DenseWindow(torch.zeros(m, d))
    for j, row in enumerate(rows):
        dense.put(j, window.put(j, row))
    x, w = torch.as_tensor(gradients(1, d, seed=4)[0]).float(), torch.linspace(-1, 1, m)
    close(window.products(m, x), dense.products(m, x), 1e-3)
    close(window.products(3, x), dense.products(3, x), 1e-3)
    close(window.combination(w), dense.combination(w), 1e-5)
    close(window.combination(w[:3]), dense.combination(w[:3]), 1e-5)


@pytest.mark.parametrize("rank", [1, 2])
def test_a_low_rank_window_is_its_dense_matrix(rank):
    torch.manual_seed(0)
    params = [torch.zeros(shape, dtype=torch.float64) for shape in ((6, 5), (4,), (), (3, 2, 4))]
    m, d = 5, 59
    window = LowRankWindow({}, m, params, rank, torch.zeros(d, dtype=torch.float64), torch.float64)
    dense = DenseWindow(torch.zeros(m, d, dtype=torch.float64))
    for t, g in enumerate(gradients(2 * m + 1, d)):
        j, n = t % m, min(t + 1, m)
        c = window.put(j, torch.as_tensor(g))
        dense.put(j, c)
        close(window.gram_row(n, j, c), dense.products(n, c))
        x = torch.as_tensor(g).flip(0)
        close(window.products(n, x), dense.products(n, x))
        close(window.combination(x[:n]), dense.combination(x[:n]))
        assert torch.linalg.matrix_rank(c[:30].view(6, 5)) == rank
        assert torch.equal(c[30:35], torch.as_tensor(g)[30:35])  # a vector and a scalar are kept whole


def test_a_matrix_that_rounding_made_indefinite_is_solved_as_if_it_were_not():
    vectors = torch.linalg.qr(torch.as_tensor(np.array(gradients(3, 3)))).Q
    gram = vectors @ torch.diag(torch.tensor([2.0, 1.0, -0.5], dtype=torch.float64)) @ vectors.t()
    r = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    expected = vectors @ ((vectors.t() @ r) / torch.tensor([2.1, 1.1, 0.1], dtype=torch.float64))
    close(solve_shifted(gram, 0.1, r), expected)


def test_a_small_shift_of_a_singular_matrix_in_single_precision_is_not_rounded_away():
    r = torch.tensor([1.0, -1.0, 0.0])
    close(solve_shifted(torch.ones(3, 3), 1e-6, r), 1e6 * r, 1e-5)
