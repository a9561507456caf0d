"""The closure's answer about clusters: the gradient of each one's samples."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightrail import Closure
from lightrail.errors import ClosureError


def problem(sizes=(8,), labels=3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, labels)).double()
    batches = [(torch.randn(size, 4).double(), torch.randint(labels, (size,))) for size in sizes]
    return model, batches


def closure_of(model, batches, **options):
    params = list(model.parameters())
    options = {"clusters_fn": lambda batch: batch[1], **options}
    return Closure(lambda batch: F.cross_entropy(model(batch[0]), batch[1]), params, *batches, **options)


@pytest.mark.parametrize("sizes", [(8,), (6, 6), (5, 5, 5)])
def test_weighted_by_their_samples_the_gradients_make_the_whole(sizes):
    model, batches = problem(sizes)
    closure = closure_of(model, batches)
    _, whole = closure.gradient()
    found = closure.clusters(3)
    total = sum(count for count, _ in found)
    assert total == sum(sizes)
    for i, expected in enumerate(whole):
        mean = sum(count / total * gradients[i] for count, gradients in found)
        torch.testing.assert_close(mean, expected, rtol=0, atol=1e-12)


def test_each_is_the_gradient_of_its_own_samples():
    model, batches = problem((7, 7))
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    for cluster, (count, gradients) in enumerate(closure_of(model, batches).clusters(3)):
        members = y == cluster
        assert count == int(members.sum()) > 0
        alone = torch.autograd.grad(F.cross_entropy(model(x[members]), y[members]), list(model.parameters()))
        for found, expected in zip(gradients, alone, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_cluster_without_samples_has_none_and_a_gradient_of_zero():
    model, batches = problem((8,))
    found = closure_of(model, batches).clusters(5)
    for count, gradients in found[3:]:
        assert count == 0
        assert not any(gradient.any() for gradient in gradients)


def test_it_leaves_everything_as_it_was():
    model, batches = problem((12,))
    model = nn.Sequential(model, nn.BatchNorm1d(3).double(), nn.Dropout(0.5))
    closure = closure_of(model, batches, module=model, clusters_fn=lambda batch: torch.arange(12) % 3)
    closure()
    gradients = [cast(Tensor, p.grad).clone() for p in model.parameters()]
    buffers = [buffer.clone() for buffer in model.buffers()]
    random_state = torch.get_rng_state()
    evaluations = closure.evaluations
    closure.clusters(3)
    assert closure.evaluations == evaluations + 1
    assert all(torch.equal(g, cast(Tensor, p.grad)) for g, p in zip(gradients, model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert torch.equal(random_state, torch.get_rng_state())


def test_a_number_out_of_range_is_an_error():
    model, batches = problem((8,))
    with pytest.raises(ClosureError, match="number the samples") as caught:
        closure_of(model, batches).clusters(2)
    assert "0 to 1" in caught.value.allowed
    with pytest.raises(ClosureError, match="number the samples"):
        closure_of(model, batches, clusters_fn=lambda batch: batch[1] - 1).clusters(3)


def test_one_number_too_few_is_an_error():
    model, batches = problem((8,))
    with pytest.raises(ClosureError, match="number the samples"):
        closure_of(model, batches, clusters_fn=lambda batch: batch[1][1:]).clusters(3)


def test_a_task_without_clusters_is_an_error():
    model, batches = problem((8,))
    with pytest.raises(ClosureError, match="'clusters'") as caught:
        closure_of(model, batches, clusters_fn=None).clusters(3)
    assert "clusters(batch)" in caught.value.allowed
