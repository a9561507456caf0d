"""Every suite over everything that is installed, and over data that read files, with files to read."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any, ClassVar

import pytest

from lightrail.testing import Case, DataSuite, installed_cases
from lightrail.testing.suite import report
from lightrail_starter.data.image_folder import ImageFolder
from lightrail_starter.data.table import Table
from lightrail_starter.data.text_files import TextFiles


@pytest.mark.parametrize("case", installed_cases(), ids=str)
def test_conformance(case: Case) -> None:
    report(case.outcome())


class _OnFiles(DataSuite):
    """A suite whose options need files, made once a test."""

    options: Any = None

    @pytest.fixture(autouse=True)
    def _with_files(self, tmp_path: Path) -> None:
        self.options = self.files(tmp_path)

    def files(self, folder: Path) -> dict[str, Any]:
        raise NotImplementedError


def _write_table(path: Path, targets: list[str]) -> None:
    numbers = random.Random(0)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["a", "b", "c", "y"])
        writer.writerows([*(round(numbers.gauss(1, 2), 3) for _ in range(3)), target] for target in targets)


class TestTableOfNumbers(_OnFiles):
    plugin: ClassVar[Any] = Table

    def files(self, folder: Path) -> dict[str, Any]:
        _write_table(folder / "table.csv", [str(i / 7) for i in range(60)])
        return {"path": str(folder / "table.csv"), "target": "y", "batch_size": 8}


class TestTableOfClasses(_OnFiles):
    plugin: ClassVar[Any] = Table

    def files(self, folder: Path) -> dict[str, Any]:
        _write_table(folder / "table.csv", ["low", "high", "middle"] * 20)
        return {"path": str(folder / "table.csv"), "target": "y", "classes": True, "batch_size": 8}


class TestTextFiles(_OnFiles):
    plugin: ClassVar[Any] = TextFiles

    def files(self, folder: Path) -> dict[str, Any]:
        for i in range(12):
            (folder / f"{i}.txt").write_text(f"chapter {i}: " + " ".join(str(j * (i + 3)) for j in range(80)))
        return {"path": str(folder), "context": 16, "batch_size": 4}


class TestImageFolder(_OnFiles):
    plugin: ClassVar[Any] = ImageFolder

    def files(self, folder: Path) -> dict[str, Any]:
        image = pytest.importorskip("PIL.Image")
        for label, name in enumerate(("cat", "dog")):
            (folder / name).mkdir()
            for i in range(24):
                image.new("RGB", (10, 9), (i * 10, label * 200, 40)).save(folder / name / f"{i}.png")
        return {"path": str(folder), "image_size": 8, "batch_size": 4}
