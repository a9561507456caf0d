"""Lookahead: the loop written by hand, where it is evaluated, and what a resumed run takes up."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.nn import functional as F

import lightrail
from lightrail import Closure, TransformedOptimizer
from lightrail.errors import CompositionError, ConfigurationError, Interrupted, UserError
from lightrail.run.checkpoint import load_checkpoint
from lightrail_optimizers import ClipNorm, Lookahead, RandomlyScaledSGDM
from lightrail_optimizers.transforms.lookahead import synchronize_


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def batch(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(6, 5, generator=generator).to(dtype), torch.randint(3, (6,), generator=generator)


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def adamw(params):
    return torch.optim.AdamW(params, lr=0.01)


def steps(model, optimizer, over, dtype=torch.float32):
    for step in over:
        loss = lambda b: F.cross_entropy(model(b[0]), b[1])  # noqa: E731
        optimizer.step(Closure(loss, list(model.parameters()), batch(step, dtype)))


def by_hand(model, make, count, k, alpha, reset=False):
    """Returns the slow weights."""
    params = list(model.parameters())
    optimizer = make(params)
    slow = [p.detach().clone() for p in params]
    for step in range(count):
        inputs, targets = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        if (step + 1) % k == 0:
            with torch.no_grad():
                for s, p in zip(slow, params, strict=True):
                    s.lerp_(p, alpha)
                    p.copy_(s)
            if reset:
                optimizer = make(params)
    return slow


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("momentum", ["keep", "reset"])
@pytest.mark.parametrize(("k", "alpha"), [(1, 0.3), (3, 0.5), (3, 0.8)])
def test_equals_the_loop_written_by_hand(make, momentum, k, alpha):
    ours, theirs = network(), network()
    optimizer = TransformedOptimizer(make(ours.parameters()), [Lookahead(k, alpha, momentum)])
    steps(ours, optimizer, range(10))
    slow = by_hand(theirs, make, 10, k, alpha, momentum == "reset")
    assert same(values(ours), values(theirs))
    optimizer.eval()
    assert same(values(ours), slow)


def test_five_steps_by_hand():
    # SGD at rate 0.1 on w²/2 multiplies by 0.9: after k = 2 steps slow = 10 + 0.25 (8.1 - 10) = 9.525.
    w = nn.Parameter(torch.tensor([10.0], dtype=torch.float64))
    optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=0.1), [lookahead := Lookahead(k=2, alpha=0.25)])
    path = []
    for _ in range(5):
        optimizer.step(Closure(lambda: (w**2).sum() / 2, [w]))
        path.append(w.item())
    expected = [9.0, 9.525, 8.5725, 9.525 + 0.25 * (7.71525 - 9.525), 0.9 * (9.525 + 0.25 * (7.71525 - 9.525))]
    assert path == pytest.approx(expected, abs=1e-12)
    assert lookahead.logged() == {"distance": pytest.approx(9.525 - 7.71525, abs=1e-12)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 4])
def test_alpha_one_trains_as_the_optimizer_alone(dtype, k):
    ours, plain = network(dtype), network(dtype)
    steps(ours, TransformedOptimizer(sgd(ours.parameters()), [Lookahead(k, 1.0)]), range(9), dtype)
    steps(plain, TransformedOptimizer(sgd(plain.parameters())), range(9), dtype)
    assert same(values(ours), values(plain))


@pytest.mark.parametrize(("momentum", "theirs"), [("keep", "none"), ("reset", "reset")])
def test_agrees_with_pytorch_optimizer(momentum, theirs):
    library = pytest.importorskip("pytorch_optimizer")
    ours, other = network(torch.float64), network(torch.float64)
    steps(ours, TransformedOptimizer(sgd(ours.parameters()), [Lookahead(3, 0.6, momentum)]), range(11), torch.float64)
    optimizer = library.Lookahead(sgd(other.parameters()), k=3, alpha=0.6, pullback_momentum=theirs)
    for step in range(11):
        inputs, targets = batch(step, torch.float64)
        optimizer.zero_grad()
        F.cross_entropy(other(inputs), targets).backward()
        optimizer.step()
    for a, b in zip(ours.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_evaluation_goes_to_the_slow_weights_and_back_however_often():
    model = network()
    optimizer = TransformedOptimizer(sgd(model.parameters()), [Lookahead(k=3)])
    start = values(model)
    optimizer.eval()
    optimizer.train()
    assert same(values(model), start)
    steps(model, optimizer, range(2))
    training = values(model)
    assert not same(training, start)
    for _ in range(2):
        optimizer.eval()
        assert same(values(model), start)
    for _ in range(2):
        optimizer.train()
        assert same(values(model), training)
    steps(model, optimizer, [2])
    training = values(model)
    optimizer.eval()
    assert same(values(model), training)  # they have just been synchronized


@pytest.mark.parametrize("at", ["train", "eval"])
@pytest.mark.parametrize("momentum", ["keep", "reset"])
def test_a_state_saved_at_either_point_goes_on_from_there(at, momentum):
    def made(model):
        return TransformedOptimizer(adamw(model.parameters()), [Lookahead(3, 0.5, momentum)])

    whole, resumed = network(), network()
    optimizer = made(whole)
    steps(whole, optimizer, range(4))
    getattr(optimizer, at)()
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), values(whole)], file)
    optimizer.train()
    steps(whole, optimizer, range(4, 9))
    file.seek(0)
    state, there = torch.load(file, weights_only=True)
    with torch.no_grad():
        torch._foreach_copy_(list(resumed.parameters()), there)
    again = made(resumed)
    again.load_state_dict(state)
    again.train()
    steps(resumed, again, range(4, 9))
    assert same(values(resumed), values(whole))
    optimizer.eval()
    again.eval()
    assert same(values(resumed), values(whole))


def test_what_was_loaded_is_not_what_was_saved():
    model = network()
    optimizer = TransformedOptimizer(sgd(model.parameters()), [first := Lookahead(k=2)])
    steps(model, optimizer, range(1))
    second = Lookahead(k=2)
    second.load_state_dict(first.state_dict())
    kept = [slow.clone() for slow in second.state_dict()["slow"]]
    steps(model, optimizer, [1])
    assert same(second.state_dict()["slow"], kept)


def test_a_step_at_the_evaluation_point_is_refused_before_anything_moves():
    model = network()
    optimizer = TransformedOptimizer(sgd(model.parameters()), [Lookahead(k=3)])
    steps(model, optimizer, range(2))
    optimizer.eval()
    there = values(model)
    with pytest.raises(UserError, match="Lookahead was asked for a step"):
        steps(model, optimizer, [2])
    assert same(values(model), there)


def test_an_optimizer_with_an_evaluation_point_of_its_own_is_refused():
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(CompositionError, match="evaluated at a point of their own"):
        TransformedOptimizer(RandomlyScaledSGDM([w]), [Lookahead()])


def test_parameters_without_gradient_and_those_that_join_later():
    first, frozen, late = (nn.Parameter(torch.full((2,), 4.0)) for _ in range(3))
    frozen.requires_grad_(False)
    optimizer = TransformedOptimizer(torch.optim.SGD([first, frozen], lr=0.5), [Lookahead(k=2, alpha=0.5)])
    optimizer.step(Closure(lambda: first.sum(), [first, frozen]))
    optimizer.add_param_group({"params": [late]})
    optimizer.eval()
    assert [p[0].item() for p in (first, frozen, late)] == [4.0, 4.0, 4.0]
    optimizer.train()
    optimizer.step(Closure(lambda: (first + late).sum(), [first, frozen, late]))
    assert [p[0].item() for p in (first, frozen, late)] == [3.5, 4.0, 3.75]


def test_it_stands_behind_other_transforms():
    w = nn.Parameter(torch.tensor([4.0]))
    optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=1.0), [ClipNorm(1.0), Lookahead(k=2, alpha=0.5)])
    for _ in range(2):
        optimizer.step(Closure(lambda: 10 * w.sum(), [w]))
    assert w.item() == 3.0


@pytest.mark.parametrize("options", [{"k": 0}, {"alpha": 0.0}, {"alpha": 1.5}, {"momentum": "forget"}])
def test_options_out_of_range(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        Lookahead(**options)


def test_synchronizing_by_hand():
    slow, fast = [torch.tensor([1.0, 2.0])], [torch.tensor([3.0, -2.0])]
    synchronize_(slow, fast, 0.25)
    assert slow[0].tolist() == fast[0].tolist() == [1.5, 1.0]


# Under Lightning.

RUN = [
    "task=run_plugins.Module",
    "data=run_plugins.Points",
    "logger=[csv]",
    "+transform=[lookahead]",
    "transform.lookahead.k=3",
    "trainer.max_epochs=2",
    "trainer.accelerator=cpu",
]


class Seen(Callback):
    """The weights of training, of validation and of the test."""

    def __init__(self) -> None:
        self.training: list[list[torch.Tensor]] = []
        self.validated: list[list[torch.Tensor]] = []
        self.tested: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.training.append(values(pl_module))

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if not trainer.sanity_checking:
            self.validated.append(values(pl_module))


def test_validation_sees_the_slow_weights_and_training_the_fast_ones(tmp_path: Path) -> None:
    run = lightrail.compose([*RUN, f"run.root={tmp_path}"])
    run.callbacks = [*run.callbacks, seen := Seen()]
    result = run.execute(show_progress=False)
    # Four steps an epoch, k = 3: the slow weights before step 3 are the first ones, and at step 3 both are the same.
    assert len(seen.training) == 8
    first, second = seen.validated[0], seen.validated[-1]
    assert same(first, seen.training[3])
    assert not same(first, seen.training[4])
    assert same(second, seen.training[6])
    checkpoint = load_checkpoint(result.folder / "checkpoints" / "last.ckpt")
    saved = list(checkpoint["state_dict"].values())
    assert same(saved, second)
    assert not same(saved, list(checkpoint["current_model_state"].values()))


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = lightrail.compose([*RUN, f"run.root={tmp_path}", "run.name=whole"]).execute(show_progress=False)
    stopped = lightrail.compose([*RUN, f"run.root={tmp_path}", "run.name=stopped", "callback=[run_plugins.Signals]"])
    with pytest.raises(Interrupted) as caught:
        stopped.execute(show_progress=False)
    assert caught.value.step == 4  # one step after a synchronization
    again = lightrail.compose([f"run.resume={tmp_path / 'stopped'}", "callback.Signals.step=-1"])
    resumed = again.execute(show_progress=False)
    a, b = (load_checkpoint(each.folder / "checkpoints" / "last.ckpt") for each in (whole, resumed))
    for key in ("state_dict", "current_model_state"):
        assert a[key].keys() == b[key].keys()
        assert same(a[key].values(), b[key].values()), key
    assert str(a["optimizer_states"]) == str(b["optimizer_states"])
    assert whole.metrics == resumed.metrics
