"""AdamP and SGDP: the projection by hand, where it happens, and what it is good for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightrail.errors import ConfigurationError
from lightrail_optimizers import SGDP, AdamP, scale_invariant


def doubles(values):
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


@pytest.fixture(params=["looking", "on the device"])
def path(request, monkeypatch):
    """Both ways to decide: by looking at the test, as on a CPU, and without, as on an accelerator."""
    if request.param == "on the device":

        def unseen(x, g, *, delta, eps):
            rows = scale_invariant._rows
            return [
                scale_invariant._invariance(rows(p), rows(q), delta, eps) if p.ndim > 1 and p.numel() else None
                for p, q in zip(x, g, strict=True)
            ]

        from lightrail_optimizers import adamp, sgdp

        monkeypatch.setattr(adamp, "invariances", unseen)
        monkeypatch.setattr(sgdp, "invariances", unseen)
    return request.param


def projected(u, w, g, delta=0.1, eps=1e-8):
    """The step and whether it was projected, as the paper has it, in numpy."""
    for view in ((len(w), -1), (1, -1)):
        rows, gradients, steps = (a.reshape(view) for a in (w, g, u))
        norms = np.linalg.norm(rows, axis=1)
        cosines = np.abs((rows * gradients).sum(1)) / norms / np.linalg.norm(gradients, axis=1)
        if cosines.max() < delta / np.sqrt(rows.shape[1]):
            units = rows / (norms + eps)[:, None]
            return (steps - units * (units * steps).sum(1, keepdims=True)).reshape(u.shape), True
    return u, False


def adamp_by_numpy(w, gradients, lr=0.1, wd=0.5, b1=0.9, b2=0.999, eps=1e-8, ratio=0.1, nesterov=False):
    w, m, v, fired = w.numpy(), 0.0, 0.0, []
    for t, gradient in enumerate(gradients, 1):
        g = gradient.numpy()
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        u = (b1 * m + (1 - b1) * g if nesterov else m) / (np.sqrt(v) / np.sqrt(1 - b2**t) + eps)
        u, fires = projected(u, w, g) if w.ndim > 1 else (u, False)
        fired.append(fires)
        w = w * (1 - lr * wd * (ratio if fires else 1)) - lr / (1 - b1**t) * u
    return torch.as_tensor(w), fired


def sgdp_by_numpy(w, gradients, lr=0.1, wd=0.5, momentum=0.9, dampening=0.0, ratio=0.1, nesterov=False, official=False):
    w, m, fired = w.numpy(), 0.0, []
    for gradient in gradients:
        g = gradient.numpy()
        m = momentum * m + (1 - dampening) * g
        u, fires = projected(g + momentum * m if nesterov else m, w, g)
        m = u if official and not nesterov else m
        fired.append(fires)
        w = w * (1 - lr * wd * (ratio if fires else 1) / (1 - momentum)) - lr * u
    return torch.as_tensor(w), fired


def at_right_angles(w, seed, to="rows"):
    """A gradient without a part along each row of w, or along w as a whole."""
    rows = w.reshape(len(w), -1) if to == "rows" else w.reshape(1, -1)
    g = random(*w.shape, seed=seed).reshape(rows.shape)
    return (g - rows * ((g * rows).sum(1) / (rows * rows).sum(1))[:, None]).reshape(w.shape)


def gradients_for(w, count=4):
    """At right angles to the rows, to the whole, to neither, in turn; near enough to fire as w moves on."""
    return [
        at_right_angles(w, 1),
        random(*w.shape, seed=2) + w,
        at_right_angles(w, 3, to="whole"),
        at_right_angles(w, 4),
    ][:count]


W, G = [[3.0, 4.0], [0.0, 2.0]], [[4.0, -3.0], [1.0, 0.0]]


def test_adamp_by_hand(path):
    w = nn.Parameter(doubles(W))
    found = stepped(AdamP([w], lr=0.1, weight_decay=0.5), w, doubles(G))
    close(found, doubles([[2.8730000004, 4.0639999998], [-0.0999999990, 1.99]]), atol=6e-11)
    close(found, adamp_by_numpy(doubles(W), [doubles(G)])[0])


def test_adamw_would_shrink_it_by_the_whole_decay():
    w = nn.Parameter(doubles(W))
    close(
        stepped(AdamP([w], lr=0.1, weight_decay=0.5, delta=0.0), w, doubles(G)),
        doubles([[2.75, 3.9], [-0.1, 1.9]]),
        atol=1e-8,
    )


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("shape", [(4, 6), (3, 2, 2, 2), (1, 5)])
def test_adamp_over_several_steps(path, shape, nesterov):
    start = random(*shape)
    gradients = gradients_for(start)
    expected, fired = adamp_by_numpy(start, gradients, lr=0.01, nesterov=nesterov)
    assert fired[:2] == [True, False]
    w = nn.Parameter(start.clone())
    close(stepped(AdamP([w], lr=0.01, weight_decay=0.5, nesterov=nesterov), w, *gradients), expected)


@pytest.mark.parametrize(
    "options",
    [{}, {"nesterov": True}, {"form": "official"}, {"form": "official", "nesterov": True}, {"dampening": 0.5}],
)
@pytest.mark.parametrize("shape", [(4, 6), (3, 2, 2, 2)])
def test_sgdp_over_several_steps(path, shape, options):
    start = random(*shape)
    gradients = gradients_for(start)
    w = nn.Parameter(start.clone())
    found = stepped(SGDP([w], lr=0.01, weight_decay=0.05, **options), w, *gradients)
    by_hand = {key: value for key, value in options.items() if key != "form"}
    official = options.get("form") == "official"
    expected, fired = sgdp_by_numpy(start, gradients, lr=0.01, wd=0.05, official=official, **by_hand)
    assert fired[:2] == [True, False]
    close(found, expected)


def test_the_paper_leaves_the_momentum_whole_and_the_authors_code_does_not():
    g = doubles(G) + 0.01 * doubles(W)
    for form, expected in (
        ("paper", g),
        ("official", torch.from_numpy(projected(g.numpy(), np.array(W), g.numpy())[0])),
    ):
        w = nn.Parameter(doubles(W))
        optimizer = SGDP([w], lr=0.1, form=form)
        stepped(optimizer, w, g)
        close(optimizer.state[w]["momentum"], expected)
        assert w.grad is not None
        assert torch.equal(w.grad, g)
    assert not torch.allclose(g, expected)


@pytest.mark.parametrize("to", ["rows", "whole"])
def test_a_projected_step_is_at_right_angles_to_the_weight(path, to):
    start = random(4, 6)
    gradient = at_right_angles(start, 1, to)
    w = nn.Parameter(start.clone())
    moved = stepped(AdamP([w], lr=0.1), w, gradient) - start
    along_rows = (moved * start).sum(1)
    if to == "rows":
        close(along_rows, torch.zeros(4).double(), atol=1e-7)
    else:
        close(along_rows.sum(), torch.zeros(()).double(), atol=1e-7)
        assert along_rows.abs().max() > 1e-3
    v = nn.Parameter(start.clone())
    assert ((stepped(torch.optim.Adam([v], lr=0.1), v, gradient) - start) * start).sum().abs() > 1e-3


def test_one_row_that_is_not_at_right_angles_keeps_all_rows_from_their_test(path):
    start = random(4, 6)
    gradient = at_right_angles(start, 1)
    gradient[2] += 10 * start[2]
    w, v = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    close(
        stepped(AdamP([w], lr=0.1, weight_decay=0.1), w, gradient),
        stepped(torch.optim.AdamW([v], lr=0.1, weight_decay=0.1), v, gradient),
    )


@pytest.mark.parametrize("shape", [(), (7,), (4, 6)])
def test_without_a_projection_they_are_adamw_and_sgd(path, shape):
    """Vectors are never projected; matrices are not where the threshold is 0."""
    delta = 0.0 if len(shape) > 1 else 0.1
    pairs = [
        (AdamP, {"weight_decay": 0.1}, torch.optim.AdamW, {"weight_decay": 0.1}),
        (SGDP, {"momentum": 0.8}, torch.optim.SGD, {"momentum": 0.8}),
        (SGDP, {"momentum": 0.8, "nesterov": True}, torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
    ]
    for ours, options, theirs, their_options in pairs:
        w, v = nn.Parameter(random(*shape)), nn.Parameter(random(*shape))
        gradients = [random(*shape, seed=seed) for seed in range(4)]
        found = stepped(ours([w], lr=0.1, delta=delta, **options), w, *gradients)
        close(found, stepped(theirs([v], lr=0.1, **their_options), v, *gradients))


def test_lists_may_mix_what_is_projected_and_what_is_not(path):
    shapes = [(4, 6), (5,), (0, 3), (3, 4), ()]
    starts = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    gradients = [at_right_angles(starts[0], 9), random(5), random(0, 3), random(3, 4) + starts[3], random()]
    together = [nn.Parameter(start.clone()) for start in starts]
    for p, gradient in zip(together, gradients, strict=True):
        p.grad = gradient.clone()
    AdamP(together, lr=0.1, weight_decay=0.5).step()
    for p, start, gradient in zip(together, starts, gradients, strict=True):
        if p.numel():
            close(p.detach(), adamp_by_numpy(start, [gradient])[0])


@pytest.mark.parametrize("kind", ["AdamP", "SGDP"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_agrees_with_pytorch_optimizer(kind, nesterov):
    module = pytest.importorskip("pytorch_optimizer")
    start = random(4, 6)
    w, v = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options = {"lr": 0.01, "weight_decay": 0.05, "nesterov": nesterov}
    ours = {"AdamP": AdamP, "SGDP": SGDP}[kind]([w], **options)
    peer = getattr(module, kind)([v], **options, **({"momentum": 0.9} if kind == "SGDP" else {}))
    for gradient in gradients_for(start):
        close(stepped(ours, w, gradient), stepped(peer, v, gradient), atol=1e-6)


def test_half_precision_is_tested_and_projected_in_single():
    w, u = random(64, 256).bfloat16(), random(64, 256, seed=1).bfloat16()
    u = u + 10 * w
    found = scale_invariant.invariances([w], [at_right_angles(w.double(), 2).bfloat16()], delta=0.1, eps=1e-8)
    assert found[0] is not None
    assert found[0].by_row
    result = scale_invariant.projected([u], [w], found, eps=1e-8)[0]
    assert result.dtype == torch.bfloat16
    left, taken = (result.double() * w).sum(1), (u.double() * w).sum(1)
    assert (left / taken).abs().max() < 1e-3  # a coefficient in bfloat16 alone would be wrong by 4e-3


def test_the_threshold_is_that_of_the_size_of_a_row_or_of_the_whole():
    """0.1 / sqrt(4) and 0.1 / sqrt(64); a gradient with one cosine for all rows has it as a whole too."""
    w = F.normalize(random(16, 4), dim=1)
    across = F.normalize(at_right_angles(w, 1), dim=1)
    signs = doubles([1.0, -1.0] * 8)[:, None]
    fires = {}
    for name, cosine in (("0.04", 0.04), ("0.06", 0.06), ("0.06 to and fro", 0.06 * signs)):
        g = cosine * w + (1 - cosine**2) ** 0.5 * across
        found = scale_invariant.invariances([w], [g], delta=0.1, eps=1e-8)[0]
        fires[name] = None if found is None else (bool(found.by_row), bool(found.whole))
    assert fires == {"0.04": (True, False), "0.06": None, "0.06 to and fro": (False, True)}


def test_weights_before_a_normalisation_keep_their_norm():
    """Their scale has no effect on the loss, yet Adam lengthens them; AdamP hardly does, and learns as well."""

    def run(kind):
        torch.manual_seed(0)
        w, head = nn.Parameter(torch.randn(16, 8) / 8**0.5), nn.Parameter(torch.randn(3, 16) / 4)
        x = torch.randn(64, 8)
        y = (x @ torch.randn(8, 3)).argmax(1)
        optimizer, start = kind([w, head], lr=0.03), w.detach().norm()
        for _ in range(150):
            optimizer.zero_grad()
            loss = F.cross_entropy(F.batch_norm(x @ w.t(), None, None, training=True).relu() @ head.t(), y)
            loss.backward()
            optimizer.step()
        return float(w.detach().norm() / start), float(loss.detach())

    (adam_norm, adam_loss), (adamp_norm, adamp_loss) = run(torch.optim.Adam), run(AdamP)
    assert adamp_norm < 1 + (adam_norm - 1) / 2
    assert adamp_loss < adam_loss + 0.05


@pytest.mark.parametrize(
    "options", [{"lr": -1}, {"eps": 0.0}, {"weight_decay": -1}, {"delta": -0.1}, {"wd_ratio": 1.5}]
)
@pytest.mark.parametrize("kind", [AdamP, SGDP])
def test_options_out_of_range(kind, options):
    with pytest.raises(ConfigurationError, match="out of range"):
        kind([nn.Parameter(random(2))], **options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(AdamP, {"betas": (1.0, 0.9)}), (SGDP, {"momentum": 1.0}), (SGDP, {"dampening": 2.0}), (SGDP, {"form": "code"})],
)
def test_own_options_out_of_range(kind, options):
    with pytest.raises(ConfigurationError):
        kind([nn.Parameter(random(2))], **options)
