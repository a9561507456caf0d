# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""Inpainting, blurring, downsampling and masks of frequencies, against dense matrices and hand-made numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from lightrail.errors import CompositionError, ConfigurationError, DataError
from lightrail.generation import Noise
from lightrail_generation.measurements.blur import Blur, convolution_matrix
from lightrail_generation.measurements.downsample import Downsample
from lightrail_generation.measurements.inpaint import Inpaint, random_mask
from lightrail_generation.measurements.mask_fourier import MaskFourier

SHAPE = (2, 8, 6)
OPERATORS = {
    "box": lambda: Inpaint(),
    "share": lambda: Inpaint(share=0.3),
    "gaussian": lambda: Blur(sigma=0.7),
    "gaussian, circular": lambda: Blur(sigma=0.7, size=5, border="circular"),
    "means": lambda: Downsample(factor=2),
    "lines": lambda: MaskFourier(share=0.5),
    "frequencies": lambda: MaskFourier(pattern="random", share=0.3, seed=1),
}


@pytest.fixture(params=OPERATORS)
def operator(request):
    made = OPERATORS[request.param]()
    made.prepare(SHAPE)
    return made


def dense(operator, shape=SHAPE):
    """A ``[m, n]``, and how to lay out y."""
    entries = int(np.prod(shape))
    columns = operator.apply(torch.eye(entries, dtype=torch.float64).view(entries, *shape))
    return columns.flatten(1).T, columns.shape[1:]


def test_the_adjoint_is_the_transpose_and_the_pseudo_inverse_exact(operator):
    operator.check_adjoint(SHAPE)
    matrix, layout = dense(operator)
    units = torch.eye(len(matrix), dtype=torch.float64).view(len(matrix), *layout)
    torch.testing.assert_close(operator.adjoint(units).flatten(1), matrix, rtol=1e-12, atol=1e-12)
    inverse = operator.pseudo_inverse(units).flatten(1).T
    torch.testing.assert_close(inverse, torch.linalg.pinv(matrix, rtol=1e-4), rtol=1e-7, atol=1e-7)


def test_a_sample_is_measured_the_same_in_any_batch_and_precision(operator):
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(operator.apply(x)[1:2], operator.apply(x[1:2]))
    torch.testing.assert_close(operator.apply(x.double()).float(), operator.apply(x), rtol=1e-5, atol=1e-5)
    y = operator.apply(x)
    assert y.dtype == operator.adjoint(y).dtype == operator.pseudo_inverse(y).dtype == torch.float32
    assert operator.picture(y).ndim == 4


def test_a_gradient_goes_through(operator):
    x = torch.randn(1, *SHAPE, dtype=torch.float64).requires_grad_()
    y = torch.randn_like(operator.apply(x))
    (gradient,) = torch.autograd.grad((operator.apply(x) * y).sum(), x)
    torch.testing.assert_close(gradient, operator.adjoint(y))


def test_the_middle_of_an_image_is_hidden():
    operator = Inpaint()
    operator.prepare((1, 4, 4))
    assert operator.seen[0].int().tolist() == [[1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]]
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert operator.apply(x).tolist() == [[0, 1, 2, 3, 4, 7, 8, 11, 12, 13, 14, 15]]
    assert operator.picture(operator.apply(x))[0, 0, 1].tolist() == [4, 0.5, 0.5, 7]


def test_entries_of_points_are_hidden():
    for options, seen in (({}, [True, True, False]), ({"hidden": [0]}, [False, True, True])):
        operator = Inpaint(**options)
        operator.prepare((3,))
        assert operator.seen.tolist() == seen


def test_a_random_share_is_hidden_the_same_in_all_channels():
    operator = Inpaint(share=0.25, seed=3)
    operator.prepare((3, 8, 8))
    assert int((~operator.seen[0]).sum()) == 16
    assert torch.equal(operator.seen[0], operator.seen[2])
    assert not torch.equal(random_mask((8, 8), 0.25, 3), random_mask((8, 8), 0.25, 4))
    assert int(random_mask((2,), 0.9, 0).sum()) == 1


def test_a_mask_is_read_from_a_picture_or_an_array(tmp_path):
    seen = np.ones((4, 4), dtype=bool)
    seen[1, 2] = False
    Image.fromarray(seen.astype(np.uint8) * 255).save(tmp_path / "mask.png")
    np.save(tmp_path / "mask.npy", seen)
    for name in ("mask.png", "mask.npy"):
        operator = Inpaint(mask=str(tmp_path / name))
        operator.prepare((3, 4, 4))
        assert torch.equal(operator.seen, torch.from_numpy(seen).expand(3, 4, 4))


def test_noise_is_only_where_something_was_seen():
    operator = Inpaint(noise=0.1)
    operator.prepare((1, 8, 8))
    x = torch.zeros(50, 1, 8, 8)
    y = operator.observe(x, Noise(0, range(50), (1, 8, 8)))
    assert y.shape == (50, 48)
    assert float(y.std()) == pytest.approx(0.1, rel=0.05)


def test_reflecting_and_circular_borders():
    kernel = torch.tensor([1.0, 2.0, 4.0])
    assert convolution_matrix(kernel, 3, "circular").tolist() == [[2, 1, 4], [4, 2, 1], [1, 4, 2]]
    assert convolution_matrix(kernel, 3, "reflect").tolist() == [[2, 5, 0], [4, 2, 1], [0, 5, 2]]


def test_a_kernel_of_ones_own(tmp_path):
    kernel = np.random.default_rng(0).random((3, 5))
    np.save(tmp_path / "kernel.npy", kernel)
    x = torch.randn(2, *SHAPE, dtype=torch.float64)
    padded = torch.nn.functional.pad(x, (2, 2, 1, 1), mode="reflect")
    weight = torch.from_numpy(kernel).flip(0, 1).expand(2, 1, 3, 5)
    wanted = torch.nn.functional.conv2d(padded, weight, groups=2)
    operator = Blur(kernel=str(tmp_path / "kernel.npy"))
    operator.prepare(SHAPE)
    operator.check_adjoint(SHAPE)
    torch.testing.assert_close(operator.apply(x), wanted)
    circular = Blur(kernel=str(tmp_path / "kernel.npy"), border="circular")
    circular.prepare(SHAPE)
    torch.testing.assert_close(circular.pseudo_inverse(circular.apply(x)), x)
    Image.fromarray(np.full((3, 3), 9, dtype=np.uint8)).save(tmp_path / "kernel.png")
    picture = Blur(kernel=str(tmp_path / "kernel.png"))
    picture.prepare(SHAPE)
    torch.testing.assert_close(picture.apply(torch.ones(1, *SHAPE)), torch.ones(1, *SHAPE))


def test_a_mean_over_blocks_is_repeated():
    operator = Downsample(2)
    operator.prepare((1, 2, 4))
    y = operator.apply(torch.tensor([[[[0.0, 2, 1, 1], [4, 2, 1, 5]]]]))
    assert y.tolist() == [[[[2, 2]]]]
    assert operator.picture(y).tolist() == [[[[2, 2, 2, 2], [2, 2, 2, 2]]]]


def test_frequencies_around_the_mean_are_always_measured():
    for pattern in ("lines", "random"):
        operator = MaskFourier(pattern=pattern, share=0.25, center=0.25, seed=5)
        operator.prepare((1, 8, 8))
        assert bool(operator.mask[0, 0])
        assert int(operator.mask.sum()) == (24 if pattern == "lines" else 16)
        flat = operator.adjoint(operator.apply(torch.ones(1, 1, 8, 8)))
        torch.testing.assert_close(flat, torch.ones(1, 1, 8, 8))


def test_all_frequencies_are_the_image():
    operator = MaskFourier(share=1.0)
    operator.prepare(SHAPE)
    x = torch.randn(2, *SHAPE)
    torch.testing.assert_close(operator.adjoint(operator.apply(x)), x)
    torch.testing.assert_close(operator.apply(x).square().sum(), x.square().sum())


def four_parts(caught):
    error = caught.value
    assert all((error.what, error.found, error.allowed, error.remedy))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: Inpaint(hidden=[1]), (1, 4, 4)),
        (lambda: Inpaint(hidden=[3]), (3,)),
        (lambda: Inpaint(hidden=[0, 1, 2]), (3,)),
        (lambda: Inpaint(box=[0.25, 0.25, 0.5, 0.5]), (3,)),
        (lambda: Inpaint(box=[0, 0, 0.01, 0.01]), (1, 4, 4)),
        (lambda: Blur(), (2,)),
        (lambda: Blur(size=9), (1, 4, 4)),
        (lambda: Downsample(2), (1, 3, 4)),
        (lambda: Downsample(2), (4,)),
        (lambda: MaskFourier(), (4,)),
    ],
)
def test_samples_that_do_not_fit_are_refused(make, shape):
    with pytest.raises(CompositionError) as caught:
        make().prepare(shape)
    four_parts(caught)


def test_a_mask_of_another_size_is_refused(tmp_path):
    np.save(tmp_path / "mask.npy", np.eye(3))
    with pytest.raises(CompositionError, match="does not fit"):
        Inpaint(mask=str(tmp_path / "mask.npy")).prepare((1, 4, 4))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Inpaint(share=0.5, hidden=[1]),
        lambda: Inpaint(share=1.0),
        lambda: Inpaint(box=[0.5, 0, 0.5, 1]),
        lambda: Inpaint(noise=-0.1),
        lambda: Blur(sigma=0),
        lambda: Blur(size=4),
        lambda: Blur(border="zeros"),
        lambda: Downsample(0),
        lambda: MaskFourier(share=0),
        lambda: MaskFourier(pattern="rays"),
    ],
)
def test_options_out_of_range_are_refused(make):
    with pytest.raises(ConfigurationError) as caught:
        make()
    four_parts(caught)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    np.save(tmp_path / "line.npy", np.ones(3))
    for make in (
        lambda: Inpaint(mask=str(tmp_path / "broken.png")).prepare((1, 4, 4)),
        lambda: Inpaint(mask=str(tmp_path / "missing.npy")).prepare((1, 4, 4)),
        lambda: Blur(kernel=str(tmp_path / "broken.png")),
        lambda: Blur(kernel=str(tmp_path / "line.npy")),
    ):
        with pytest.raises(DataError) as caught:
            make()
        four_parts(caught)
