"""MARS by hand, its reduction to AdamW, and what it corrects."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lightrail.errors import ConfigurationError
from lightrail_optimizers import MARS, MARSLion, MARSShampoo
from lightrail_optimizers.mars_rule import corrected_
from lightrail_optimizers.newton_schulz import newton_schulz

KINDS = [MARS, MARSLion, MARSShampoo]
K = 0.025 * 0.95 / 0.05  # gamma b1 / (1-b1)


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stepped(optimizer, w, *gradients):
    for gradient in gradients:
        w.grad = gradient.clone()
        optimizer.step()
    return w.detach()


def close(found, expected, atol=1e-12):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


GRADIENTS = doubles(0.5, -1.0), doubles(1.0, 0.25)
OPTIONS = {"lr": 0.1, "weight_decay": 0.1, "optimize_1d": True}


def by_numpy(kind, start, gradients, lr=0.1, wd=0.1, b1=0.95, b2=0.99, eps=1e-8, gamma=0.025):
    x, m, v, g_prev = np.array(start), 0.0, 0.0, 0.0
    for t, gradient in enumerate(gradients, 1):
        g = gradient.numpy()
        c = g + gamma * b1 / (1 - b1) * (g - g_prev)
        c = c / max(1.0, float(np.sqrt((c**2).sum())))
        m, v, g_prev = b1 * m + (1 - b1) * c, b2 * v + (1 - b2) * c**2, g
        u = np.sign(m) if kind is MARSLion else (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        x = x - lr * (wd * x + u)
    return torch.from_numpy(x)


@pytest.mark.parametrize(
    ("kind", "after"),
    [
        (MARS, [(0.8900000022, -1.8800000011), (0.7846560450, -1.8415309251)]),
        (MARSLion, [(0.89, -1.88), (0.7811, -1.7612)]),
    ],
)
def test_two_steps_by_hand(kind, after):
    for count, expected in enumerate(after, 1):
        w = nn.Parameter(doubles(1.0, -2.0))
        found = stepped(kind([w], **OPTIONS), w, *GRADIENTS[:count])
        close(found, doubles(*expected), atol=6e-11)  # all of the ten digits
        close(found, by_numpy(kind, (1.0, -2.0), GRADIENTS[:count]))


def test_the_first_correction_extrapolates_from_zero():
    w = nn.Parameter(doubles(1.0, -2.0))
    optimizer = MARS([w], **OPTIONS)
    stepped(optimizer, w, doubles(0.1, -0.2))
    close(optimizer.state[w]["momentum"], 0.05 * 1.475 * doubles(0.1, -0.2))


@pytest.mark.parametrize("shape", [(3, 2), (2, 3, 2, 2)])
def test_without_gamma_and_below_norm_one_it_is_adamw(shape):
    w = nn.Parameter(random(*shape))
    v = nn.Parameter(w.detach().clone())
    ours = MARS([w], lr=0.1, betas=(0.9, 0.95), weight_decay=0.1, gamma=0.0)
    theirs = torch.optim.AdamW([v], lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)
    for seed in range(5):
        gradient = random(*shape, seed=seed)
        gradient /= 1.001 * gradient.norm()
        close(stepped(ours, w, gradient), stepped(theirs, v, gradient))


def test_each_tensor_is_clipped_by_its_own_norm():
    g = [doubles(3.0, 4.0), doubles(0.03, 0.04), doubles(0.0, 0.0), doubles()]
    kept = [each.clone() for each in g]
    c = corrected_([torch.zeros_like(each) for each in g], g, gamma=0.0, b1=0.9)
    for found, expected in zip(c, [doubles(0.6, 0.8), kept[1], kept[2], kept[3]], strict=True):
        close(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(g, kept, strict=True))


def test_the_norm_of_half_precision_is_computed_in_single():
    # The norm is 1.0039, which bfloat16 rounds to 1.
    g = torch.full((258,), 0.0625, dtype=torch.bfloat16)
    c = corrected_([torch.zeros_like(g)], [g], gamma=0.0, b1=0.9)[0]
    assert torch.equal(c, torch.full((258,), 0.0625 / (258 * 0.0625**2) ** 0.5, dtype=torch.bfloat16))
    assert (c < g).all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_neither_edited_nor_kept(kind):
    def path(spoils):
        w = nn.Parameter(random(4, 3))
        optimizer = kind([w], lr=0.1)
        for seed in range(4):
            given = random(4, 3, seed=seed)
            w.grad = given.clone()
            optimizer.step()
            assert torch.equal(w.grad, given)
            if spoils:
                w.grad.zero_()
        return w.detach()

    assert torch.equal(path(True), path(False))


@pytest.mark.parametrize("kind", KINDS)
def test_convolutions_are_corrected_unless_as_published(kind):
    """Four-dimensional weights must not become AdamW's in silence."""
    shapes = {"scalar": (), "bias": (4,), "matrix": (4, 3), "conv": (4, 3, 2, 2)}

    def path(form, **options):
        params = {name: nn.Parameter(random(*shape)) for name, shape in shapes.items()}
        optimizer = kind(params.values(), lr=0.02, lr_1d=0.02, form=form, **options)
        for seed in range(3):
            for p in params.values():
                p.grad = random(*p.shape, seed=seed)
            optimizer.step()
        return {name: p.detach() for name, p in params.items()}

    adamw = {name: nn.Parameter(random(*shape)) for name, shape in shapes.items()}
    optimizer = torch.optim.AdamW(adamw.values(), lr=0.02, betas=(0.9, 0.95), weight_decay=0.1)
    for seed in range(3):
        for p in adamw.values():
            p.grad = random(*p.shape, seed=seed)
        optimizer.step()

    def equal_to_adamw(found):
        return {name for name in shapes if torch.allclose(found[name], adamw[name].detach(), rtol=0, atol=1e-12)}

    assert equal_to_adamw(path("default")) == {"scalar", "bias"}
    assert equal_to_adamw(path("official")) == {"scalar", "bias", "conv"}
    assert equal_to_adamw(path("default", optimize_1d=True)) == set()


def test_a_schedule_scales_both_learning_rates():
    layer = nn.Linear(3, 2)
    optimizer = MARS(layer.parameters(), lr=0.5, lr_1d=0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.125]


def test_what_a_group_sets_holds_for_all_of_its_tensors():
    first, second, third = nn.Linear(3, 2), nn.Linear(3, 2), nn.Parameter(torch.zeros(3))
    groups = [
        {"params": first.named_parameters(), "weight_decay": 0.0, "gamma": 0.5},
        {"params": second.named_parameters(), "lr": 0.5, "lr_1d": 0.25, "betas": (0.5, 0.5)},
    ]
    optimizer = MARS(groups, lr=0.1, lr_1d=0.2, weight_decay=0.3, weight_decay_1d=0.4)
    optimizer.add_param_group({"params": [("third", third)]})
    keys = ("lr", "betas", "weight_decay")
    assert [tuple(group[key] for key in keys) for group in optimizer.param_groups] == [
        (0.1, (0.95, 0.99), 0.0),
        (0.2, (0.9, 0.95), 0.0),
        (0.5, (0.5, 0.5), 0.3),
        (0.25, (0.5, 0.5), 0.4),
        (0.2, (0.9, 0.95), 0.4),
    ]
    assert [group["gamma"] for group in optimizer.param_groups] == [0.5, 0.5, 0.025, 0.025, 0.025]
    assert optimizer.param_groups[3]["param_names"] == ["bias"]


def test_gamma_is_read_from_the_group():
    w = nn.Parameter(random(3, 2))
    optimizer = MARS([w], lr=0.1)
    optimizer.param_groups[0]["gamma"] = 0.0
    stepped(optimizer, w, 0.01 * random(3, 2, seed=1))
    close(optimizer.state[w]["momentum"], 0.05 * 0.01 * random(3, 2, seed=1))


# Shampoo.


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (5, 3, 2, 1)])
def test_shampoo_by_hand(shape):
    w = nn.Parameter(random(*shape))
    gradients = [random(*shape, seed=seed) for seed in (1, 2)]
    x, m, g_prev = w.detach().clone(), torch.zeros(shape).double(), torch.zeros(shape).double()
    for g in gradients:
        c = g + K * (g - g_prev)
        m, g_prev = 0.95 * m + 0.05 * c / c.norm().clamp(min=1), g
        u = newton_schulz([m.reshape(shape[0], -1) / 0.05], eps=1e-8)[0].reshape(shape)
        x = x - 0.1 * (0.2 * x + max(1.0, shape[0] / m[0].numel()) ** 0.5 * u)
    close(stepped(MARSShampoo([w], lr=0.1, weight_decay=0.2), w, *gradients), x)


def test_shampoo_updates_vectors_as_mars_where_it_is_to_correct_them():
    w, v = nn.Parameter(doubles(1.0, -2.0)), nn.Parameter(doubles(1.0, -2.0))
    close(stepped(MARSShampoo([w], **OPTIONS), w, *GRADIENTS), stepped(MARS([v], **OPTIONS), v, *GRADIENTS), atol=0)


# Options.


@pytest.mark.parametrize(
    "options", [{"lr": -1}, {"gamma": -0.1}, {"eps": 0.0}, {"form": "paper"}, {"betas_1d": (0.9, 1.0)}, {"lr_1d": -1}]
)
@pytest.mark.parametrize("kind", KINDS)
def test_options_out_of_range(kind, options):
    with pytest.raises(ConfigurationError):
        kind([nn.Parameter(random(2, 2))], **options)


@pytest.mark.parametrize(("kind", "options"), [(MARS, {"betas": (1.0, 0.9)}), (MARSLion, {"beta": 1.0})])
def test_betas_out_of_range(kind, options):
    with pytest.raises(ConfigurationError, match="out of range"):
        kind([nn.Parameter(random(2, 2))], **options)
