# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""What is measured of samples: operators and their adjoints, what is read from files, measurements of states."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lightrail.errors import CompositionError, ConfigurationError, DataError, PluginError
from lightrail.generation import GaussianMixture, LinearVP, Measurement, Noise, Observed, conjugate_gradients
from lightrail.generation.denoiser import Denoiser
from lightrail.generation.execution import generate
from lightrail.generation.observing import Observations


class Matrix(Measurement):
    """Any matrix."""

    def __init__(self, matrix: Tensor, noise: float = 0.0) -> None:
        super().__init__(noise)
        self.matrix = matrix

    def apply(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.matrix.to(x.dtype).T

    def adjoint(self, y: Tensor) -> Tensor:
        return y @ self.matrix.to(y.dtype)


class Images(Denoiser):
    """Grey images of 4 by 4, whose states are in [−1, 1]."""

    path = LinearVP()
    form = "data"
    shape = (1, 4, 4)

    def output(self, x: Tensor, t: Tensor, condition: Any) -> Tensor:
        return 0 * x

    def decode(self, x: Tensor) -> Tensor:
        return (x + 1) / 2

    def examples(self, count: int) -> Tensor:
        return torch.linspace(0, 1, 3 * 16).view(3, 1, 4, 4)


class Latents(Images):
    def decode(self, x: Tensor) -> Tensor:
        return torch.tanh(3 * x)


class Smaller(Images):
    def decode(self, x: Tensor) -> Tensor:
        return x[..., :2, :2]


class Mean(Measurement):
    """Of each image."""

    def apply(self, x: Tensor) -> Tensor:
        return x.flatten(1).mean(1, keepdim=True)

    def adjoint(self, y: Tensor) -> Tensor:
        return y[:, :, None, None].expand(-1, 1, 4, 4) / 16


A = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0]], dtype=torch.float64)
NOTHING: dict[str, Any] = {"image": None, "observed": None}


def four_parts(error: Any) -> None:
    assert all((error.what, error.found, error.allowed, error.remedy))


def test_a_right_adjoint_passes_and_a_wrong_one_is_refused() -> None:
    Matrix(A).check_adjoint((3,))

    class Doubled(Matrix):
        def adjoint(self, y: Tensor) -> Tensor:
            return 1.01 * super().adjoint(y)

    with pytest.raises(PluginError, match="adjoint of Doubled is not that of its A") as caught:
        Doubled(A).check_adjoint((3,))
    four_parts(caught.value)


def test_an_adjoint_of_another_shape_is_refused() -> None:
    class Short(Matrix):
        def adjoint(self, y: Tensor) -> Tensor:
            return super().adjoint(y)[:, :2]

    with pytest.raises(PluginError, match="another shape") as caught:
        Short(A).check_adjoint((3,))
    four_parts(caught.value)


def test_noise_is_a_samples_own_and_has_its_size() -> None:
    operator, x = Matrix(A, noise=0.5), torch.zeros(400, 3, dtype=torch.float64)
    y = operator.observe(x, Noise(3, range(400), (3,), torch.float64))
    alone = operator.observe(x[:1], Noise(3, [7], (3,), torch.float64))
    assert torch.equal(alone[0], y[7])
    assert float(y.std()) == pytest.approx(0.5, rel=0.08)
    with pytest.raises(ConfigurationError, match="noise is out of range"):
        Matrix(A, noise=-1.0)


def test_the_pseudo_inverse_by_conjugate_gradients_is_the_smallest_solution() -> None:
    y = torch.tensor([[1.0, -2.0], [0.3, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(Matrix(A).pseudo_inverse(y), y @ torch.linalg.pinv(A).T, rtol=1e-10, atol=1e-10)


def test_conjugate_gradients_do_not_depend_on_the_batch() -> None:
    matrix = torch.diag(torch.tensor([1.0, 4.0, 9.0, 30.0], dtype=torch.float64))
    right = torch.tensor([[1.0, 1, 1, 1], [1e3, 0, 0, 1], [0, 0, 0, 0]], dtype=torch.float64)
    for steps in range(5):
        together = conjugate_gradients(lambda x: x @ matrix, right, steps=steps)
        for row in range(3):
            alone = conjugate_gradients(lambda x: x @ matrix, right[row : row + 1], steps=steps)
            torch.testing.assert_close(together[row], alone[0], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(together @ matrix, right, rtol=1e-9, atol=1e-9)


def test_conjugate_gradients_from_a_start_keep_what_the_matrix_does_not_see() -> None:
    singular = torch.diag(torch.tensor([2.0, 0.0], dtype=torch.float64))
    right, start = torch.tensor([[4.0, 0.0]], dtype=torch.float64), torch.tensor([[7.0, 5.0]], dtype=torch.float64)
    assert conjugate_gradients(lambda x: x @ singular, right, start).tolist() == [[2.0, 5.0]]
    assert conjugate_gradients(lambda x: x @ singular, right, start, steps=0).tolist() == [[7.0, 5.0]]


def test_conjugate_gradients_in_single_precision_do_not_run_off_where_the_matrix_sees_nothing() -> None:
    basis = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))[0]
    projection = basis[:, :40] @ basis[:, :40].T
    start = 3 * torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    right = torch.randn(8, 64, generator=torch.Generator().manual_seed(2)) @ projection
    found = conjugate_gradients(lambda x: x @ projection, right, start, steps=50)
    torch.testing.assert_close(found, right + start - start @ projection, rtol=1e-4, atol=1e-4)
    again = conjugate_gradients(lambda x: x @ projection, right, found, steps=50)
    torch.testing.assert_close(again, found, rtol=1e-4, atol=1e-4)


def test_a_measurement_of_states_is_that_of_the_samples() -> None:
    observed = Observed(Mean(), torch.tensor([[0.3], [0.9]]))
    measured = observed.on_states(Images())
    x = torch.linspace(-1, 1, 32).view(2, 1, 4, 4)
    torch.testing.assert_close(measured.value - measured.apply(x), observed.residual(Images().decode(x)))
    y = torch.tensor([[2.0], [-1.0]])
    left, right = (measured.apply(x) * y).sum(), (x * measured.adjoint(y)).sum()
    torch.testing.assert_close(left, right)
    torch.testing.assert_close(measured.apply(measured.pseudo_inverse(y)), y)


class CubicMixture(GaussianMixture):
    def decode(self, x: Tensor) -> Tensor:
        return x + x**3


@pytest.mark.parametrize("denoiser", [Latents(), Smaller(), CubicMixture()])
def test_a_decoder_that_is_not_affine_has_no_measurement_of_states(denoiser: Denoiser) -> None:
    with pytest.raises(CompositionError, match="cannot be carried over to the states") as caught:
        Observed(Mean(), torch.zeros(1, 1)).on_states(denoiser)
    four_parts(caught.value)


def test_without_a_file_the_models_own_data_are_measured_in_turn() -> None:
    found = Observations(Mean(), Images(), NOTHING, count=5, seed=1).of([0, 4])
    assert found.truth is not None
    assert torch.equal(found.truth[1], Images().examples(1)[1])
    torch.testing.assert_close(found.value, found.truth.flatten(1).mean(1, keepdim=True))


def test_images_and_arrays_are_read(tmp_path: Any) -> None:
    pixels = (np.arange(16, dtype=np.uint8) * 16).reshape(4, 4)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.save(tmp_path / "b.npy", pixels[None] / 255.0)
    found = Observations(Mean(), Images(), {**NOTHING, "image": str(tmp_path)}, count=2, seed=1).of([0, 1])
    assert found.truth is not None
    torch.testing.assert_close(found.truth[0, 0], torch.from_numpy(pixels / 255.0).float())
    torch.testing.assert_close(found.truth[0], found.truth[1])


def test_what_was_measured_elsewhere_is_read_and_used_in_turn(tmp_path: Any) -> None:
    np.save(tmp_path / "y.npy", np.array([[0.2], [0.4]]))
    found = Observations(Mean(), Images(), {**NOTHING, "observed": str(tmp_path / "y.npy")}, count=3, seed=1).of([1, 2])
    assert found.truth is None
    torch.testing.assert_close(found.value, torch.tensor([[0.4], [0.2]]))


def test_a_picture_of_what_was_seen_is_read_where_the_operator_knows_how(tmp_path: Any) -> None:
    class Top(Mean):
        """The upper half."""

        def apply(self, x: Tensor) -> Tensor:
            return x[:, :, :2].flatten(1)

        def from_picture(self, picture: Tensor) -> Tensor:
            return self.apply(picture)

    pixels = np.arange(0, 160, 10, dtype=np.uint8).reshape(4, 4)
    Image.fromarray(pixels).save(tmp_path / "seen.png")
    request = {**NOTHING, "observed": str(tmp_path / "seen.png")}
    found = Observations(Top(), Images(), request, count=1, seed=1).of([0])
    torch.testing.assert_close(found.value[0], torch.from_numpy(pixels[:2].flatten() / 255.0).float())
    with pytest.raises(CompositionError, match="cannot be read from a picture"):
        Observations(Mean(), Images(), request, count=1, seed=1)


def refused(tmp_path: Any, key: str, name: str, content: Any) -> DataError:
    if isinstance(content, np.ndarray) and name.endswith(".npy"):
        np.save(tmp_path / name, content)
    elif isinstance(content, np.ndarray):
        Image.fromarray(content).save(tmp_path / name)
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        Observations(Mean(), Images(), {**NOTHING, key: str(tmp_path / name)}, count=1, seed=1)
    four_parts(caught.value)
    return caught.value


def test_files_that_cannot_be_measured_are_refused(tmp_path: Any) -> None:
    wrong = refused(tmp_path, "image", "large.png", np.zeros((5, 4), dtype=np.uint8))
    assert "another size" in wrong.what
    assert "(1, 4, 4)" in wrong.allowed
    assert "not finite" in refused(tmp_path, "image", "nan.npy", np.full((1, 4, 4), np.nan)).what
    assert "cannot be read" in refused(tmp_path, "image", "broken.png", b"no picture").what
    assert "cannot be read" in refused(tmp_path, "image", "broken.npy", b"no array").what
    assert "nothing to read" in refused(tmp_path, "image", "missing.png", None).what
    assert "not what the operator measures" in refused(tmp_path, "observed", "y.npy", np.zeros((1, 2))).what


WORDS = ("denoiser=gaussian_mixture", "+sampler=ddim", "sampler.steps=10", "generate.count=4", "logger=[]")


def test_an_inverse_problem_from_the_command_line(tmp_path: Any) -> None:
    words = (*WORDS, f"run.root={tmp_path}", "+guidance=[dds]", "generate.measurement=inpaint")
    found = generate(words, show_progress=False)
    metrics = found.summary["metrics"]
    assert metrics["residual"] < 1e-6
    assert found.summary["unguided"]["metrics"]["residual"] > 0.1
    assert metrics["rmse"] < found.summary["unguided"]["metrics"]["rmse"]
    assert found.summary["evaluations"] == 10
    assert (found.folder / "report.html").is_file()


def test_a_measurement_without_guidance_and_guidance_without_one_are_refused(tmp_path: Any) -> None:
    for words in (("+guidance=[dds]",), ("generate.measurement=inpaint",)):
        with pytest.raises(CompositionError) as caught:
            generate([*WORDS, f"run.root={tmp_path}", *words], show_progress=False)
        four_parts(caught.value)


def test_an_option_of_the_measurement_from_the_command_line(tmp_path: Any) -> None:
    words = [
        *WORDS,
        f"run.root={tmp_path}",
        "+guidance=[dds]",
        "generate.measurement=inpaint",
        "generate.compare=false",
    ]
    np.save(tmp_path / "y.npy", np.array([[0.25]]))
    found = generate(
        [*words, "generate.measurement.hidden=[0]", f"generate.observed={tmp_path / 'y.npy'}"], show_progress=False
    )
    assert found.samples is not None
    torch.testing.assert_close(found.samples[:, 1], torch.full((4,), 0.25, dtype=found.samples.dtype))
    assert "rmse" not in found.summary["metrics"]


def test_the_denoiser_of_the_mixture_has_data_to_measure() -> None:
    assert GaussianMixture().examples(3).shape == (3, 2)
