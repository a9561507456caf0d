"""A run under Lightning equals the hand-written loop bit for bit, whatever the method asks of its closure."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning_runs import Task, fit, problem, transformed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightrail import Closure, CombinedOptimizer, Transform, TransformedOptimizer
from lightrail.errors import ClosureError
from lightrail.step.window import WindowLoop


class Climb(Transform):
    """The gradient at a point a little uphill: SAM's, in two lines."""

    def before_step(self, params: list[Tensor], closure: Closure) -> None:
        norm = torch.stack([p.grad.norm() for p in params if p.grad is not None]).norm()
        with closure.at([p + 0.05 * p.grad / norm for p in params if p.grad is not None]):
            closure()


class Clip(Transform):
    def before_step(self, params: list[Tensor], closure: Closure) -> None:
        for p in params:
            assert p.grad is not None
            p.grad.clamp_(-0.01, 0.01)


class Curious(torch.optim.SGD):
    """Asks its closure every question."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = closure()
        params = self.param_groups[0]["params"]
        products = closure.hvp([p.sign() for p in params])
        sampled = closure.sampled()
        parts = closure.groups(2)
        assert closure.num_samples() in (8, 16)
        curvature = closure.loss() / loss
        for p, product, label, first, second in zip(params, products, sampled, *parts, strict=True):
            p.grad.add_(product, alpha=1e-3).add_(label, alpha=0.1).add_(first - second, alpha=0.1).mul_(curvature)
        super().step()
        return loss


def adamw(params: list[Tensor]) -> Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


def curious(params: list[Tensor]) -> Optimizer:
    return Curious(params, lr=1e-1)


def by_hand(make_optimizer: Callable[[Any], Optimizer], accumulate: int = 1, epochs: int = 1) -> Task:
    """The loop that a careful person would write."""
    pl.seed_everything(0, verbose=False)
    task = Task(make_optimizer)
    task.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    configured = task.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    loader = DataLoader(problem(), batch_size=8)
    for _ in range(epochs):
        window = []
        for index, batch in enumerate(loader):
            window.append(batch)
            if len(window) < accumulate and index + 1 < len(loader):
                continue
            closure = Closure(
                lambda batch: task.training_step(batch, 0)["loss"],
                [p for group in optimizer.param_groups for p in group["params"]],
                *window,
                module=task,
                sampled_loss_fn=task.sampled_loss,
            )
            closure._divisor = accumulate  # Lightning divides an epoch's shorter last window by the same number
            optimizer.step(closure)
            schedule.step()
            window = []
    return task


def assert_same(left: nn.Module, right: nn.Module) -> None:
    for (name, a), b in zip(left.state_dict().items(), right.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


METHODS = {
    "adamw": (adamw, False),
    "climb": (transformed(adamw, Climb()), True),
    "clip-climb": (transformed(adamw, Clip(), Climb()), True),
    "climb-clip": (transformed(adamw, Climb(), Clip()), True),
    "curious": (transformed(curious), True),
    "lbfgs": (transformed(lambda params: torch.optim.LBFGS(params, lr=0.1, max_iter=3)), True),
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_lightning_equals_the_hand_written_loop(tmp_path: Path, name: str, accumulate: int) -> None:
    make, window = METHODS[name]
    task, trainer, _ = fit(
        tmp_path, make, shuffle=False, max_epochs=1, window=window, accumulate_grad_batches=accumulate
    )
    assert_same(task, by_hand(make, accumulate))
    assert trainer.global_step == (9 if accumulate == 1 else 5)


def test_the_order_of_transforms_is_the_order_of_functions(tmp_path: Path) -> None:
    first = by_hand(transformed(adamw, Clip(), Climb()))
    second = by_hand(transformed(adamw, Climb(), Clip()))
    assert not torch.equal(first.get_parameter("net.0.weight"), second.get_parameter("net.0.weight"))


def test_each_window_logs_once_and_moves_statistics_once(tmp_path: Path) -> None:
    plain, plain_trainer, _ = fit(tmp_path / "plain", lambda p: torch.optim.SGD(p, lr=0.0), shuffle=False, max_epochs=1)
    make = transformed(lambda p: torch.optim.SGD(p, lr=0.0), Climb(), Climb())
    task, trainer, _ = fit(tmp_path / "window", make, shuffle=False, max_epochs=1, window=True)
    assert task.calls == 4 * plain.calls
    assert_same(plain, task)  # nothing moved: the learning rate is 0, BatchNorm counted each batch once
    assert trainer.callback_metrics["seen_loss"] == plain_trainer.callback_metrics["seen_loss"]


def test_clipping_comes_once_after_the_transforms(tmp_path: Path) -> None:
    seen: list[float] = []

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            seen.append(float(torch.stack([p.grad.abs().max() for p in optimizer.params]).max()))

    class Grow(Transform):
        def before_step(self, params: list[Tensor], closure: Closure) -> None:
            for p in params:
                assert p.grad is not None
                p.grad.mul_(1000)

    used: list[float] = []

    class Record(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            loss = closure()
            used.append(float(torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"]]).norm()))
            return loss

    fit(
        tmp_path,
        transformed(lambda p: Record(p, lr=0.1), Climb(), Grow()),
        max_epochs=1,
        window=True,
        gradient_clip_val=0.5,
        callbacks=[Watch()],
    )
    assert len(seen) == len(used) == 9
    assert max(used) < 0.5001
    assert min(seen) > 1


def test_bf16_mixed_evaluates_again_in_the_same_precision(tmp_path: Path) -> None:
    class Twice(Transform):
        def before_step(self, params: list[Tensor], closure: Closure) -> None:
            first = [p.grad.clone() for p in params if p.grad is not None]
            closure()
            again = [p.grad for p in params if p.grad is not None]
            assert len(first) == len(params)
            assert all(map(torch.equal, first, again))

    fit(tmp_path, transformed(adamw, Twice()), max_epochs=1, window=True, precision="bf16-mixed")


def test_a_loss_that_is_not_finite_can_be_skipped(tmp_path: Path) -> None:
    data = problem()
    data.tensors[0][24:32] = float("nan")
    task, trainer, _ = fit(
        tmp_path, transformed(adamw), dataset=data, shuffle=False, max_epochs=1, window=True, on_nan="skip"
    )
    assert all(torch.isfinite(p).all() for p in task.parameters())
    assert trainer.global_step == 9
    loop = trainer.fit_loop.epoch_loop.automatic_optimization
    assert isinstance(loop, WindowLoop)
    assert loop.skipped_updates == 1


def test_plain_closures_serve_transforms_that_evaluate_once() -> None:
    torch.manual_seed(0)
    net = nn.Linear(3, 1)
    twin = copy.deepcopy(net)
    x = torch.randn(4, 3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        return loss

    optimizer = TransformedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), [Clip()])
    optimizer.step(closure)
    twin(x).square().mean().backward()
    plain = TransformedOptimizer(torch.optim.SGD(twin.parameters(), lr=0.1), [Clip()])
    plain.step()
    assert_same(net, twin)


def test_plain_closures_refuse_by_name_what_they_cannot_give() -> None:
    net = nn.Linear(3, 1)
    optimizer = TransformedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), [Climb()])
    net(torch.randn(4, 3)).square().mean().backward()
    with pytest.raises(ClosureError, match="evaluates the loss again"):
        optimizer.step()


def test_combined_optimizers_are_one() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    twin = copy.deepcopy(net)

    def make(module: nn.Sequential) -> CombinedOptimizer:
        return CombinedOptimizer(
            [
                torch.optim.SGD(module[0].parameters(), lr=0.1, momentum=0.9),
                torch.optim.AdamW(module[1].parameters(), lr=0.01),
            ]
        )

    combined = make(net)
    schedule = torch.optim.lr_scheduler.LambdaLR(combined, lambda t: 1 / (1 + t))
    x, y = torch.randn(8, 3), torch.tensor([0, 1] * 4)

    def step(module: nn.Module, optimizer: Any, schedule: Any) -> None:
        optimizer.step(Closure(lambda: F.cross_entropy(module(x), y), list(module.parameters())))
        schedule.step()

    step(net, combined, schedule)
    assert [group["lr"] for group in combined.param_groups] == [0.05, 0.005]
    resumed = make(twin)
    twin.load_state_dict(net.state_dict())
    resumed.load_state_dict(copy.deepcopy(combined.state_dict()))
    second = torch.optim.lr_scheduler.LambdaLR(resumed, lambda t: 1 / (1 + t))
    second.load_state_dict(schedule.state_dict())
    for group, other in zip(resumed.param_groups, combined.param_groups, strict=True):
        group["lr"] = other["lr"]
    step(net, combined, schedule)
    step(twin, resumed, second)
    assert_same(net, twin)


def test_the_closure_answers_exactly() -> None:
    """On ½xᵀAx every answer is known: the gradient Ax, the product Av, the value elsewhere."""
    torch.manual_seed(0)
    a = torch.randn(4, 4, dtype=torch.float64)
    a = a @ a.T
    x = nn.Parameter(torch.randn(4, dtype=torch.float64))
    batches = [a * 0.5, a * 1.5]  # their mean is a
    closure = Closure(lambda a: 0.5 * x @ a @ x, [x], *batches)
    v = torch.randn(4, dtype=torch.float64)
    loss, (gradient,) = closure.gradient()
    assert x.grad is None
    torch.testing.assert_close(loss, (0.5 * x @ a @ x).detach())
    torch.testing.assert_close(gradient, (a @ x).detach())
    torch.testing.assert_close(closure.hvp([v])[0], a @ v)
    before = x.detach().clone()
    with closure.at([v]):
        torch.testing.assert_close(closure.loss(), 0.5 * v @ a @ v)
        torch.testing.assert_close(closure.gradient()[1][0], a @ v)
    assert torch.equal(x, before)
    assert closure.evaluations == 4


def test_extra_evaluations_draw_nothing_from_the_generators() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    x = torch.randn(4, 3)
    params = list(net.parameters())
    closure = Closure(lambda: net(x).square().mean(), params)
    loss = closure()
    torch.rand(7)  # the loop goes on to draw other numbers
    state = torch.get_rng_state()
    assert closure() == closure.loss() == loss
    closure.hvp([torch.ones_like(p) for p in params])
    with closure.at(params):
        closure.gradient()
    assert torch.equal(torch.get_rng_state(), state)


def test_groups_are_disjoint_and_average_to_the_gradient() -> None:
    torch.manual_seed(0)
    net = nn.Linear(3, 1, dtype=torch.float64)
    x = torch.randn(6, 3, dtype=torch.float64)
    closure = Closure(lambda x: net(x).square().mean(), list(net.parameters()), x)
    _, whole = closure.gradient()
    parts = closure.groups(3)
    for p, *each in zip(whole, *parts, strict=True):
        torch.testing.assert_close(torch.stack(each).mean(0), p)
    with pytest.raises(ClosureError, match="cannot be divided into 7 parts"):
        closure.groups(7)


def test_one_gradient_an_objective() -> None:
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    closure = Closure(lambda: w.sum(), [w], objectives_fn=lambda: {"first": w[0] ** 2, "second": 3 * w[1]})
    assert [row[0].tolist() for row in closure.jacobian()] == [[2.0, 0.0], [0.0, 3.0]]
    with pytest.raises(ClosureError, match="objectives"):
        Closure(lambda: w.sum(), [w]).jacobian()


def test_a_parameter_in_which_the_loss_is_linear_leaves_the_others_their_curvature() -> None:
    a, c = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.ones(3))
    closure = Closure(lambda: (a**3).sum() + c.sum() + (a * c[:2]).sum(), [a, c])
    h_a, h_c = closure.hvp([torch.ones(2), torch.ones(3)])
    assert h_a.tolist() == [6.0 + 1, 12.0 + 1]
    assert h_c.tolist() == [1.0, 1.0, 0.0]
    b = nn.Parameter(torch.ones(2))
    only, none = Closure(lambda: (a**2).sum() + b.sum(), [a, b]).hvp([torch.ones(2), torch.ones(2)])
    assert (only.tolist(), none.tolist()) == ([2.0, 2.0], [0.0, 0.0])
