"""Shapes, gradients, and what makes each model what it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lightrail.errors import ConfigurationError
from lightrail_starter.data.digits import Digits
from lightrail_starter.models.cnn import CNN
from lightrail_starter.models.gpt import GPT
from lightrail_starter.models.mlp import MLP
from lightrail_starter.models.resnet import ResNet
from lightrail_starter.models.rotary import Rotary

GPT_OPTIONS: Any = {"vocab_size": 17, "context": 12, "width": 16, "depth": 2, "heads": 2}


def tokens(batch=2, length=12):
    return torch.randint(17, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("model", "inputs", "shape"),
    [
        (lambda: MLP(64, 10), torch.randn(3, 1, 8, 8), (3, 10)),
        (lambda: MLP(5, 1, hidden=[]), torch.randn(3, 5), (3, 1)),
        (lambda: MLP(5, 2, hidden=[4, 3], activation="tanh", dropout=0.2), torch.randn(3, 5), (3, 2)),
        (lambda: CNN(1, 10), torch.randn(3, 1, 8, 8), (3, 10)),
        (lambda: CNN(3, 2, widths=[4, 8, 8], dropout=0.0), torch.randn(3, 3, 20, 9), (3, 2)),
        (lambda: ResNet(3, 7, depth=8, width=4), torch.randn(3, 3, 8, 8), (3, 7)),
        (lambda: ResNet(1, 7, depth=14, width=4), torch.randn(2, 1, 33, 17), (2, 7)),
        (lambda: GPT(**GPT_OPTIONS), tokens(), (2, 12, 17)),
        (lambda: GPT(**GPT_OPTIONS, mlp="gelu", tied=False, dropout=0.1), tokens(length=5), (2, 5, 17)),
    ],
)
def test_models_have_the_shapes_they_promise_and_every_parameter_learns(model, inputs, shape):
    torch.manual_seed(0)
    built = model()
    output = built(inputs)
    assert output.shape == shape
    output.square().sum().backward()
    for name, parameter in built.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: MLP(out_features=3), "in_features"),
        (lambda: MLP(in_features=3), "out_features"),
        (lambda: CNN(out_features=3), "in_channels"),
        (lambda: GPT(vocab_size=3), "context"),
        (lambda: MLP(3, 3, hidden=[0]), "hidden"),
        (lambda: MLP(3, 3, activation="rellu"), "activation"),  # type: ignore[arg-type]
        (lambda: MLP(3, 3, dropout=1.0), "dropout"),
        (lambda: ResNet(3, 3, depth=18), "depth"),
        (lambda: GPT(8, 8, width=10, heads=4), "width"),
        (lambda: GPT(8, 8, mlp="swish"), "mlp"),  # type: ignore[arg-type]
        (lambda: GPT(8, 4)(torch.zeros(1, 5, dtype=torch.long)), "context"),
    ],
)
def test_what_a_model_cannot_be_built_from_is_named(make, word):
    with pytest.raises(ConfigurationError) as caught:
        make()
    assert word in str(caught.value)


def test_resnet_is_the_identity_around_its_residuals():
    model = ResNet(1, 2, depth=8, width=4).eval()
    block = model.blocks[0]
    torch.nn.init.zeros_(block.residual[-1].weight)  # type: ignore[union-attr]
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(block(x), x)


def test_a_later_byte_changes_no_earlier_logits():
    torch.manual_seed(0)
    model = GPT(**GPT_OPTIONS).eval()
    first = tokens()
    for position in (3, 7, 11):
        second = first.clone()
        second[:, position] = (second[:, position] + 1) % 17
        with torch.no_grad():
            a, b = model(first), model(second)
        assert torch.allclose(a[:, :position], b[:, :position], atol=1e-6)
        assert (a[:, position:] - b[:, position:]).abs().amax(dim=(0, 2)).min() > 1e-5


def test_rotary_scores_depend_on_the_distance_only():
    rotary = Rotary(features=8, context=20)
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 8, generator=generator)
    q, k = rotary(query.expand(20, 8)), rotary(key.expand(20, 8))
    scores = q @ k.T
    for distance in range(-19, 20):
        diagonal = scores.diagonal(-distance)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), atol=1e-5)
    assert (scores[5] - scores[5, 5]).abs().max() > 0.1  # and on the distance they do depend
    assert torch.allclose(q.norm(dim=1), query.norm().expand(20), atol=1e-5)


def test_rotary_turns_by_hand_computed_angles():
    turned = Rotary(features=4, context=3)(torch.tensor([[1.0, 1.0, 0.0, 0.0]]).expand(3, 4))
    angle = torch.tensor([2.0, 2.0 / 100.0])  # position 2, frequencies 1 and 10000^(-2/4)
    assert torch.allclose(turned[2], torch.cat([angle.cos(), angle.sin()]))


def test_gpt_starts_near_the_uniform_distribution_with_small_residual_writes():
    torch.manual_seed(0)
    model = GPT(vocab_size=256, context=32, width=128, depth=4)
    text = torch.randint(256, (4, 32))
    with torch.no_grad():
        loss = F.cross_entropy(model(text).flatten(0, 1), text.roll(-1, 1).flatten())
    assert abs(float(loss) - 5.545) < 0.1
    deviations = {name: float(p.detach().std()) for name, p in model.named_parameters() if p.dim() == 2}
    for name, deviation in deviations.items():
        expected = 0.02 / 8**0.5 if name.endswith("write.weight") else 0.02
        assert abs(deviation / expected - 1) < 0.05, name


def test_a_tied_head_is_the_embedding():
    tied, untied = GPT(**GPT_OPTIONS), GPT(**GPT_OPTIONS, tied=False)
    assert tied.head.weight is tied.embedding.weight
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 17 * 16


def test_checkpoints_hold_no_rotary_tables():
    assert not [name for name in GPT(**GPT_OPTIONS).state_dict() if "rotary" in name]


def test_the_cnn_reads_digits_with_97_percent_in_a_plain_loop():
    torch.manual_seed(0)
    data, epochs = Digits(batch_size=64), 10
    model = CNN(in_channels=1, out_features=10)
    loader = data.train_dataloader()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        right = sum(int(model(x).argmax(1).eq(y).sum()) for x, y in data.test_dataloader())
    assert right / len(data.parts.test) >= 0.97
