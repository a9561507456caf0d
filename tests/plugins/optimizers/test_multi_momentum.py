"""Multi-momentum: which noise it takes out, what it is where there is none, and what it needs of the task."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightrail import Closure
from lightrail.errors import ClosureError, ConfigurationError
from lightrail_optimizers import MultiMomentum


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


CENTERS = doubles([2.0, 0.0, -1.0], [-1.0, 3.0, 0.5], [0.0, -4.0, 1.0])


def closure_of(w, batch, clusters, noise=None):
    """The gradient of a sample is the center of its cluster, with noise of its own."""

    def loss(numbers):
        slopes = CENTERS[clusters[numbers]]
        return ((slopes if noise is None else slopes + noise[numbers]) @ w).mean()

    return Closure(loss, [w], batch, clusters_fn=lambda numbers: clusters[numbers])


def test_a_single_cluster_is_sgd_with_momentum():
    generator = torch.Generator().manual_seed(0)
    w, u = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))
    ours = MultiMomentum([w], lr=0.05, clusters=1, weight_decay=0.1)
    theirs = torch.optim.SGD([u], lr=0.05, momentum=0.9, weight_decay=0.1)
    for _ in range(8):
        x = torch.randn(6, 3, generator=generator)

        def loss_of(p):
            return lambda batch: (batch @ p).square().mean()

        ours.step(Closure(loss_of(w), [w], x, clusters_fn=lambda batch: torch.zeros(len(batch), dtype=torch.long)))
        theirs.step(Closure(loss_of(u), [u], x))
        torch.testing.assert_close(w, u, rtol=1e-6, atol=1e-7)


def test_two_steps_by_hand():
    w = nn.Parameter(doubles(0.0, 0.0, 0.0))
    clusters = torch.tensor([0, 1, 1, 2])
    optimizer = MultiMomentum([w], lr=0.1, clusters=3, momentum=0.5, frequencies=[0.25, 0.5, 0.25])
    optimizer.step(closure_of(w, torch.tensor([0, 0, 1, 3]), clusters))
    v = CENTERS[0] / 2 + CENTERS[1] / 4 + CENTERS[2] / 4
    torch.testing.assert_close(w.detach(), -0.1 * v, rtol=0, atol=1e-12)
    optimizer.step(closure_of(w, torch.tensor([2, 3]), clusters))
    u = (CENTERS[1] + CENTERS[2]) / 2 + 0.25 * CENTERS[0] + 0.0 * CENTERS[1] - 0.25 * CENTERS[2]
    torch.testing.assert_close(w.detach(), -0.1 * v - 0.1 * (0.5 * v + u), rtol=0, atol=1e-12)


def test_momenta_are_averages_of_their_clusters_gradients():
    w = nn.Parameter(doubles(0.0, 0.0, 0.0))
    noise = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    clusters = torch.tensor([0, 0, 1, 1])
    optimizer = MultiMomentum([w], clusters=3, alpha=0.75)
    for batch in ([0, 1, 2], [3], [0, 0, 3]):
        optimizer.step(closure_of(w, torch.tensor(batch), clusters, noise))
    state = optimizer.state[w]
    first, last = (CENTERS[0] + noise[:2]).mean(0), CENTERS[0] + noise[0]
    torch.testing.assert_close(state["momentum_0"], 0.75 * first + 0.25 * last, rtol=0, atol=1e-12)
    expected = 0.75 * (0.75 * (CENTERS[1] + noise[2]) + 0.25 * (CENTERS[1] + noise[3])) + 0.25 * (CENTERS[1] + noise[3])
    torch.testing.assert_close(state["momentum_1"], expected, rtol=0, atol=1e-12)
    assert state["momentum_2"].tolist() == [0.0] * 3


def test_clusters_of_one_gradient_leave_no_noise_once_all_were_seen():
    w = nn.Parameter(doubles(0.0, 0.0, 0.0))
    clusters = torch.tensor([0, 1, 1, 1, 2, 2])
    shares = [1 / 6, 1 / 2, 1 / 3]
    optimizer = MultiMomentum([w], lr=1.0, clusters=3, momentum=0.0, frequencies=shares)
    for batch in ([0], [1], [4]):
        optimizer.step(closure_of(w, torch.tensor(batch), clusters))
    full = doubles(*shares) @ CENTERS
    for batch in ([0], [5], [2, 2, 0], [1, 4]):
        before = w.detach().clone()
        optimizer.step(closure_of(w, torch.tensor(batch), clusters))
        torch.testing.assert_close(before - w.detach(), full, rtol=0, atol=1e-12)


def test_shares_are_learnt_from_what_was_seen():
    w = nn.Parameter(doubles(0.0, 0.0, 0.0))
    clusters = torch.tensor([0, 1, 2, 2])
    optimizer = MultiMomentum([w], lr=1.0, clusters=3, momentum=0.0)
    optimizer.step(closure_of(w, torch.tensor([0, 1, 2, 3]), clusters))
    torch.testing.assert_close(w.detach(), -CENTERS[clusters].mean(0), rtol=0, atol=1e-12)
    before = w.detach().clone()
    optimizer.step(closure_of(w, torch.tensor([0, 0]), clusters))
    assert optimizer.param_groups[0]["samples_seen"] == [3, 1, 2]
    expected = doubles(3 / 6, 1 / 6, 2 / 6) @ CENTERS
    torch.testing.assert_close(before - w.detach(), expected, rtol=0, atol=1e-12)


def test_its_direction_is_unbiased_and_less_noisy():
    generator = torch.Generator().manual_seed(0)
    clusters = torch.randint(3, (30,), generator=generator)
    noise = 0.3 * torch.randn(30, 3, generator=generator, dtype=torch.float64)
    full = (CENTERS[clusters] + noise).mean(0)
    shares = [float((clusters == k).double().mean()) for k in range(3)]
    w = nn.Parameter(doubles(0.0, 0.0, 0.0))
    optimizer = MultiMomentum([w], lr=1.0, clusters=3, momentum=0.0, frequencies=shares)
    found, plain = [], []
    for _ in range(400):
        batch = torch.randint(30, (2,), generator=generator)
        before = w.detach().clone()
        closure = closure_of(w, batch, clusters, noise)
        optimizer.step(closure)
        assert closure.evaluations == 2
        found.append(before - w.detach())
        plain.append((CENTERS[clusters[batch]] + noise[batch]).mean(0))
    errors = torch.stack(found[50:]) - full
    assert float(errors.square().sum(1).mean()) < 0.1 * float((torch.stack(plain[50:]) - full).square().sum(1).mean())
    assert float(errors.mean(0).norm()) < 0.1


def test_a_parameter_that_joins_late_begins_with_its_clusters_gradients():
    a, b = nn.Parameter(doubles(1.0)), nn.Parameter(doubles(1.0))
    optimizer = MultiMomentum([a, b], clusters=2)

    def closure(late):
        def loss(x):
            return (x * a).mean() + ((x * b).mean() if late else 0.0)

        return Closure(loss, [a, b], doubles(1.0, 3.0), clusters_fn=lambda x: (x > 2).long())

    optimizer.step(closure(False))
    assert b.item() == 1.0
    assert b not in optimizer.state
    optimizer.step(closure(True))
    assert optimizer.state[b]["momentum_0"].item() == 1.0
    assert optimizer.state[b]["momentum_1"].item() == 3.0


def test_a_resumed_run_and_a_copy_go_on_exactly():
    model = nn.Linear(4, 3)

    def closure(model, t):
        generator = torch.Generator().manual_seed(t)
        x, y = torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)
        return Closure(
            lambda batch: F.cross_entropy(model(batch[0]), batch[1]),
            list(model.parameters()),
            (x, y),
            clusters_fn=lambda batch: batch[1],
        )

    optimizer = MultiMomentum(model.parameters(), lr=0.1, clusters=3)
    for t in range(3):
        optimizer.step(closure(model, t))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    model_2 = copy.deepcopy(model)
    resumed = MultiMomentum(model_2.parameters(), lr=0.1, clusters=3)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    model_3, twin = copy.deepcopy((model, optimizer))
    for t in range(3, 6):
        optimizer.step(closure(model, t))
        resumed.step(closure(model_2, t))
        twin.step(closure(model_3, t))
    assert torch.equal(model.weight, model_2.weight)
    assert torch.equal(model.weight, model_3.weight)


def test_it_needs_clusters():
    w = nn.Parameter(doubles(1.0))
    optimizer = MultiMomentum([w], clusters=2)
    with pytest.raises(ClosureError, match="MultiMomentum"):
        optimizer.step(lambda: (w**2).sum())
    with pytest.raises(ClosureError, match="clusters"):
        optimizer.step(Closure(lambda x: (w * x).mean(), [w], doubles(1.0, 2.0)))


def test_a_parameter_that_the_closure_does_not_know_is_named():
    w, other = nn.Parameter(doubles(1.0)), nn.Parameter(doubles(1.0))
    other.grad = doubles(1.0)
    optimizer = MultiMomentum([w, other], clusters=2)
    closure = Closure(lambda x: (w * x).mean(), [w], doubles(1.0, 3.0), clusters_fn=lambda x: (x > 2).long())
    with pytest.raises(ClosureError, match="does not know a parameter"):
        optimizer.step(closure)


def test_batchnorm_over_a_single_sample_is_named():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    optimizer = MultiMomentum(model.parameters(), clusters=2)
    closure = Closure(
        lambda x: model(x).square().mean(),
        list(model.parameters()),
        torch.randn(5, 2),
        module=model,
        clusters_fn=lambda x: torch.tensor([0, 0, 0, 0, 1]),
    )
    with pytest.raises(ClosureError, match="BatchNorm"):
        optimizer.step(closure)


@pytest.mark.parametrize("frequencies", [[0.5, 0.5], [0.5, 0.6, -0.1], [0.2, 0.2, 0.2]])
def test_frequencies_that_are_no_shares_are_refused(frequencies):
    with pytest.raises(ConfigurationError, match="frequencies"):
        MultiMomentum([nn.Parameter(torch.ones(1))], clusters=3, frequencies=frequencies)
