"""Pictures in folders, and data sets of the hub."""

from __future__ import annotations

import builtins
import sys
import types

import numpy as np
import pytest
import torch

from lightrail.errors import ConfigurationError, DataError, PluginError
from lightrail_starter.data.hub import Hub
from lightrail_starter.data.image_folder import ImageFolder

Image = pytest.importorskip("PIL.Image")


def draw(folder, count, colour, size=(10, 6)):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", size, colour).save(folder / f"{i}.{'png' if i % 2 else 'jpg'}")


def test_pictures_are_resized_labelled_and_split(tmp_path):
    draw(tmp_path / "red", 20, (255, 0, 0))
    draw(tmp_path / "green", 20, (0, 255, 0), size=(4, 4))
    data = ImageFolder(str(tmp_path), image_size=8, batch_size=4)
    sizes = {"in_features": 192, "in_channels": 3, "image_size": 8, "num_classes": 2, "out_features": 2}
    assert data.dimensions() == sizes
    assert data.class_names == ["green", "red"]
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 8, 8)
    assert torch.equal(images[:, 0].mean(dim=(1, 2)) > 0.9, labels == 1)
    files = [set(part.files) for part in (data.parts.train, data.parts.val, data.parts.test)]
    assert [len(part) for part in files] == [28, 6, 6]
    assert len(set.union(*files)) == 40
    assert data.parts.train[0][0].shape == (3, 8, 8)


def test_gray_pictures_have_one_channel(tmp_path):
    draw(tmp_path / "a", 10, (255, 255, 255))
    data = ImageFolder(str(tmp_path), image_size=4, grayscale=True, batch_size=2)
    assert next(iter(data.train_dataloader()))[0].shape == (2, 1, 4, 4)
    assert data.dimensions()["in_features"] == 16


def test_folders_of_parts_are_the_parts_and_missing_ones_are_cut_from_training(tmp_path):
    for name in ("a", "b"):
        draw(tmp_path / "train" / name, 20, (9, 9, 9))
        draw(tmp_path / "validation" / name, 3, (9, 9, 9))
    data = ImageFolder(str(tmp_path), batch_size=2)
    assert len(data.parts.val) == 6
    assert len(data.parts.train) == 34
    assert len(data.parts.test) == 6
    assert not set(data.parts.train.files) & set(data.parts.test.files)
    draw(tmp_path / "test" / "c", 1, (9, 9, 9))
    with pytest.raises(DataError, match="class that training has not"):
        ImageFolder(str(tmp_path)).setup("fit")


def test_bad_folders_and_pictures_are_refused(tmp_path):
    with pytest.raises(DataError, match="no file or folder"):
        ImageFolder(str(tmp_path / "none")).dimensions()
    with pytest.raises(DataError, match="no pictures"):
        ImageFolder(str(tmp_path)).dimensions()
    draw(tmp_path / "a", 10, (9, 9, 9))
    for file in (tmp_path / "a").iterdir():
        file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(DataError, match=r"the picture .* cannot be read"):
        next(iter(ImageFolder(str(tmp_path), batch_size=2).train_dataloader()))
    with pytest.raises(ConfigurationError, match="image_size"):
        ImageFolder(str(tmp_path), image_size=0)


def without(monkeypatch, package):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named '{package}'", name=package)
        return real(name, *args, **kwargs)

    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setattr("importlib.import_module", lambda name: refuse(name))


@pytest.mark.parametrize(
    ("package", "extra", "make"),
    [
        ("PIL", "images", lambda: ImageFolder("anywhere")),
        ("datasets", "hub", lambda: Hub("anything", text="text").setup("fit")),
    ],
)
def test_a_missing_library_names_its_extra(monkeypatch, package, extra, make):
    without(monkeypatch, package)
    with pytest.raises(PluginError, match=f"'{extra}'") as caught:
        make()
    assert caught.value.remedy == f"Run `pip install 'lightrail[{extra}]'`."


class FakeTable:
    """As much of a table of the library ``datasets`` as is used."""

    def __init__(self, columns, features=None):
        self.columns = columns
        self.column_names = list(columns)
        self.features = features or dict.fromkeys(columns)

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key):
        if isinstance(key, str):
            return self.columns[key]
        return {name: [values[i] for i in key] for name, values in self.columns.items()}

    def select(self, indices):
        return FakeTable({n: [v[i] for i in indices] for n, v in self.columns.items()}, self.features)


@pytest.fixture
def hub(monkeypatch):
    """A library ``datasets`` whose hub holds what the test puts there."""
    shelf = {}
    module = types.ModuleType("datasets")

    def load_dataset(name, config):
        if name not in shelf:
            raise FileNotFoundError(f"{name} is not on the hub")
        return shelf[name]

    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return shelf


def test_pictures_of_the_hub(hub):
    pictures = [Image.fromarray(np.full((5, 5), 10 * i, dtype=np.uint8)) for i in range(20)]
    names = types.SimpleNamespace(names=["even", "odd"])
    labels = [i % 2 for i in range(20)]
    hub["mnist"] = {"train": FakeTable({"image": pictures, "label": labels}, {"image": None, "label": names})}
    data = Hub("mnist", image="image", image_size=5, grayscale=True, batch_size=4)
    sizes = {"in_features": 25, "in_channels": 1, "image_size": 5, "num_classes": 2, "out_features": 2}
    assert data.dimensions() == sizes
    assert data.class_names == ["even", "odd"]
    seen = []
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for images, labels in loader:
            values = (images[:, 0, 0, 0] * 25.5).round().long()
            assert torch.equal(values % 2, labels)
            seen += values.tolist()
    assert sorted(seen) == list(range(20))


def test_labels_that_are_words_become_indices(hub):
    table = FakeTable({"img": [Image.new("L", (2, 2))] * 10, "kind": ["b", "a"] * 5})
    hub["x"] = {"train": table, "validation": table, "test": table}
    data = Hub("x", image="img", label="kind", batch_size=10)
    assert data.dimensions()["num_classes"] == 2
    assert data.class_names == ["a", "b"]
    assert next(iter(data.val_dataloader()))[1].tolist() == [1, 0] * 5
    assert len(data.parts.train) == 10


def test_text_of_the_hub(hub):
    rows = [f"row {i}: some words." for i in range(50)]
    hub["wiki"] = {"train": FakeTable({"text": rows}), "test": FakeTable({"text": rows[:10]})}
    data = Hub("wiki", text="text", context=16, batch_size=4)
    assert data.dimensions() == {"vocab_size": 256, "context": 16}
    inputs, targets = next(iter(data.test_dataloader()))
    assert bytes(inputs[0].tolist()) == b"row 0: some word"
    assert bytes(targets[0].tolist()) == b"ow 0: some words"


def test_what_the_hub_lacks_is_named(hub):
    hub["x"] = {"train": FakeTable({"words": ["a"] * 20})}
    hub["y"] = {"other": FakeTable({"words": ["a"] * 20})}
    with pytest.raises(DataError, match="cannot be loaded") as caught:
        Hub("z", text="words").setup("fit")
    assert "FileNotFoundError" in caught.value.found
    with pytest.raises(DataError, match="no column 'word'") as caught:
        Hub("x", text="word").setup("fit")
    assert "Did you mean 'words'" in caught.value.remedy
    with pytest.raises(DataError, match="no part 'train'"):
        Hub("y", text="words").setup("fit")
    with pytest.raises(DataError, match="train part"):
        Hub("x", text="words", context=64).setup("fit")
    with pytest.raises(ConfigurationError, match="which column"):
        Hub("x")
