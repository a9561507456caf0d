"""What a terminal shows."""

from __future__ import annotations

import io
import sys

import pytest

from lightrail.run.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_one_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "160")
    progress = Progress(total=100, first=0, epochs=2)
    progress.begin_epoch(1)
    progress.show({"train_loss": 0.25, "lr": 0.1, "val_loss": 0.5, "val_accuracy": 0.75})
    assert progress._bar is not None
    progress._next_refresh = progress._bar.last_print_t = 0.0
    progress.to_step(40)
    progress._bar.refresh()
    progress.close()
    shown = terminal.getvalue()
    assert "epoch 2/2" in shown
    assert "40/100" in shown
    assert "loss 0.25 val 0.5 · val accuracy 0.75" in shown
    assert "\n" not in shown


def test_a_file_gets_a_line_an_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(total=100, first=0, epochs=2)
    progress.begin_epoch(0)
    progress.to_step(50)
    progress.show({"train_loss": 0.25})
    progress.end_epoch(50)
    progress.close()
    assert capsys.readouterr().err.startswith("epoch 1/2  step 50  train_loss 0.25  ")


def test_a_run_of_rounds_counts_rounds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(total=30, first=0, epochs=None, unit="rounds")
    progress.begin_epoch(4)
    progress.end_epoch(25)
    assert capsys.readouterr().err.startswith("round 25/30  ")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "160")
    progress = Progress(total=30, first=0, epochs=None, unit="rounds")
    progress.begin_epoch(4)
    assert progress._bar is not None
    progress._next_refresh = progress._bar.last_print_t = 0.0
    progress.to_step(25)
    progress._bar.refresh()
    progress.close()
    assert terminal.getvalue().count("rounds ") >= 1
    assert "25/30" in terminal.getvalue()
    assert "epoch" not in terminal.getvalue()


def test_other_ranks_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(total=None, first=0, epochs=None, enabled=False)
    progress.begin_epoch(0)
    progress.to_step(1)
    progress.show({"loss": 1.0})
    progress.end_epoch(1)
    progress.close()
    assert capsys.readouterr().err == ""
