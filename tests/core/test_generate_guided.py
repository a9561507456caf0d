"""Guided generations: side by side with unguided ones, in whole populations, towards what was measured."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from lightrail.errors import CompositionError, DataError, Interrupted, PluginError
from lightrail.generation import making
from lightrail.generation.composed import compose_generation, normalised
from lightrail.generation.execution import generate
from lightrail.generation.sample_files import read_samples
from lightrail.report import result_table

MIXTURE = ["denoiser=gaussian_mixture", "+sampler=ddim", "sampler.steps=5", "generate.accelerator=cpu"]

MINE = '''
import json

import torch
from lightning.pytorch.loggers import Logger

from lightrail import Guidance, Measurement


class Shift(Guidance):
    """Adds to the predicted data."""

    def __init__(self, by: float = 1.0):
        self.by = by

    def correct(self, prediction, moment):
        return prediction.with_data(prediction.data + self.by)

    def measure(self, generated):
        return {"mean": float(generated.samples.mean())}


class Shares(Guidance):
    """Every sample ends at the mean of its population, which shares a label."""

    population = 4

    def after_step(self, state, moment):
        labels = moment.condition["label"].view(-1, 4)
        assert bool((labels == labels[:, :1]).all())
        if state.index < moment.grid.steps:
            return state
        mean = state.x.view(-1, 4, *state.x.shape[1:]).mean(1).repeat_interleave(4, 0)
        return state.next(mean)


class AsksMore(Guidance):
    """Asks once more a step for samples from number 3 on."""

    def after_step(self, state, moment):
        if moment.noise.indices[0] >= 3:
            moment.predict(moment.x, moment.level, moment.condition)
        return state


class Meets(Guidance):
    """Replaces what was measured."""

    needs_measurement = True

    def correct(self, prediction, moment):
        on = moment.observed.on_states(moment.denoiser)
        return prediction.with_data(prediction.data + on.pseudo_inverse(on.value - on.apply(prediction.data)))


class First(Measurement):
    """The first entry."""

    def prepare(self, shape):
        self.size = shape[0]

    def apply(self, x):
        return x[:, :1]

    def adjoint(self, y):
        return torch.cat([y, y.new_zeros(len(y), self.size - 1)], 1)


class Log(Logger):
    """Keeps what it is told in a file."""

    name = version = "log"

    def __init__(self, folder: str):
        super().__init__()
        self.path = f"{folder}/told.jsonl"

    def _tell(self, *what):
        with open(self.path, "a") as file:
            file.write(json.dumps(what) + "\\n")

    def log_hyperparams(self, params, *args, **kwargs):
        self._tell("options", params["seed"])

    def log_metrics(self, metrics, step=None):
        self._tell("metrics", metrics)

    def log_image(self, key, images, step):
        self._tell("image", key, images)


class Wrong(First):
    """Not the adjoint."""

    def adjoint(self, y):
        return 2 * super().adjoint(y)
'''


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    name = f"guided_{tmp_path.name}"  # a module of this test alone
    (tmp_path / f"{name}.py").write_text(MINE)


def mine(name: str) -> str:
    return f"guided_{Path.cwd().name}.{name}"


def test_guided_samples_stand_beside_unguided_ones_of_the_same_seed() -> None:
    words = [*MIXTURE, "generate.count=6"]
    guided = generate([*words, f"+guidance=[{mine('Shift')}]"], show_progress=False)
    plain = generate(words, show_progress=False)
    beside = guided.summary["unguided"]
    torch.testing.assert_close(read_samples(guided.folder / "unguided")["samples"], plain.samples)
    assert beside["metrics"]["ode_error"] == pytest.approx(plain.summary["metrics"]["ode_error"])
    assert beside["evaluations"] == 5
    assert guided.summary["metrics"]["mean"] > beside["metrics"]["mean"] + 0.5
    assert "ode_error" not in guided.summary["metrics"]  # the exact flow is that of the model alone
    page = (guided.folder / "report.html").read_text()
    assert "Samples, guided" in page
    assert "Samples, unguided" in page
    table = str(result_table(guided.summary, guided.folder))
    assert table.splitlines()[0].split() == ["guided", "unguided"]
    assert next(line for line in table.splitlines() if line.startswith("mean")).split()[1:] != []


def test_the_comparison_can_be_left_out() -> None:
    guidance = f"+guidance=[{mine('Shift')}]"
    found = generate([*MIXTURE, guidance, "generate.count=4", "generate.compare=false"], show_progress=False)
    assert "unguided" not in found.summary
    assert not (found.folder / "unguided").exists()


@pytest.mark.parametrize("stop_at", [1, 3])
def test_a_guided_generation_that_is_interrupted_goes_on_with_both(
    monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    words = [*MIXTURE, f"+guidance=[{mine('Shift')}]", "generate.count=6", "generate.batch_size=3"]
    whole = generate(words, show_progress=False)
    real, calls = making.sample, []

    def interrupting(*args, **kwargs):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **kwargs)

    monkeypatch.setattr(making, "sample", interrupting)
    with pytest.raises(Interrupted) as stop:
        generate(words, show_progress=False)
    assert Path(stop.value.folder).name != "unguided"
    resumed = generate(["run.resume=latest"], show_progress=False)
    assert resumed.folder == Path(stop.value.folder)
    assert len(calls) == 4  # every batch once, of either
    torch.testing.assert_close(resumed.samples, whole.samples)
    assert resumed.summary["unguided"]["metrics"] == pytest.approx(whole.summary["unguided"]["metrics"])


def test_populations_stay_together_in_any_batch_and_on_any_device() -> None:
    words = [*MIXTURE, f"+guidance=[{mine('Shares')}]", "generate.count=12", "generate.label=[0,1,2]", "sampler.eta=1"]
    one = generate([*words, "generate.batch_size=64"], show_progress=False)
    small = generate([*words, "generate.batch_size=5"], show_progress=False)
    alone = "generate.compare=false"
    two = generate([*words, "generate.batch_size=4", "generate.devices=2", alone], show_progress=False)
    torch.testing.assert_close(one.samples, small.samples, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.samples, two.samples, rtol=1e-12, atol=1e-12)
    assert one.samples is not None
    by_population = one.samples.view(3, 4, 2)
    torch.testing.assert_close(by_population[:, :1].expand(3, 4, 2), by_population)
    assert read_samples(one.folder)["label"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert read_samples(one.folder / "unguided")["label"].tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_a_population_that_is_not_whole_is_refused_with_the_number_that_would_do() -> None:
    with pytest.raises(CompositionError) as refused:
        generate([*MIXTURE, f"+guidance=[{mine('Shares')}]", "generate.count=6"], show_progress=False)
    assert "multiple of 4" in refused.value.allowed
    assert "generate.count=8" in refused.value.remedy


def test_samples_meet_what_was_measured_of_data() -> None:
    words = [*MIXTURE, f"+guidance=[{mine('Meets')}]", f"generate.measurement={mine('First')}", "generate.count=5"]
    found = generate(words, show_progress=False)
    metrics, beside = found.summary["metrics"], found.summary["unguided"]["metrics"]
    assert metrics["residual"] < 1e-6 < beside["residual"]
    assert metrics["rmse"] < beside["rmse"]


def test_what_lies_behind_a_measurement_has_no_class_unless_one_is_told() -> None:
    words = [*MIXTURE, f"+guidance=[{mine('Meets')}]", f"measurement={mine('First')}"]
    assert any(note.startswith("class: none is told") for note in compose_generation(words).notes)
    assert not any(note.startswith("class") for note in compose_generation([*words, "generate.label=1"]).notes)


def test_evaluations_are_those_of_a_sample_on_average() -> None:
    words = [*MIXTURE, f"+guidance=[{mine('AsksMore')}]", "generate.count=6", "generate.batch_size=3"]
    assert generate(words, show_progress=False).summary["evaluations"] == 7.5


def test_the_noise_of_a_measurement_belongs_to_the_sample() -> None:
    words = [*MIXTURE, f"+guidance=[{mine('Meets')}]", f"measurement={mine('First')}", "measurement.noise=0.5"]
    one = generate([*words, "generate.count=6"], show_progress=False)
    three = generate([*words, "generate.count=6", "generate.batch_size=2"], show_progress=False)
    torch.testing.assert_close(one.samples, three.samples, rtol=1e-12, atol=1e-12)
    assert one.summary["metrics"]["rmse"] > 0.2


def test_what_cannot_work_with_a_measurement_is_named() -> None:
    meets, first = f"+guidance=[{mine('Meets')}]", f"generate.measurement={mine('First')}"
    with pytest.raises(CompositionError, match="nothing was"):
        compose_generation([*MIXTURE, meets])
    with pytest.raises(CompositionError, match="steers nothing"):
        compose_generation([*MIXTURE, first])
    with pytest.raises(PluginError, match="adjoint"):
        compose_generation([*MIXTURE, meets, f"generate.measurement={mine('Wrong')}"])
    Path("three.npy").write_bytes(b"")
    with pytest.raises(DataError, match="cannot be read"):
        generate([*MIXTURE, meets, first, "generate.image=three.npy"], show_progress=False)


def test_words_that_nothing_would_come_of_are_refused() -> None:
    shift, meets, first = f"+guidance=[{mine('Shift')}]", f"+guidance=[{mine('Meets')}]", f"measurement={mine('First')}"
    with pytest.raises(CompositionError, match="without guidance"):
        compose_generation([*MIXTURE, shift, "generate.invert=somewhere"])
    with pytest.raises(CompositionError, match="nothing measures it"):
        compose_generation([*MIXTURE, "generate.image=photo.png"])
    with pytest.raises(CompositionError, match="not clear what was measured"):
        compose_generation([*MIXTURE, meets, first, "generate.image=a.png", "generate.observed=b.png"])


def test_what_is_measured_is_a_group_of_its_own_behind_a_short_form() -> None:
    assert normalised(["generate.measurement=blur", "+generate.measurement.size=3", "generate.count=2"]) == [
        "measurement=blur",
        "measurement.size=3",
        "generate.count=2",
    ]


def test_pictures_of_both_are_logged() -> None:
    found = generate(
        [*MIXTURE, f"+guidance=[{mine('Shift')}]", f"logger=[{mine('Log')}]", "generate.count=4"], show_progress=False
    )
    told = [json.loads(line) for line in (found.folder / "told.jsonl").read_text().splitlines()]
    pictures = {key: paths for what, key, *paths in told if what == "image"}
    assert set(pictures) == {"samples", "samples/unguided"}
    assert all(Path(path).is_file() for (paths,) in pictures.values() for path in paths)
    (values,) = [values for what, values, *_ in told if what == "metrics"]
    assert values["unguided/mean"] < values["mean"]


def test_what_guidance_measures_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    found = generate(
        [*MIXTURE, f"+guidance=[{mine('Shift')}]", "generate.count=4", "logger=[csv]"], show_progress=False
    )
    logged = "".join(path.read_text() for path in found.folder.rglob("*.csv"))
    assert "unguided/mean" in logged
    assert json.loads((found.folder / "summary.json").read_text())["unguided"]["metrics"]["mean"] is not None
