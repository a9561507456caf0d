"""The table at the end of a run: aligned, complete, and with paths that one can click or pipe."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lightrail.report import result_table

SUMMARY: dict[str, Any] = {
    "name": "my run", "status": "finished", "wall_time": 12.34, "steps": 1080, "epochs": 20, "parameters": 23466,
    "metrics": {"train_loss": 0.0213, "test_loss": 0.0912, "val_accuracy": 0.98333, "test_accuracy": 0.977777,
                "extra": 3},
    "device": "cpu", "monitor": {"name": "val_accuracy"}, "notes": ["resume with run.resume=latest"],
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder whose path is wider than a terminal, and has brackets that a markup would swallow."""
    folder = tmp_path / ("long-" * 30) / "[bold]run[1]"
    folder.mkdir(parents=True)
    (folder / "report.html").write_text("")
    return folder


def test_plain_text(folder: Path) -> None:
    lines = str(result_table(SUMMARY, folder)).splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["train", "val", "test"],
        ["accuracy", "0.9833", "0.9778"],
        ["loss", "0.02130", "0.09120"],
        ["extra", "3"],
    ]
    assert lines[1].index("0.9833") + 6 == lines[0].index("val") + 3  # figures end under their heading
    assert lines[5:] == [
        "finished · 1,080 steps · 20 epochs · 12.3 s · 23,466 parameters · cpu",
        "",
        "resume with run.resume=latest",
        "",
        str(folder),
        str(folder / "report.html"),
    ]


def test_nothing_is_cut_or_coloured_in_a_pipe(folder: Path) -> None:
    stream = io.StringIO()
    result_table(SUMMARY, folder).print(stream)
    assert stream.getvalue() == f"{result_table(SUMMARY, folder)}\n"


def test_paths_stay_whole_on_a_terminal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    result_table(SUMMARY, folder).print(stream)
    assert "\x1b[" in stream.getvalue()
    assert f"m{folder}\x1b[0m" in stream.getvalue()
    assert f"m{folder}/report.html\x1b[0m" in stream.getvalue()


def test_a_rich_console_prints_it(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=300)
    console.print(result_table(SUMMARY, tmp_path))
    assert "0.9778" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_report_that_is_not_there_is_not_named(tmp_path: Path) -> None:
    assert str(result_table({}, tmp_path)) == str(tmp_path)


def test_a_failed_run_without_metrics(tmp_path: Path) -> None:
    text = str(result_table({"status": "failed", "metrics": {}, "steps": 1, "notes": None}, tmp_path))
    assert text == f"failed · 1 step\n\n{tmp_path}"
