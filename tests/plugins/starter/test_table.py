"""A user's table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lightrail.errors import ConfigurationError, DataError
from lightrail_starter.data.table import Table


def write(tmp_path, text):
    path = tmp_path / "table.csv"
    path.write_text(text)
    return str(path)


@pytest.fixture
def numbers(tmp_path):
    random = np.random.RandomState(0)
    values = random.randn(200, 3) * [1, 10, 0] + [5, -3, 7]
    target = 100 + 20 * values[:, 0]
    lines = [",".join(map(repr, map(float, [*row, y]))) for row, y in zip(values, target, strict=True)]
    return write(tmp_path, "a,b,same,price\n" + "\n".join(lines) + "\n")


def test_features_and_target_are_standardised_with_training_statistics(numbers):
    data = Table(numbers, "price", batch_size=16)
    assert data.dimensions() == {"in_features": 3, "out_features": 1}
    x, y = data.parts.train.tensors
    assert x.dtype == y.dtype == torch.float32
    assert torch.allclose(x.mean(0), torch.zeros(3), atol=1e-5)
    assert torch.allclose(x.std(0, correction=0), torch.tensor([1.0, 1.0, 0.0]), atol=1e-5)  # a constant column stays 0
    assert abs(float(y.mean())) < 1e-5
    assert abs(float(y.std(correction=0)) - 1) < 1e-5
    held_out = data.parts.test.tensors[0]
    assert abs(float(held_out[:, 0].mean())) > 1e-5  # its own statistics were not used
    assert len(x) + len(data.parts.val) + len(held_out) == 200


def test_the_way_back_to_the_units_of_the_file(numbers):
    data = Table(numbers, "price")
    y = torch.cat([part.tensors[1] for part in (data.parts.train, data.parts.val, data.parts.test)])
    found = sorted(data.original_units(y).tolist())
    known = sorted(float(line.rsplit(",", 1)[1]) for line in Path(numbers).read_text().splitlines()[1:])
    assert np.allclose(found, known, rtol=1e-5)
    assert abs(data.target_scale - np.std(known)) < 2


def test_a_target_of_words_makes_classes(tmp_path):
    path = write(tmp_path, "x,kind,id\n" + "\n".join(f"{i},{('cat', 'dog', 'eel')[i % 3]},{i}n" for i in range(90)))
    data = Table(path, "kind", classes=True, ignore=["id"], batch_size=4)
    assert data.dimensions() == {"in_features": 1, "out_features": 3, "num_classes": 3}
    assert data.class_names == ["cat", "dog", "eel"]
    _, y = next(iter(data.val_dataloader()))
    assert y.dtype == torch.int64
    assert data.original_units(y) is y
    raw = torch.bincount(data.parts.train.tensors[1])
    assert raw.max() - raw.min() <= 1  # stratified


def test_classes_named_by_numbers_come_in_the_order_of_numbers(tmp_path):
    path = write(tmp_path, "x,y\n" + "\n".join(f"{i},{i % 11}" for i in range(220)))
    data = Table(path, "y", classes=True)
    data.dimensions()
    assert data.class_names == [str(i) for i in range(11)]


@pytest.mark.parametrize(
    ("text", "what", "found"),
    [
        ("", "is empty", "no lines"),
        ("\n\n", "is empty", "no lines"),
        ("a,y\n", "has no rows", "header"),
        ("a,b\n1,2\n", "has no column 'y'", "a, b"),
        ("a,a,y\n1,2,3\n", "two columns named 'a'", "a, a, y"),
        ("a,y\n1,2\n3\n", "line 3 .* 1 cells where the header has 2", "3"),
        ("a,y\n1,2\nx,3\n", "line 3, column 'a'", "'x'"),
        ("a,y\n1,2\n4,abc\n", "line 3, column 'y'", "'abc'"),
        ("a,y\n\n1,2\n\n,3\n", "line 5, column 'a'", "an empty cell"),
        ('"a","y"\n"1","2"\n"nan","3"\n', "line 3, column 'a'", "'nan'"),
        ("a,y\n1,2\ninf,3\n", "line 3, column 'a'", "'inf'"),
        ("y\n1\n2\n", "has no features", "target alone"),
    ],
)
def test_what_is_wrong_with_a_file_is_named_where_it_is(tmp_path, text, what, found):
    with pytest.raises(DataError, match=what) as caught:
        Table(write(tmp_path, text), "y").dimensions()
    assert found in caught.value.found
    assert caught.value.remedy


def test_a_line_is_counted_as_a_person_counts_even_after_a_cell_of_two_lines(tmp_path):
    path = write(tmp_path, 'note,a,y\n"two\nlines",1,2\nplain,oops,3\n')
    with pytest.raises(DataError, match="line 4, column 'a'"):
        Table(path, "y", ignore=["note"]).dimensions()


def test_words_in_the_target_of_a_regression_point_to_classes(tmp_path):
    with pytest.raises(DataError, match="column 'y'") as caught:
        Table(write(tmp_path, "a,y\n1,yes\n"), "y").dimensions()
    assert "data.classes=true" in caught.value.remedy


def test_a_row_without_a_class_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"line 3, column 'y' .* names no class"):
        Table(write(tmp_path, "a,y\n1,yes\n2,\n"), "y", classes=True).dimensions()


def test_files_that_are_missing_or_no_tables_are_refused(tmp_path):
    write(tmp_path, "a,y\n1,2\n")
    with pytest.raises(DataError, match="no file or folder") as caught:
        Table(str(tmp_path / "tabel.csv"), "y").dimensions()
    assert "Did you mean 'table.csv'" in caught.value.remedy
    with pytest.raises(DataError, match="is a folder"):
        Table(str(tmp_path), "y").dimensions()
    (tmp_path / "binary.csv").write_bytes(b"a,y\n\xff\xfe\x00,1\n")
    with pytest.raises(DataError, match="not a text table"):
        Table(str(tmp_path / "binary.csv"), "y").dimensions()
    with pytest.raises(DataError, match="train part"):
        Table(str(tmp_path / "table.csv"), "y", batch_size=4).setup("fit")
    with pytest.raises(ConfigurationError, match="one character"):
        Table(str(tmp_path / "table.csv"), "y", delimiter="::").dimensions()


def test_a_byte_order_mark_and_another_delimiter_are_no_trouble(tmp_path):
    path = tmp_path / "excel.csv"
    path.write_text("a;y\n" + "\n".join(f"{i};{i}.5" for i in range(30)), encoding="utf-8-sig")
    assert Table(str(path), "y", delimiter=";").dimensions() == {"in_features": 1, "out_features": 1}
