"""Reading a CSV file strictly: whatever is wrong is named by the line and column that a person would count."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from lightrail.errors import ConfigurationError, DataError, closest
from lightrail_starter.data.files import existing, readable

__all__ = ["Sheet", "column", "numbers", "read_sheet", "refuse_unlabelled"]

ALLOWED = "a CSV file with a header line"


@dataclass(frozen=True)
class Sheet:
    """The cells of a file, as text.

    Args:
        path: The file.
        header: The names of the columns.
        rows: The cells, all rows as long as the header.
        lines: The line of the file where each row ends, counted from 1.
    """

    path: Path
    header: list[str]
    rows: list[list[str]]
    lines: list[int]


def read_sheet(path: Path, delimiter: str = ",") -> Sheet:
    """Reads a file whole; blank lines are passed over.

    Raises:
        DataError: The file is missing, empty, not text, or ragged.
    """
    if len(delimiter) != 1:
        raise ConfigurationError(
            "delimiter is not one character",
            found=f"delimiter={delimiter!r}",
            allowed="one character, such as , or ; or a tab",
            remedy="Set data.delimiter to one character.",
        )
    if existing(path, ALLOWED).is_dir():
        _refuse(path, f"{path} is a folder", "a folder", "Set data.path to one CSV file.")
    rows, lines = [], []
    try:
        with readable(path), open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter=delimiter)
            for row in reader:
                if any(cell.strip() for cell in row):
                    rows.append(row)
                    lines.append(reader.line_num)
    except (UnicodeDecodeError, csv.Error) as error:
        _refuse(path, f"{path} is not a text table", str(error), "Save it as CSV in UTF-8.")
    if not rows:
        _refuse(path, f"{path} is empty", "no lines", "Set data.path to a file with a header and rows.")
    sheet = Sheet(path, [name.strip() for name in rows[0]], rows[1:], lines[1:])
    _check(sheet)
    return sheet


def _check(sheet: Sheet) -> None:
    if not sheet.rows:
        _refuse(sheet.path, f"{sheet.path} has no rows", "a header only", "Add rows below the header.")
    twice = sorted({name for name in sheet.header if sheet.header.count(name) > 1})
    if twice:
        _refuse(sheet.path, f"{sheet.path} has two columns named '{twice[0]}'", ", ".join(sheet.header), "Rename one.")
    for row, line in zip(sheet.rows, sheet.lines, strict=True):
        if len(row) != len(sheet.header):
            raise DataError(
                f"line {line} of {sheet.path} has {len(row)} cells where the header has {len(sheet.header)}",
                found=", ".join(row),
                allowed=f"{len(sheet.header)} cells: {', '.join(sheet.header)}",
                remedy="Mend that line; a cell that holds the delimiter must stand in quotes.",
            )


def _refuse(path: Path, what: str, found: str, remedy: str) -> NoReturn:
    raise DataError(what, found=found, allowed=ALLOWED, remedy=remedy)


def column(sheet: Sheet, name: str) -> int:
    """The position of a column.

    Raises:
        DataError: There is none of that name.
    """
    if name in sheet.header:
        return sheet.header.index(name)
    raise DataError(
        f"{sheet.path} has no column '{name}'",
        found=f"the columns {', '.join(sheet.header)}",
        allowed="the name of one of those columns",
        remedy=f"{closest(name, sheet.header)}Set data.target (or data.ignore) to one of them.",
    )


def numbers(sheet: Sheet, names: Sequence[str], remedy: str = "") -> np.ndarray:
    """The cells of some columns as numbers, ``[rows, columns]`` float64.

    Args:
        sheet: The cells.
        names: The columns.
        remedy: What else the user might do about a cell that is not a number.

    Raises:
        DataError: There is no column, or a cell is not a finite number.
    """
    if not names:
        _refuse(sheet.path, f"{sheet.path} has no features", "the target alone", "Add columns with numbers.")
    where = [column(sheet, name) for name in names]
    try:
        values = np.array([[float(row[i]) for i in where] for row in sheet.rows])
        if np.isfinite(values).all():
            return values
    except ValueError:
        pass
    row, name = next((r, n) for r in range(len(sheet.rows)) for n in names if not _is_number(sheet, r, n))
    cell = sheet.rows[row][column(sheet, name)]
    raise DataError(
        f"line {sheet.lines[row]}, column '{name}' of {sheet.path} is not a number",
        found=repr(cell) if cell.strip() else "an empty cell",
        allowed="a finite number, such as 3.5 or -1e-3",
        remedy=f"Mend that cell, or leave the column out with data.ignore=[{name}]{remedy}."
        if not remedy
        else f"Mend that cell{remedy}.",
    )


def _is_number(sheet: Sheet, row: int, name: str) -> bool:
    try:
        return math.isfinite(float(sheet.rows[row][column(sheet, name)]))
    except ValueError:
        return False


def refuse_unlabelled(sheet: Sheet, row: int, name: str) -> NoReturn:
    """Refuses a row whose class is missing."""
    raise DataError(
        f"line {sheet.lines[row]}, column '{name}' of {sheet.path} names no class",
        found="an empty cell",
        allowed="a word or a number",
        remedy="Name its class, or remove the line.",
    )
