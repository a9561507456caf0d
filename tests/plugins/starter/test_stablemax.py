"""StableMax: its numbers, its derivatives, and what the tasks make of it."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import nn

from lightrail import Closure
from lightrail.errors import ConfigurationError
from lightrail_starter.data.digits import Digits
from lightrail_starter.models.mlp import MLP
from lightrail_starter.tasks.classification import Classification
from lightrail_starter.tasks.language_modeling import LanguageModeling
from lightrail_starter.tasks.stablemax import log_stablemax, stablemax, stablemax_cross_entropy

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def by_definition(z):
    """s(z) / Σ s(z), entry by entry."""
    rows = [[v + 1 if v >= 0 else 1 / (1 - v) for v in row] for row in z.tolist()]
    s = torch.tensor(rows, dtype=torch.float64)
    return s / s.sum(1, keepdim=True)


# The numbers.


def test_three_logits():
    z = torch.tensor([2.0, 0.0, -3.0])
    expected = torch.tensor([3.0, 1.0, 0.25], dtype=torch.float64) / 4.25
    torch.testing.assert_close(stablemax(z), expected, rtol=0, atol=1e-12)
    assert [round(p, 6) for p in expected.tolist()] == [0.705882, 0.235294, 0.058824]
    loss = stablemax_cross_entropy(z[None].double(), torch.tensor([0]))
    assert loss.item() == pytest.approx(math.log(4.25 / 3), abs=1e-12)
    assert loss.item() == pytest.approx(0.3483066943, abs=1e-9)


def test_it_is_the_definition_whichever_the_axis():
    torch.manual_seed(0)
    z = 10 * torch.randn(6, 5)
    expected = by_definition(z)
    torch.testing.assert_close(stablemax(z), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(stablemax(z.t(), dim=0).t(), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(log_stablemax(z), expected.log(), rtol=0, atol=1e-12)


def test_a_constant_added_to_all_logits_matters():
    z = torch.tensor([2.0, 0.0, -3.0])
    assert (stablemax(z + 1) - stablemax(z)).abs().max() > 0.05
    assert torch.allclose((z + 1).softmax(-1), z.softmax(-1))


def test_derivatives_are_exact_at_the_joint_and_at_the_poles_of_the_branch_not_taken():
    # 1 / (1 - z) has a pole at 1, and log(1 + z) one at -1.
    z = torch.tensor([[0.0, 1.0, -1.0, 3.0, -2.0, 1e6, -1e6]], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([1])
    (gradient,) = torch.autograd.grad(stablemax_cross_entropy(z, y), z)
    # d log s / dz = 1 / (1 + |z|) on either side, at 0 too.
    expected = (stablemax(z.detach()) - F.one_hot(y, 7)) / (1 + z.detach().abs())
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)
    smooth = torch.tensor([[0.5, -0.5, 2.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda t: stablemax_cross_entropy(t, torch.tensor([2])), smooth)


def test_single_precision_does_not_collapse():
    z, y = torch.tensor([[200.0, 0.0]], requires_grad=True), torch.tensor([0])
    (softmax_gradient,) = torch.autograd.grad(F.cross_entropy(z, y), z)
    assert not softmax_gradient.any()
    large = torch.tensor([[1e9, 0.0]], requires_grad=True)
    loss = stablemax_cross_entropy(large, y)
    (gradient,) = torch.autograd.grad(loss, large)
    assert loss.dtype == gradient.dtype == torch.float32
    # In single precision s / Σ s would be 1, and its logarithm 0.
    assert loss.item() == pytest.approx(math.log1p(1 / (1e9 + 1)), rel=1e-6)
    assert gradient[0, 1].item() == pytest.approx(1 / (1e9 + 2), rel=1e-6)


def test_autocast_leaves_the_double_precision_alone():
    large, y = torch.tensor([[1e9, 0.0]]), torch.tensor([0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert stablemax_cross_entropy(large, y).item() == pytest.approx(1e-9, rel=1e-6)
    assert stablemax_cross_entropy(torch.ones(2, 3).bfloat16(), torch.tensor([0, 1])).dtype == torch.float32
    assert stablemax_cross_entropy(torch.ones(2, 3).double(), torch.tensor([0, 1])).dtype == torch.float64


def test_reductions_and_shapes_are_those_of_the_cross_entropy():
    torch.manual_seed(0)
    z, y = torch.randn(4, 3, 5), torch.randint(3, (4, 5))
    y[0, 0] = -100
    for reduction in ("mean", "sum", "none"):
        found = stablemax_cross_entropy(z, y, reduction=reduction)
        # The cross entropy of logits log s(z) is the same thing.
        torch.testing.assert_close(found, F.cross_entropy(log_stablemax(z, 1), y, reduction=reduction).float())
    alone = stablemax_cross_entropy(z[0, :, 1], y[0, 1])
    torch.testing.assert_close(alone, stablemax_cross_entropy(z, y, reduction="none")[0, 1])
    with pytest.raises(ValueError, match="reduction"):
        stablemax_cross_entropy(z, y, reduction="median")


# Classification.


def test_a_task_of_classification_takes_it_throughout():
    torch.manual_seed(0)
    task, batch = Classification(nn.Linear(4, 3), loss="stablemax"), (torch.randn(6, 4), torch.randint(3, (6,)))
    task.log = lambda *args, **kwargs: None
    logits = task(batch[0])
    p = by_definition(logits)
    losses = -p[range(6), batch[1]].log().float()
    torch.testing.assert_close(task.training_step(batch, 0)["loss"], losses.mean())
    torch.testing.assert_close(task.sample_losses(batch), losses)
    torch.testing.assert_close(task.output_loss(task.outputs(batch), batch), losses.mean())
    torch.testing.assert_close(task.validation_step(batch, 0)["prediction"], p.float())
    with pytest.raises(ConfigurationError, match="label_smoothing"):
        Classification(nn.Linear(4, 3), loss="stablemax", label_smoothing=0.1)


def fisher_diagonal(task, batch):
    """Σ_y p(y) (d log p(y))², averaged over samples: by enumeration."""
    p = by_definition(task.outputs(batch).flatten(0, -2))
    params = list(task.parameters())
    total = torch.zeros(())
    for sample, row in enumerate(p):
        for y, weight in enumerate(row):
            log_p = log_stablemax(task.outputs(batch).flatten(0, -2)[sample])[y]
            g = torch.cat([g.flatten() for g in torch.autograd.grad(log_p, params)])
            total = total + weight.item() * g.square() / len(p)
    return total


@pytest.mark.parametrize(
    ("make", "batch"),
    [
        (lambda: Classification(nn.Linear(3, 4), loss="stablemax"), (torch.linspace(-2, 2, 15).view(5, 3), None)),
        (
            lambda: LanguageModeling(nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 3)), loss="stablemax"),
            (torch.tensor([[0, 1, 2], [2, 2, 1]]), None),
        ),
    ],
)
def test_sampled_labels_estimate_the_fisher_matrix_of_its_own_likelihood(make, batch):
    torch.manual_seed(0)
    task = make()
    with torch.no_grad():  # large logits, for which the softmax's probabilities would be others
        for p in task.parameters():
            p.mul_(3)
    generator = torch.Generator().manual_seed(1)
    count, draws, squares = task.outputs(batch).flatten(0, -2).shape[0], 3000, []
    for _ in range(draws):
        gradients = torch.autograd.grad(task.sampled_loss(batch, generator), list(task.parameters()))
        squares.append(torch.cat([g.flatten() for g in gradients]).square() * count)
    stacked = torch.stack(squares)
    error = 4 * stacked.std(0) / draws**0.5
    expected = fisher_diagonal(task, batch)
    assert ((stacked.mean(0) - expected).abs() <= error + 1e-7).all()
    assert error.mean() < 0.15 * expected.mean()


def test_digits_are_learned_under_it():
    torch.manual_seed(0)
    task = Classification(MLP(64, 10, hidden=[32]), loss="stablemax")
    task.configure_optimizers = lambda: torch.optim.AdamW(task.parameters(), lr=1e-2)
    trainer = Trainer(
        max_epochs=3, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(task, Digits(batch_size=50))
    assert trainer.callback_metrics["val_accuracy"] > 0.85


def test_a_closure_asks_for_the_loss_of_each_sample():
    torch.manual_seed(0)
    task, batch = Classification(nn.Linear(4, 3), loss="stablemax"), (torch.randn(6, 4), torch.randint(3, (6,)))
    closure = Closure(
        lambda b: task.training_step(b, 0)["loss"], list(task.parameters()), batch, sample_losses_fn=task.sample_losses
    )
    torch.testing.assert_close(closure.sample_losses().mean(), closure.loss())


# Language modelling.


def test_a_language_model_takes_it_throughout():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    task = LanguageModeling(model, loss="stablemax")
    task.log = lambda *args, **kwargs: None
    batch = (torch.randint(5, (2, 3)), torch.randint(5, (2, 3)))
    p = by_definition(model(batch[0]).flatten(0, 1))
    losses = -p[range(6), batch[1].flatten()].log().float().view(2, 3)
    torch.testing.assert_close(task.training_step(batch, 0)["loss"], losses.mean())
    torch.testing.assert_close(task.sample_losses(batch), losses.mean(1))
    torch.testing.assert_close(task.output_loss(task.outputs(batch), batch), losses.mean())
    found = task.validation_step(batch, 0)
    # What is predicted are logits, whose softmax a metric such as perplexity takes.
    torch.testing.assert_close(found["prediction"].softmax(-1).flatten(0, 1), p.float())
    measured: Any = task.metrics["val_loss"]
    torch.testing.assert_close(measured.compute(), losses.mean())


def test_text_is_written_from_its_probabilities():
    logits = torch.tensor([40.0, 38.0, 0.0])
    model = nn.Embedding(3, 3)
    with torch.no_grad():
        model.weight.copy_(logits.expand(3, 3))
    prompts = torch.zeros(3000, 1, dtype=torch.long)

    def shares(loss, temperature):
        task = LanguageModeling(model, temperature=temperature, loss=loss)
        written = task.continue_text(prompts, 1, torch.Generator().manual_seed(0))
        return written.flatten().bincount(minlength=3) / len(prompts)

    torch.testing.assert_close(shares("cross_entropy", 1.0), logits.softmax(0), rtol=0, atol=0.03)
    torch.testing.assert_close(shares("stablemax", 1.0), stablemax(logits).float(), rtol=0, atol=0.03)
    sharp = stablemax(logits).square()
    torch.testing.assert_close(shares("stablemax", 0.5), (sharp / sharp.sum()).float(), rtol=0, atol=0.03)
    assert shares("stablemax", 0.0).tolist() == [1.0, 0.0, 0.0]


def test_a_language_model_knows_no_other_loss():
    with pytest.raises(ConfigurationError, match="focal") as caught:
        LanguageModeling(nn.Identity(), loss="focal")
    assert caught.value.allowed == "cross_entropy, stablemax"
