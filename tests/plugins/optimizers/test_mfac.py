"""M-FAC: Woodbury's identity at every step, the ring buffer, precision, and its claim on ill-conditioned problems."""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from lightrail.errors import ConfigurationError
from lightrail_optimizers import MFAC
from lightrail_optimizers.gradient_window import DenseWindow
from lightrail_optimizers.mfac import mfac

D, M = 20, 5


def gradients(count, d=D, seed=0):
    return list(np.random.default_rng(seed).standard_normal((count, d)))


def dense_direction(window, x, m, damping):
    rows = np.array(window)
    fisher = damping * np.eye(rows.shape[1]) + rows.T @ rows / m
    return np.linalg.solve(fisher, x)


def parameter(d=D, dtype=torch.float64):
    return Parameter(torch.zeros(d, dtype=dtype))


def step_with(optimizer, w, g):
    """The move of one step, over minus the learning rate."""
    before = w.detach().clone()
    w.grad = torch.as_tensor(g).to(w.dtype)
    optimizer.step()
    return ((before - w.detach()) / optimizer.param_groups[0]["lr"]).double().numpy()


def close(found, expected, tolerance=1e-9):
    scale = max(1.0, float(np.abs(np.asarray(expected)).max()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)


# The direction.


def test_first_step_has_the_closed_form():
    w, g = parameter(2), np.array([0.3, -0.4])
    found = step_with(MFAC([w], lr=1.0, window=4, damping=0.01), w, g)
    close(found, g / (0.01 + 0.25 / 4))


def test_a_window_of_one_forgets_all_but_the_newest():
    w = parameter()
    optimizer = MFAC([w], lr=1.0, window=1, damping=0.1)
    for g in gradients(4):
        close(step_with(optimizer, w, g), g / (0.1 + g @ g))


@pytest.mark.parametrize("m", [M, 32])
def test_every_step_is_the_dense_inverse_while_the_ring_fills_and_wraps(m):
    w, window = parameter(), deque(maxlen=m)
    optimizer = MFAC([w], lr=0.5, window=m, damping=0.03)
    for g in gradients(3 * M + 2):
        window.append(g)
        close(step_with(optimizer, w, g), dense_direction(window, g, m, 0.03))


def test_the_short_form_for_a_row_is_woodburys_identity():
    rows = torch.as_tensor(np.array(gradients(M)))
    window, gram = DenseWindow(rows), rows @ rows.t()
    found = mfac(window, gram, 3, m=M, damping=0.02)
    g = rows[3]
    inner = torch.linalg.solve(M * 0.02 * torch.eye(M, dtype=torch.float64) + gram, rows @ g)
    close(found, (g - rows.t() @ inner) / 0.02)
    close(mfac(window, gram, 3, m=M, damping=0.02, x=g), found)


def test_any_other_vector_is_preconditioned_too():
    rows, x = np.array(gradients(M)), gradients(1, seed=1)[0]
    window = DenseWindow(torch.as_tensor(rows))
    found = mfac(window, window.rows @ window.rows.t(), 0, m=M, damping=0.02, x=torch.as_tensor(x))
    close(found, dense_direction(rows, x, M, 0.02))


def test_large_damping_is_sgd():
    w, plain, damping = parameter(), parameter(), 1e12
    optimizer, sgd = MFAC([w], lr=0.1 * damping, window=M, damping=damping), torch.optim.SGD([plain], lr=0.1)
    for g in gradients(8):
        w.grad, plain.grad = torch.as_tensor(g), torch.as_tensor(g)
        optimizer.step()
        sgd.step()
    close(w.detach(), plain.detach())


def test_the_direction_is_never_longer_than_half_the_root_of_m_over_damping():
    damping = 0.04
    bound = math.sqrt(M / damping) / 2
    w = parameter(2)
    g = np.array([math.sqrt(M * damping), 0.0])  # the length at which the first step attains it
    close(np.linalg.norm(step_with(MFAC([w], lr=1.0, window=M, damping=damping), w, g)), bound)
    optimizer = MFAC([w], lr=1.0, window=M, damping=damping)
    for scale in (0.01, 0.1, 1.0, 10.0):
        for g in gradients(7, 2):
            assert np.linalg.norm(step_with(optimizer, w, scale * g)) <= bound * (1 + 1e-12)


# Momentum and weight decay.


def test_momentum_is_an_average_of_directions():
    w, window, v = parameter(), deque(maxlen=M), np.zeros(D)
    optimizer = MFAC([w], lr=1.0, window=M, damping=0.1, momentum=0.7)
    for g in gradients(8):
        window.append(g)
        v = 0.7 * v + 0.3 * dense_direction(window, g, M, 0.1)
        close(step_with(optimizer, w, g), v)


def test_weight_decay_joins_the_gradient_before_the_window():
    w, window = parameter(), deque(maxlen=M)
    with torch.no_grad():
        w.copy_(torch.linspace(-1, 1, D))
    optimizer = MFAC([w], lr=0.1, window=M, damping=0.1, weight_decay=0.5)
    for g in gradients(8):
        decayed = g + 0.5 * w.detach().numpy()
        window.append(decayed)
        close(step_with(optimizer, w, g), dense_direction(window, decayed, M, 0.1))


def test_maximize_ascends_and_still_decays():
    up, down = parameter(), parameter()
    with torch.no_grad():
        up.fill_(1.0)
        down.fill_(1.0)
    options = {"lr": 0.1, "window": M, "damping": 0.1, "weight_decay": 0.5}
    climbing, descending = MFAC([up], maximize=True, **options), MFAC([down], **options)
    for g in gradients(8):
        up.grad, down.grad = torch.as_tensor(-g), torch.as_tensor(g)
        climbing.step()
        descending.step()
    assert torch.equal(up, down)


# Groups and missing gradients.


def test_parameters_of_a_group_share_one_matrix_and_groups_do_not():
    ab, c = [parameter(3), Parameter(torch.zeros(2, 2, dtype=torch.float64))], parameter(4)
    optimizer = MFAC([{"params": ab}, {"params": [c]}], lr=1.0, window=M, damping=0.1)
    joint, alone = deque(maxlen=M), deque(maxlen=M)
    for g, h in zip(gradients(7, 7), gradients(7, 4, seed=2), strict=True):
        joint.append(g)
        alone.append(h)
        before = [p.detach().clone() for p in (*ab, c)]
        ab[0].grad, ab[1].grad = torch.as_tensor(g[:3]), torch.as_tensor(g[3:]).view(2, 2)
        c.grad = torch.as_tensor(h)
        optimizer.step()
        moved = [(old - new.detach()).flatten() for old, new in zip(before, (*ab, c), strict=True)]
        close(torch.cat(moved[:2]), dense_direction(joint, g, M, 0.1))
        close(moved[2], dense_direction(alone, h, M, 0.1))


def test_a_missing_gradient_counts_as_zero_and_its_parameter_stays():
    a, b = parameter(3), parameter(4)
    optimizer = MFAC([a, b], lr=1.0, window=M, damping=0.1, weight_decay=0.2)
    with torch.no_grad():
        b.fill_(1.0)
    window = deque(maxlen=M)
    for t, g in enumerate(gradients(7, 7)):
        missing = t % 3 == 1
        a.grad, b.grad = torch.as_tensor(g[:3]), None if missing else torch.as_tensor(g[3:])
        decayed = g + 0.2 * torch.cat([a, b]).detach().numpy()
        decayed[3:] *= not missing
        window.append(decayed)
        before = torch.cat([a, b]).detach().clone()
        optimizer.step()
        expected = dense_direction(window, decayed, M, 0.1)
        expected[3:] *= not missing
        close(before - torch.cat([a, b]).detach(), expected)


# Precision.


def test_small_damping_keeps_its_digits_in_single_precision():
    # The difference of Woodbury's identity, over a damping of 1e-6, would leave no digit of them.
    w, window = parameter(dtype=torch.float32), deque(maxlen=M)
    optimizer = MFAC([w], lr=1.0, window=M, damping=1e-6)
    for g in gradients(12):
        g = g.astype(np.float32)
        window.append(g.astype(np.float64))
        with torch.no_grad():
            w.zero_()
        close(step_with(optimizer, w, g), dense_direction(window, window[-1], M, 1e-6), tolerance=1e-3)


def test_half_precision_parameters_hold_a_half_precision_window_and_a_single_precision_matrix():
    w, window = parameter(dtype=torch.bfloat16), deque(maxlen=M)
    optimizer = MFAC([w], lr=1.0, window=M, damping=0.1, weight_decay=0.3)
    for g in gradients(9):
        with torch.no_grad():
            w.fill_(0.25)
        rounded = torch.as_tensor(g).bfloat16()
        window.append((rounded.float() + 0.3 * 0.25).bfloat16().double().numpy())
        close(step_with(optimizer, w, rounded), dense_direction(window, window[-1], M, 0.1), tolerance=1e-2)
    kept = optimizer.state[w]
    assert (kept["window"].dtype, kept["gram"].dtype) == (torch.bfloat16, torch.float32)
    rows = kept["window"].double()
    torch.testing.assert_close(kept["gram"].double(), rows @ rows.t(), rtol=1e-5, atol=1e-5)
    loaded = MFAC([w], lr=1.0, window=M)
    loaded.load_state_dict(optimizer.state_dict())
    assert torch.equal(loaded.state[w]["gram"], kept["gram"])
    assert loaded.state[w]["gram"].dtype == torch.float32


def test_a_gradient_that_is_not_a_number_shows_in_the_parameters():
    w = parameter()
    optimizer = MFAC([w], lr=1.0, window=M)
    for g in gradients(3):
        step_with(optimizer, w, g)
    for _ in range(2):
        step_with(optimizer, w, np.full(D, np.nan))
        assert bool(w.isnan().all())


# Cost.


def test_a_step_reads_the_window_twice(monkeypatch):
    reads = []
    for name in ("products", "combination"):
        original = getattr(DenseWindow, name)
        monkeypatch.setattr(
            DenseWindow, name, lambda *args, original=original, name=name: (reads.append(name), original(*args))[1]
        )
    w = parameter()
    optimizer = MFAC([w], lr=1.0, window=M)
    for g in gradients(7):
        reads.clear()
        step_with(optimizer, w, g)
        assert sorted(reads) == ["combination", "products"]


def test_the_window_is_allocated_at_once_and_the_small_matrix_as_it_fills():
    w = parameter()
    optimizer = MFAC([w], window=M)
    sizes = []
    for g in gradients(7):
        step_with(optimizer, w, g)
        assert optimizer.state[w]["window"].shape == (M, D)
        sizes.append(len(optimizer.state[w]["gram"]))
    assert sizes == [1, 2, 3, 4, 5, 5, 5]


@pytest.mark.parametrize(
    "options", [{"window": 0}, {"damping": 0.0}, {"momentum": 1.0}, {"lr": -1.0}, {"weight_decay": -0.1}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        MFAC([parameter()], **options)


# The claim.


def logistic_regression(d=20, n=200):
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -2, d, dtype=torch.float64)
    features = torch.randn(n, d, generator=generator, dtype=torch.float64) * scale
    truth = 0.3 * torch.randn(d, generator=generator, dtype=torch.float64) / scale
    labels = torch.bernoulli(torch.sigmoid(features @ truth), generator=generator)

    def loss_and_gradient(w):
        z = features @ w
        loss = torch.nn.functional.binary_cross_entropy_with_logits(z, labels) + 5e-6 * w @ w
        return float(loss), features.t() @ (torch.sigmoid(z) - labels) / n + 1e-5 * w

    def hessian(w):
        s = torch.sigmoid(features @ w)
        return (features.t() * (s * (1 - s))) @ features / n + 1e-5 * torch.eye(d, dtype=torch.float64)

    return loss_and_gradient, hessian, d


def test_reaches_an_ill_conditioned_optimum_in_far_fewer_steps_than_gradient_descent():
    loss_and_gradient, hessian, d = logistic_regression()
    w = torch.zeros(d, dtype=torch.float64)
    for _ in range(30):
        w = w - torch.linalg.solve(hessian(w), loss_and_gradient(w)[1])
    best, gradient = loss_and_gradient(w)
    assert float(gradient.norm()) < 1e-10

    def steps_to_1e_3(make, at_most):
        w = parameter(d)
        optimizer = make(w)
        for t in range(at_most):
            loss, w.grad = loss_and_gradient(w.detach())
            if loss - best < 1e-3:
                return t
            optimizer.step()
        return at_most

    ours = steps_to_1e_3(lambda w: MFAC([w], lr=0.03, window=32, damping=1e-5), 400)
    assert ours < 200
    for lr in (1.0, 3.0, 6.0, 10.0, 20.0):
        assert steps_to_1e_3(lambda w, lr=lr: torch.optim.SGD([w], lr=lr), 8 * ours) == 8 * ours
