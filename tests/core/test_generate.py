"""The ``generate`` command: its folder, resuming, devices, inversion, text, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from lightrail.errors import CheckpointError, CompositionError, ConfigurationError, DataError, Interrupted
from lightrail.generate import main
from lightrail.generation import making
from lightrail.generation.composed import compose_generation, normalised
from lightrail.generation.execution import generate
from lightrail.generation.pictures import image_grid
from lightrail.generation.sample_files import Batch, SampleFiles, read_samples

MIXTURE = ["denoiser=gaussian_mixture", "+sampler=ddim", "sampler.steps=5", "generate.accelerator=cpu"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")


def samples_of(folder: Path) -> torch.Tensor:
    return read_samples(folder)["samples"]


def test_the_folder_of_a_generation_holds_everything() -> None:
    result = generate([*MIXTURE, "generate.count=10", "generate.batch_size=4"], show_progress=False)
    names = {path.name for path in result.folder.iterdir()}
    assert {"config.yaml", "lock.json", "report.html", "samples.png", "samples.safetensors", "summary.json"} <= names
    assert "batches" not in names
    summary = json.loads((result.folder / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["samples"] == 10
    assert summary["evaluations"] == 5
    assert 0 < summary["metrics"]["ode_error"] < 1
    assert samples_of(result.folder).shape == (10, 2)
    page = (result.folder / "report.html").read_text()
    assert "Samples" in page
    assert "generate denoiser=gaussian_mixture" in page
    assert "Curves" not in page
    lock = json.loads((result.folder / "lock.json").read_text())
    assert lock["command"].startswith("generate ")
    # What suited the sampler is on record like what was chosen.
    assert {"sampler": "ddim", "time_grid": "uniform_lambda"}.items() <= {
        plugin["kind"]: plugin["name"] for plugin in lock["plugins"]
    }.items()


def test_the_same_seed_gives_the_same_samples_whatever_the_batch_size() -> None:
    words = [*MIXTURE, "generate.count=7", "sampler.eta=0.5", "seed=3"]
    one = generate([*words, "generate.batch_size=7"], show_progress=False)
    three = generate([*words, "generate.batch_size=3"], show_progress=False)
    other = generate([*words[:-1], "seed=4"], show_progress=False)
    torch.testing.assert_close(samples_of(one.folder), samples_of(three.folder), rtol=1e-13, atol=1e-13)
    assert not torch.allclose(samples_of(one.folder), samples_of(other.folder))


def test_an_interrupted_generation_keeps_its_batches_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*MIXTURE, "generate.count=10", "generate.batch_size=3", "sampler.eta=1"]
    whole = generate(words, show_progress=False)
    real = making.sample
    calls = []

    def interrupting(*args, **kwargs):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **kwargs)

    monkeypatch.setattr(making, "sample", interrupting)
    with pytest.raises(Interrupted) as stop:
        generate(words, show_progress=False)
    folder = Path(stop.value.folder)
    assert stop.value.step == 6
    assert json.loads((folder / "summary.json").read_text())["status"] == "stopped"
    assert len(list((folder / "batches").iterdir())) == 2
    calls.clear()
    calls += [1, 1]  # no more interruptions
    # With another batch size, which the samples do not depend on.
    resumed = generate(["run.resume=latest", "generate.batch_size=2"], show_progress=False)
    assert resumed.folder == folder
    assert len(calls) == 2 + 2
    torch.testing.assert_close(samples_of(folder), samples_of(whole.folder), rtol=1e-13, atol=1e-13)
    with pytest.raises(CheckpointError, match="no generation to go on with"):
        generate([f"run.resume={folder}"], show_progress=False)
    with pytest.raises(CheckpointError, match="no generation to go on with"):
        generate(["run.resume=latest"], show_progress=False)


def test_a_generation_goes_on_as_it_was_begun() -> None:
    folder = Path("runs/half")
    (folder / "batches").mkdir(parents=True)
    (folder / "lock.json").write_text(json.dumps({"overrides": MIXTURE}))
    with pytest.raises(CheckpointError, match="goes on as it was begun"):
        generate([f"run.resume={folder}", "seed=9"], show_progress=False)


def test_two_devices_make_the_samples_of_one() -> None:
    words = [*MIXTURE, "generate.count=6", "generate.batch_size=2", "sampler.eta=1"]
    one = generate(words, show_progress=False)
    two = generate([*words, "generate.devices=2"], show_progress=False)
    torch.testing.assert_close(samples_of(one.folder), samples_of(two.folder), rtol=1e-13, atol=1e-13)


def test_samples_go_back_to_the_noise_they_came_from() -> None:
    words = [*MIXTURE, "sampler.steps=200", "generate.count=4"]
    forward = generate([*words, "time_grid=uniform"], show_progress=False)
    back = generate(
        [*words, "time_grid=uniform", f"generate.invert={forward.folder}", "run.name=back"], show_progress=False
    )
    noise, start = samples_of(back.folder), read_samples(forward.folder)["start"]
    assert float((noise - start).square().mean().sqrt()) < 0.05
    assert back.summary["metrics"] == {}
    with pytest.raises(CompositionError, match="cannot be run backwards"):
        generate([*words, "sampler.eta=1", f"generate.invert={forward.folder}"], show_progress=False)
    with pytest.raises(DataError, match="cannot be read"):
        generate([*words, "generate.invert=nowhere"], show_progress=False)


def test_a_label_chooses_the_component() -> None:
    result = generate([*MIXTURE, "sampler.steps=50", "generate.count=200", "generate.label=2"], show_progress=False)
    torch.testing.assert_close(
        samples_of(result.folder).mean(0), torch.tensor([0.2, -1.2], dtype=torch.float64), rtol=0, atol=0.15
    )
    assert bool((read_samples(result.folder)["label"] == 2).all())


def test_what_cannot_be_sampled_is_named() -> None:
    with pytest.raises(CompositionError, match="nothing to sample"):
        generate([], show_progress=False)
    with pytest.raises(CompositionError, match="not clear what to sample"):
        generate(["run=latest", *MIXTURE], show_progress=False)
    with pytest.raises(CheckpointError, match="no run to resume"):
        generate(["run=latest"], show_progress=False)
    with pytest.raises(CompositionError, match="not one for diffusion and flow models"):
        generate(["denoiser=gaussian_mixture", "+sampler=top_p"], show_progress=False)
    with pytest.raises(ConfigurationError, match="count"):
        generate([*MIXTURE, "generate.count=0"], show_progress=False)


def test_samples_that_are_not_finite_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightrail.generation import GaussianMixture

    def broken(self, x, t, condition):  # type: ignore[no-untyped-def]
        return x * torch.nan

    monkeypatch.setattr(GaussianMixture, "output", broken)
    with pytest.raises(DataError, match="not finite"):
        generate(MIXTURE, show_progress=False)


def test_run_is_short_for_run_from() -> None:
    assert normalised(["run=latest", "+run=a/b", "run.root=x", "seed=1"]) == [
        "run.from=latest",
        "run.from=a/b",
        "run.root=x",
        "seed=1",
    ]


def test_a_composition_is_ready_to_sample() -> None:
    composed = compose_generation([*MIXTURE, "time_grid=karras", "time_grid.rho=3"])
    assert composed.levels.steps == 5
    assert composed.levels[0].t == 1.0
    assert composed.notes == ()
    assert compose_generation(["denoiser=gaussian_mixture"]).notes[0].startswith("sampler: dpm_solver_pp")


def test_the_command_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*MIXTURE, "generate.count=3"]) == 0
    out = capsys.readouterr().out
    assert "ode_error" in out
    assert "3 samples" in out
    assert main(["--help"]) == 0
    assert "generate run=latest" in capsys.readouterr().out
    assert main(["--cfg", *MIXTURE]) == 0
    assert "gaussian_mixture" in capsys.readouterr().out.lower().replace("gaussianmixture", "gaussian_mixture")
    assert main([]) == 2


# Files.


def test_pending_batches_fill_the_gaps_whatever_size_they_had(tmp_path: Path) -> None:
    files = SampleFiles(tmp_path)
    for indices in (range(3), range(6, 8)):
        files.write(Batch(indices, {"samples": torch.arange(indices.start, indices.stop).double()}, 4, 1.5))
    assert files.pending(12, 2) == [range(3, 5), range(5, 6), range(8, 10), range(10, 12)]
    assert files.pending(8, 5) == [range(3, 6)]
    files.write(Batch(range(3, 6), {"samples": torch.arange(3, 6).double()}, 4, 0.5))
    assert files.pending(8, 5) == []
    assert [batch.evaluations for batch in files.read()] == [4, 4, 4]
    files.join({"seed": "1"})
    joined, metadata = files.finished()
    assert metadata == {"seed": "1"}
    assert joined["samples"].tolist() == list(range(8))
    assert not files.batches.exists()


def test_images_stand_beside_each_other() -> None:
    page = image_grid(torch.zeros(5, 1, 8, 8))
    assert page.shape[2] == 3
    assert page.shape[1] > page.shape[0]  # three in a row, two rows
    assert page.max() == 255
    assert page[6, 6, 0] == 0


# Text.


class Counting(torch.nn.Module):
    """A language model over ten tokens, whose favourite is the last token plus one."""

    device = torch.device("cpu")

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot((tokens[:, -1] + 1) % 10, 10).double() * 2

    def encode_text(self, text: str) -> torch.Tensor:
        return torch.tensor([int(each) for each in text or "0"])

    def decode_text(self, tokens: torch.Tensor) -> str:
        return "".join(str(int(each)) for each in tokens)


def test_text_is_the_same_in_any_batch_and_is_drawn_as_the_sampler_says() -> None:
    from lightrail.catalogue import load
    from lightrail.generation.text import write_text

    model = Counting()
    greedy = write_text(model, load("sampler", "greedy")(), model.encode_text("3"), 6, range(2))
    assert greedy.tolist() == [[4, 5, 6, 7, 8, 9]] * 2
    top = load("sampler", "temperature")(temperature=1.0)
    together = write_text(model, top, model.encode_text("3"), 30, range(40), seed=2)
    for i in (0, 17):
        assert torch.equal(write_text(model, top, model.encode_text("3"), 30, [i], seed=2)[0], together[i])
    share = (together[:, 1:] == (together[:, :-1] + 1) % 10).double().mean()
    p = float(torch.tensor(2.0).exp() / (torch.tensor(2.0).exp() + 9))
    assert abs(float(share) - p) < 0.05
    assert not torch.equal(together, write_text(model, top, model.encode_text("3"), 30, range(40), seed=3))


def test_several_prompts_are_gone_through_in_turn() -> None:
    from types import SimpleNamespace

    from lightrail.catalogue import load
    from lightrail.generation.text import TextModel, TokenSampler
    from lightrail.generation.text_run import prompts_of, write_texts

    assert isinstance(Counting(), TextModel)
    request = {"prompt": ["3", "71", "5"], "count": 7, "length": 4, "batch_size": 2}
    sampler: TokenSampler = load("sampler", "temperature")(temperature=1.0)
    generation: Any = SimpleNamespace(model=Counting(), sampler=sampler, request=request, seed=2)
    assert prompts_of(generation) == ["3", "71", "5", "3", "71", "5", "3"]
    together = write_texts(generation, shows=False)
    for prompt, first in (("3", 0), ("71", 1), ("5", 2)):
        generation.request = {**request, "prompt": prompt}
        assert together[first::3] == write_texts(generation, shows=False)[first::3]
    # What is watched is what is not.
    generation.request = request
    assert write_texts(generation, shows=True) == together


def test_a_stream_writes_whole_characters(capsys: pytest.CaptureFixture[str]) -> None:
    from lightrail.generation.text_run import _Stream

    class Bytes(Counting):
        def decode_text(self, tokens: torch.Tensor) -> str:
            return bytes(tokens.tolist()).decode(errors="replace")

    stream = _Stream(Bytes(), "x", is_first=True)
    seen = []
    for byte in "é!".encode():
        stream.add(torch.tensor([byte]))
        seen.append(capsys.readouterr().out)
    stream.end()
    assert seen == ["x", "é", "!"]
    assert capsys.readouterr().out == "\n"
