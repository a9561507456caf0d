"""`lightrail plugins NAME --plot`: the curve of a schedule in the terminal and as a picture."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightrail.catalogue import available
from lightrail.command import main
from lightrail.command.schedule_plot import text_picture

Captured = pytest.CaptureFixture[str]
BRAILLE = re.compile("[\u2801-\u28ff]")


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("LIGHTRAIL_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.delenv("LIGHTRAIL_TRACEBACK", raising=False)
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def drawn(capsys: Captured, *words: str) -> list[str]:
    status = main(["plugins", *words])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out.splitlines()


def heights(lines: list[str]) -> list[float]:
    """The middle of the dots in each column, 1 at the top of the axes and 0 at the bottom."""
    rows = [re.split("[┤│]", line, maxsplit=1)[1] for line in lines if re.search("[┤│]", line)]
    found = []
    for column in range(max(map(len, rows))):
        dots = []
        for row, cells in enumerate(rows):
            code = ord(cells[column]) - 0x2800 if column < len(cells) and cells[column] != " " else 0
            dots += [4 * row + k for k, mask in enumerate((0x09, 0x12, 0x24, 0xC0)) if code & mask]
        found.append(1 - sum(dots) / len(dots) / (4 * len(rows) - 1))
    return found


def refused(capsys: Captured, *words: str) -> str:
    assert main(["plugins", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    for part in ("found:", "allowed:", "remedy:"):
        assert part in captured.err
    assert "Traceback" not in captured.err
    return captured.err


class TestInTheTerminal:
    def test_a_straight_line(self, capsys: Captured) -> None:
        lines = drawn(capsys, "linear_decay", "--plot")
        assert lines[0] == "linear_decay: share of the learning rate"
        assert max(map(len, lines)) <= 80
        curve = heights(lines)
        assert len(curve) == 80 - 9
        for column, height in enumerate(curve):
            assert height == pytest.approx(1 - (column + 0.5) / len(curve), abs=0.03)
        assert [re.sub("[┤│└].*", "", line).strip() for line in lines[1:14:3]] == ["1", "0.75", "0.5", "0.25", "0"]
        assert lines[-1].split() == ["steps", "0", "250", "500", "750", "1,000"]

    def test_options_follow_the_flag_or_the_name(self, capsys: Captured) -> None:
        lines = drawn(capsys, "cosine", "--plot", "final=0.5", "warmup_steps=0.25")
        assert lines[0] == "cosine final=0.5 warmup_steps=0.25: share of the learning rate"
        curve = heights(lines)
        assert curve[0] < 0.1
        assert curve[len(curve) // 4 + 1] > 0.95
        assert curve[-1] == pytest.approx(0.5, abs=0.03)
        for words in (
            ("cosine", "final=0.5", "warmup_steps=0.25", "--plot"),
            ("cosine", "final=0.5", "--plot", "warmup_steps=0.25"),
            ("--plot", "cosine", "final=0.5", "schedule.warmup_steps=0.25"),
            ("--plot", "final=0.5", "cosine", "warmup_steps=0.25", "--kind", "schedule"),
        ):
            assert drawn(capsys, *words)[1:] == lines[1:]

    def test_every_schedule_that_is_installed(self, capsys: Captured) -> None:
        for name in available("schedule"):
            assert BRAILLE.search("\n".join(drawn(capsys, name, "--plot"))), name

    def test_samples_where_the_batch_size_is_known(self, capsys: Captured) -> None:
        lines = drawn(capsys, "cosine", "--plot", "--batch-size", "32")
        assert lines[-1].split() == ["samples", "0", "8,000", "16,000", "24,000", "32,000"]
        lines = drawn(capsys, "batch_scaling", "--plot", "--batch-size", "128", "base_batch_size=64")
        assert "2 ┤" in lines[1]
        assert lines[-1].startswith("note: lr times 2")

    def test_restarts_are_joined_and_narrow_terminals_served(self, monkeypatch: pytest.MonkeyPatch) -> None:
        saw = [1 - (t % 100) / 100 for t in range(1000)]
        for width in (10, 30, 200):
            lines = text_picture(saw, width)
            assert max(map(len, lines)) <= max(width, 29)
            full = [column for column in zip(*(line.ljust(200)[9:] for line in lines[:13]), strict=True)
                    if all(BRAILLE.match(cell) for cell in column)]  # fmt: skip
            assert len(full) >= 9
        assert text_picture([0.0], 60)  # a curve without height is a curve


class TestAsAPicture:
    @pytest.mark.parametrize(
        ("name", "begins"), [("curve.png", b"\x89PNG"), ("curve.svg", b"<?xml"), ("C.PNG", b"\x89")]
    )
    def test_into_a_file(self, capsys: Captured, tmp_path: Path, name: str, begins: bytes) -> None:
        file = tmp_path / name
        lines = drawn(capsys, "cosine", "--plot", str(file), "final=0.1", "--batch-size", "8")
        assert lines == [f"cosine final=0.1: drawn into {file}"]
        assert file.read_bytes().startswith(begins)

    def test_a_file_may_have_an_equals_sign(self, capsys: Captured, tmp_path: Path) -> None:
        drawn(capsys, "cosine", "--plot", str(tmp_path / "final=0.svg"))
        assert (tmp_path / "final=0.svg").exists()

    def test_a_file_that_cannot_be_written(self, capsys: Captured, tmp_path: Path) -> None:
        assert "cannot be written" in refused(capsys, "cosine", "--plot", str(tmp_path / "no" / "curve.png"))
        assert ".svg" in refused(capsys, "cosine", "--plot", "curve.gif")


class TestMistakes:
    def test_what_is_no_schedule(self, capsys: Captured) -> None:
        error = refused(capsys, "adamw", "--plot")
        assert error.startswith("'adamw' is no schedule")
        assert "optimizer" in error
        assert "cosine" in error
        assert "no name" in refused(capsys, "--plot")
        assert "Did you mean 'cosine'?" in refused(capsys, "cosin", "--plot")

    def test_options(self, capsys: Captured) -> None:
        assert "Did you mean 'final'?" in refused(capsys, "cosine", "--plot", "finall=0.1")
        assert "final has the wrong type" in refused(capsys, "cosine", "--plot", "final=low")
        assert "final is out of range" in refused(capsys, "cosine", "--plot", "final=3")
        assert "one value" in refused(capsys, "cosine", "--plot", "final=0.1,0.2")
        assert "is not an override" in refused(capsys, "cosine", "--plot", "final=0.1", "low")
        assert "--batch-size" in refused(capsys, "cosine", "--plot", "--batch-size", "0")

    def test_options_without_a_plot(self, capsys: Captured) -> None:
        assert "plot only" in refused(capsys, "cosine", "final=0.1")
        assert "plot only" in refused(capsys, "cosine", "--batch-size", "3")
