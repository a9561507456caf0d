"""EFCP: every step against dense matrices of what the window holds, M-FAC as the limit, and what is owed."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from lightrail.errors import ConfigurationError
from lightrail_optimizers import EFCPGGT, MFAC, EFCPLowRankMFAC, EFCPTopKMFAC

M = 5
SHAPES = ((6, 5), (4,), (), (3, 2, 4))
D = 30 + 4 + 1 + 24


def parameters(dtype=torch.float64, fill=0.0):
    return [Parameter(torch.full(shape, fill, dtype=dtype)) for shape in SHAPES]


def flat(params):
    return torch.cat([p.detach().reshape(-1) for p in params]).double().clone()


def gradients(count, d=D, seed=0):
    return np.random.default_rng(seed).standard_normal((count, d))


def give(params, g):
    parts = torch.as_tensor(g).split([p.numel() for p in params])
    for p, part in zip(params, parts, strict=True):
        p.grad = part.view(p.shape).to(p.dtype)


def step_with(optimizer, params, g):
    """The move of one step, over minus the learning rate."""
    give(params, g)
    before = flat(params)
    optimizer.step()
    return ((before - flat(params)) / optimizer.param_groups[0]["lr"]).numpy()


def inverse_fisher(window, x, m, damping):
    rows = np.array(window)
    return np.linalg.solve(damping * np.eye(len(x)) + rows.T @ rows / m, x)


def inverse_root(window, x, eps, beta2=1.0):
    ages = np.arange(len(window))[::-1]
    rows = np.array(window) * (beta2**ages)[:, None]
    _, s, vt = np.linalg.svd(rows)
    return vt.T @ ((vt @ x) / (np.append(s, np.zeros(len(x) - len(s))) + eps))


def close(found, expected, tolerance=1e-9):
    scale = max(1.0, float(np.abs(np.asarray(expected)).max()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)


class ByHand:
    """Top-k with error feedback, by sorting."""

    def __init__(self, k, parts=(D,)):
        self.k, self.parts, self.e, self.window = k, parts, np.zeros(D), deque(maxlen=M)

    def __call__(self, g):
        a, c, start = self.e + g, np.zeros(D), 0
        for size in self.parts:
            k = max(1, round(self.k * size))
            where = start + np.argsort(-np.abs(a[start : start + size]))[:k]
            c[where] = a[where]
            start += size
        self.e = a - c
        self.window.append(c)
        return c


# M-FAC over sparse gradients.


@pytest.mark.parametrize("selection", ["global", "tensor"])
@pytest.mark.parametrize("precondition", ["compressed", "gradient"])
def test_every_step_of_sparse_mfac_is_the_dense_inverse_while_the_ring_wraps(selection, precondition):
    params, compress = parameters(), ByHand(0.1, (D,) if selection == "global" else (30, 4, 1, 24))
    options = {"lr": 0.1, "density": 0.1, "window": M, "damping": 0.03}
    optimizer = EFCPTopKMFAC(params, selection=selection, precondition=precondition, **options)
    for g in gradients(3 * M + 2):
        c = compress(g)
        x = c if precondition == "compressed" else g
        close(step_with(optimizer, params, g), inverse_fisher(compress.window, x, M, 0.03))
        close(optimizer.state[params[0]]["error"], compress.e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_density_of_one_is_mfac_bit_for_bit(dtype):
    ours, theirs = parameters(dtype), parameters(dtype)
    a = EFCPTopKMFAC(ours, lr=0.1, density=1.0, window=M, damping=1e-4)
    b = MFAC(theirs, lr=0.1, window=M, damping=1e-4)
    for g in gradients(2 * M + 1):
        give(ours, g)
        give(theirs, g)
        a.step()
        b.step()
        assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    assert not a.state[ours[0]]["error"].any()


def test_a_density_just_below_one_is_close_to_mfac():
    ours, theirs = parameters(), parameters()
    a = EFCPTopKMFAC(ours, lr=0.1, density=1 - 1e-9, window=M, damping=0.01)
    b = MFAC(theirs, lr=0.1, window=M, damping=0.01)
    for g in gradients(2 * M + 1):
        close(step_with(a, ours, g), step_with(b, theirs, g), 1e-8)
    assert a.state[ours[0]]["values"].shape == (M, D)


def test_what_entered_the_window_and_what_is_owed_make_up_all_gradients():
    params, given = parameters(), gradients(M)
    optimizer = EFCPTopKMFAC(params, density=0.1, window=M)
    for g in given:
        step_with(optimizer, params, g)
    kept = optimizer.state[params[0]]
    sent = torch.zeros(D, dtype=torch.float64)
    for values, indices in zip(kept["values"], kept["indices"], strict=True):
        sent[indices.long()] += values
    close(sent + kept["error"], given.sum(0), 1e-12)


def test_momentum_is_a_sum_of_directions():
    params, compress, v = parameters(), ByHand(0.1), 0.0
    optimizer = EFCPTopKMFAC(params, lr=0.1, density=0.1, window=M, damping=0.1, momentum=0.7)
    for g in gradients(8):
        c = compress(g)
        v = 0.7 * v + inverse_fisher(compress.window, c, M, 0.1)
        close(step_with(optimizer, params, g), v)


@pytest.mark.parametrize("form", ["decoupled", "preconditioned"])
def test_weight_decay_passes_by_the_window(form):
    params, compress = parameters(fill=1.0), ByHand(0.1)
    options = {"lr": 0.1, "density": 0.1, "window": M, "damping": 0.1, "weight_decay": 0.5}
    optimizer = EFCPTopKMFAC(params, decay_form=form, **options)
    for g in gradients(8):
        x, c = flat(params).numpy(), compress(g)
        decayed = c + 0.5 * x if form == "preconditioned" else c
        expected = inverse_fisher(compress.window, decayed, M, 0.1) + (0.5 * x if form == "decoupled" else 0.0)
        close(step_with(optimizer, params, g), expected)


def test_what_a_parameter_without_gradient_is_owed_waits():
    a, b = (Parameter(torch.zeros(4, dtype=torch.float64)) for _ in range(2))
    optimizer = EFCPTopKMFAC([a, b], lr=1.0, density=0.25, window=M, damping=0.1)
    a.grad, b.grad = torch.full((4,), 3.0, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    optimizer.step()
    a.grad, b.grad, before = torch.full((4,), 1e-3, dtype=torch.float64), None, b.detach().clone()
    for _ in range(3):  # the debts of a are paid, and those of b, by then the largest, are not lost
        optimizer.step()
    kept = optimizer.state[a]
    assert torch.equal(b, before)
    assert torch.equal(kept["error"][4:], torch.ones(4, dtype=torch.float64))
    assert int(kept["indices"].max()) < 4


def test_indices_survive_a_checkpoint_of_half_precision_parameters():
    params = [Parameter(torch.zeros(5000, dtype=torch.bfloat16))]
    optimizer = EFCPTopKMFAC(params, density=0.01, window=M)
    for g in gradients(3, 5000):
        step_with(optimizer, params, g)
    loaded = EFCPTopKMFAC(params, density=0.01, window=M)
    loaded.load_state_dict(optimizer.state_dict())
    for name in ("indices", "gram", "values", "error"):
        found, expected = loaded.state[params[0]][name], optimizer.state[params[0]][name]
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    assert loaded.state[params[0]]["indices"].dtype == torch.int32
    assert loaded.state[params[0]]["values"].dtype == torch.bfloat16


def test_state_is_two_window_shares_and_one_error():
    (p,) = params = [Parameter(torch.zeros(5000))]
    optimizer = EFCPTopKMFAC(params, density=0.01, window=64)
    step_with(optimizer, params, gradients(1, 5000)[0])
    kept = optimizer.state[p]
    large = sum(kept[name].numel() for name in ("values", "indices", "error"))
    assert large == 2 * 64 * 50 + 5000
    assert {name for name, value in kept.items() if isinstance(value, torch.Tensor)} == {
        "values",
        "indices",
        "error",
        "gram",
    }


# M-FAC over gradients of low rank.


@pytest.mark.parametrize("precondition", ["compressed", "gradient"])
def test_every_step_of_low_rank_mfac_is_the_dense_inverse_while_the_ring_wraps(precondition):
    torch.manual_seed(0)
    params, window, owed = parameters(), deque(maxlen=M), np.zeros(D)
    optimizer = EFCPLowRankMFAC(params, lr=0.1, rank=1, window=M, damping=0.03, precondition=precondition)
    for t, g in enumerate(gradients(3 * M)):
        found = step_with(optimizer, params, g)
        kept = optimizer.state[params[0]]
        window.append(owed + g - kept["error"].numpy())  # c, by the conservation that other tests establish
        left, right = kept["left"][0][t % M], kept["right"][0][t % M]
        close(left.t() @ right, window[-1][:30].reshape(6, 5))
        owed = kept["error"].numpy().copy()
        close(found, inverse_fisher(window, window[-1] if precondition == "compressed" else g, M, 0.03))


def test_gradients_of_that_rank_pass_whole():
    torch.manual_seed(0)  # the first factor is random
    ours, theirs = parameters(), parameters()
    a = EFCPLowRankMFAC(ours, lr=0.1, rank=1, window=M, damping=0.01)
    b = MFAC(theirs, lr=0.1, window=M, damping=0.01)
    for g, u, v, y, z in zip(
        gradients(8), gradients(8, 6, 1), gradients(8, 5, 2), gradients(8, 3, 3), gradients(8, 8, 4), strict=True
    ):
        g[:30], g[35:] = np.outer(u, v).reshape(-1), np.outer(y, z).reshape(-1)
        close(step_with(a, ours, g), step_with(b, theirs, g))
        assert float(a.state[ours[0]]["error"].abs().max()) < 1e-9


def test_a_rank_that_saves_nothing_is_mfac_bit_for_bit():
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    a = EFCPLowRankMFAC(ours, lr=0.1, rank=3, window=M, damping=1e-4)
    b = MFAC(theirs, lr=0.1, window=M, damping=1e-4)
    for g in gradients(2 * M + 1):
        give(ours, g)
        give(theirs, g)
        a.step()
        b.step()
        assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


# GGT.


@pytest.mark.parametrize("beta2", [1.0, 0.8])
@pytest.mark.parametrize("density", [0.1, 1.0])
@pytest.mark.parametrize("precondition", ["compressed", "gradient"])
def test_every_step_of_ggt_is_the_dense_matrix_function_while_the_ring_wraps(beta2, density, precondition):
    params, compress = parameters(), ByHand(density)
    options = {"lr": 0.1, "window": M, "eps": 0.05, "beta2": beta2, "density": density}
    optimizer = EFCPGGT(params, precondition=precondition, **options)
    for g in gradients(3 * M + 2):
        c = compress(g)
        x = c if precondition == "compressed" else g
        close(step_with(optimizer, params, g), inverse_root(compress.window, x, 0.05, beta2), 1e-8)


def test_the_first_step_of_ggt_has_the_length_of_a_normalised_gradient():
    params, g = parameters(), gradients(1)[0]
    close(step_with(EFCPGGT(params, lr=1.0, density=1.0, eps=0.5), params, g), g / (np.linalg.norm(g) + 0.5))


def test_steps_of_ggt_are_shorter_than_the_learning_rate_whatever_the_gradients():
    params = parameters()
    optimizer = EFCPGGT(params, lr=1.0, window=M, density=0.2, eps=1e-8)
    for t, g in enumerate(gradients(12)):
        assert 0 < np.linalg.norm(step_with(optimizer, params, 10.0 ** (t % 4) * g)) <= 1 + 1e-9


@pytest.mark.parametrize("precondition", ["compressed", "gradient"])
def test_ggt_stands_gradients_that_repeat_and_vanish(precondition):
    params, g = parameters(torch.float32), gradients(1)[0]
    optimizer = EFCPGGT(params, lr=1.0, window=M, density=1.0, eps=1e-3, precondition=precondition)
    for factor in (0.0, 1.0, 1.0, 1.0, 0.0):
        found = step_with(optimizer, params, factor * g)
        assert np.isfinite(found).all()
        if factor == 0.0:
            assert not found.any()
    close(step_with(optimizer, params, g), g / (2 * np.linalg.norm(g) + 1e-3), 1e-3)


@pytest.mark.parametrize("optimizer_class", [EFCPTopKMFAC, EFCPLowRankMFAC, EFCPGGT])
def test_a_gradient_that_is_not_a_number_shows_in_the_parameters(optimizer_class):
    w = Parameter(torch.zeros(4))
    optimizer = optimizer_class([w])
    for value in (1.0, torch.nan, torch.nan):
        w.grad = torch.full((4,), value)
        optimizer.step()
    assert bool(w.isnan().any())


@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [
        (EFCPTopKMFAC, {"density": 0.0}),
        (EFCPTopKMFAC, {"density": 1.5}),
        (EFCPTopKMFAC, {"selection": "layer"}),
        (EFCPTopKMFAC, {"damping": 0.0}),
        (EFCPTopKMFAC, {"decay_form": "l2"}),
        (EFCPTopKMFAC, {"precondition": "raw"}),
        (EFCPLowRankMFAC, {"rank": 0}),
        (EFCPLowRankMFAC, {"damping": -1.0}),
        (EFCPGGT, {"eps": 0.0}),
        (EFCPGGT, {"beta2": 0.0}),
        (EFCPGGT, {"density": 0.0}),
    ],
)
def test_options_out_of_range_are_refused(optimizer_class, options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        optimizer_class([Parameter(torch.zeros(3))], **options)


# The claim: compression does not slow the preconditioned method down, error feedback given.


def test_one_entry_in_twenty_trains_as_well_as_all_of_them_with_feedback_only():
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -1, 40, dtype=torch.float64)
    features = torch.randn(200, 40, generator=generator, dtype=torch.float64) * scale
    truth = torch.randn(40, generator=generator, dtype=torch.float64) / scale
    labels = torch.bernoulli(torch.sigmoid(features @ truth), generator=generator)

    def loss_after(optimizer_class, feeds_back=True, **options):
        w = Parameter(torch.zeros(40, dtype=torch.float64))
        optimizer = optimizer_class([w], lr=0.05, window=32, damping=0.01, **options)
        for _ in range(300):
            z = features @ w.detach()
            w.grad = features.t() @ (torch.sigmoid(z) - labels) / 200 + 1e-3 * w.detach()
            optimizer.step()
            if not feeds_back:
                optimizer.state[w]["error"].zero_()
        x = w.detach()
        return float(torch.nn.functional.binary_cross_entropy_with_logits(features @ x, labels) + 5e-4 * x @ x)

    dense = loss_after(MFAC)
    assert loss_after(EFCPTopKMFAC, density=0.05) == pytest.approx(dense, rel=0.01)
    assert loss_after(EFCPTopKMFAC, density=0.05, feeds_back=False) > 1.1 * dense
