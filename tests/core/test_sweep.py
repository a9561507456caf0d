"""A sweep is a folder: written whole, carried out by one at a time, and never the worse for a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from sweep_kills_program import written

from lightrail import Launch
from lightrail.errors import CheckpointError, CompositionError, ConfigurationError, RunFolderError
from lightrail.launch import Job, JobState, Order
from lightrail.launch.job import outcome_of, write_outcome
from lightrail.run.folder import newest_run
from lightrail.sweep import Choices, Goal, SweepMethod, run_sweep
from lightrail.sweep.control import Controller
from lightrail.sweep.ledger import Ledger, Trial, find_sweep, folder_name, newest_sweep
from lightrail.sweep.planning import planned_sweep

HERE = Path(__file__).parent
RUN = ["model=mlp", "logger=[csv]", "trainer.accelerator=cpu"]
FINISHED, FAILED, STOPPED = JobState("finished"), JobState("failed", "no luck"), JobState("stopped")


def test_fifty_kills_lose_nothing_and_run_nothing_twice(tmp_path: Path) -> None:
    program = [sys.executable, str(HERE / "sweep_kills_program.py"), str(tmp_path), "200", "50"]
    seed = str(time.time_ns())
    done = subprocess.run([*program, seed], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, (seed, done.stderr)
    told = json.loads(done.stdout)
    assert (told["killed"], told["status"]) == (50, 0), seed
    assert told["over_then"] > 0, "each was killed before it had done anything"
    assert told["phases"] == ["finished"] * 200, seed
    assert told["starts"] == told["runs"] == [1] * 200, seed


def train(folder: Path, *words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    command = [sys.executable, "-m", "lightrail.train", *words]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes)


def until(holds: Any, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not holds():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)


def processes_of(supervisor: str) -> list[int]:
    return [int(child) for child in Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()]


def run_of(folder: Path) -> int:
    job = Job.of(folder)
    assert job is not None
    return processes_of(job.number)[0]


def is_standing_still(folder: Path) -> bool:
    job = Job.of(folder)
    states = [Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()[0] for each in
              (processes_of(job.number) if job is not None else [])]  # fmt: skip
    return states == ["T"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds a run's process in /proc")
def test_real_runs_outlive_their_controller_and_go_on_after_a_stop(tmp_path: Path) -> None:
    stands_still = ["+callback=[run_plugins.Signals]", "callback.Signals.step=7",
                    f"callback.Signals.number={int(signal.SIGSTOP)}"]  # fmt: skip
    first = train(tmp_path, "-m", *RUN, *stands_still, "trainer.max_steps=20", "seed=1,2", "launch.parallel=2",
                  "run.name=s")  # fmt: skip
    folders = [tmp_path / "runs" / "s" / "jobs" / name for name in ("0_seed-1", "1_seed-2")]
    until(lambda: all(map(is_standing_still, folders)), first)
    first.kill()
    first.communicate()
    # Each run has stopped itself at step 7: it is found as it is, asked to stop, and only then let go on.
    second = train(tmp_path, "sweep.resume=latest")
    ledger = find_sweep("latest", tmp_path / "runs")
    until(lambda: f"process {second.pid} " in (ledger.folder / "lock").read_text(), second)
    with pytest.raises(RunFolderError, match="carried out already"), ledger.held():
        pass
    second.send_signal(signal.SIGINT)
    until(lambda: _asks_to_stop(folders), second)
    for folder in folders:
        os.kill(run_of(folder), signal.SIGCONT)
    told = second.communicate(timeout=120)[0]
    assert (second.returncode, "train sweep.resume=" in told) == (130, True), told
    assert [getattr(outcome_of(folder), "phase", None) for folder in folders] == ["stopped", "stopped"], told
    third = train(tmp_path, "sweep.resume=latest")
    told = third.communicate(timeout=120)[0]
    assert third.returncode == 0, told
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    assert [(each["status"], each["steps"]) for each in summaries] == [("finished", 20)] * 2
    assert all(each["resumed_from"] for each in summaries)
    starts = [(folder / "launch" / "starts.jsonl").read_text().splitlines() for folder in folders]
    assert [len(each) for each in starts] == [2, 2]
    assert newest_run(tmp_path / "runs").path in folders


def _asks_to_stop(folders: list[Path]) -> bool:
    """SIGTERM waits for each run that stands still."""
    found = []
    for folder in folders:
        status = Path(f"/proc/{run_of(folder)}/status").read_text()
        pending = next(line for line in status.splitlines() if line.startswith("ShdPnd:"))
        found.append(int(pending.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return all(found)


class Planned(Launch):
    """Ends each job at once, as was planned for its starts."""

    in_this_process = True

    def __init__(self, plan: Mapping[int, list[JobState | Exception]], parallel: int = 2) -> None:
        super().__init__(parallel=parallel)
        self.plan = {number: list(each) for number, each in plan.items()}
        self.begun: list[int] = []
        self.most = 0
        self.running: set[Path] = set()

    def start(self, order: Order) -> Job:
        number = int(order.folder.name)
        self.begun.append(number)
        end = self.plan.get(number, [FINISHED]).pop(0)
        if isinstance(end, Exception):
            raise end
        self.running = {folder for folder in self.running if outcome_of(folder) is None} | {order.folder}
        self.most = max(self.most, len(self.running))
        if end.phase != "lost":
            subprocess.Popen([sys.executable, "-c", _END.format(str(order.folder), end.phase, end.reason)])
        return self.job(order, str(number), ends=end.phase)

    def state(self, job: Job) -> JobState:
        return JobState("lost", "gone") if job.known["ends"] == "lost" else JobState("running")

    def cancel(self, job: Job) -> None:
        raise AssertionError


_END = """
import sys
sys.modules.update(torch=None, lightning=None)
from pathlib import Path
from lightrail.launch.job import JobState, write_outcome
write_outcome(Path({!r}), JobState({!r}, {!r}))
"""


class Noted:
    def __init__(self) -> None:
        self.told: list[tuple[int, str]] = []

    def over(self, trial: Trial, state: JobState) -> None:
        self.told.append((trial.number, state.phase))

    def standing(self, over: int, running: int, planned: int) -> None: ...
    def said(self, sentence: str) -> None: ...


def phases(ledger: Ledger) -> list[str | None]:
    return [getattr(outcome_of(trial.folder), "phase", None) for trial in ledger.trials()]


def test_what_ends_badly_stops_nothing_else_and_is_run_again_when_asked(tmp_path: Path) -> None:
    ledger, watcher = written(tmp_path, 5), Noted()
    refused = ConfigurationError("no", found="it", allowed="that", remedy="Do.")
    launch = Planned({1: [FAILED], 2: [JobState("lost"), FINISHED], 3: [refused]})
    assert Controller(ledger, launch, watcher).run() == 1
    assert phases(ledger) == ["finished", "failed", "finished", "failed", "finished"]
    assert (sorted(launch.begun), launch.most) == ([0, 1, 2, 2, 3, 4], 2)
    assert sorted(watcher.told) == list(enumerate(phases(ledger)))
    write_outcome(ledger.trials()[4].folder, STOPPED)
    again = Planned({})
    assert Controller(ledger, again, Noted()).run() == 1
    assert again.begun == [4]
    again = Planned({})
    assert Controller(ledger, again, Noted(), retry=True).run() == 0
    assert again.begun == [1, 3]


def test_what_a_killed_controller_had_just_started_is_not_started_again(tmp_path: Path) -> None:
    ledger = written(tmp_path, 2)
    first, second = (trial.folder for trial in ledger.trials())

    class Meanwhile(Planned):
        def start(self, order: Order) -> Job:
            # Its supervisor ends between the look at the folders and the next start; nobody had noted that it ran.
            write_outcome(second, FINISHED)
            return super().start(order)

    launch, watcher = Meanwhile({}, parallel=1), Noted()
    assert Controller(ledger, launch, watcher).run() == 0
    assert (launch.begun, phases(ledger)) == ([0], ["finished", "finished"])
    assert (sorted(watcher.told), Job.of(first) is None, Job.of(second)) == (
        [(0, "finished"), (1, "finished")], False, None,
    )  # fmt: skip


class Counting(SweepMethod):
    """Proposes its own number, and notes what it is told."""

    def __init__(self, folder: Path, trials: int) -> None:
        super().__init__({"seed": Choices(("0", "1"))}, folder, Goal("val_loss", "min"), trials=trials)
        self.asked: list[int] = []
        self.told: dict[int, float | None] = {}

    def ask(self, number: int) -> dict[str, str]:
        self.asked.append(number)
        return {"seed": str(number)}

    def tell(self, number: int, value: float | None) -> None:
        self.told[number] = value


def test_a_method_is_asked_as_places_fall_free_and_told_how_each_ended(tmp_path: Path) -> None:
    ledger = written(tmp_path, 2)
    ledger = ledger.write(**{**ledger.content, "planned": 5})
    write_outcome(ledger.trials()[0].folder, FINISHED)
    (ledger.trials()[0].folder / "metrics.csv").write_text("step,val_loss\n1,0.5\n2,0.25\n3,nan\n4,0.75\n")
    method, launch = Counting(tmp_path, 5), Planned({3: [FAILED]}, parallel=1)

    def propose(number: int) -> Trial:
        values = method.ask(number)
        if number == 2:
            return ledger.refused(number, values, "not to be composed")
        place = tmp_path / "jobs" / str(number)
        (place / "launch").mkdir(parents=True)
        (place / "launch" / "order.json").write_text("{}")
        (place / "trial.json").write_text(json.dumps({"number": number, "values": values}))
        return Trial(number, values, place)

    assert Controller(ledger, launch, Noted(), method=method, propose=propose).run() == 1
    assert (method.asked, launch.begun) == ([2, 3, 4], [1, 3, 4])
    assert method.told == {0: 0.25, 1: None, 2: None, 3: None, 4: None}


def test_every_job_is_composed_before_the_first_is_started(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError) as refused:
        planned_sweep([*RUN, "optimizer=adamw,sgd", "optimizer.lr=0.1", "optimizer.momentum=0.9"])
    assert "1 of 2 jobs cannot be carried out" in refused.value.what
    assert "optimizer=adamw: " in refused.value.found
    with pytest.raises(CompositionError, match="no task"):
        planned_sweep([*RUN, "task=null", "seed=1,2"])
    with pytest.raises(ConfigurationError, match="different launches"):
        planned_sweep([*RUN, "launch=here", "launch.parallel=1,2"])
    with pytest.raises(ConfigurationError, match="cannot go on with one"):
        run_sweep([*RUN, "seed=1,2", "run.resume=latest"])
    with pytest.raises(ConfigurationError, match="is not said"):
        planned_sweep([*RUN, "seed=1,2", "sweep.metric=test_loss"])
    assert not (tmp_path / "runs").exists()


def test_what_was_written_is_found_again(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    planned = planned_sweep([*RUN, "seed=1,2", "optimizer.lr=1e-3,1e-2", "run.name=s", "sweep.metric=val_loss",
                             "sweep.direction=min"])  # fmt: skip
    ledger = find_sweep("runs/s", Path("elsewhere"))
    assert ledger == planned.ledger == newest_sweep(Path("runs"))
    assert [trial.folder.name for trial in ledger.trials()][1] == "1_seed-1_lr-0.01"
    assert ledger.trials()[1].values == {"seed": "1", "optimizer.lr": "0.01"}
    assert ledger.content["goal"] == {"metric": "val_loss", "mode": "min"}
    (ledger.folder / "jobs" / ".4").mkdir()
    (ledger.folder / "jobs" / ".4" / "trial.json").write_text('{"number": 4, "values": {}}')
    assert len(ledger.trials()) == 4  # what was being written when the power failed is none yet
    with ledger.held(), pytest.raises(RunFolderError, match="carried out already"):
        run_sweep(["sweep.resume=latest"])
    with pytest.raises(ConfigurationError, match="is as it was written"):
        run_sweep(["sweep.resume=latest", "seed=3"])
    with pytest.raises(ConfigurationError, match="cannot go on like that"):
        run_sweep(["sweep.resume=latest", "launch.parallel=0"])
    (ledger.folder / "sweep.json").unlink()
    with pytest.raises(CheckpointError, match="never complete"):
        run_sweep([f"sweep.resume={ledger.folder}"])
    with pytest.raises(CheckpointError, match="there is no sweep"):
        run_sweep(["sweep.resume=latest"])
    with pytest.raises(CheckpointError, match="is no sweep"):
        run_sweep(["sweep.resume=nowhere"])


def test_a_folder_is_named_in_characters_that_need_no_quotes() -> None:
    values = {"optimizer.betas": "[0.9,0.99]", "data": "mine.Data", "x.y": "../../etc", "generate.prompt": "'a b'"}
    assert folder_name(7, values, 200) == "007_betas--0.9-0.99_mine.Data_y-..-..-etc_prompt--a-b"
    assert len(folder_name(1, {"seed": "1" * 300}, 2)) <= 62
