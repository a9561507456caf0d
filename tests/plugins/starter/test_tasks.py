"""What tasks train on, measure, sample and draw."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import nn

from lightrail import Closure
from lightrail.errors import ClosureError, ConfigurationError
from lightrail_starter.data.digits import Digits
from lightrail_starter.data.table import Table
from lightrail_starter.data.text_files import TextFiles
from lightrail_starter.models.gpt import GPT
from lightrail_starter.models.mlp import MLP
from lightrail_starter.tasks.classification import Classification
from lightrail_starter.tasks.language_modeling import LanguageModeling
from lightrail_starter.tasks.regression import Regression

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def trained(task, data, epochs=1):
    torch.manual_seed(0)
    task.configure_optimizers = lambda: torch.optim.AdamW(task.parameters(), lr=1e-2)
    trainer = Trainer(
        max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(task, data)
    validated = {k: float(v) for k, v in trainer.callback_metrics.items()}
    return validated, trainer.test(task, data, verbose=False)[0]


def mean_square_of_sampled_gradients(task, batch, count, draws):
    """E[g ⊙ g] · B by Monte Carlo, and four standard errors of it."""
    generator = torch.Generator().manual_seed(1)
    params = list(task.parameters())
    squares = []
    for _ in range(draws):
        gradients = torch.autograd.grad(task.sampled_loss(batch, generator), params)
        squares.append(torch.cat([g.flatten() for g in gradients]).square() * count)
    stacked = torch.stack(squares)
    return stacked.mean(0), 4 * stacked.std(0) / draws**0.5


def jacobian_of_outputs(model, inputs):
    """``[samples, outputs, parameters]``."""
    outputs = model(inputs).flatten(1)
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()), retain_graph=True)])
        for value in outputs.flatten()
    ]
    return torch.stack(rows).view(*outputs.shape, -1), outputs.detach()


def gauss_newton_diagonal(jacobian, logits):
    p = logits.softmax(-1)
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("npi,npq,nqi->i", jacobian, hessian, jacobian) / len(logits)


def test_sampled_classification_estimates_the_gauss_newton_diagonal():
    torch.manual_seed(0)
    task = Classification(nn.Linear(3, 4))  # logistic regression: the Gauss-Newton matrix is the Hessian
    batch = (torch.randn(5, 3), torch.zeros(5, dtype=torch.long))
    found, error = mean_square_of_sampled_gradients(task, batch, count=5, draws=4000)
    expected = gauss_newton_diagonal(*jacobian_of_outputs(task.model, batch[0]))
    assert ((found - expected).abs() < error).all()
    assert (error < 0.25 * expected.abs().mean()).all()  # so that a wrong factor of two would be seen


def test_sampled_bytes_estimate_the_gauss_newton_diagonal():
    torch.manual_seed(0)
    task = LanguageModeling(nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 3)))
    batch = (torch.tensor([[0, 1, 2], [2, 2, 1]]), torch.zeros(2, 3, dtype=torch.long))
    found, error = mean_square_of_sampled_gradients(task, batch, count=6, draws=4000)
    outputs = task.model(batch[0]).flatten(0, 1)
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(v, list(task.model.parameters()), retain_graph=True)])
        for v in outputs.flatten()
    ]
    expected = gauss_newton_diagonal(torch.stack(rows).view(6, 3, -1), outputs.detach())
    assert ((found - expected).abs() < error).all()


@pytest.mark.parametrize("outputs", [1, 2])
def test_sampled_regression_estimates_the_mean_of_squared_jacobians(outputs):
    torch.manual_seed(0)
    task = Regression(nn.Linear(3, outputs))
    batch = (torch.randn(5, 3), torch.zeros(5) if outputs == 1 else torch.zeros(5, outputs))
    found, error = mean_square_of_sampled_gradients(task, batch, count=5, draws=4000)
    jacobian, _ = jacobian_of_outputs(task.model, batch[0])
    assert ((found - jacobian.square().sum(1).mean(0)).abs() < error).all()


def test_a_closure_takes_sampled_loss_and_repeats_it_under_a_seed():
    torch.manual_seed(0)
    task = Classification(MLP(4, 3, hidden=[5]))
    batch = (torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))
    closure = Closure(
        lambda b: task.training_step(b, 0)["loss"], list(task.parameters()), batch, sampled_loss_fn=task.sampled_loss
    )
    torch.manual_seed(3)
    first, second = closure.sampled(), closure.sampled()
    torch.manual_seed(3)
    again = closure.sampled()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_loss_that_is_no_likelihood_refuses_to_be_sampled():
    batch, generator = (torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)), torch.Generator()
    with pytest.raises(ClosureError, match="'focal'"):
        Classification(nn.Linear(3, 2), loss="focal").sampled_loss(batch, generator)
    with pytest.raises(ClosureError, match="smooth_l1"):
        Regression(nn.Linear(3, 1), loss="torch.nn.functional.smooth_l1_loss").sampled_loss(batch, generator)


def test_named_losses_are_what_they_say():
    logits, y = torch.tensor([[2.0, -1.0, 0.5], [0.0, 1.0, 0.0]]), torch.tensor([0, 2])
    model = nn.Identity()
    p = logits.softmax(-1)[[0, 1], y]

    def loss(**options):
        return Classification(model, **options).training_step((logits, y), 0)["loss"]

    assert torch.allclose(loss(), -p.log().mean())
    assert torch.allclose(loss(loss="focal"), (-((1 - p) ** 2) * p.log()).mean())
    assert torch.allclose(loss(loss="multi_margin"), F.multi_margin_loss(logits, y))
    assert torch.allclose(loss(label_smoothing=0.1), F.cross_entropy(logits, y, label_smoothing=0.1))
    assert torch.allclose(loss(loss="torch.nn.functional.cross_entropy"), -p.log().mean())
    assert torch.allclose(loss(loss="torch.nn.CrossEntropyLoss"), -p.log().mean())
    x, t = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0])
    assert Regression(model, loss="mse").training_step((x, t), 0)["loss"] == 5
    assert Regression(model, loss="l1").training_step((x, t), 0)["loss"] == 2
    assert Regression(model, loss="huber").training_step((x, t), 0)["loss"] == (0.5 + 2.5) / 2


@pytest.mark.parametrize("loss", ["cros_entropy", "torch.nn.functional.nothing", "no.such.module", "math.pi"])
def test_a_loss_that_does_not_exist_is_named(loss):
    with pytest.raises(ConfigurationError, match="there is no loss") as caught:
        Classification(nn.Identity(), loss=loss)
    assert "cross_entropy" in caught.value.allowed


def test_label_smoothing_goes_with_the_cross_entropy_only():
    with pytest.raises(ConfigurationError, match="label_smoothing"):
        Classification(nn.Identity(), loss="focal", label_smoothing=0.1)


def test_the_accuracy_of_a_training_step_is_the_share_of_right_answers():
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]], requires_grad=True)
    found = Classification(nn.Identity()).training_step((logits, torch.tensor([0, 1, 0, 0])), 0)
    assert found["accuracy"] == 0.75
    assert not found["accuracy"].requires_grad
    assert found["loss"].requires_grad


def test_classification_measures_and_draws():
    task, data = Classification(MLP(64, 10, hidden=[32])), Digits(batch_size=50)
    assert task.figures() == {}
    validated, tested = trained(task, data, epochs=3)
    assert set(validated) == {"val_loss", "val_accuracy"}
    assert task.monitor[0] in validated
    with torch.no_grad():
        images, labels = data.parts.test.tensors
        logits = task.eval()(images)
    # Batches differ in size: the mean over samples is not the mean over batches.
    assert math.isclose(tested["test_loss"], float(F.cross_entropy(logits, labels)), rel_tol=1e-5)
    assert math.isclose(tested["test_accuracy"], float(logits.argmax(1).eq(labels).float().mean()), rel_tol=1e-6)
    figures = task.figures()
    assert set(figures) == {"confusion_matrix", "predictions"}
    assert f"{tested['test_accuracy']:.2%}" in figures["confusion_matrix"].axes[0].get_title(loc="left")
    assert len([axes for axes in figures["predictions"].axes if axes.images]) == 36
    for figure in figures.values():
        figure.canvas.draw()


def test_a_table_of_classes_has_no_grid_of_pictures(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,b,kind\n" + "\n".join(f"{i % 7},{i % 5},{'no' if i % 7 < 4 else 'yes'}" for i in range(200)))
    data = Table(str(path), "kind", classes=True)
    sizes = data.dimensions()
    task = Classification(MLP(sizes["in_features"], sizes["out_features"], hidden=[8]))
    trained(task, data, epochs=2)
    figures = task.figures()
    assert set(figures) == {"confusion_matrix"}
    assert [t.get_text() for t in figures["confusion_matrix"].axes[0].get_xticklabels()] == ["no", "yes"]


def test_not_a_number_in_one_batch_of_validation_is_not_hidden():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 10)

        def forward(self, x):
            return self.linear(x.flatten(1)) * (torch.nan if len(x) == 69 else 1.0)

    validated, _ = trained(Classification(Broken()), Digits(batch_size=200))
    assert math.isnan(validated["val_loss"])


def test_regression_measures_in_the_units_of_the_file_and_draws(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,b,price\n" + "\n".join(f"{i % 17},{i % 5},{1000 + 30 * (i % 17)}" for i in range(300)))
    data = Table(str(path), "price", batch_size=20)
    task = Regression(MLP(2, 1, hidden=[16]))
    validated, tested = trained(task, data, epochs=5)
    assert set(validated) == {"val_loss", "val_mae", "val_r2"}
    with torch.no_grad():
        x, y = data.parts.test.tensors
        prediction = task.eval()(x)[:, 0]
    error = (data.original_units(prediction) - data.original_units(y)).abs().mean()
    assert math.isclose(tested["test_mae"], float(error), rel_tol=1e-3)
    assert math.isclose(tested["test_loss"], float(F.mse_loss(prediction, y)), rel_tol=1e-4)
    explained = 1 - (prediction - y).square().sum() / (y - y.mean()).square().sum()
    assert math.isclose(tested["test_r2"], float(explained), rel_tol=1e-4)
    (figure,) = task.figures().values()
    assert figure.axes[0].get_xlabel() == "true price"
    assert 900 < figure.axes[0].get_xlim()[0] < figure.axes[0].get_xlim()[1] < 1700
    figure.canvas.draw()


def test_one_output_and_flat_targets_do_not_broadcast():
    prediction, target = torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 4.0])
    assert Regression(nn.Identity()).training_step((prediction, target), 0)["loss"] == 2


def test_language_modelling_measures_writes_and_draws(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefgh\n" * 400)
    data = TextFiles(str(tmp_path), context=16, batch_size=10)
    task = LanguageModeling(GPT(256, 16, width=16, depth=1, heads=2), sample_length=20, temperature=0.0)
    validated, tested = trained(task, data, epochs=8)
    assert set(validated) == {"val_loss", "val_accuracy", "val_bits_per_byte", "val_perplexity"}
    assert math.isclose(tested["test_bits_per_byte"], tested["test_loss"] / math.log(2), rel_tol=1e-5)
    assert math.isclose(tested["test_perplexity"], math.exp(tested["test_loss"]), rel_tol=1e-5)
    with torch.no_grad():
        x, y = data.parts.test.__getitems__(range(len(data.parts.test)))
        expected = F.cross_entropy(task.eval()(x).flatten(0, 1), y.flatten())
    assert math.isclose(tested["test_loss"], float(expected), rel_tol=1e-5)
    assert tested["test_accuracy"] > 0.9
    prompt = torch.tensor([list(b"fgh\nabcdefgh\nabc")])
    state = torch.get_rng_state()
    written = task.continue_text(prompt, 6, torch.Generator().manual_seed(0))
    assert bytes(written[0].tolist()) == b"defgh\n"
    assert torch.equal(state, torch.get_rng_state())
    figures = task.figures()
    assert set(figures) == {"loss_by_position", "continuations"}
    for figure in figures.values():
        figure.canvas.draw()


def test_steps_return_what_added_metrics_need():
    for task, batch, shape in (
        (Classification(nn.Linear(3, 4)), (torch.randn(2, 3), torch.tensor([0, 3])), (2, 4)),
        (Regression(nn.Linear(3, 1)), (torch.randn(2, 3), torch.randn(2)), (2,)),
        (LanguageModeling(nn.Embedding(5, 5)), (torch.zeros(2, 3).long(), torch.zeros(2, 3).long()), (2, 3, 5)),
    ):
        task.log = lambda *args, **kwargs: None
        found = task.validation_step(batch, 0)
        assert found["prediction"].shape == shape
        assert torch.equal(found["target"], batch[1])
