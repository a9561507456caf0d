"""Digits, texts, and what all data modules here share."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DistributedSampler

from lightrail.errors import ConfigurationError, DataError
from lightrail_starter.data.byte_windows import ByteWindows
from lightrail_starter.data.digits import Digits
from lightrail_starter.data.docs import Docs
from lightrail_starter.data.splits import Fractions, split_documents, split_indices
from lightrail_starter.data.text_files import TextFiles


def rows_of(dataset):
    return {row.numpy().tobytes() for row in dataset.tensors[0]}


def test_digits_have_the_shapes_and_ranges_that_they_promise():
    data = Digits(batch_size=32)
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (32, 1, 8, 8)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert 0 <= images.min() < images.max() <= 1
    whole = torch.cat([part.tensors[0] for part in (data.parts.train, data.parts.val, data.parts.test)])
    assert len(whole) == 1797
    assert data.dimensions()["in_features"] == images[0].numel()
    assert data.class_names == list("0123456789")


def test_digits_are_the_real_ones():
    from sklearn.datasets import load_digits

    data = Digits()
    known: Any = load_digits()
    parts = (data.parts.train, data.parts.val, data.parts.test)
    mine = sorted((image.numpy().tobytes(), int(y)) for part in parts for image, y in zip(*part.tensors, strict=True))
    theirs = sorted(
        ((image / 16).astype(np.float32).tobytes(), int(y)) for image, y in zip(known.data, known.target, strict=True)
    )
    assert mine == theirs


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setattr("lightrail_starter.data.digits.find_spec", lambda name: None)
    with pytest.raises(DataError, match="embedded digits") as caught:
        Digits().setup("fit")
    assert "pip install" in caught.value.remedy


def test_the_split_is_disjoint_stratified_and_fixed_by_its_seed():
    labels = np.repeat([0, 1, 2], [100, 200, 300])
    first, again, other = (split_indices(labels, Fractions(0.1, 0.2), seed) for seed in (0, 0, 1))
    for name in ("train", "val", "test"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.test, other.test)
    assert sorted(np.concatenate([first.train, first.val, first.test])) == list(range(600))
    assert [int((labels[first.test] == c).sum()) for c in range(3)] == [20, 40, 60]


def test_the_split_of_the_digits_ignores_the_seed_of_the_run():
    torch.manual_seed(1)
    first = Digits().parts.test.tensors[0]
    torch.manual_seed(2)
    np.random.seed(2)
    assert torch.equal(first, Digits().parts.test.tensors[0])
    assert not torch.equal(first, Digits(split_seed=1).parts.test.tensors[0])


def test_training_is_shuffled_from_the_global_generator_and_nothing_else_is():
    data = Digits(batch_size=64)
    torch.manual_seed(5)
    first = [y for _, y in data.train_dataloader()]
    second = [y for _, y in data.train_dataloader()]
    torch.manual_seed(5)
    again = [y for _, y in data.train_dataloader()]
    assert torch.equal(torch.cat(first), torch.cat(again))
    assert not torch.equal(torch.cat(first), torch.cat(second))
    assert sum(map(len, first)) == len(data.parts.train)  # the last batch is kept
    for loader in (data.val_dataloader(), data.test_dataloader()):
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(loader, loader, strict=True))


def test_the_loader_takes_a_distributed_sampler():
    from lightning.pytorch.utilities.data import _update_dataloader

    loader: Any = Digits(batch_size=16).train_dataloader()
    halves = [
        _update_dataloader(loader, DistributedSampler(loader.dataset, num_replicas=2, rank=rank, shuffle=False))
        for rank in range(2)
    ]
    first = [torch.cat([x.flatten(1) for x, _ in half]) for half in halves]
    assert len(first[0]) == len(first[1]) == -(-len(loader.dataset) // 2)
    assert torch.equal(first[1][0], loader.dataset.tensors[0][1].flatten())


def test_workers_yield_the_same_batches():
    torch.manual_seed(0)
    alone = [y for _, y in Digits(batch_size=256).train_dataloader()]
    torch.manual_seed(0)
    helped = [y for _, y in Digits(batch_size=256, num_workers=1).train_dataloader()]
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))


def test_a_part_that_cannot_fill_one_batch_is_refused():
    with pytest.raises(DataError, match="train part") as caught:
        Digits(batch_size=5000).setup("fit")
    assert "at most 1259" in caught.value.remedy
    with pytest.raises(DataError, match="val part"):
        Digits(val_fraction=1e-6).setup("fit")


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 0}, {"num_workers": -1}, {"val_fraction": 0.0}, {"val_fraction": 0.6, "test_fraction": 0.5}],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigurationError):
        Digits(**options)


def test_windows_are_the_text_and_its_next_bytes():
    text = bytes(range(20))
    windows = ByteWindows(text, context=4)
    assert len(windows) == 4  # starts 0, 4, 8, 12; a fifth would lack its last target
    inputs, targets = windows.__getitems__([0, 3])
    assert inputs.tolist() == [[0, 1, 2, 3], [12, 13, 14, 15]]
    assert targets.tolist() == [[1, 2, 3, 4], [13, 14, 15, 16]]
    assert inputs.dtype == targets.dtype == torch.int64
    assert len(ByteWindows(text, context=4, stride=1)) == 16
    assert len(ByteWindows(text[:4], context=4)) == 0
    assert len(ByteWindows(text[:5], context=4)) == 1
    assert len(ByteWindows(b"", context=4)) == 0


def test_docs_are_split_by_topic():
    data = Docs(context=64)
    documents = data.documents()
    assert len(documents) > 50
    whole = sum(map(len, documents))
    for name, share in (("train", 0.8), ("val", 0.1), ("test", 0.1)):
        text = getattr(data.texts, name)
        assert abs(len(text) / whole - share) < 0.06
    where = {d: [n for n in ("train", "val", "test") if d in getattr(data.texts, n)] for d in documents if len(d) > 900}
    assert all(len(parts) == 1 for parts in where.values())
    assert data.dimensions() == {"vocab_size": 256, "context": 64}
    assert Docs(context=64).texts == data.texts
    assert Docs(context=64, split_seed=3).texts != data.texts


def test_docs_without_topics_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match="documentation topics"):
        Docs().setup("fit")


def test_a_folder_of_texts_below_ten_files_is_cut_at_its_end(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "a.txt").write_bytes(b"a" * 700)
    (tmp_path / "below" / "b.txt").write_bytes(b"b" * 300)
    (tmp_path / "c.md").write_bytes(b"c" * 300)
    data = TextFiles(str(tmp_path), context=16, batch_size=2)
    data.setup("fit")
    assert data.texts.train.startswith(b"a" * 700)
    assert set(data.texts.test) == {ord("b")}
    inputs, targets = next(iter(data.train_dataloader()))
    assert inputs.shape == targets.shape == (2, 16)


def test_many_texts_are_split_by_file():
    documents = [bytes([65 + i]) * 100 for i in range(20)]
    parts = split_documents(documents, Fractions(0.1, 0.1), seed=0)
    letters = [set(part) - {ord("\n")} for part in (parts.train, parts.val, parts.test)]
    assert [len(found) for found in letters] == [16, 2, 2]
    assert not letters[0] & letters[1]
    assert not letters[1] & letters[2]


def test_one_text_file_will_do(tmp_path):
    file = tmp_path / "any.name"
    file.write_bytes(bytes(range(256)) * 10)
    data = TextFiles(str(file), context=8)
    assert data.texts.train + data.texts.val + data.texts.test == file.read_bytes()


def test_texts_that_are_missing_empty_or_too_short_are_refused(tmp_path):
    with pytest.raises(DataError, match="no file or folder"):
        TextFiles(str(tmp_path / "none")).dimensions()
    with pytest.raises(DataError, match="no text"):
        TextFiles(str(tmp_path)).dimensions()
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(DataError, match="no text"):
        TextFiles(str(tmp_path)).setup("fit")
    (tmp_path / "a.txt").write_bytes(b"short" * 30)
    with pytest.raises(DataError, match="shorter than one window") as caught:
        TextFiles(str(tmp_path), context=64).setup("fit")
    assert "data.context" in caught.value.remedy
    with pytest.raises(DataError, match="train part"):
        TextFiles(str(tmp_path), context=8, batch_size=100).setup("fit")
