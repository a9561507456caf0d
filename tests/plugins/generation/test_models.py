"""The networks of generative tasks: what they take and give, what they listen to, and sizes that they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from lightrail.errors import ConfigurationError
from lightrail.testing import ModelSuite
from lightrail.testing.suite import examine, name_of
from lightrail_generation.models.conditioning import Conditioning, time_features
from lightrail_generation.models.dit import DiT
from lightrail_generation.models.point_mlp import PointMLP
from lightrail_generation.models.unet import UNet


def moved(model: nn.Module) -> Any:
    """A model off its initialisation, where it is 0 whatever it is told."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


def networks(num_classes: int | None = 3) -> list[tuple[nn.Module, torch.Tensor]]:
    torch.manual_seed(0)
    images, points = torch.randn(4, 2, 8, 8), torch.randn(4, 5)
    return [
        (moved(UNet(2, 8, num_classes, width=8)), images),
        (moved(DiT(2, 8, num_classes, width=16, depth=2)), images),
        (moved(PointMLP(5, num_classes, width=16)), points),
        (moved(PointMLP(128, num_classes, width=16)), images),
    ]


TIMES = torch.tensor([-1.5, 0.0, 0.4, 1.0])
LABELS = torch.tensor([0, 1, 2, 3])


def test_a_network_gives_back_what_it_takes_for_times_of_either_sign():
    for network, x in networks():
        found = network(x, TIMES, LABELS)
        assert found.shape == x.shape
        assert found.isfinite().all()


def test_a_label_beyond_the_classes_is_no_label():
    for network, x in networks():
        none = network(x, TIMES, None)
        assert torch.equal(none, network(x, TIMES, torch.full((4,), 3)))
        assert (none - network(x, TIMES, LABELS)).flatten(1).abs().amax(1)[:3].min() > 1e-4
        assert network.num_classes == 3


def test_a_network_without_classes_does_not_look_at_labels():
    for open_or_none in (0, None):
        for network, x in networks(open_or_none):
            assert network.num_classes == 0
            assert torch.equal(network(x, TIMES), network(x, TIMES, LABELS))
            assert not any("label" in name for name, _ in network.named_parameters())


def test_the_time_is_heard():
    for network, x in networks():
        at_once = network(x[:1].repeat_interleave(4, 0), TIMES, LABELS[:1].repeat(4))
        assert all((at_once[0] - other).abs().max() > 1e-4 for other in at_once[1:])


def test_networks_start_at_zero():
    torch.manual_seed(0)
    for network in (UNet(1, 8, 0, width=8), DiT(1, 8, 0, width=16, depth=2)):
        assert (network(torch.randn(2, 1, 8, 8), torch.rand(2)) == 0).all()
    assert (PointMLP(2, 0, width=16)(torch.randn(2, 2), torch.rand(2)) == 0).all()


def test_the_blocks_of_a_dit_start_as_the_identity_and_can_be_called_one_by_one():
    torch.manual_seed(0)
    model = DiT(1, 8, 3, width=16, depth=3)
    tokens, condition = torch.randn(2, 16, 16), torch.randn(2, 16)
    assert len(model.blocks) == 3
    for block in model.blocks:
        assert torch.equal(block(tokens, condition), tokens)
    assert not torch.equal(moved(model).blocks[1](tokens, condition), tokens)


def test_a_dit_knows_where_a_patch_is():
    model = moved(DiT(1, 8, 0, width=16, depth=1))
    x = torch.randn(1, 1, 8, 8)
    rolled = torch.roll(model(x, torch.zeros(1)), 2, dims=-1)
    assert (model(torch.roll(x, 2, dims=-1), torch.zeros(1)) - rolled).abs().max() > 1e-3


def test_a_dit_puts_patches_back_where_they_were():
    """With blocks and modulation at 0 each patch depends on itself alone."""
    torch.manual_seed(0)
    model = DiT(2, 8, 0, width=16, depth=1).eval()
    nn.init.normal_(model.leave.weight)
    x = torch.randn(1, 2, 8, 8)
    other = x.clone()
    other[..., 2:4, 6:8] += 1
    changed = (model(x, torch.zeros(1)) != model(other, torch.zeros(1))).any(1)[0]
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[2:4, 6:8] = True
    assert torch.equal(changed, expected)


def test_time_features_are_the_published_ones():
    time = torch.tensor([0.3, -0.5])
    found = time_features(time, 6)
    for k in range(3):
        omega = 1000 * 10000 ** (-k / 3)
        for row, t in enumerate(time.tolist()):
            assert math.isclose(float(found[row, k]), math.cos(omega * t), abs_tol=1e-4)
            assert math.isclose(float(found[row, 3 + k]), math.sin(omega * t), abs_tol=1e-4)


def test_conditioning_follows_the_type_of_its_weights():
    conditioning = Conditioning(8, 2).to(torch.bfloat16)
    assert conditioning(torch.rand(3), None).dtype == torch.bfloat16


def test_networks_work_in_half_precision():
    for network, x in networks():
        found = network.to(torch.bfloat16)(x.to(torch.bfloat16), TIMES, LABELS)
        assert found.dtype == torch.bfloat16
        assert found.isfinite().all()


@pytest.mark.parametrize(("side", "levels"), [(4, 1), (8, 2), (16, 3), (28, 3), (32, 4), (64, 4), (7, 1)])
def test_a_unet_halves_the_image_down_to_four_pixels_in_four_levels_at_most(side: int, levels: int):
    model: Any = UNet(1, side, 0, width=2)
    assert len(model.down) == levels
    assert [level.blocks[0].second.out_channels for level in model.down] == [2, 4, 8, 8][:levels]
    assert model(torch.randn(1, 1, side, side), torch.rand(1)).shape == (1, 1, side, side)


def test_a_unet_attends_only_where_the_image_is_small():
    def attending(attention: int) -> list[bool]:
        model: Any = UNet(1, 16, 0, width=4, attention=attention)
        return [hasattr(level.blocks[0].attention, "heads") for level in (*model.down, *model.up)]

    assert attending(8) == [False, True, True, True, True, False]
    assert attending(4) == [False, False, True, True, False, False]
    assert not any(attending(0))


def test_a_unet_uses_every_skip_connection():
    model = moved(UNet(1, 16, 0, width=4, depth=2))
    heard = []
    for level in model.up:
        for block in level.blocks:
            block.first.register_forward_hook(lambda _, given, __: heard.append(given[0].shape[1]))
    model(torch.randn(1, 1, 16, 16), torch.rand(1))
    # What comes from below, joined with as many channels from the twin.
    assert heard == [16 + 16, 16 + 16, 16 + 8, 8 + 8, 8 + 4, 4 + 4]


def test_dropout_is_for_training_only():
    for make in (
        lambda: UNet(1, 8, 0, width=8, dropout=0.5),
        lambda: DiT(1, 8, 0, width=16, depth=1, dropout=0.5),
        lambda: PointMLP(64, 0, width=16, dropout=0.5),
    ):
        model, x, time = moved(make()), torch.randn(2, 1, 8, 8), torch.rand(2)
        assert torch.equal(model(x, time), model(x, time))
        model.train()
        assert not torch.equal(model(x, time), model(x, time))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: UNet(image_size=8), "in_channels"),
        (lambda: UNet(1), "image_size"),
        (lambda: UNet(1, 6, levels=3), "image_size"),
        (lambda: UNet(1, 8, width=9), "width"),
        (lambda: UNet(1, 8, -1), "num_classes"),
        (lambda: UNet(1, 8, depth=0), "depth"),
        (lambda: UNet(1, 8, attention=-1), "attention"),
        (lambda: UNet(1, 8, dropout=1.0), "dropout"),
        (lambda: DiT(1, 9), "image_size"),
        (lambda: DiT(1, 8, width=18), "width"),
        (lambda: DiT(1, 8, width=16, heads=3), "width"),
        (lambda: DiT(1, 8, patch=0), "patch"),
        (lambda: PointMLP(), "in_features"),
        (lambda: PointMLP(2, width=7), "width"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make: Any, says: str):
    with pytest.raises(ConfigurationError) as error:
        make()
    assert says in str(error.value)


class _Stuck(nn.Module):
    """A made-up denoising network whose samples look at each other and whose output has another shape."""

    def __init__(self, in_features: int | None = None, num_classes: int | None = None, is_longer: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(in_features or 1, (in_features or 1) + is_longer)

    def forward(self, x: torch.Tensor, time: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        return self.layer(x - x.mean(0)) * time[:, None]


def test_the_suite_of_models_knows_networks_that_take_times_and_labels():
    def failed(**options: Any) -> list[str]:
        return [name_of(check) for check in ModelSuite.checks if examine(check, _Stuck, options).state == "failed"]

    assert "keeps_samples_apart" in failed()
    assert "gives_one_output_a_sample" not in failed()
    assert "gives_one_output_a_sample" in failed(is_longer=True)
