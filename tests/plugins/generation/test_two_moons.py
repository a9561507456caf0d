"""Two moons: points where the equations put them, equal everywhere, in three parts."""

from __future__ import annotations

import math

import pytest
import torch

from lightrail.errors import ConfigurationError
from lightrail_generation.data.two_moons import TwoMoons


def points_of(data: TwoMoons, part: str = "train") -> tuple[torch.Tensor, torch.Tensor]:
    return data.parts[part].points, data.parts[part].labels


def test_without_noise_the_points_lie_on_the_half_circles():
    points, labels = points_of(TwoMoons(noise=0.0))
    upper, lower = points[labels == 0], points[labels == 1]
    assert torch.allclose(upper.norm(dim=1), torch.ones(len(upper)), atol=1e-6)
    assert (upper[:, 1] >= -1e-6).all()
    centre = torch.tensor([1.0, 0.5])
    assert torch.allclose((lower - centre).norm(dim=1), torch.ones(len(lower)), atol=1e-6)
    assert (lower[:, 1] <= 0.5 + 1e-6).all()
    # Uniform along the arc: half of the angles lie in the middle half.
    angles = torch.atan2(upper[:, 1], upper[:, 0])
    share = ((angles > math.pi / 4) & (angles < 3 * math.pi / 4)).double().mean()
    assert abs(float(share) - 0.5) < 0.04


def test_the_noise_is_normal_with_the_given_deviation():
    points, labels = points_of(TwoMoons(noise=0.1, samples=20_000))
    off = points[labels == 0].norm(dim=1) - 1
    # Across the arc the noise shows as it is, but for the bend of the circle.
    assert abs(float(off.std()) - 0.1) < 0.003
    assert abs(float(off.mean()) - 0.1**2 / 2) < 0.004


def test_equal_seeds_give_equal_points_and_others_do_not():
    first, second, other = (TwoMoons(samples=256, data_seed=seed) for seed in (3, 3, 4))
    torch.manual_seed(0)
    assert torch.equal(points_of(first)[0], points_of(second)[0])
    assert not torch.equal(points_of(first)[0], points_of(other)[0])
    # The stream of the generator is frozen: these numbers are the same on every machine.
    assert torch.allclose(points_of(TwoMoons())[0][0], torch.tensor(FIRST), atol=1e-5)


FIRST = (-0.087604, 0.905399)


def test_the_parts_are_disjoint_and_hold_both_classes_in_equal_shares():
    data = TwoMoons(samples=400)
    sizes = {name: len(points_of(data, name)[0]) for name in ("train", "val", "test")}
    assert sizes == {"train": 400, "val": 100, "test": 100}
    rows = {tuple(row) for part in sizes for row in points_of(data, part)[0].tolist()}
    assert len(rows) == 600
    assert all(int(points_of(data, part)[1].sum()) == sizes[part] // 2 for part in sizes)


def test_batches_are_points_with_labels():
    data = TwoMoons(batch_size=100, samples=250)
    batches = list(data.train_dataloader())
    assert [len(points) for points, _ in batches] == [100, 100, 50]
    points, labels = batches[0]
    assert points.dtype == torch.float32
    assert labels.dtype == torch.int64
    whole = dict(zip(map(tuple, points_of(data)[0].tolist()), points_of(data)[1].tolist(), strict=True))
    assert all(whole[tuple(p)] == int(label) for p, label in zip(points.tolist(), labels, strict=True))
    assert data.dimensions()["in_features"] == 2


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"samples": 100}, {"noise": -0.1}, {"data_seed": -1}, {"num_workers": -1}]
)
def test_options_out_of_range_are_refused(options: dict[str, float]):
    with pytest.raises(ConfigurationError):
        TwoMoons(**options)  # type: ignore[arg-type]
