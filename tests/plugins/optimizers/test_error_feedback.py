"""Compression and its feedback: nothing is lost, the largest are found, and descent needs the feedback."""

from __future__ import annotations

import pytest
import torch

from lightrail_optimizers.error_feedback import feed_back_, largest, power_iteration, share


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def keeping(k):
    def compress(a):
        where = largest(a, k)
        return torch.zeros_like(a).scatter_(0, where, a[where])

    return compress


def low_rank(rows, columns, rank):
    held = [random(columns, rank, seed=9)]

    def compress(a):
        p, held[0] = power_iteration(a.view(rows, columns), held[0])
        return (p @ held[0].t()).flatten()

    return compress


@pytest.mark.parametrize("compress", [keeping(3), low_rank(6, 5, 2), torch.clone, torch.zeros_like, lambda a: a])
def test_what_was_sent_and_what_is_owed_make_up_all_gradients(compress):
    e, sent, gradients = torch.zeros(30, dtype=torch.float64), [], random(40, 30)
    for g in gradients:
        given = g.clone()
        sent.append(feed_back_(e, g, compress).clone())
        assert torch.equal(g, given)
    torch.testing.assert_close(torch.stack(sent).sum(0) + e, gradients.sum(0), rtol=0, atol=1e-12)


def test_without_compression_nothing_is_owed_and_the_gradient_passes_bit_for_bit():
    e = torch.zeros(30)
    for g in random(5, 30, dtype=torch.float32):
        assert torch.equal(feed_back_(e, g, lambda a: a), g)
        assert torch.equal(e, torch.zeros(30))


def test_half_precision_errors_owe_what_half_precision_values_lacked():
    e, g = torch.zeros(2, dtype=torch.bfloat16), torch.tensor([1.0009765625, 0.0])
    c = feed_back_(e, g, lambda a: a.bfloat16().float())
    assert c.tolist() == [1.0, 0.0]
    assert e.tolist() == [0.0009765625, 0.0]


@pytest.mark.parametrize("size", [1, 7, 1000, 200_000])
def test_the_largest_are_found(size):
    a = random(size)
    for density in (1e-4, 0.01, 0.3, 1.0):
        k = share(size, density)
        expected = torch.topk(a.abs(), k).values
        found = largest(a, k)
        assert len(found.unique()) == k
        assert torch.equal(a.abs()[found].sort(descending=True).values, expected)


def test_the_largest_are_found_where_a_sample_misleads():
    size = 200_000
    a = random(size)
    a[:: size // (1 << 15)] *= 1e3  # what the sample sees is what is rare elsewhere: its threshold is too high
    k = 60_000
    assert torch.equal(a.abs()[largest(a, k)].sort(descending=True).values, torch.topk(a.abs(), k).values)
    a[:: size // (1 << 15)] = 0.0  # or it sees nothing
    assert torch.equal(a.abs()[largest(a, 100)].sort(descending=True).values, torch.topk(a.abs(), 100).values)


def test_equal_entries_and_none_at_all():
    assert len(largest(torch.ones(200_000), 500).unique()) == 500
    assert len(largest(torch.zeros(0), 0)) == 0
    assert [share(0, 0.5), share(3, 1e-9), share(200, 0.01), share(5, 1.0)] == [0, 1, 2, 5]


def test_one_iteration_is_exact_on_a_matrix_of_that_rank():
    a = random(7, 2) @ random(2, 5, seed=1)
    p, q = power_iteration(a, random(5, 2, seed=2))
    torch.testing.assert_close(p @ q.t(), a)
    torch.testing.assert_close(p.t() @ p, torch.eye(2, dtype=torch.float64))


def test_iterations_find_the_best_approximation():
    a, q = random(7, 5), random(5, 2, seed=2)
    for _ in range(200):
        p, q = power_iteration(a, q)
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    torch.testing.assert_close(p @ q.t(), u[:, :2] @ torch.diag(s[:2]) @ vh[:2])


def test_a_zero_matrix_does_not_stop_the_iterations_for_good():
    _, q = power_iteration(torch.zeros(7, 5, dtype=torch.float64), random(5, 2))
    a = random(7, 2) @ random(2, 5, seed=1)
    for _ in range(3):
        p, q = power_iteration(a, q)
    torch.testing.assert_close(p @ q.t(), a)


def test_sparse_descent_solves_a_badly_scaled_problem_with_feedback_only():
    features = random(200, 50) * torch.logspace(0.5, -0.5, 50, dtype=torch.float64)
    labels = (features @ (random(50, seed=1) * torch.logspace(-0.5, 0.5, 50, dtype=torch.float64)) > 0).double()

    def loss_after(direction):
        w = torch.zeros(50, dtype=torch.float64)
        for _ in range(2000):
            g = features.t() @ (torch.sigmoid(features @ w) - labels) / 200
            w -= 0.1 * direction(g)
        return float(torch.nn.functional.binary_cross_entropy_with_logits(features @ w, labels))

    e = torch.zeros(50, dtype=torch.float64)
    dense = loss_after(lambda g: g)
    assert loss_after(lambda g: feed_back_(e, g, keeping(1))) == pytest.approx(dense, rel=0.02)
    assert loss_after(keeping(1)) > 3 * dense
