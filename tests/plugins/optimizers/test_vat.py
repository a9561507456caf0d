"""VAT: the worst direction, the divergence in it, and its gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightrail import Closure, TransformedOptimizer
from lightrail.errors import ClosureError, ConfigurationError
from lightrail_optimizers import SAM, VAT
from lightrail_optimizers.batch_inputs import inputs_of
from lightrail_optimizers.transforms.vat import divergence, virtual_adversarial


def network(*extra):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), *extra, nn.Tanh(), nn.Linear(8, 3)).double()


def window(step, count):
    torch.manual_seed(100 + step)
    return [(torch.randn(6, 5).double(), torch.randint(3, (6,))) for _ in range(count)]


def closure_of(model, *batches, outputs=None):
    outputs = outputs or (lambda batch: model(batch[0]))
    return Closure(
        lambda batch: F.cross_entropy(model(batch[0]), batch[1]),
        list(model.parameters()),
        *batches,
        module=model,
        outputs_fn=outputs,
    )


def train(model, transforms, count=1, steps=3, inner=torch.optim.SGD):
    optimizer = TransformedOptimizer(inner(model.parameters(), lr=0.1), transforms)
    spent = []
    for step in range(steps):
        closure = closure_of(model, *window(step, count))
        torch.manual_seed(step)  # the masks of dropout, and then the direction
        optimizer.step(closure)
        spent.append(closure.evaluations)
    return spent


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def kl(p, q):
    p, q = p.softmax(-1), q.softmax(-1)
    return (p * (p.log() - q.log())).sum(-1).mean()


# By hand.


def test_the_divergences():
    p, q = torch.randn(4, 3).double(), torch.randn(4, 3).double()
    assert divergence(p, q, "kl").item() == pytest.approx(kl(p, q).item(), abs=1e-12)
    assert divergence(p, p + 5.0, "kl").item() == pytest.approx(0.0, abs=1e-12)
    expected = sum((a - b).square().sum().item() for a, b in zip(p, q, strict=True)) / 4 / 2
    assert divergence(p, q, "squared").item() == pytest.approx(expected, abs=1e-12)
    assert divergence(p[:, 0], q[:, 0], "squared").item() == pytest.approx(
        (p[:, 0] - q[:, 0]).square().mean().item() / 2, abs=1e-12
    )
    assert divergence(p.bfloat16(), q.bfloat16(), "kl").dtype == torch.float32


def test_the_power_method_finds_the_worst_direction_of_a_softmax():
    torch.manual_seed(0)
    w = torch.randn(5, 3).double()
    x = torch.randn(2, 5).double()
    clean = x @ w
    r = virtual_adversarial(
        lambda r: divergence(clean, (x + r) @ w, "kl"), torch.randn(2, 5).double(), eps=0.7, xi=1e-4, iterations=60
    )
    for i in range(2):
        p = clean[i].softmax(-1)
        values, vectors = torch.linalg.eigh(w @ (torch.diag(p) - torch.outer(p, p)) @ w.T)
        assert r[i].norm().item() == pytest.approx(0.7, abs=1e-9)
        assert abs(r[i] @ vectors[:, -1]).item() == pytest.approx(0.7, abs=1e-5)
        assert values[-1] > values[-2]


def test_one_iteration_is_one_product_with_the_hessian():
    torch.manual_seed(0)
    w, x, d = torch.randn(5, 3).double(), torch.randn(1, 5).double(), torch.randn(1, 5).double()
    r = virtual_adversarial(lambda r: divergence(x @ w, (x + r) @ w, "squared"), d, eps=2.0, xi=10.0, iterations=1)
    g = w @ (w.T @ d[0])
    torch.testing.assert_close(r[0], 2 * g / g.norm(), rtol=0, atol=1e-12)
    r = virtual_adversarial(lambda r: r.sum(), d, eps=2.0, xi=10.0, iterations=0)
    torch.testing.assert_close(r, 2 * d / d.norm(), rtol=0, atol=1e-12)


def test_each_sample_has_a_norm_of_its_own():
    w = torch.eye(2).double()
    x = torch.zeros(2, 2).double()
    d = torch.tensor([[1.0, 0.0], [0.0, 1e-200]], dtype=torch.float64)
    r = virtual_adversarial(lambda r: divergence(x, (x + r) @ w, "squared"), d, eps=3.0, xi=0.1, iterations=1)
    torch.testing.assert_close(r, torch.tensor([[3.0, 0.0], [0.0, 3.0]]).double(), rtol=0, atol=1e-12)


def test_where_nothing_changes_the_outputs_nothing_is_added():
    x = torch.zeros(2, 3)
    r = virtual_adversarial(lambda r: (0 * r).sum(), torch.ones(2, 3), eps=1.0, xi=0.1, iterations=2)
    assert r.tolist() == x.tolist()


def test_the_clean_prediction_is_held_fixed():
    """For f(x) = w x the penalty is ((x + r) w - x w0)² / 2 at w = w0: its gradient is (x + r) r w0."""
    w = nn.Parameter(torch.tensor([[2.0]]).double())
    x = torch.tensor([[3.0], [3.0]]).double()
    closure = Closure(lambda batch: 0 * w.sum(), [w], (x,), outputs_fn=lambda batch: batch[0] @ w)
    closure()
    torch.manual_seed(4)
    with torch.no_grad():
        VAT(eps=0.5).before_step([w], closure)
    found = w.grad
    assert found is not None
    signs = [-0.5, 0.5]
    allowed = [((3 + a) * a + (3 + b) * b) for a in signs for b in signs]  # mean over two, times w0 = 2
    assert min(abs(found.item() - each) for each in allowed) < 1e-12


# Against a loop.


@pytest.mark.parametrize("iterations", [0, 1, 2])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("inner", [torch.optim.SGD, torch.optim.AdamW])
def test_equals_the_loop_written_by_hand(iterations, count, inner):
    """Two micro-batches draw one after the other from one generator, and dropout has one mask for all outputs."""
    ours, theirs, plain = (network(nn.Dropout(0.4)) for _ in range(3))
    transform = VAT(strength=0.7, eps=0.8, xi=0.05, iterations=iterations)
    assert train(ours, [transform], count, inner=inner) == [2, 2, 2]
    train(plain, [], count, inner=inner)
    optimizer = inner(theirs.parameters(), lr=0.1)
    for step in range(3):
        batches = window(step, count)
        torch.manual_seed(step)
        states = []
        optimizer.zero_grad()
        for x, y in batches:
            states.append(torch.get_rng_state())
            (F.cross_entropy(theirs(x), y) / count).backward()
        loss_gradient = gradients(theirs)
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, (), dtype=torch.int64)))
        optimizer.zero_grad()
        for (x, _), state in zip(batches, states, strict=True):

            def masked(inputs, state=state):
                torch.set_rng_state(state)
                return theirs(inputs)

            with torch.no_grad():
                log_p = masked(x).log_softmax(-1)
            d = torch.randn(x.shape, dtype=x.dtype, generator=generator)

            def unit(d):
                d = d / d.abs().amax(1, keepdim=True)
                return d / torch.linalg.vector_norm(d, dim=1, keepdim=True)

            def penalty(r, x=x, log_p=log_p, masked=masked):
                log_q = masked(x + r).log_softmax(-1)
                return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()

            for _ in range(iterations):
                r = (0.05 * unit(d)).requires_grad_()
                (d,) = torch.autograd.grad(penalty(r), r)
            (penalty(0.8 * unit(d)) / count).backward()
        for p, g, more in zip(theirs.parameters(), loss_gradient, gradients(theirs), strict=True):
            p.grad = g.add(more, alpha=0.7)
        optimizer.step()
    assert same(ours, theirs)
    assert not same(ours, plain)
    assert transform.logged()["divergence"] > 0


def test_strength_zero_is_the_optimizer_alone():
    ours, plain = network(nn.Dropout(0.4)), network(nn.Dropout(0.4))
    assert train(ours, [VAT(strength=0.0)], 2) == [1, 1, 1]
    after = torch.get_rng_state()
    train(plain, [], 2)
    assert same(ours, plain)
    assert torch.equal(after, torch.get_rng_state())


def test_a_small_change_under_dropout_costs_little():
    """With masks of their own the outputs would differ although the inputs do not."""
    model = network(nn.Dropout(0.5))
    transform = VAT(eps=1e-6)
    train(model, [transform], steps=1)
    assert 0 <= transform.logged()["divergence"] < 1e-9


def test_statistics_move_once():
    ours, plain = network(nn.BatchNorm1d(8)), network(nn.BatchNorm1d(8))
    train(ours, [VAT()], 2, steps=1)
    train(plain, [], 2, steps=1)
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), plain.buffers(), strict=True))


def test_it_makes_a_model_smoother():
    torch.manual_seed(1)
    batches = window(0, 1)
    ends = []
    for transforms in ([], [VAT(strength=2.0, eps=1.0)]):
        model = network()
        optimizer = TransformedOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), transforms)
        for _ in range(60):
            optimizer.step(closure_of(model, *batches))
        x = batches[0][0]
        with torch.no_grad():
            clean = model(x)
        r = virtual_adversarial(
            lambda r, m=model, x=x, clean=clean: divergence(clean, m(x + r), "kl"),
            torch.ones_like(x),
            eps=1.0,
            xi=1e-3,
            iterations=10,
        )
        ends.append(divergence(clean, model(x + r), "kl").item())
    assert ends[1] < 0.5 * ends[0]


def test_after_it_sam_climbs_the_penalised_loss():
    ours, without = network(), network()
    assert train(ours, [VAT(eps=0.5), SAM(rho=0.1)]) == [4, 4, 4]
    train(without, [SAM(rho=0.1)])
    assert not same(ours, without)


# Batches.


def test_the_divergence_follows_the_targets():
    x, logits = torch.randn(4, 5).double(), torch.randn(5, 3).double()
    for batch, kind in (
        ((x, torch.tensor([0, 1, 2, 0])), "kl"),
        ({"x": x, "y": torch.randn(4, 3).double()}, "squared"),
        (x, "squared"),
        ((x, torch.tensor([0, 1, 2, 0]), torch.randn(4).double()), "squared"),
    ):
        seen = []
        w = nn.Parameter(logits.clone())

        def outputs(batch, w=w):
            return inputs_of("vat", batch)[0] @ w

        for divergence_of in ("auto", kind):
            transform = VAT(divergence=divergence_of)
            closure = Closure(lambda batch, w=w: w.sum(), [w], batch, outputs_fn=outputs)
            closure()
            torch.manual_seed(0)
            with torch.no_grad():
                transform.before_step([w], closure)
            seen.append(transform.logged()["divergence"])
        assert seen[0] == seen[1] > 0


def test_inputs_are_the_first_real_valued_tensor_and_the_rest_stays():
    batch = {"index": torch.arange(2), "x": torch.zeros(2, 3), "y": torch.ones(2)}
    x, with_inputs = inputs_of("vat", batch)
    assert x is batch["x"]
    other = with_inputs(x + 1)
    assert other["x"].tolist() == [[1.0] * 3] * 2
    assert other["index"] is batch["index"]
    assert other["y"] is batch["y"]


def test_tokens_a_missing_batch_and_inputs_that_nothing_looks_at_are_refused():
    w = nn.Parameter(torch.ones(3, 2))

    def step(*batches, outputs):
        optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=0.1), [VAT()])
        optimizer.step(Closure(lambda *batch: w.sum(), [w], *batches, outputs_fn=outputs))

    tokens = (torch.tensor([0, 2]), torch.tensor([1, 0]))
    with pytest.raises(ClosureError, match=r"vat changes the inputs") as caught:
        step(tokens, outputs=lambda batch: w[batch[0]])
    assert "torch.int64 (2,)" in caught.value.found
    with pytest.raises(ClosureError, match=r"vat changes the inputs"):
        step(outputs=lambda batch: w)
    # Tokens with real-valued targets: those are not what the model looks at.
    with pytest.raises(ClosureError, match="no way from the inputs"):
        step((tokens[0], torch.randn(2, 2)), outputs=lambda batch: w[batch[0]])
    with pytest.raises(ClosureError, match="'outputs'"):
        step((torch.randn(2, 3),), outputs=None)
    assert w.tolist() == [[1.0, 1.0]] * 3


def test_parameters_of_any_shape_and_without_a_gradient():
    scalar = nn.Parameter(torch.tensor(2.0))
    hollow = nn.Parameter(torch.zeros(0, 3))
    turned = nn.Parameter(torch.randn(3, 4).t())
    unused, frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3), requires_grad=False)
    params = [scalar, hollow, turned, unused, frozen]
    outputs = lambda batch: scalar * (batch @ turned + frozen) + hollow.sum()  # noqa: E731
    optimizer = TransformedOptimizer(torch.optim.SGD(params, lr=0.1, weight_decay=0.1), [VAT()])
    before = [p.detach().clone() for p in params]
    optimizer.step(Closure(lambda batch: outputs(batch).square().mean(), params, torch.randn(5, 4), outputs_fn=outputs))
    assert not torch.equal(scalar, before[0])
    assert not torch.equal(turned, before[2])
    assert unused.grad is None
    assert torch.equal(unused, before[3])
    assert torch.equal(frozen, before[4])


@pytest.mark.parametrize(
    "options",
    [{"strength": -1.0}, {"eps": 0.0}, {"xi": 0.0}, {"iterations": -1}, {"divergence": "js"}],
)
def test_options_out_of_range(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        VAT(**options)
