"""Training again on the pairs that a trained model makes."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch

import lightrail
from lightrail.errors import CheckpointError, CompositionError, ConfigurationError
from lightrail.generation import sample
from lightrail.generation.trained_run import load_trained
from lightrail.step.randomness import RandomState
from lightrail.testing import TaskSuite
from lightrail_generation.models.point_mlp import PointMLP
from lightrail_generation.samplers.ddim import DDIM, transfer
from lightrail_generation.tasks.draws import Draws
from lightrail_generation.tasks.rectified_diffusion import RectifiedDiffusion, generate_pairs
from lightrail_generation.time_grids.uniform import Uniform

WIDTH = PointMLP.traits.example["width"]


def train(folder, name, *more):
    return lightrail.compose(
        [
            "data=two_moons",
            "model=point_mlp",
            f"model.width={WIDTH}",
            "data.batch_size=64",
            "logger=[csv]",
            "optimizer.lr=3e-3",
            "trainer.accelerator=cpu",
            "trainer.max_epochs=3",
            f"run.root={folder}",
            f"run.name={name}",
            *more,
        ]
    ).execute(show_progress=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def teacher(runs):
    return str(train(runs, "teacher", "task=diffusion").folder)


def student(teacher, **options):
    torch.manual_seed(9)
    return RectifiedDiffusion(PointMLP(2, 2, width=WIDTH), teacher, **{"pairs": 200, "steps": 8, **options})


def trained_task(folder) -> Any:
    return load_trained(str(folder)).task


BATCH = (torch.zeros(64, 2), torch.zeros(64, dtype=torch.int64))


class TestRectifiedDiffusion(TaskSuite):
    plugin: ClassVar[Any] = RectifiedDiffusion
    options: Any = None

    @pytest.fixture(autouse=True)
    def _with_a_teacher(self, teacher):
        self.options = {"teacher": teacher, "pairs": 64, "steps": 3}


def test_pairs_lie_on_the_teachers_flow(teacher):
    denoiser: Any = trained_task(teacher).denoiser()
    pairs: Any = generate_pairs(denoiser, 300, 8)
    grid = Uniform().grid(denoiser.path, 8)
    expected = sample(denoiser, DDIM(8), grid, range(300), condition=denoiser.condition({}, range(300)))
    assert torch.allclose(pairs.x0, expected.x, atol=1e-5)
    assert torch.allclose(pairs.z, expected.start, atol=1e-6)
    assert pairs.label.tolist() == [i % 2 for i in range(300)]
    assert len(pairs) == 300


def test_guided_pairs_are_guided(teacher):
    denoiser: Any = trained_task(teacher).denoiser()
    plain, one = generate_pairs(denoiser, 8, 4), generate_pairs(denoiser, 8, 4, guidance=1.0)
    guided = generate_pairs(denoiser, 8, 4, guidance=3.0)
    assert torch.equal(plain.x0, one.x0)
    assert torch.equal(plain.z, guided.z)
    assert not torch.allclose(plain.x0, guided.x0, atol=1e-2)
    # One step of classifier-free guidance in the data, by hand.
    grid = Uniform().grid(denoiser.path, 1)
    once = generate_pairs(denoiser, 8, 1, guidance=3.0)
    condition = denoiser.condition({}, range(8))
    x = once.z * denoiser.path.starting_scale(grid[0])
    with torch.no_grad():
        told, untold = (
            denoiser.predict(x, grid[0], condition),
            denoiser.predict(x, grid[0], denoiser.unconditional(condition)),
        )
        expected = transfer(told.with_data(3 * told.data - 2 * untold.data), grid[1])
    assert torch.allclose(once.x0, expected, atol=1e-5)


def test_it_starts_as_the_teacher(teacher):
    task: Any = student(teacher)
    taught = trained_task(teacher)
    for name, value in taught.model.state_dict().items():
        assert torch.equal(task.model.state_dict()[name], value)
    assert float(task.center) == float(taught.center)
    assert float(task.scale) == float(taught.scale)
    assert task.state_shape == (2,)
    assert set(task.state_dict()) == set(taught.state_dict())
    x, level = torch.randn(3, 2), task.path.level(0.3)
    assert torch.equal(task.denoiser().predict(x, level).data, taught.denoiser().predict(x, level).data)


def test_data_are_trained_with_the_noise_that_they_came_from(teacher):
    task: Any = student(teacher)
    pairs = task._ready_pairs()
    seen = []
    task.model.register_forward_hook(lambda module, inputs, output: seen.append(inputs))
    task.training_step(BATCH, 0)
    x, time, label = seen[0]
    level = task.path.levels(time.double(), 2)
    # Each x is α x0 + σ z of exactly one pair, and the held-out ones are not among them.
    made = level.alpha[:, None] * pairs.x0[None] + level.sigma[:, None] * pairs.z[None]
    nearest = (x[:, None] - made).norm(dim=-1).min(1)
    assert float(nearest.values.max()) < 1e-4
    assert int(nearest.indices.min()) >= 20
    known = label < 2
    assert torch.equal(label[known], pairs.label[nearest.indices][known])
    example: Any = task.example(BATCH, Draws.for_evaluation(0, 0, torch.device("cpu")))
    assert all(any(torch.equal(x0, own) for own in pairs.x0[:20]) for x0 in example.x0)


def one_step_error(task, pairs):
    """How far one step from noise ends from where the teacher's many steps end."""
    denoiser: Any = task.denoiser()
    grid = Uniform().grid(denoiser.path, 1)
    x = pairs.z * denoiser.path.starting_scale(grid[0])
    with torch.no_grad():
        found = transfer(denoiser.predict(x, grid[0], {"label": pairs.label}), grid[1])
    return float((found - pairs.x0).square().mean())


def test_one_round_brings_one_step_nearer(teacher):
    task: Any = student(teacher, pairs=1000, steps=20, label_dropout=0.0)
    fresh: Any = generate_pairs(trained_task(teacher).denoiser(), 1500, 20)
    held_out = type(fresh)(fresh.z[1000:], fresh.x0[1000:], fresh.label[1000:])
    before = one_step_error(task, held_out)
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        task.training_step(BATCH, 0)["loss"].backward()
        optimizer.step()
    after = one_step_error(task, held_out)
    assert after < 0.5 * before


def test_making_one_moves_no_random_numbers(teacher):
    model = PointMLP(2, 2, width=WIDTH)
    state = RandomState.capture()
    RectifiedDiffusion(model, teacher, pairs=20, steps=2)._ready_pairs()
    after = RandomState.capture()
    assert torch.equal(after.torch, state.torch)
    assert after.python == state.python
    assert after.numpy["state"]["pos"] == state.numpy["state"]["pos"]


def test_a_copy_trains_its_own_network(teacher):
    task: Any = student(teacher)
    other = copy.deepcopy(task)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert other.objective.model is other.model
    assert task.objective.model is task.model
    assert next(task.parameters()).abs().sum().item() > 0


def test_it_trains_resumes_generates_and_teaches_as_a_run(runs, teacher):
    more = ["task=rectified_diffusion", f"task.teacher={teacher}", "task.pairs=100", "task.steps=4"]
    result = train(runs, "rectified", *more, "trainer.max_epochs=1")
    assert result.metrics["val_loss"] > 0
    weights = trained_task(result.folder).model.state_dict()
    taught: Any = trained_task(teacher).model.state_dict()
    assert any(not torch.equal(weights[name], taught[name]) for name in weights)
    again = RectifiedDiffusion(PointMLP(2, 2, width=WIDTH), str(result.folder), pairs=20, steps=2)
    assert again.objective.form == "velocity"
    assert torch.isfinite(again.training_step(BATCH, 0)["loss"])
    second_round = generate_pairs(trained_task(result.folder).denoiser(), 20, 2)
    assert torch.equal(again._ready_pairs().x0, second_round.x0)


def test_a_teacher_with_another_network_is_refused(teacher):
    with pytest.raises(CompositionError, match="architecture"):
        RectifiedDiffusion(PointMLP(2, 2, width=2 * WIDTH), teacher)
    with pytest.raises(CompositionError, match="architecture"):
        RectifiedDiffusion(PointMLP(2, 2, width=WIDTH, depth=4), teacher)


def test_a_teacher_with_another_objective_is_refused(runs):
    folder = train(runs, "heavy", "task=pfgmpp", "trainer.max_epochs=-1", "trainer.max_steps=1").folder
    with pytest.raises(CompositionError, match="cannot be rectified") as caught:
        RectifiedDiffusion(PointMLP(2, 2, width=WIDTH), str(folder))
    assert "PFGMPP" in caught.value.found


def test_a_teacher_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        RectifiedDiffusion(PointMLP(2, 2, width=WIDTH), str(tmp_path / "nowhere"))


@pytest.mark.parametrize("options", [{"pairs": 9}, {"steps": 0}, {"label_dropout": 1.5}])
def test_options_that_cannot_be_are_refused(options, teacher):
    with pytest.raises(ConfigurationError):
        student(teacher, **options)
