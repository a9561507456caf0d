"""InvarianceAugmentation: transformations, the chain that draws them, and the constraint that they make."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightrail import Closure, TransformedOptimizer
from lightrail.errors import ClosureError, ConfigurationError
from lightrail_optimizers import InvarianceAugmentation
from lightrail_optimizers.random_transformations import numbers_needed, transformed
from lightrail_optimizers.transforms.invariance_augmentation import losses_of_outputs, metropolis


def network(*extra):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), *extra, nn.Tanh(), nn.Linear(8, 3)).double()


def window(step, count):
    torch.manual_seed(100 + step)
    return [(torch.randn(6, 1, 8, 8).double(), torch.randint(3, (6,))) for _ in range(count)]


def closure_of(model, *batches):
    return Closure(
        lambda batch: F.cross_entropy(model(batch[0]), batch[1]),
        list(model.parameters()),
        *batches,
        module=model,
        outputs_fn=lambda batch: model(batch[0]),
        output_loss_fn=lambda outputs, batch: F.cross_entropy(outputs, batch[1]),
    )


def train(model, transforms, count=1, steps=3, inner=torch.optim.SGD):
    optimizer = TransformedOptimizer(inner(model.parameters(), lr=0.1), transforms)
    spent = []
    for step in range(steps):
        closure = closure_of(model, *window(step, count))
        torch.manual_seed(step)  # the masks of dropout, and then the transformations
        optimizer.step(closure)
        spent.append(closure.evaluations)
    return spent


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# Transformations.


def numbers(**chosen):
    """The uniform numbers of one sample; a half changes nothing."""
    order = ("across", "down", "turn", "size", "mirror")
    return torch.tensor([[chosen.get(name, 0.5) for name in order]], dtype=torch.float64)


def image():
    return torch.arange(1.0, 33.0, dtype=torch.float64).reshape(1, 2, 4, 4)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_half_way_nothing_changes():
    close(transformed(image(), {"shift": 0.4, "rotate": 90.0, "scale": 0.5}, numbers()), image())


def test_shifts_flips_and_turns_by_hand():
    x = image()
    moved = torch.zeros_like(x)
    moved[..., 1:] = x[..., :-1]
    close(transformed(x, {"shift": 0.25}, numbers(across=1.0)), moved)
    moved = torch.zeros_like(x)
    moved[..., :-1, :] = x[..., 1:, :]
    close(transformed(x, {"shift": 0.25}, numbers(down=0.0)), moved)
    close(transformed(x, {"flip": 0.5}, numbers(mirror=0.4)), x.flip(-1))
    close(transformed(x, {"flip": 0.5}, numbers(mirror=0.6)), x)
    turned = transformed(x, {"rotate": 90.0}, numbers(turn=1.0))
    close(turned, torch.rot90(x, 1, (-2, -1)))
    close(transformed(x, {"rotate": 90.0}, numbers(turn=0.0)), torch.rot90(x, -1, (-2, -1)))


def test_twice_the_size_is_the_middle_enlarged():
    x = torch.zeros(1, 1, 6, 6, dtype=torch.float64)
    x[..., 2:4, 2:4] = 1.0
    larger = transformed(x, {"scale": 0.999}, numbers(size=1.0))
    close(larger[0, 0, 2:4, 2:4], torch.ones(2, 2, dtype=torch.float64))
    assert larger.sum().item() == pytest.approx(4 * 1.999**2, rel=0.05)
    assert transformed(x, {"scale": 0.5}, numbers(size=0.0)).sum().item() < 4


def test_a_turn_keeps_shapes_where_images_are_not_square():
    x = torch.zeros(1, 1, 5, 9, dtype=torch.float64)
    x[0, 0, 2, 2:7] = 1.0  # a line of five across
    turned = transformed(x, {"rotate": 90.0}, numbers(turn=1.0))
    expected = torch.zeros_like(x)
    expected[0, 0, :, 4] = 1.0  # a line of five down
    close(turned, expected)


def test_each_sample_has_a_transformation_of_its_own():
    x = torch.cat([image(), image()])
    both = torch.cat([numbers(across=1.0), numbers(mirror=0.1)])
    found = transformed(x, {"shift": 0.25, "flip": 0.2}, both)
    close(found[:1], transformed(image(), {"shift": 0.25, "flip": 0.2}, numbers(across=1.0)))
    close(found[1:], image().flip(-1))


def test_noise_is_normal_and_of_any_shape():
    torch.manual_seed(0)
    x = torch.zeros(50, 400)
    u = torch.rand(50, numbers_needed(x, {"noise": 2.0}), dtype=torch.float64)
    noise = transformed(x, {"noise": 2.0}, u)
    assert noise.shape == x.shape
    assert noise.dtype == x.dtype
    assert noise.mean().item() == pytest.approx(0.0, abs=0.05)
    assert noise.std().item() == pytest.approx(2.0, abs=0.05)
    assert transformed(x, {"noise": 2.0}, torch.zeros_like(u)).isfinite().all()


# The chain.


def test_what_is_worse_is_always_taken_and_what_is_better_with_the_ratio_of_losses():
    losses = [torch.tensor([1.0, 4.0, 4.0, 0.0, 2.0]), torch.tensor([2.0, 1.0, 1.0, 0.0, -3.0])]
    uniform = torch.tensor([[0.0, 0.99], [0.0, 0.24], [0.0, 0.26], [0.0, 0.99], [0.0, 0.01]])
    x, accepted = metropolis(lambda k: losses[k], lambda x: x, uniform)
    assert x.tolist() == [2.0, 1.0, 4.0, 0.0, 2.0]
    assert accepted.item() == pytest.approx(3 / 5)


def test_one_proposal_needs_no_losses():
    def never(_):
        raise AssertionError

    x, accepted = metropolis(lambda k: torch.ones(3), never, torch.rand(3, 1))
    assert x.tolist() == [1.0] * 3
    assert accepted.item() == 1.0


def test_a_long_chain_draws_in_proportion_to_the_loss():
    torch.manual_seed(0)
    states = torch.tensor([1.0, 2.0, 5.0])  # each is its own loss
    x, _ = metropolis(lambda k: states[torch.randint(3, (20_000,))], lambda x: x, torch.rand(20_000, 30))
    shares = [(x == state).float().mean().item() for state in states.tolist()]
    assert shares == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.015)


def test_losses_of_samples_from_a_mean():
    logits, y = torch.randn(5, 3), torch.randint(3, (5,))
    expected = F.cross_entropy(logits, y, reduction="none")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = losses_of_outputs(lambda o, batch: F.cross_entropy(o, batch[1]), logits, (torch.zeros(5), y, "name"))
    torch.testing.assert_close(found, expected)

    def depends_on_data(outputs, batch):
        return F.cross_entropy(outputs, batch[1]) if bool((batch[1] >= 0).all()) else outputs.sum()

    torch.testing.assert_close(losses_of_outputs(depends_on_data, logits, (torch.zeros(5), y)), expected)


# Against a loop.


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("proposals", [1, 3])
@pytest.mark.parametrize("inner", [torch.optim.SGD, torch.optim.AdamW])
def test_equals_the_loop_written_by_hand(count, proposals, inner):
    """Rows of one draw for each micro-batch; dropout has one mask; lambda counts as it was before the step."""
    magnitudes = {"shift": 0.25, "noise": 0.3}
    ours, theirs, plain = (network(nn.Dropout(0.4)) for _ in range(3))
    transform = InvarianceAugmentation(magnitudes, bound=0.5, dual_lr=0.4, proposals=proposals)
    assert train(ours, [transform], count, inner=inner) == [2, 2, 2]
    train(plain, [], count, inner=inner)
    optimizer = inner(theirs.parameters(), lr=0.1)
    multiplier = 0.0
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
        total = 0.0
        for (x, y), state in zip(batches, states, strict=True):

            def masked(inputs, state=state):
                torch.set_rng_state(state)
                return theirs(inputs)

            u = torch.rand(6, proposals, 1 + 5 + 64, dtype=torch.float64, generator=generator)
            with torch.no_grad():
                worst = transformed(x, magnitudes, u[:, 0, 1:])
                losses = F.cross_entropy(masked(worst), y, reduction="none")
                for k in range(1, proposals):
                    other = transformed(x, magnitudes, u[:, k, 1:])
                    others = F.cross_entropy(masked(other), y, reduction="none")
                    for i in range(6):
                        if u[i, k, 0] < others[i] / losses[i]:
                            worst[i], losses[i] = other[i], others[i]
            loss = F.cross_entropy(masked(worst), y) / count
            loss.backward()
            total += loss.item()
        for p, g, more in zip(theirs.parameters(), loss_gradient, gradients(theirs), strict=True):
            p.grad = g.add(more, alpha=multiplier) if multiplier else g
        multiplier = max(0.0, multiplier + 0.4 * (total - 0.5))
        optimizer.step()
    assert same(ours, theirs)
    assert not same(ours, plain)
    assert transform.logged()["multiplier"] == multiplier > 0


@pytest.mark.parametrize("bound", [math.inf, 1e9])
def test_a_loose_bound_is_the_optimizer_alone(bound):
    ours, plain = network(), network()
    spent = train(ours, [InvarianceAugmentation(bound=bound)], 2)
    train(plain, [], 2)
    assert same(ours, plain)
    assert spent == ([1, 1, 1] if bound == math.inf else [2, 2, 2])


def test_an_infinite_bound_draws_nothing():
    train(network(nn.Dropout(0.4)), [InvarianceAugmentation(bound=math.inf)])
    after = torch.get_rng_state()
    train(network(nn.Dropout(0.4)), [])
    assert torch.equal(after, torch.get_rng_state())


def test_it_augments_until_the_bound_is_kept():
    """A model that sees one side learns the other when mirror images must not cost more than 0.05."""

    def mirror(x, generator):
        return -x

    ends = []
    for bound in (math.inf, 0.05):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)).double()
        x = torch.linspace(0.5, 1.0, 8, dtype=torch.float64)[:, None]
        y = torch.ones_like(x)
        transform = InvarianceAugmentation(mirror, bound=bound, dual_lr=0.5, proposals=1)
        optimizer = TransformedOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), [transform])
        for _ in range(300):
            optimizer.step(
                Closure(
                    lambda batch, m=model: F.mse_loss(m(batch[0]), batch[1]),
                    list(model.parameters()),
                    (x, y),
                    outputs_fn=lambda batch, m=model: m(batch[0]),
                    output_loss_fn=lambda outputs, batch: F.mse_loss(outputs, batch[1]),
                )
            )
        ends.append(F.mse_loss(model(-x), y).item())
    assert ends[0] > 0.3
    assert ends[1] < 0.06


def test_statistics_move_once():
    ours, plain = network(nn.BatchNorm1d(8)), network(nn.BatchNorm1d(8))
    train(ours, [InvarianceAugmentation(bound=-1.0, dual_lr=1.0)], 2, steps=1)
    train(plain, [], 2, steps=1)
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), plain.buffers(), strict=True))


def test_a_transformation_of_ones_own_gets_the_inputs_and_a_generator():
    drawn = []

    def jitter(x, generator):
        drawn.append(torch.randn(x.shape, generator=generator))
        return x + drawn[-1]

    train(network(), [InvarianceAugmentation(jitter, bound=-1.0, proposals=2)], 1, steps=2)
    assert len(drawn) == 4
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    with pytest.raises(ClosureError, match="does not give inputs of the shape"):
        train(network(), [InvarianceAugmentation(lambda x, generator: x[:3])], steps=1)


def test_a_resumed_run_goes_on():
    whole, halves = network(), network()
    options = {"bound": 0.1, "dual_lr": 0.5, "dual_every": 2}
    train(whole, [InvarianceAugmentation(**options)], steps=4)
    first, second = InvarianceAugmentation(**options), InvarianceAugmentation(**options)
    train(halves, [first], steps=3)
    second.load_state_dict(first.state_dict())
    optimizer = TransformedOptimizer(torch.optim.SGD(halves.parameters(), lr=0.1), [second])
    closure = closure_of(halves, *window(3, 1))
    torch.manual_seed(3)
    optimizer.step(closure)
    assert same(whole, halves)
    assert second.logged()["multiplier"] > 0


# What it refuses.


def test_inputs_that_are_no_images_and_tokens():
    w = nn.Parameter(torch.ones(5, 3))

    def step(batch, **options):
        optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=0.1), [InvarianceAugmentation(**options)])
        loss = lambda outputs, batch: outputs.square().mean()  # noqa: E731
        outputs = lambda batch: batch[0] @ w  # noqa: E731
        optimizer.step(Closure(lambda b: loss(outputs(b), b), [w], batch, outputs_fn=outputs, output_loss_fn=loss))

    with pytest.raises(ClosureError, match="no images") as caught:
        step((torch.randn(4, 5), torch.zeros(4)))
    assert "(4, 5)" in caught.value.found
    step((torch.randn(4, 5), torch.zeros(4)), transformations={"noise": 0.1})
    outputs = lambda batch: w[batch]  # noqa: E731
    closure = Closure(
        lambda batch: outputs(batch).mean(),
        [w],
        torch.tensor([0, 1]),
        outputs_fn=outputs,
        output_loss_fn=lambda outputs, batch: outputs.mean(),
    )
    optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=0.1), [InvarianceAugmentation()])
    with pytest.raises(ClosureError, match="invariance_augmentation changes the inputs"):
        optimizer.step(closure)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"transformations": {}}, "no transformation"),
        ({"transformations": {"shift": 0.0}}, "no transformation"),
        ({"transformations": {"rotat": 3.0}}, "no transformation 'rotat'"),
        ({"transformations": {"shift": 1.0}}, r"transformations\.shift"),
        ({"transformations": {"scale": 1.0}}, r"transformations\.scale"),
        ({"transformations": {"flip": 1.1}}, r"transformations\.flip"),
        ({"transformations": {"rotate": -1.0}}, r"transformations\.rotate"),
        ({"transformations": {"noise": -1.0}}, r"transformations\.noise"),
        ({"bound": -math.inf}, "bound"),
        ({"dual_lr": 0.0}, "dual_lr"),
        ({"dual_every": 0}, "dual_every"),
        ({"proposals": 0}, "proposals"),
    ],
)
def test_options_out_of_range(options, named):
    with pytest.raises(ConfigurationError, match=named):
        InvarianceAugmentation(**options)
