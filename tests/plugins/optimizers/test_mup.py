"""MuP: the table of factors, where they act, and activations that keep their size as a model grows wider."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import lightrail
from lightrail import Closure, TransformedOptimizer
from lightrail.errors import CompositionError, ConfigurationError
from lightrail.step import CombinedOptimizer
from lightrail_optimizers import DoG, MuP
from lightrail_optimizers.width_ratios import Width, initial_factor, learning_rate_factor, target_deviation
from lightrail_starter.models.gpt import GPT


def mlp(width, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(16, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 4),
    )


def adam(params, lr=0.01):
    return torch.optim.Adam(params, lr=lr)


def sgd(params, lr=0.5):
    return torch.optim.SGD(params, lr=lr)


def fixed_batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(32, 16, generator=generator), torch.randint(4, (32,), generator=generator)


def train(model, transforms, make, steps=4):
    optimizer = TransformedOptimizer(make(model.parameters()), transforms)
    x, y = (t.to(next(model.parameters()).dtype) if t.is_floating_point() else t for t in fixed_batch())
    for _ in range(steps):
        optimizer.step(Closure(lambda: F.cross_entropy(model(x), y), list(model.parameters())))
    return optimizer


def attached(model, base, **options):
    mup = MuP(base=base, **options)
    mup.attach(model)
    return mup


def snapshot(model):
    return [p.detach().clone() for p in model.parameters()]


def rates(optimizer):
    """The learning rate of every parameter."""
    return {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}


# The table.


@pytest.mark.parametrize(
    ("m_in", "m_out", "deviation", "of_sgd", "of_adam"),
    [
        (1, 1, 1, 1, 1),
        (4, 4, 1 / 2, 1, 1 / 4),
        (4, 16, 1 / 2, 4, 1 / 4),
        (4, 1, 1 / 4, 1 / 4, 1 / 4),
        (1, 4, 1, 4, 1),
        (0.25, 0.25, 2, 1, 4),
    ],
)
def test_the_table(m_in, m_out, deviation, of_sgd, of_adam):
    width = Width(m_in, m_out)
    assert target_deviation(width) == deviation
    assert learning_rate_factor(width, True) == of_sgd
    assert learning_rate_factor(width, False) == of_adam


def test_how_a_model_draws_its_weights_is_found_out():
    torch.manual_seed(0)
    hidden, first, last = Width(4, 4), Width(1, 4), Width(4, 1)

    def normal(rows, columns, deviation):
        return torch.randn(rows, columns) * deviation

    for width, wide, narrow in ((hidden, (256, 256), (64, 64)), (first, (256, 9), (64, 9)), (last, (9, 256), (9, 64))):
        target = target_deviation(width)
        same = initial_factor(width, normal(*wide, 0.02), normal(*narrow, 0.02))
        assert same == target
        by_fan_in = initial_factor(width, normal(*wide, wide[1] ** -0.5), normal(*narrow, narrow[1] ** -0.5))
        assert by_fan_in == target * width.fan_in**0.5
        by_fan_out = initial_factor(width, normal(*wide, wide[0] ** -0.5), normal(*narrow, narrow[0] ** -0.5))
        assert by_fan_out == target * width.fan_out**0.5
    # Another law: here 1/fan_in.
    wide, narrow = normal(256, 256, 1 / 256), normal(64, 64, 1 / 64)
    factor = initial_factor(hidden, wide, narrow)
    torch.testing.assert_close((factor * wide).square().mean(), narrow.square().mean() / 4)
    assert initial_factor(hidden, torch.zeros(8, 8), torch.zeros(2, 2)) == 1


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        # First weights and bias, hidden weights and bias, last weights and bias.
        (adam, [0.01, 0.01, 0.0025, 0.01, 0.0025, 0.01, 0.0025, 0.01]),
        (sgd, [2.0, 2.0, 0.5, 2.0, 0.5, 2.0, 0.125, 0.5]),
    ],
)
@pytest.mark.parametrize("by", ["base", "ratio"])
def test_every_parameter_has_its_rate_and_its_scale(make, expected, by):
    model, before = mlp(128), snapshot(mlp(128))
    mup = MuP(base=mlp(32, seed=5)) if by == "base" else MuP(ratio=4.0)
    mup.attach(model)
    optimizer = TransformedOptimizer(make(model.parameters()), [mup])
    found = rates(optimizer)
    assert [found[p] for p in model.parameters()] == expected
    # Hidden weights are 1/fan_in already; those of the last layer have to be 1/fan_in²; biases the base's.
    factors = [1, 1, 1, 2, 1, 2, 0.5, 2]
    for p, x, factor in zip(model.parameters(), before, factors, strict=True):
        assert torch.equal(p, x * factor)


def test_the_product_of_rate_and_decay_stays():
    model = mlp(128)
    mup = attached(model, mlp(32))
    adamw = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    optimizer = TransformedOptimizer(adamw, [mup])
    assert [(g["lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups] == [
        (0.01, 0.1, 5),
        (0.0025, 0.4, 3),
    ]


def test_the_base_width_is_training_without_it_bit_for_bit():
    for make in (adam, sgd):
        plain, ours = mlp(32), mlp(32)
        train(plain, [], make)
        mup = attached(ours, mlp(32, seed=5))
        optimizer = train(ours, [mup], make)
        assert len(optimizer.param_groups) == 1
        assert all(torch.equal(a, b) for a, b in zip(snapshot(ours), snapshot(plain), strict=True))


class Multiplied(nn.Module):
    """A last layer in the published form: its input over m, its weights root m times as large."""

    def __init__(self, layer, m):
        super().__init__()
        self.layer, self.m = layer, m
        with torch.no_grad():
            layer.weight *= m**0.5
            layer.bias *= m**0.5

    def forward(self, x):
        return self.layer(x / self.m)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_it_is_the_published_form_with_a_multiplier(kind):
    m = 4.0
    ours, theirs = mlp(128).double(), mlp(128).double()
    mup = attached(ours, mlp(32).double())
    theirs[6] = last = Multiplied(theirs[6], m)
    first_weight, first_bias, *middle = list(theirs.parameters())[:6]
    hidden, biases = middle[::2], middle[1::2]
    with torch.no_grad():
        for bias in biases:
            bias *= m**0.5
    vectors, fixed = [first_weight, first_bias, *biases, last.layer.weight], [last.layer.bias]
    eps = 1e-30  # it has no share in the equality
    if kind == "adam":
        groups = [{"params": hidden, "lr": 0.01 / m}, {"params": [*vectors, *fixed], "lr": 0.01}]
        optimizer: torch.optim.Optimizer = torch.optim.Adam(groups, eps=eps)
        train(ours, [mup], lambda p: torch.optim.Adam(p, lr=0.01, eps=eps))
    else:
        groups = [{"params": [*hidden, *fixed], "lr": 0.5}, {"params": vectors, "lr": 0.5 * m}]
        optimizer = torch.optim.SGD(groups)
        train(ours, [mup], sgd)
    x, y = fixed_batch()
    x = x.double()
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(theirs(x), y).backward()
        optimizer.step()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-12)


# What it is for.


def slopes(with_mup, make, widths=(32, 128, 512), seeds=(0, 1)):
    """How the mean magnitude of each layer's output grows with width after four steps, on axes of logarithms."""
    x, _ = fixed_batch()
    rows = []
    for width in widths:
        sizes = []
        for seed in seeds:
            model = mlp(width, seed)
            train(model, [attached(model, mlp(32, seed + 9))] if with_mup else [], make)
            found, h = [], x
            with torch.no_grad():
                for layer in model:
                    h = layer(h)
                    if isinstance(layer, nn.Linear):
                        found.append(h.abs().mean().log())
            sizes.append(torch.stack(found))
        rows.append(torch.stack(sizes).mean(0))
    ys, xs = torch.stack(rows), torch.tensor(widths).log()
    xs = xs - xs.mean()
    return (xs[:, None] * ys).sum(0) / xs.square().sum()


@pytest.mark.parametrize("make", [adam, sgd])
def test_activations_keep_their_size_with_it(make):
    assert slopes(True, make).abs().max() < 0.1


def test_and_grow_without_it():
    found = slopes(False, adam)
    assert found[1:].min() > 0.2


@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_a_transformer_keep_their_size_too(tied):
    def size(width, with_mup):
        def model(width, seed=0):
            torch.manual_seed(seed)
            return GPT(vocab_size=30, context=8, width=width, depth=2, heads=2, tied=tied)

        wide = model(width)
        transforms = [attached(wide, model(32, 1))] if with_mup else []
        optimizer = TransformedOptimizer(adam(wide.parameters()), transforms)
        tokens = torch.randint(30, (8, 9), generator=torch.Generator().manual_seed(1))
        loss = lambda: F.cross_entropy(wide(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())  # noqa: E731
        for _ in range(4):
            optimizer.step(Closure(loss, list(wide.parameters())))
        return wide(tokens[:, :-1]).abs().mean().item()

    slopes = [math.log(size(256, with_mup) / size(32, with_mup)) / math.log(8) for with_mup in (True, False)]
    assert abs(slopes[0]) < 0.15
    assert slopes[1] > 0.4


# What else a model may be made of.


def gpt(width, heads=2, **options):
    torch.manual_seed(0)
    return GPT(vocab_size=30, context=8, width=width, depth=1, heads=heads, **options)


def test_attention_is_scaled_by_the_width_of_its_heads():
    wide = gpt(64)
    attention = wide.get_submodule("blocks.0.attention")
    assert attention.attention_scale == 1 / math.sqrt(32)
    attached(wide, gpt(16))
    # 1/d, and 1/sqrt(d) at the base width, 8.
    assert attention.attention_scale == pytest.approx(math.sqrt(8) / 32, rel=1e-12)
    tokens = torch.randint(30, (2, 8))
    before = wide(tokens)
    attention.attention_scale = 0.0  # type: ignore[assignment]
    assert not torch.equal(wide(tokens), before)
    more_heads = gpt(64, heads=8)
    attached(more_heads, gpt(16))
    assert more_heads.get_submodule("blocks.0.attention").attention_scale == 1 / math.sqrt(8)


def test_a_tied_last_layer_divides_its_input():
    wide, plain = gpt(64), gpt(64)
    mup = attached(wide, gpt(16))
    assert torch.equal(wide.embedding.weight, plain.embedding.weight)  # an embedding begins as in the base
    name = "blocks.0.attention.read.weight"
    assert torch.equal(wide.get_parameter(name), plain.get_parameter(name) / 2)
    h = torch.randn(3, 64)
    assert torch.equal(wide.head(h), plain.head(h / 4))
    found = rates(TransformedOptimizer(adam(wide.parameters()), [mup]))
    assert found[wide.embedding.weight] == 0.01
    assert found[wide.get_parameter("blocks.0.mlp.write.weight")] == pytest.approx(0.01 * 48 / 176, rel=1e-12)
    assert found[wide.norm.weight] == 0.01
    untied, base = gpt(64, tied=False), gpt(16, tied=False)
    found = rates(TransformedOptimizer(adam(untied.parameters()), [attached(untied, base)]))
    assert found[untied.head.weight] == 0.0025


def test_convolutions_norms_and_what_is_transposed():
    def model(width):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv1d(2, width, 3),
            nn.BatchNorm1d(width),
            nn.Conv1d(width, width, 3, groups=width),
            nn.ConvTranspose1d(width, 2 * width, 2),
            nn.ConvTranspose1d(2 * width, 3, 2),
        )

    wide = model(32)
    found = rates(TransformedOptimizer(sgd(wide.parameters(), 1.0), [attached(wide, model(8))]))
    by_name = {name: found[p] for name, p in wide.named_parameters() if name.endswith("weight")}
    # The channels of a convolution with a group a channel read one channel, however many there are.
    assert by_name == {"0.weight": 4.0, "1.weight": 4.0, "2.weight": 4.0, "3.weight": 1.0, "4.weight": 0.25}


def test_recurrent_layers_and_single_numbers():
    class Model(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.rnn = nn.LSTM(5, width)
            self.temperature = nn.Parameter(torch.ones(()))

    wide = Model(32)
    found = rates(TransformedOptimizer(adam(wide.parameters()), [attached(wide, Model(8))]))
    assert found[wide.rnn.weight_ih_l0] == 0.01
    assert found[wide.rnn.weight_hh_l0] == 0.0025
    assert found[wide.temperature] == 0.01


def test_biases_that_begin_at_zero_stay_there():
    model = mlp(128)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.bias)
    attached(model, mlp(32))
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))


# Optimizers.


def test_groups_keep_their_options_order_and_names():
    model = mlp(128)
    first, rest = list(model[0].named_parameters("first")), list(model[2].named_parameters("second"))
    optimizer = torch.optim.Adam(
        [{"params": first, "lr": 0.1}, {"params": rest, "lr": 0.2, "betas": (0.5, 0.6)}], lr=1.0
    )
    TransformedOptimizer(optimizer, [attached(model, mlp(32))])
    assert [(g["lr"], g["betas"], g["param_names"]) for g in optimizer.param_groups] == [
        (0.1, (0.9, 0.999), ["first.weight", "first.bias"]),
        (0.05, (0.5, 0.6), ["second.weight"]),
        (0.2, (0.5, 0.6), ["second.bias"]),
    ]


def test_the_groups_of_combined_optimizers_each_by_its_own_rule():
    model = mlp(128)
    parts = [sgd(model[0].parameters(), 1.0), adam(model[2].parameters(), 1.0)]
    TransformedOptimizer(CombinedOptimizer(parts), [attached(model, mlp(32))])
    assert [[g["lr"] for g in part.param_groups] for part in parts] == [[4.0], [0.25, 1.0]]


def test_a_rule_may_be_chosen():
    model = mlp(128)
    optimizer = adam(model.parameters(), 1.0)
    TransformedOptimizer(optimizer, [attached(model, mlp(32), rule="sgd")])
    assert [g["lr"] for g in optimizer.param_groups] == [4.0, 1.0, 0.25]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this version of torch has no Muon")
def test_orthogonalized_updates_keep_their_rate():
    model = mlp(128)
    optimizer = torch.optim.Muon([model.get_parameter("2.weight")], lr=0.02)
    TransformedOptimizer(optimizer, [attached(model, mlp(32))])
    assert [g["lr"] for g in optimizer.param_groups] == [0.02]


@pytest.mark.parametrize("make", [torch.optim.LBFGS, DoG])
def test_optimizers_without_a_learning_rate_for_each_group_are_refused(make):
    model = mlp(128)
    with pytest.raises(CompositionError, match=make.__name__):
        TransformedOptimizer(make(model.parameters()), [attached(model, mlp(32))])
    same = mlp(32)
    TransformedOptimizer(make(same.parameters()), [attached(same, mlp(32))])  # nothing to divide


# Runs.


RUN = [
    "+transform=[mup]",
    "transform.mup.base.hidden=[16,16]",
    "model=mlp",
    "model.hidden=[64,64]",
    "schedule=null",
    "trainer.accelerator=cpu",
    "logger=[csv]",
]


def checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def test_a_resumed_run_goes_on_as_one_that_was_not_stopped(tmp_path: Path) -> None:
    def go(*more: str) -> Path:
        return lightrail.compose([*RUN, f"run.root={tmp_path}", *more]).execute().folder

    whole = go("trainer.max_epochs=2", "run.name=whole")
    short = go("trainer.max_epochs=1", "run.name=short")
    begun = checkpoint(short)["state_dict"]
    resumed = go("trainer.max_epochs=2", f"run.resume={short}")
    expected, found = checkpoint(whole), checkpoint(resumed)
    for name, value in expected["state_dict"].items():
        assert torch.equal(found["state_dict"][name], value), name
    assert not torch.equal(begun["model.layers.0.weight"], found["state_dict"]["model.layers.0.weight"])
    groups = found["optimizer_states"][0]["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == [3e-3, 7.5e-4]
    assert str(expected["optimizer_states"]) == str(found["optimizer_states"])


def test_the_base_model_of_a_run_draws_nothing_from_its_random_numbers(tmp_path: Path) -> None:
    def first_weights(*more: str) -> dict[str, torch.Tensor]:
        run = lightrail.compose(["model=mlp", "model.hidden=[64,64]", f"run.root={tmp_path}", "logger=[csv]", *more])
        return {"next": torch.rand(3), **run.task.state_dict()}

    plain = first_weights()
    ours = first_weights("+transform=[mup]", "transform.mup.base.hidden=[16,16]")
    factors = {"model.layers.4.weight": 0.5, "model.layers.2.bias": 2, "model.layers.4.bias": 2}
    for name, value in plain.items():
        assert torch.equal(ours[name], value * factors.get(name, 1)), name


# Refusals.


def test_options_that_do_not_go_together():
    wrong: list[dict[str, Any]] = [
        {},
        {"base": mlp(32), "ratio": 2.0},
        {"ratio": 0.0},
        {"base": {"width": 32}},
        {"ratio": 2.0, "rule": "lion"},
    ]
    for options in wrong:
        with pytest.raises(ConfigurationError):
            MuP(**options)


def test_models_whose_widths_cannot_be_told():
    with pytest.raises(CompositionError, match="another kind of model") as caught:
        attached(mlp(64), nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)))
    assert "only there: none; only here: 4.bias, 4.weight, 6.bias, …" in str(caught.value)
    with pytest.raises(CompositionError, match=r"'weight' cannot be told"):
        attached(nn.Conv1d(2, 2, 5), nn.Conv1d(2, 2, 3))
    with pytest.raises(CompositionError, match=r"'weight' cannot be told"):
        attached(nn.Embedding(9, 4), nn.Embedding(7, 4))
    with pytest.raises(CompositionError, match="parametrization"):
        attached(parametrizations.weight_norm(nn.Linear(4, 4)), parametrizations.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(CompositionError, match=r"rescale the attention of ''"):
        attached(nn.MultiheadAttention(16, 2), nn.MultiheadAttention(8, 2))
    task = nn.ModuleDict({"model": nn.Linear(4, 4), "projection": nn.Linear(4, 2)})
    with pytest.raises(CompositionError, match=r"'projection.weight' cannot be told"):
        attached(task, nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("module", "match"),
    [
        (nn.Linear(2, 2), "no hidden layer"),
        (nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2), nn.Linear(2, 2)), "cannot be told"),
        (nn.Sequential(nn.Linear(2, 2), nn.MultiheadAttention(2, 1)), "how wide the heads"),
    ],
)
def test_a_ratio_is_for_chains_of_layers(module, match):
    with pytest.raises(CompositionError, match=match):
        MuP(ratio=2.0).attach(module)


def test_attached_once_and_before_the_optimizer():
    model = mlp(64)
    with pytest.raises(CompositionError, match="has not seen"):
        TransformedOptimizer(adam(model.parameters()), [MuP(ratio=2.0)])
    mup = attached(model, mlp(32))
    with pytest.raises(CompositionError, match="already"):
        mup.attach(model)
    with pytest.raises(CompositionError, match="not the module's"):
        TransformedOptimizer(adam(mlp(64).parameters()), [mup])
