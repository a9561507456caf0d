"""Adapters of other libraries' optimizers: the libraries' numbers, torch's conventions, errors that name things."""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import sys

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lightrail.errors import ConfigurationError, PluginError, UserError

pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
schedulefree = pytest.importorskip("schedulefree")

from lightrail_optimizers import SOAP, Prodigy, ScheduleFreeAdamW  # noqa: E402

ALL = [SOAP, Prodigy, ScheduleFreeAdamW]
THEIRS = {
    SOAP: pytorch_optimizer.SOAP,
    Prodigy: pytorch_optimizer.Prodigy,
    ScheduleFreeAdamW: schedulefree.AdamWScheduleFree,
}


def params(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in [(4, 3), (), (5,), (2, 3, 2)]]


def run(optimizer, params, steps, start=0, skip=()):
    for t in range(start, start + steps):
        generator = torch.Generator().manual_seed(100 + t)
        for i, p in enumerate(params):
            noise = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad = None if i in skip else p.detach() + noise
        optimizer.step()
    return [p.detach().clone() for p in params]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (SOAP, {}),
        (SOAP, {"lr": 0.01, "precondition_frequency": 3, "precondition_1d": True, "correct_bias": False}),
        (SOAP, {"shampoo_beta": 0.8, "max_precondition_dim": 3, "weight_decay": 0.1, "merge_dims": True}),
        (Prodigy, {}),
        (Prodigy, {"d0": 1e-3, "d_coef": 2.0, "growth_rate": 1.5, "weight_decay": 0.1, "bias_correction": True}),
        (Prodigy, {"beta3": 0.99, "safeguard_warmup": True, "betas": (0.8, 0.99), "d0": 1e-2}),
        (ScheduleFreeAdamW, {}),
        (ScheduleFreeAdamW, {"lr": 0.05, "warmup_steps": 5, "weight_decay": 0.1, "r": 1.0, "weight_lr_power": 1.0}),
        (ScheduleFreeAdamW, {"betas": (0.95, 0.99), "foreach": False}),
    ],
)
def test_the_update_is_the_librarys(method, options):
    ours, theirs = params(torch.float64), params(torch.float64)
    optimizer, reference = method(ours, **options), THEIRS[method](theirs, **options)
    if method is ScheduleFreeAdamW:
        reference.train()
    assert same(run(optimizer, ours, 12), run(reference, theirs, 12))
    if method is ScheduleFreeAdamW:
        optimizer.eval()
        reference.eval()
        assert same(ours, theirs)


def test_normalized_gradients_are_the_librarys_of_another_name():
    ours, theirs = params(), params()
    optimizer = SOAP(ours, normalize_gradients=True)
    assert same(run(optimizer, ours, 5), run(pytorch_optimizer.SOAP(theirs, normalize_gradient=True), theirs, 5))


@pytest.mark.parametrize("method", ALL)
def test_every_option_is_named_and_has_its_librarys_default(method):
    ours = dict(list(inspect.signature(method).parameters.items())[1:])
    theirs = inspect.signature(THEIRS[method]).parameters
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in ours.values())
    for name, option in ours.items():
        their_name = {"normalize_gradients": "normalize_gradient"}.get(name, name)
        assert option.default == theirs[their_name].default, name


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_and_a_copy_go_on_exactly(method, dtype):
    some = params(dtype)
    optimizer = method(some)
    run(optimizer, some, 4)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    others = [nn.Parameter(p.detach().clone()) for p in some]
    resumed = method(others)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    twins, twin = copy.deepcopy((some, optimizer))
    expected = run(optimizer, some, 12, start=4)
    assert same(run(resumed, others, 12, start=4), expected)
    assert same(run(twin, twins, 12, start=4), expected)


@pytest.mark.parametrize("method", ALL)
def test_a_tensor_for_lr_is_the_number_and_stays(method):
    lr = torch.tensor(0.25)
    tensors, numbers = params(), params()
    assert same(run(method(tensors, lr=lr), tensors, 5), run(method(numbers, lr=0.25), numbers, 5))
    assert lr.item() == 0.25


@pytest.mark.parametrize("method", ALL)
def test_gradients_are_left_as_they_are(method):
    some = params()
    optimizer = method(some, weight_decay=0.1)
    for p in some:
        p.grad = torch.ones_like(p)
    held = [p.grad for p in some]
    for _ in range(3):
        optimizer.step()
    for p, g in zip(some, held, strict=True):
        assert p.grad is g
        assert g is not None
        assert torch.equal(g, torch.ones_like(p))


@pytest.mark.parametrize("method", ALL)
def test_missing_gradients_stand_aside(method):
    some = params()
    optimizer = method(some)
    before = [p.detach().clone() for p in some]
    run(optimizer, some, 3, skip=(0, 2))
    assert same([some[0], some[2]], [before[0], before[2]])
    late = run(optimizer, some, 6, start=3, skip=(2,))
    assert not torch.equal(late[0], before[0])
    assert all(p.isfinite().all() for p in late)
    assert torch.equal(late[2], before[2])


@pytest.mark.parametrize("method", ALL)
def test_sparse_and_complex_are_refused_by_name(method):
    with pytest.raises(ConfigurationError, match=f"{method.__name__} does not take complex"):
        method([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigurationError, match=f"{method.__name__} does not take sparse"):
        method(embedding.parameters()).step()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (SOAP, {"lr": -1.0}),
        (SOAP, {"precondition_frequency": 0}),
        (Prodigy, {"d0": 0.0}),
        (Prodigy, {"growth_rate": 0.5}),
        (ScheduleFreeAdamW, {"warmup_steps": -1}),
        (ScheduleFreeAdamW, {"eps": 0.0}),
    ],
)
def test_options_out_of_range_are_named(method, options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        method(params(), **options)


@pytest.mark.parametrize(
    ("module", "library", "plugin"),
    [
        ("soap", "pytorch_optimizer", "optimizer 'soap'"),
        ("prodigy", "pytorch_optimizer", "optimizer 'prodigy'"),
        ("schedule_free_adamw", "schedulefree", "optimizer 'schedule_free_adamw'"),
    ],
)
def test_a_missing_library_names_the_extra(monkeypatch, module, library, plugin):
    monkeypatch.delitem(sys.modules, f"lightrail_optimizers.{module}")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(PluginError) as caught:
        importlib.import_module(f"lightrail_optimizers.{module}")
    assert plugin in caught.value.what
    assert caught.value.remedy == "Run `pip install 'lightrail[optimizers]'`."


# SOAP.


def test_soap_is_adam_in_the_eigenbasis():
    """A gradient whose row and column spaces never turn: in its eigenbasis it is diagonal, and Adam takes signs."""
    left, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    w = nn.Parameter(torch.zeros(3, 3, dtype=torch.float64))
    optimizer = SOAP([w], lr=0.1, weight_decay=0.0)
    for _ in range(2):
        w.grad = left @ torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)) @ right
        optimizer.step()
    torch.testing.assert_close(w.detach(), -0.1 * left @ right, rtol=0, atol=1e-6)


# Prodigy.


def test_prodigy_finds_the_distance():
    """On |x - 1|-like losses d grows from 1e-6 to the order of the distance to the solution."""
    w = nn.Parameter(torch.zeros(10, dtype=torch.float64))
    optimizer = Prodigy([w])
    for _ in range(300):
        w.grad = torch.sign(w.detach() - 1.0)
        optimizer.step()
    assert 0.05 < optimizer.param_groups[0]["d"] < 3
    assert float((w.detach() - 1).abs().max()) < 0.6


def test_prodigy_refuses_groups_that_its_one_estimate_cannot_follow():
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = Prodigy([{"params": [a]}, {"params": [b], "lr": 0.5}])
    with pytest.raises(ConfigurationError, match="one learning rate for all groups"):
        optimizer.step()


# Schedule-Free.


def test_schedule_free_by_hand():
    """One coordinate with a constant gradient: each normalized step is 1, z falls by lr, x is the mean of the z."""
    w = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = ScheduleFreeAdamW([w], lr=0.1, betas=(0.75, 0.99), eps=1e-15)
    for t, (z, x) in enumerate([(0.9, 0.9), (0.8, 0.85), (0.7, 0.8)], 1):
        w.grad = torch.tensor([2.0], dtype=torch.float64)
        optimizer.step()
        assert optimizer.state[w]["z"].item() == pytest.approx(z, abs=1e-12), t
        assert w.item() == pytest.approx(0.75 * x + 0.25 * z, abs=1e-12), t
        optimizer.eval()
        assert w.item() == pytest.approx(x, abs=1e-12), t
        optimizer.train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_schedule_free_comes_back_to_the_last_bit_and_resumes_from_either_mode(dtype):
    some = [nn.Parameter(torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype))]
    optimizer = ScheduleFreeAdamW(some, lr=0.3)
    y = run(optimizer, some, 5)
    optimizer.eval()
    x = [p.detach().clone() for p in some]
    optimizer.eval()
    assert same(some, x)
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), x], file)
    optimizer.train()
    assert same(some, y)
    optimizer.train()
    assert same(some, y)
    expected = run(optimizer, some, 5, start=5)
    file.seek(0)
    state, values = torch.load(file, weights_only=True)
    others = [nn.Parameter(value) for value in values]
    resumed = ScheduleFreeAdamW(others, lr=0.3)
    resumed.load_state_dict(state)
    resumed.train()
    assert same(run(resumed, others, 5, start=5), expected)


def test_schedule_free_keeps_no_third_copy_while_it_trains():
    some = params()
    optimizer = ScheduleFreeAdamW(some)
    run(optimizer, some, 2)
    optimizer.eval()
    optimizer.train()
    assert all(set(kept) == {"z", "exp_avg_sq"} for kept in optimizer.state.values())


def test_schedule_free_refuses_a_step_at_the_evaluation_point():
    some = params()
    optimizer = ScheduleFreeAdamW(some)
    run(optimizer, some, 1)
    optimizer.eval()
    with pytest.raises(UserError, match="where it is evaluated"):
        optimizer.step()


def test_schedule_free_refuses_a_schedule():
    some = params()
    optimizer = ScheduleFreeAdamW(some)
    LambdaLR(optimizer, lambda t: 0.5)
    with pytest.raises(ConfigurationError, match="sets its own step size") as caught:
        run(optimizer, some, 1)
    assert "warmup_steps" in caught.value.remedy
