"""Block coordinate descent with AdamW on the active block, and the conformance of rules other than the default."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightrail import Closure
from lightrail.testing import OptimizerSuite
from lightrail.testing.suite import examine, name_of
from lightrail_optimizers import BlockCoordinate


def blocks(*points):
    return [nn.Parameter(torch.tensor(point, dtype=torch.float64)) for point in points]


def named(params):
    return [(f"layers.{i}.weight", p) for i, p in enumerate(params)]


def quadratic(params, hessian):
    def loss():
        x = torch.cat([p.flatten() for p in params])
        return x @ hessian @ x / 2

    return Closure(loss, params)


def values(params):
    return torch.cat([p.detach().flatten() for p in params]).tolist()


def adamw(params, **options):
    return BlockCoordinate(named(params), 0.1, "cyclic", "adamw", switch_every=3, weight_decay=0.1, **options)


def test_it_is_adamw_on_the_active_block_and_begins_anew_with_the_next():
    params, twins = blocks([1.0, 2.0], [0.5, -1.0]), blocks([1.0, 2.0], [0.5, -1.0])
    hessian = torch.diag(torch.tensor([9.0, 4.0, 1.0, 2.0], dtype=torch.float64))
    optimizer = adamw(params)
    for step in range(12):
        if step % 3 == 0:
            theirs = torch.optim.AdamW([twins[step // 3 % 2]], 0.1, weight_decay=0.1)
        optimizer.step(quadratic(params, hessian))
        quadratic(twins, hessian)()
        theirs.step()
        assert values(params) == pytest.approx(values(twins), abs=1e-12)
        active = params[step // 3 % 2]
        assert set(optimizer.state) == {active}
        assert optimizer.state[active]["step"] == step % 3 + 1


def test_with_one_block_it_is_adamw():
    params, twins = blocks([1.0, 2.0], [0.5, -1.0]), blocks([1.0, 2.0], [0.5, -1.0])
    hessian = torch.diag(torch.tensor([9.0, 4.0, 1.0, 2.0], dtype=torch.float64))
    optimizer, theirs = adamw(params, blocks=1), torch.optim.AdamW(twins, 0.1, weight_decay=0.1)
    for _ in range(8):
        optimizer.step(quadratic(params, hessian))
        quadratic(twins, hessian)()
        theirs.step()
    assert values(params) == pytest.approx(values(twins), abs=1e-12)


def test_memory_is_two_copies_of_the_active_block():
    model = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 50), nn.Linear(50, 2))
    optimizer = BlockCoordinate(model.named_parameters(), 0.01, "cyclic", "adamw", switch_every=2)
    kept = []
    for _ in range(6):
        optimizer.step(Closure(lambda: model(torch.ones(3, 30)).square().mean(), list(model.parameters())))
        state = optimizer.state_dict()["state"].values()
        kept.append(sum(v.numel() for each in state for v in each.values() if isinstance(v, torch.Tensor)))
    sizes = [2 * sum(p.numel() for p in layer.parameters()) for layer in model]
    assert kept == [size for size in sizes for _ in range(2)]


CHECKED = {
    "resumes_exactly",
    "takes_missing_gradients",
    "takes_no_gradient_at_all",
    "is_the_same_under_lightning",
    "keeps_state_in_parameter_dtype",
    "steps_without_a_closure",
    "takes_a_tensor_lr",
    "maximize_is_minimize_negated",
    "lowers_rosenbrock",
    "takes_or_names_sparse_gradients",
}


@pytest.mark.parametrize("check", [check for check in OptimizerSuite.checks if name_of(check) in CHECKED], ids=name_of)
@pytest.mark.parametrize("select", ["cyclic", "random"])
@pytest.mark.parametrize("inner", ["adamw", "gradient"])
def test_other_rules_conform(check, select, inner):
    options = {"lr": 0.02, "select": select, "inner": inner, "switch_every": 3}
    outcome = examine(check, BlockCoordinate, options)
    assert outcome.state == "passed", outcome.reason
