"""FRUGAL: what it is equal to at its limits, its clock, its memory, and its choice of subspaces."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightrail.errors import ConfigurationError
from lightrail.traits import traits_of
from lightrail_optimizers import FrugalAdamW, FrugalLion, FrugalSGD, Lion
from lightrail_optimizers.frugal_base import block_order
from lightrail_optimizers.subspaces import how_many, random_subset

ALL = (FrugalAdamW, FrugalLion, FrugalSGD)
IN_TENSORS = ("columns", "rows", "randk", "svd", "random")


def matrices(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


def named(params: list[Tensor]) -> list[tuple[str, Tensor]]:
    return [(f"layers.{i}.weight", p) for i, p in enumerate(params)]


def give_gradients(step: int, *params: Tensor) -> list[Tensor]:
    """The same for equal shapes at equal places, whichever model they belong to."""
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
    return [p.grad.clone() for p in params if p.grad is not None]


def run(optimizer: torch.optim.Optimizer, params: list[Tensor], steps: range) -> None:
    for step in steps:
        give_gradients(step, *params)
        optimizer.step()


def require_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# Its limits.

SHAPES = ((4, 3), (3, 5), (3,), (2, 2, 3))


@pytest.mark.parametrize("selection", ["block", "columns", "rows", "randk"])
def test_all_with_state_and_no_reset_is_adamw(selection):
    ours, theirs = matrices(*SHAPES), matrices(*SHAPES)
    options: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}
    optimizer = FrugalAdamW(named(ours), density=1.0, update_gap=2, selection=selection, reset=False, **options)
    run(optimizer, ours, range(7))
    run(torch.optim.AdamW(theirs, **options), theirs, range(7))
    require_close(ours, theirs)


@pytest.mark.parametrize("selection", ["block", *IN_TENSORS])
def test_nothing_with_state_is_sign_descent_with_decay(selection):
    x, bias = ours = matrices((4, 3), (3,))
    _, other = theirs = matrices((4, 3), (3,))
    by_hand = theirs[0].detach().clone()
    optimizer = FrugalAdamW(
        named(ours), lr=0.1, weight_decay=0.5, density=0.0, selection=selection, state_free_scale=0.5, scale=0.2
    )
    adamw = torch.optim.AdamW([other], lr=0.1, weight_decay=0.5)
    for step in range(4):
        give_gradients(step, *ours)
        g, _ = give_gradients(step, *theirs)
        by_hand = by_hand * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 0.5 * torch.sign(g)
        optimizer.step()
        adamw.step()
    torch.testing.assert_close(x.detach(), by_hand, rtol=0, atol=1e-12)
    torch.testing.assert_close(bias, other, rtol=0, atol=1e-12)
    assert not optimizer.state[x]


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_svd_without_the_rest_is_galore(shape):
    """GaLore by hand: moments in the space of the leading singular vectors, which are renewed and the moments kept.

    GaLore leaves the signs of the vectors to the decomposition; here the largest entry is positive.
    """
    (x,), rank, gap = matrices(shape), 2, 3
    w = x.detach().clone()
    optimizer = FrugalAdamW(
        named([x]),
        lr=0.01,
        density=rank / min(shape),
        update_gap=gap,
        selection="svd",
        state_free="none",
        reset=False,
        scale=0.25,
    )
    m = v = torch.zeros((), dtype=torch.float64)
    basis = torch.zeros(())
    for t in range(1, 9):
        (g,) = give_gradients(t, x)
        if (t - 1) % gap == 0:
            u, _, vh = torch.linalg.svd(g, full_matrices=False)
            basis = vh[:rank].T if shape[0] >= shape[1] else u[:, :rank]
            basis = torch.stack([column * column[column.abs().argmax()].sign() for column in basis.T], 1)
        r = g @ basis if shape[0] >= shape[1] else basis.T @ g
        m, v = 0.9 * m + 0.1 * r, 0.999 * v + 0.001 * r * r
        n = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        w = w - 0.01 * 0.25 * (n @ basis.T if shape[0] >= shape[1] else basis @ n)
        optimizer.step()
        torch.testing.assert_close(x.detach(), w, rtol=0, atol=1e-9)


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("selection", ["block", "columns"])
def test_state_starts_anew_at_each_choice(selection, reset):
    ours, theirs = matrices((4, 3)), matrices((4, 3))
    optimizer = FrugalAdamW(named(ours), lr=0.05, density=1.0, update_gap=3, selection=selection, reset=reset)
    run(optimizer, ours, range(8))
    adamw = torch.optim.AdamW(theirs, lr=0.05, weight_decay=0.0)
    for first in (0, 3, 6):
        if reset:
            adamw = torch.optim.AdamW(theirs, lr=0.05, weight_decay=0.0)
        run(adamw, theirs, range(first, min(first + 3, 8)))
    require_close(ours, theirs)


def test_the_other_limits():
    lion, plain = matrices((4, 3)), matrices((4, 3))
    run(FrugalLion(named(lion), lr=0.05, weight_decay=0.1, density=1.0), lion, range(5))
    run(Lion(plain, lr=0.05, weight_decay=0.1), plain, range(5))
    require_close(lion, plain)
    sgd, plain = matrices((4, 3)), matrices((4, 3))
    run(FrugalSGD(named(sgd), lr=0.05, density=0.0), sgd, range(5))
    run(torch.optim.SGD(plain, lr=0.05), plain, range(5))
    require_close(sgd, plain)
    # The same learning rate and no momentum inside and outside: SGD, whatever the subspace.
    for selection in IN_TENSORS:
        both, plain = matrices((4, 6), (5, 3)), matrices((4, 6), (5, 3))
        optimizer = FrugalSGD(named(both), lr=0.05, momentum=0.0, density=0.5, selection=selection, update_gap=2)
        run(optimizer, both, range(5))
        run(torch.optim.SGD(plain, lr=0.05), plain, range(5))
        require_close(both, plain)


@pytest.mark.parametrize("selection", ["block", "columns"])
def test_momentum_begins_with_zeros_and_not_with_the_weights(selection):
    """The published code clones the parameter, and its first steps shrink the weights."""
    ours, theirs = matrices((4, 3)), matrices((4, 3))
    run(FrugalSGD(named(ours), lr=0.05, momentum=0.9, density=1.0, selection=selection), ours, range(4))
    run(torch.optim.SGD(theirs, lr=0.05, momentum=0.9), theirs, range(4))
    require_close(ours, theirs)


# The two parts.


@pytest.mark.parametrize(("selection", "dim"), [("columns", 1), ("rows", 0)])
@pytest.mark.parametrize("rule", ["sign", "sgd", "none"])
def test_lines_with_state_and_the_rest(selection, dim, rule):
    (x,), free_scale = matrices((4, 8)), 0.5
    start = x.detach().clone()
    optimizer = FrugalAdamW(
        named([x]),
        lr=0.1,
        weight_decay=0.5,
        density=0.25,
        selection=selection,
        state_free=rule,
        state_free_scale=free_scale,
        scale=0.2,
    )
    (g,) = give_gradients(0, x)
    optimizer.step()
    index = optimizer.state[x]["subspace"]
    assert len(index) == start.shape[dim] // 4
    rest = {"sign": g.sign(), "sgd": g, "none": torch.zeros_like(g)}[rule]
    decayed = start * (1 - 0.1 * 0.5)
    expected = decayed - 0.1 * 0.2 * free_scale * rest
    # The first step of Adam is a sign, short by eps.
    first = decayed - 0.1 * 0.2 * g / (g.abs() + 1e-8)
    expected = expected.index_copy(dim, index, first.index_select(dim, index))
    torch.testing.assert_close(x.detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", ["sign", "sgd", "none"])
def test_a_block_with_state_and_the_rest(rule):
    params = matrices((3, 4), (4, 2))
    optimizer = FrugalAdamW(
        named(params),
        lr=0.1,
        weight_decay=0.5,
        density=0.5,
        block_order="descending",
        state_free=rule,
        state_free_scale=0.5,
        scale=0.2,
    )
    decayed = [p.detach() * (1 - 0.1 * 0.5) for p in params]
    h, g = give_gradients(0, *params)
    optimizer.step()
    rest = {"sign": h.sign(), "sgd": h, "none": torch.zeros_like(h)}[rule]
    torch.testing.assert_close(params[0].detach(), decayed[0] - 0.1 * 0.2 * 0.5 * rest, rtol=0, atol=1e-12)
    expected = decayed[1] - 0.1 * 0.2 * g / (g.abs() + 1e-8)
    torch.testing.assert_close(params[1].detach(), expected, rtol=0, atol=1e-12)


def test_a_matrix_of_any_strides_takes_the_same_path():
    for selection in IN_TENSORS:
        (plain,) = matrices((6, 4))
        turned = nn.Parameter(plain.detach().t().contiguous().t())
        for p in (plain, turned):
            torch.manual_seed(0)
            run(FrugalAdamW(named([p]), lr=0.05, density=0.5, selection=selection, update_gap=2), [p], range(5))
        assert not turned.is_contiguous()
        torch.testing.assert_close(plain, turned, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_rounding_errors_make_no_steps(shape):
    """A gradient of rank 2 lies in a subspace of rank 3: what is left over is rounding, of which a sign is 1."""
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(shape[0], 2, generator=generator) @ torch.randn(2, shape[1], generator=generator)
    paths = []
    for rule in ("sign", "none"):
        (x,) = matrices(shape, dtype=torch.float32)
        optimizer = FrugalAdamW(named([x]), lr=0.1, density=3 / 8, selection="svd", state_free=rule)
        x.grad = g.clone()
        optimizer.step()
        paths.append(x.detach())
    # The third direction holds nothing but rounding errors either, which Adam enlarges in both.
    torch.testing.assert_close(paths[0], paths[1], rtol=0, atol=1e-6)


# Which blocks, and when.


def active(optimizer: FrugalAdamW, params: list[Tensor]) -> list[int]:
    return [i for i, p in enumerate(params) if optimizer.state[p]]


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("ascending", [[0, 1], [2, 3], [0, 4], [1, 2]]),
        ("descending", [[3, 4], [1, 2], [0, 4], [2, 3]]),
        ("mirror", [[0, 4], [1, 3], [0, 2], [1, 4]]),
    ],
)
def test_orders_of_blocks(order, expected):
    params = matrices(*[(2, 2)] * 5)
    optimizer = FrugalAdamW(named(params), density=0.4, update_gap=2, block_order=order)
    for step, blocks in enumerate(expected):
        for _ in range(2):
            run(optimizer, params, range(step, step + 1))
            assert active(optimizer, params) == blocks


def test_mirror_takes_both_ends_first():
    assert block_order("mirror", 4) == [0, 3, 1, 2]
    assert sorted(block_order("mirror", 7)) == list(range(7))


def test_random_blocks_are_as_likely():
    torch.manual_seed(0)
    params = matrices(*[(2, 2)] * 4)
    optimizer = FrugalAdamW(named(params), density=0.5, update_gap=1)
    seen = [0] * 4
    for step in range(120):
        run(optimizer, params, range(step, step + 1))
        chosen = active(optimizer, params)
        assert len(chosen) == 2
        for i in chosen:
            seen[i] += 1
    assert all(40 < count < 80 for count in seen)
    pairs = {tuple(random_subset(4, 2, torch.device("cpu")).tolist()) for _ in range(100)}
    assert pairs == set(itertools.combinations(range(4), 2))


def test_a_block_that_stays_keeps_its_state_without_reset():
    params = matrices((2, 2), (2, 2), (2, 2))
    optimizer = FrugalAdamW(named(params), density=2 / 3, update_gap=1, block_order="ascending", reset=False)
    run(optimizer, params, range(2))  # 0 and 1, then 2 and 0
    assert [optimizer.state[p].get("step") for p in params] == [2, None, 1]


def test_a_late_gradient_chooses_its_own_subspace():
    params = matrices((4, 4), (4, 4))
    optimizer = FrugalAdamW(named(params), density=0.5, update_gap=3, selection="svd")
    run(optimizer, params[:1], range(2))
    assert "subspace" not in optimizer.state[params[1]]
    run(optimizer, params, range(2, 4))
    assert [optimizer.state[p]["updates"] for p in params] == [4, 2]


def test_ranks_choose_alike(monkeypatch):
    def choices(seed: int) -> list[Any]:
        torch.manual_seed(seed)
        found = []
        for selection in ("block", "columns", "rows", "randk", "random"):
            params = matrices(*[(8, 8)] * 6)
            optimizer = FrugalAdamW(named(params), selection=selection)
            run(optimizer, params, range(1))
            found += [optimizer.state[p]["subspace"].tolist() for p in params] if selection != "block" else []
            found.append(active(optimizer, params))
        return found

    assert choices(1) != choices(2)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda seed, src: seed.fill_(5))
    assert choices(1) == choices(2)


# Memory and checkpoints.


def kept_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [t for kept in optimizer.state.values() for t in kept.values() if isinstance(t, Tensor) and t.numel() > 1]
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize(
    ("selection", "copies"),
    # Of 8 square matrices of 32: 2 x density, and numbers of entries of half the size or a basis.
    [("block", 0.5), ("columns", 0.5), ("rows", 0.5), ("randk", 0.75), ("svd", 0.75), ("random", 0.75)],
)
def test_state_is_there_for_the_active_part_alone(selection, copies):
    params = matrices(*[(32, 32)] * 8, dtype=torch.float32)
    optimizer = FrugalAdamW(named(params), density=0.25, update_gap=2, selection=selection)
    numbers = 8 * 8 * 8 if selection in ("columns", "rows") else 0  # eight of eight bytes in each of eight matrices
    for step in range(5):
        run(optimizer, params, range(step, step + 1))
        assert kept_bytes(optimizer) == 4 * 8 * 32 * 32 * copies + numbers
    adamw = torch.optim.AdamW(params)
    run(adamw, params, range(1))
    assert kept_bytes(optimizer) < 0.4 * kept_bytes(adamw)


@pytest.mark.parametrize("plugin", ALL)
@pytest.mark.parametrize("selection", ["block", *IN_TENSORS])
def test_resumes_within_a_gap(plugin, selection, tmp_path):
    # More lines than bfloat16 has whole numbers: their numbers must not be cast to it.
    shapes, dtype = ((300, 600), (4, 4), (3,)), torch.bfloat16
    whole, first, second = (matrices(*shapes, dtype=dtype) for _ in range(3))
    options: dict[str, Any] = {"selection": selection, "update_gap": 4, "lr": 0.01, "density": 0.5}
    torch.manual_seed(0)
    run(plugin(named(whole), **options), whole, range(7))
    torch.manual_seed(0)
    optimizer = plugin(named(first), **options)
    run(optimizer, first, range(3))
    torch.save([optimizer.state_dict(), [p.detach() for p in first], torch.get_rng_state()], tmp_path / "state")
    state, values, random_state = torch.load(tmp_path / "state", weights_only=True)
    resumed = plugin(named(second), **options)
    resumed.load_state_dict(state)
    with torch.no_grad():
        torch._foreach_copy_(second, values)
    torch.set_rng_state(random_state)
    run(resumed, second, range(3, 7))
    for a, b in zip(second, whole, strict=True):
        assert torch.equal(a, b)


def test_a_copy_goes_on_as_the_original():
    model = nn.Linear(4, 4)
    optimizer = FrugalAdamW(model.named_parameters(), selection="columns")
    run(optimizer, list(model.parameters()), range(1))
    again = copy.deepcopy(optimizer)
    again.add_param_group({"params": [("late.weight", nn.Parameter(torch.zeros(2, 2)))], "density": 0.5})
    assert again.param_groups[-1]["density"] == 0.5
    assert again.param_groups[-1]["selection"] == "columns"
    assert len(optimizer.param_groups) == 2


# Parameters and options.


def test_hidden_matrices_and_all_else():
    model = nn.ModuleDict({"embedding": nn.Embedding(4, 4), "hidden": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    optimizer = FrugalLion(model.named_parameters(), lr=0.5, adamw_lr=0.25, adamw_betas=(0.5, 0.6))
    hidden, rest = optimizer.param_groups
    assert hidden["params"] == [model["hidden"].weight]
    assert (hidden["lr"], rest["lr"], rest["betas"]) == (0.5, 0.25, (0.5, 0.6))
    assert len(rest["params"]) == 4
    narrowed = FrugalLion(model.named_parameters(), adamw_names=["head"])
    assert len(narrowed.param_groups[0]["params"]) == 2


@pytest.mark.parametrize("plugin", ALL)
def test_a_schedule_scales_both_parts(plugin):
    params = matrices((4, 3), (3,))
    optimizer = plugin(named(params))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = [p.detach().clone() for p in params]
    run(optimizer, params, range(1))
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    schedule.step()


@pytest.mark.parametrize("selection", ["block", "columns", "svd"])
def test_maximize_ascends(selection):
    down, up = matrices((4, 4), (3,)), matrices((4, 4), (3,))
    descent = FrugalAdamW(named(down), density=0.5, selection=selection)
    ascent = FrugalAdamW(named(up), density=0.5, selection=selection, maximize=True)
    for optimizer, params, sign in ((descent, down, 1), (ascent, up, -1)):
        torch.manual_seed(0)
        for step in range(3):
            for p, g in zip(params, give_gradients(step, *params), strict=True):
                p.grad = sign * g
            optimizer.step()
    require_close(down, up)


@pytest.mark.parametrize(
    "options",
    [
        {"density": 1.5},
        {"density": -0.1},
        {"update_gap": 0},
        {"selection": "rowz"},
        {"block_order": "sideways"},
        {"state_free": "lion"},
        {"state_free_scale": -1.0},
        {"scale": -1.0},
        {"lr": -1.0},
        {"weight_decay": -1.0},
        {"betas": (0.9, 1.0)},
        {"eps": 0.0},
    ],
)
def test_options_out_of_range_are_named(options):
    (name,) = options
    for build in (
        lambda: FrugalAdamW(named(matrices((2, 2))), **options),
        lambda: FrugalAdamW([{"params": named(matrices((2, 2))), **options}]),
    ):
        with pytest.raises(ConfigurationError) as error:
            build()
        assert name in str(error.value)


def test_what_it_cannot_use_is_refused():
    with pytest.raises(ConfigurationError, match="FrugalLion is built from named parameters"):
        FrugalLion(matrices((2, 2)))
    with pytest.raises(ConfigurationError, match="FrugalSGD found no hidden matrix"):
        FrugalSGD(named(matrices((2,), (2, 2, 2))))
    refused: list[dict[str, Any]] = [{"momentum": 1.0}, {"adamw_lr": -1.0}, {"adamw_betas": (1.0, 0.9)}]
    for options in refused:
        with pytest.raises(ConfigurationError):
            FrugalSGD(named(matrices((2, 2))), **options)


def test_its_needs_depend_on_the_selection():
    def needs(**options: Any) -> tuple[bool, bool]:
        traits = traits_of(FrugalAdamW, options)
        return traits.needs_whole_tensors, traits.is_stochastic

    assert needs(lr=0.1) == (False, True)
    assert needs(block_order="mirror") == (False, False)
    assert needs(selection="svd") == (True, False)
    assert needs(selection="columns") == (True, True)


def test_how_many():
    assert [how_many(10, d) for d in (0.0, 0.01, 0.25, 0.5, 1.0)] == [0, 1, 2, 5, 10]


def test_the_rest_is_worth_its_steps():
    """Regression by a network: sign descent outside the subspace ends lower than the subspace alone."""

    def final_loss(rule: str) -> float:
        torch.manual_seed(0)
        x = torch.randn(256, 8)
        y = torch.sin(2 * x[:, :1]) + x[:, 1:2] * x[:, 2:3]
        model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
        optimizer = FrugalAdamW(
            model.named_parameters(),
            lr=3e-3,
            density=0.25,
            update_gap=50,
            selection="columns",
            state_free=rule,
            state_free_scale=0.1,
        )
        for _ in range(400):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            return float((model(x) - y).square().mean())

    assert final_loss("sign") < 0.9 * final_loss("none")
