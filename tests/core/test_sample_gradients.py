"""The gradients of samples from one backward pass are those of samples evaluated one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from lightrail.errors import CompositionError
from lightrail.sample_gradients import Recording, SampleGradients, gradients_one_by_one, learn, refuse_unseen
from lightrail.sample_gradients.paths import survey

# As many samples as there are tokens, positions and channels, so that no shape says which axis is which.
BATCH = 8

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:Using padding='same'")


class Over(nn.Module):
    """A function of a module's parameters and a batch."""

    def __init__(self, forward: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def vision_transformer() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.cat([m.token.expand(len(x), -1, -1), m.embed(x)], 1)
        x = (x + m.position[:, : x.shape[1]]) * m.scale
        x = x @ m.mix.t() + torch.einsum("btd,de->bte", x, m.mix)
        return m.head(F.relu(x, inplace=True)[:, 0] * torch.sigmoid(m.gate))

    parts = {"token": parameter(1, 1, 8), "position": parameter(1, 12, 8), "scale": parameter(8), "gate": parameter()}
    return Over(forward, **parts, mix=parameter(8, 8), embed=nn.Linear(8, 8), head=nn.Linear(8, 2))


def tied_language_model() -> nn.Module:
    def forward(m: Any, tokens: Tensor) -> Tensor:
        x = m.embed(tokens) + m.position(torch.arange(tokens.shape[1]))
        return F.linear(m.norm(m.mix(m.mix(x))), m.embed.weight)

    parts = {"embed": nn.Embedding(11, 6, padding_idx=0), "position": nn.Embedding(9, 6)}
    return Over(forward, **parts, mix=nn.Linear(6, 6), norm=nn.LayerNorm(6))


def time_first(module: nn.Module) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        found = m.inner(x.transpose(0, 1))
        return (found[0] if isinstance(found, tuple) else found).transpose(0, 1)

    return Over(forward, inner=module)


def recurrent(module: nn.Module) -> nn.Module:
    return Over(lambda m, x: m.head(m.inner(x)[0]), inner=module, head=nn.LazyLinear(2))


def encoder(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, **options)


VECTORS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(8, 3),
    "without_bias": lambda: nn.Sequential(nn.Linear(8, 5, bias=False), nn.Tanh(), nn.Linear(5, 1)),
    "layer_norm": lambda: nn.Sequential(nn.LayerNorm([8, 8]), nn.Linear(8, 5), nn.LayerNorm(5)),
    "rms_norm": lambda: nn.Sequential(nn.Linear(8, 5), nn.RMSNorm(5)),
    "conv1d": lambda: nn.Sequential(nn.Conv1d(8, 6, 3, padding=1), nn.ConvTranspose1d(6, 3, 2), nn.PReLU()),
    "transformer": lambda: encoder(batch_first=True),
    "transformer_time_first": lambda: time_first(encoder()),
    "lstm": lambda: recurrent(nn.LSTM(8, 5, batch_first=True)),
    "gru_both_ways": lambda: recurrent(nn.GRU(8, 5, num_layers=2, bidirectional=True, batch_first=True)),
    "rnn_time_first": lambda: time_first(nn.RNN(8, 5)),
    "bare_parameters": vision_transformer,
    "reparametrised": lambda: nn.Sequential(weight_norm(nn.Linear(8, 5)), nn.Tanh(), spectral_norm(nn.Linear(5, 3))),
    "applied_twice": lambda: Over(lambda m, x: m.inner(m.inner(x).tanh()), inner=nn.Linear(8, 8)),
    "penalised": lambda: Penalised(nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 2))),
    "flattened": lambda: Over(lambda m, x: m.inner(x.flatten(0, 1)).view(len(x), -1), inner=nn.Linear(8, 8)),
    "bilinear": lambda: Over(lambda m, x: m.inner(x, x), inner=nn.Bilinear(8, 8, 3)),
    "in_place": lambda: Over(lambda m, x: m.inner(x).add_(m.shift).mul_(m.scale), inner=nn.Linear(8, 8),
                             shift=parameter(8), scale=parameter(8)),
}  # fmt: skip

IMAGES: dict[str, Callable[[], nn.Module]] = {
    "conv2d": lambda: nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU(True), nn.Conv2d(6, 9, 3)
    ),
    "strides_groups": lambda: nn.Conv2d(4, 8, (2, 3), stride=2, padding=(1, 2), dilation=2, groups=2),
    "same_padding": lambda: nn.Sequential(nn.Conv2d(4, 3, (2, 3), padding="same"), nn.Conv2d(3, 2, 2, padding="same")),
    "reflected": lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"),
    "transposed": lambda: nn.Sequential(
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), nn.ConvTranspose2d(6, 2, 3, groups=2)
    ),
    "instance_norm": lambda: nn.Sequential(nn.Conv2d(4, 6, 1), nn.InstanceNorm2d(6, affine=True)),
    "wide_and_small": lambda: nn.Sequential(nn.Conv2d(4, 64, 3, stride=4), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)),
}
VOLUMES = {"conv3d": lambda: nn.Sequential(nn.Conv3d(2, 4, 3), nn.ConvTranspose3d(4, 2, 2))}


def square(module: nn.Module) -> Callable[[Tensor], Tensor]:
    penalty = module.penalty if isinstance(module, Penalised) else lambda: 0.0
    return lambda x: module(x).flatten(1).tanh().square().mean(1).mean() + penalty()


def next_token(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda tokens: F.cross_entropy(module(tokens).flatten(0, 1), tokens.flatten())


class Penalised(nn.Sequential):
    """A module with a penalty on its weights, which is part of every sample's loss."""

    def penalty(self) -> Tensor:
        return 0.1 * torch.stack([p.square().sum() for p in self.parameters()]).sum()


def cases() -> list[Any]:
    inputs = {"vectors": (VECTORS, (8, 8)), "images": (IMAGES, (4, 9, 9)), "volumes": (VOLUMES, (2, 5, 5, 5))}
    found = [
        pytest.param(make, (BATCH, *shape), square, id=name)
        for group, shape in inputs.values()
        for name, make in group.items()
    ]
    return [*found, pytest.param(tied_language_model, None, next_token, id="tied_embedding")]


def recorded(evaluate: Callable[[Any], Tensor], params: list[Any], path: Any, batch: Tensor) -> SampleGradients:
    recording = Recording(params, path)
    with recording:
        loss = evaluate(batch)
    loss.backward()
    pieces = recording.pieces()
    refuse_unseen(params)
    return SampleGradients(params, pieces, len(batch))


def prepared(make: Callable[[], nn.Module], shape: Any, loss: Any, dtype: torch.dtype) -> tuple[Any, Any, Tensor]:
    torch.manual_seed(0)
    batch = torch.randint(0, 11, (BATCH, BATCH)) if shape is None else torch.randn(shape)
    module = make()
    module(batch)  # lazy layers, and the first power iterations
    module = module.to(dtype)
    for each in module.modules():
        if isinstance(each, nn.Dropout):
            each.p = 0.0
        if isinstance(each, nn.MultiheadAttention):
            each.dropout = 0.0
        if type(each).__name__ == "_SpectralNorm":
            each.eval()
    return loss(module), [p for p in module.parameters() if p.requires_grad], batch.to(dtype) if shape else batch


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize(("make", "shape", "loss"), cases())
def test_one_pass_equals_one_by_one(
    make: Callable[[], nn.Module], shape: Any, loss: Any, dtype: torch.dtype, tolerance: float
) -> None:
    evaluate, params, batch = prepared(make, shape, loss, dtype)
    path, difference = learn(evaluate, params, batch)
    assert difference < tolerance
    together = recorded(evaluate, params, path, batch)
    alone = gradients_one_by_one(evaluate, params, batch)
    assert torch.allclose(together.norms().to(dtype), alone.norms().to(dtype), rtol=tolerance)
    scale = alone.norms_by_parameter().amax()
    assert torch.allclose(
        together.norms_by_parameter(), alone.norms_by_parameter(), rtol=10 * tolerance, atol=float(tolerance * scale)
    )
    weights = torch.linspace(-1, 2, BATCH, dtype=dtype)
    for mine, theirs, p in zip(together.weighted_sum(weights), alone.weighted_sum(weights), params, strict=True):
        assert mine.shape == p.shape
        assert (mine - theirs).norm() <= tolerance * max(theirs.norm(), 1e-2 * scale)
    for mine, theirs in zip(together.per_sample(), alone.per_sample(), strict=True):
        assert (mine - theirs).norm() <= tolerance * max(theirs.norm(), 1e-2 * scale)


def test_the_mean_of_the_samples_gradients_is_the_gradient() -> None:
    evaluate, params, batch = prepared(vision_transformer, (BATCH, 8, 8), square, torch.float64)
    path, _ = learn(evaluate, params, batch)
    found = recorded(evaluate, params, path, batch)
    plain = torch.autograd.grad(evaluate(batch), params)
    for mine, theirs in zip(found.sum(), plain, strict=True):
        assert torch.allclose(mine / BATCH, theirs, rtol=1e-10, atol=1e-14)


def test_an_axis_of_the_batch_s_own_length_is_not_taken_for_it() -> None:
    """Eight positions and eight samples: the table of positions is one parameter for all samples."""
    evaluate, params, batch = prepared(tied_language_model, None, next_token, torch.float64)
    path, _ = learn(evaluate, params, batch)
    position = 1
    mine = recorded(evaluate, params, path, batch).per_sample()[position]
    assert int((mine.flatten(2).norm(dim=2) > 0).sum(1).min()) == BATCH, "every sample reaches every position"


def test_random_numbers_and_dropout_do_not_disturb_the_proof() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def evaluate(x: Tensor) -> Tensor:
        level = torch.rand(len(x), 1)
        noise = torch.randn_like(x)
        return (module(x * (1 - level) + noise * level) - noise.sum(1, keepdim=True)).square().mean()

    params = list(module.parameters())
    assert learn(evaluate, params, torch.randn(5, 8))[1] < 1e-5


def test_a_frozen_parameter_and_one_without_use_are_left_alone() -> None:
    first, last, unused = nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(2, 2)
    first.requires_grad_(False)
    params = [*last.parameters(), *unused.parameters()]
    batch = torch.randn(5, 4)
    evaluate = square(nn.Sequential(first, nn.Tanh(), last))
    path, _ = learn(evaluate, params, batch)
    found = recorded(evaluate, params, path, batch).sum()
    assert found[2].count_nonzero() == 0
    assert found[2].shape == (2, 2)
    assert found[0].count_nonzero() == 4


# What cannot be told apart.


def contrastive(module: nn.Module) -> Callable[[Tensor], Tensor]:
    def loss(x: Tensor) -> Tensor:
        z = F.normalize(module(x), dim=1)
        return F.cross_entropy(z @ z.t() / 0.1, torch.arange(len(x)))

    return loss


def weighted_by_batch(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: F.cross_entropy(module(x), (x[:, 0] > 0).long(), weight=torch.tensor([1.0, 5.0]))


def uncertainty_weighted(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The mean loss times something of a parameter: what reaches that parameter depends on all samples."""
    return lambda x: module(x).square().mean() * torch.exp(-module.bias[0]) + module.bias[0]  # type: ignore[index]


@pytest.mark.parametrize("loss", [contrastive, weighted_by_batch, uncertainty_weighted])
def test_a_loss_that_mixes_samples_is_refused(loss: Any) -> None:
    torch.manual_seed(1)
    module = nn.Linear(4, 2)
    with pytest.raises(CompositionError) as caught:
        learn(loss(module), list(module.parameters()), torch.randn(6, 4))
    assert "depends on the other samples" in caught.value.what or "cannot be told apart" in caught.value.what


def test_batch_norm_in_training_is_refused() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    with pytest.raises(CompositionError, match="cannot be told apart") as caught:
        learn(square(module), list(module.parameters()), torch.randn(6, 4))
    assert "BatchNorm" in caught.value.found


def test_a_batch_norm_without_scale_is_refused_by_the_proof() -> None:
    torch.manual_seed(2)
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 1))
    params = list(module.parameters())
    with pytest.raises((CompositionError, ValueError)):
        learn(square(module), params, torch.randn(6, 4))


def test_a_sum_is_told_from_a_mean() -> None:
    module = nn.Linear(4, 1)
    params, batch = list(module.parameters()), torch.randn(6, 4)

    def evaluate(x: Tensor) -> Tensor:
        return module(x).square().sum()

    with pytest.raises(CompositionError, match="sum over the samples") as caught:
        learn(evaluate, params, batch)
    assert "privacy.loss=sum" in caught.value.remedy
    assert learn(evaluate, params, batch, is_mean=False)[1] < 1e-5


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_is_refused_rather_than_missed(use_reentrant: bool) -> None:
    inner, head = nn.Linear(4, 4), nn.Linear(4, 1)

    def evaluate(x: Tensor) -> Tensor:
        return head(checkpoint(lambda z: inner(z).tanh(), x, use_reentrant=use_reentrant)).square().mean()

    with pytest.raises(CompositionError) as caught:
        learn(evaluate, [*inner.parameters(), *head.parameters()], torch.randn(6, 4, requires_grad=True))
    assert "checkpointing" in caught.value.found


def test_dropout_inside_a_recurrent_network_is_refused() -> None:
    module = nn.LSTM(4, 3, num_layers=2, dropout=0.5, batch_first=True)
    with pytest.raises(CompositionError) as caught:
        learn(lambda x: module(x)[0].square().mean(), list(module.parameters()), torch.randn(6, 5, 4))
    assert "dropout inside lstm" in caught.value.found


def test_a_model_that_goes_another_way_with_more_samples_is_refused() -> None:
    first, second = nn.Linear(4, 1), nn.Linear(4, 1)
    params, batch = [*first.parameters(), *second.parameters()], torch.randn(12, 4)

    def evaluate(x: Tensor) -> Tensor:
        extra = second(x).square() if len(x) > 8 else 0.0
        return (first(x).square() + extra).mean()

    path, _ = learn(evaluate, params, batch)
    with pytest.raises(CompositionError, match="cannot be told apart"):
        recorded(evaluate, params, path, batch)


# Samples that are left out, and differences.


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e30])
def test_a_sample_whose_gradient_is_not_finite_is_left_out_of_everything(bad: float) -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1, bias=False))
    params, batch = list(module.parameters()), torch.randn(6, 4)

    def evaluate(pair: Tensor) -> Tensor:
        return (module(pair[:, :4]) * pair[:, 4:]).square().mean()

    good = torch.cat([batch, torch.ones(6, 1)], 1)
    spoilt = good.clone()
    spoilt[2, 4] = bad
    path, _ = learn(evaluate, params, good)
    with_bad, without = recorded(evaluate, params, path, spoilt), recorded(evaluate, params, path, good)
    assert with_bad.is_left_out.tolist() == [False, False, True, False, False, False]
    assert with_bad.norms()[2] == 0
    weights = torch.ones(6)
    weights[2] = 0
    for mine, theirs in zip(with_bad.sum(), without.weighted_sum(weights), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-7)


def test_close_gradients_are_subtracted_without_losing_their_difference() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    params, batch = list(module.parameters()), torch.randn(7, 4, 6)
    evaluate = square(module)
    path, _ = learn(evaluate, params, batch)
    here = recorded(evaluate, params, path, batch)
    exact_here = gradients_one_by_one(square(module.double()), params, batch.double())
    module.float()
    with torch.no_grad():
        for p in params:
            p.add_(1e-3 * torch.randn_like(p))
    there = recorded(evaluate, params, path, batch)
    exact_there = gradients_one_by_one(square(module.double()), params, batch.double())
    difference, exact = here.minus(there), exact_here.minus(exact_there)
    assert torch.allclose(difference.norms().double(), exact.norms().double(), rtol=1e-2)
    total = difference.weighted_sum(torch.ones(7))
    assert all(torch.allclose(a.double(), b, rtol=1e-2, atol=1e-6) for a, b in zip(total, exact.sum(), strict=True))


def test_a_norm_whose_terms_cancel_is_not_taken_for_small() -> None:
    """Two places whose shares are huge and opposite: rounding leaves more of them in the sum than in the norm."""
    torch.manual_seed(0)
    size = 1e5
    batch = torch.randn(4, 1, 6).mul(size).repeat(1, 2, 1)
    batch[:, 1] *= 1 + 1e-7
    layer = nn.Linear(6, 5, bias=False)
    weights, signs = torch.randn(5), torch.tensor([1.0, -1.0])[:, None]

    def evaluate(x: Tensor) -> Tensor:
        return (layer(x) * signs * weights * size).flatten(1).sum(1).mean()

    found = recorded(evaluate, [layer.weight], survey(evaluate, [layer.weight], batch), batch)
    for i in range(4):
        alone = found.weighted_sum(torch.eye(4)[i])[0]
        assert found.norms()[i] >= alone.norm() * (1 - 1e-6)
