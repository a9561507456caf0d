"""Lion by hand, Muon as its two parts, L-BFGS as torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightrail import Closure
from lightrail.errors import ClosureError, ConfigurationError
from lightrail_optimizers import LBFGS, Lion, Muon


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


# Lion.


def test_lion_by_hand():
    w = nn.Parameter(doubles(1.0, -2.0))
    optimizer = Lion([w], lr=0.1, betas=(0.9, 0.5), weight_decay=0.1)
    w.grad = doubles(0.5, -1.0)
    optimizer.step()
    torch.testing.assert_close(w.detach(), doubles(0.89, -1.88), rtol=0, atol=1e-12)
    torch.testing.assert_close(optimizer.state[w]["momentum"], doubles(0.25, -0.5), rtol=0, atol=1e-12)
    # 0.9 m + 0.1 g is (0.025, -0.2): the momentum outweighs the first gradient, which points the other way.
    w.grad = doubles(-2.0, 2.5)
    optimizer.step()
    torch.testing.assert_close(w.detach(), doubles(0.7811, -1.7612), rtol=0, atol=1e-12)
    torch.testing.assert_close(optimizer.state[w]["momentum"], doubles(-0.875, 1.0), rtol=0, atol=1e-12)


def test_lion_agrees_with_pytorch_optimizer():
    module = pytest.importorskip("pytorch_optimizer")
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
    v = nn.Parameter(w.detach().clone())
    ours, theirs = Lion([w], lr=0.01, weight_decay=0.1), module.Lion([v], lr=0.01, weight_decay=0.1)
    for _ in range(6):
        w.grad = torch.randn_like(w)
        v.grad = w.grad.clone()
        ours.step()
        theirs.step()
        torch.testing.assert_close(w, v, rtol=0, atol=1e-12)


# Muon.


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(5, 4)
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.hidden = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.lm_head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.embedding(x)
        x = self.conv(x[None, None]).mean(1)[0]
        return self.lm_head(self.norm(torch.tanh(self.hidden(x))))


BATCH = (torch.arange(5), torch.tensor([1, 2, 3, 4, 0]))


def loss_of(model):
    return lambda: F.cross_entropy(model(BATCH[0]), BATCH[1])


def test_muon_is_its_two_parts():
    ours, theirs = Network(), Network()
    optimizer = Muon(
        ours.named_parameters(),
        lr=0.05,
        weight_decay=0.1,
        adamw_lr=0.01,
        adamw_betas=(0.8, 0.9),
        adamw_weight_decay=0.2,
    )
    rest = [p for name, p in theirs.named_parameters() if name != "hidden.weight"]
    parts = [
        torch.optim.Muon([theirs.hidden.weight], lr=0.05, weight_decay=0.1, momentum=0.95),
        torch.optim.AdamW(rest, lr=0.01, betas=(0.8, 0.9), weight_decay=0.2),
    ]
    for _ in range(4):
        optimizer.step(Closure(loss_of(ours), list(ours.parameters())))
        theirs.zero_grad()
        loss_of(theirs)().backward()
        for part in parts:
            part.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def names_by_part(model, **options):
    optimizer = Muon(model.named_parameters(), **options)
    names = {p: name for name, p in model.named_parameters()}
    return [[names[p] for g in part.param_groups for p in g["params"]] for part in optimizer.optimizers]


def test_muon_takes_hidden_matrices_only():
    matrices, rest = names_by_part(Network())
    assert matrices == ["hidden.weight"]
    assert {"conv.weight", "embedding.weight", "lm_head.weight", "hidden.bias"} < set(rest)
    assert names_by_part(Network(), adamw_names=["lm_head"])[0] == ["embedding.weight", "hidden.weight"]
    sequential = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    assert names_by_part(sequential)[0] == ["0.weight", "2.weight"]
    assert names_by_part(sequential, adamw_names=["2"])[0] == ["0.weight"]
    assert len(names_by_part(nn.Sequential(nn.Linear(4, 4, bias=False)))) == 1


def test_muon_groups_and_later_groups():
    model = Network()
    pairs = list(model.named_parameters())
    optimizer = Muon([{"params": pairs[:4], "lr": 0.5, "adamw_lr": 0.25}, {"params": pairs[4:6]}], lr=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25, 3e-4]
    optimizer.add_param_group({"params": [*pairs[6:], ("extra.weight", nn.Parameter(torch.zeros(2, 2)))]})
    assert [len(part.param_groups) for part in optimizer.optimizers] == [2, 3]
    assert len(optimizer.params) == len(pairs) + 1
    optimizer.step(Closure(loss_of(model), optimizer.params))


def test_muon_resumes(tmp_path):
    def run(model, optimizer, steps):
        for _ in range(steps):
            optimizer.step(Closure(loss_of(model), list(model.parameters())))

    whole, first, second = Network(), Network(), Network()
    run(whole, Muon(whole.named_parameters()), 5)
    optimizer = Muon(first.named_parameters())
    run(first, optimizer, 2)
    torch.save([first.state_dict(), optimizer.state_dict()], tmp_path / "state")
    model_state, optimizer_state = torch.load(tmp_path / "state", weights_only=True)
    second.load_state_dict(model_state)
    resumed = Muon(second.named_parameters())
    resumed.load_state_dict(optimizer_state)
    run(second, resumed, 3)
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_muon_refuses_what_it_cannot_use(monkeypatch):
    with pytest.raises(ConfigurationError, match="named parameters") as error:
        Muon(Network().parameters())
    assert "named_parameters" in error.value.remedy
    with pytest.raises(ConfigurationError, match="no hidden matrix"):
        Muon(nn.Sequential(nn.Conv2d(1, 1, 3)).named_parameters())
    refused: list[dict[str, Any]] = [{"lr": -1.0}, {"momentum": 1.0}, {"ns_steps": 0}, {"adamw_betas": (0.9, 1.0)}]
    for options in refused:
        with pytest.raises(ConfigurationError):
            Muon(Network().named_parameters(), **options)
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(Exception, match="no Muon"):
        Muon(Network().named_parameters())


# L-BFGS.


def test_lbfgs_is_torchs_and_takes_our_closure():
    curvature = doubles(1.0, 10.0, 100.0)
    w, v = nn.Parameter(doubles(1.0, 1.0, 1.0)), nn.Parameter(doubles(1.0, 1.0, 1.0))
    ours, theirs = LBFGS([w], max_iter=5), torch.optim.LBFGS([v], max_iter=5)

    def closure():
        theirs.zero_grad()
        loss = (curvature * v**2).sum() / 2
        loss.backward()
        return loss

    for _ in range(3):
        ours.step(Closure(lambda: (curvature * w**2).sum() / 2, [w]))
        theirs.step(closure)
        assert torch.equal(w, v)


def test_lbfgs_needs_a_closure():
    with pytest.raises(ClosureError, match="LBFGS"):
        LBFGS([nn.Parameter(torch.zeros(1))]).step()
