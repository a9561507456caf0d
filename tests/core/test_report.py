"""The report is one file that stands on its own and says what the run folder says, whatever that is."""

from __future__ import annotations

import base64
import json
import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from lightrail.errors import RunFolderError
from lightrail.report import write_report
from lightrail.report.curves import charts, draw

LOCK: dict[str, Any] = {
    "core": "0.1.0", "python": "3.11.9", "torch": "2.9.0", "lightning": "2.6.1", "seed": 7, "overrides": [],
    "git": {"commit": "4be1c2a90f77", "dirty": True}, "config": "9f3c21ab",
    "command": "train +optimizer=sophia",
    "plugins": [
        {"kind": "optimizer", "name": "sophia", "target": "lightrail_optimizers.sophia:SophiaG", "version": "0.1.0",
         "distribution": "lightrail",
         "options": {"lr": 0.001, "betas": [0.9, 0.95], "maximize": False, "foreach": None}}
    ],
}  # fmt: skip
SUMMARY: dict[str, Any] = {
    "name": "my run", "status": "finished", "wall_time": 754.0, "steps": 1080, "epochs": 20, "parameters": 23466,
    "metrics": {"train_loss": 0.0213, "val_accuracy": 0.98333, "test_accuracy": 0.977777, "test_loss": 0.0912},
    "device": "cpu", "checkpoint": "checkpoints/last.ckpt", "best_checkpoint": None, "resumed_from": "runs/before",
    "monitor": {"name": "val_accuracy", "mode": "max", "best": 0.98611}, "notes": ["one thing to know"],
}  # fmt: skip


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, and the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in ("meta", "img", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if "style" not in self.open else ""

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def run_folder(folder: Path, *, lock: dict[str, Any] = LOCK, summary: dict[str, Any] = SUMMARY) -> Path:
    rows = [f"{step},0,{2 / step},{3 / step if step % 4 == 0 else ''},{step / 40},{0.1}" for step in range(1, 41)]
    header = "step,epoch,train_loss,val_loss,val_accuracy,lr"
    (folder / "metrics.csv").write_text("\n".join([header, *rows, ""]))
    (folder / "config.yaml").write_text("optimizer:\n  lr: 0.001\n")
    (folder / "lock.json").write_text(json.dumps(lock))
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def picture() -> Figure:
    figure = Figure(figsize=(2, 2))
    figure.add_subplot().set_title("on the test set")
    return figure


def decoded(source: str) -> tuple[int, int]:
    """Width and height of a PNG whose every chunk has the right checksum and whose pixels inflate."""
    prefix, data = source.split(",")
    assert prefix == "data:image/png;base64"
    content = base64.b64decode(data, validate=True)
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    at, pixels = 8, b""
    while at < len(content):
        length, kind = struct.unpack(">I4s", content[at : at + 8])
        body = content[at + 8 : at + 8 + length]
        assert zlib.crc32(kind + body) == struct.unpack(">I", content[at + 8 + length : at + 12 + length])[0]
        pixels += body if kind == b"IDAT" else b""
        at += 12 + length
    width, height = struct.unpack(">II", content[16:24])
    assert len(zlib.decompress(pixels)) >= width * height
    return width, height


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    page = Page(write_report(run_folder(tmp_path), figures={"confusion_matrix": picture()}))
    assert page.open == []
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    assert not re.search(r"url\(|@import", page.source)
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset"):
            assert not re.match(r"\s*(\w+:)?//|https?:", attributes.get(name, ""))
    assert {link["href"] for link in page.all("a")} <= {path.name for path in tmp_path.iterdir()}
    assert "default-src 'none'" in page.source
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.yaml", "lock.json", "metrics.csv", "report.html", "summary.json"
    ]  # fmt: skip


def test_every_picture_decodes_and_is_told_in_words(tmp_path: Path) -> None:
    page = Page(write_report(run_folder(tmp_path), figures={"confusion_matrix": picture()}))
    alts = [image["alt"] for image in page.all("img")]
    assert [alt.split(".")[0] for alt in alts] == [
        "Curves of Accuracy over steps", "Curves of Loss over steps", "Curves of Learning rate over steps",
        "Confusion matrix",
    ]  # fmt: skip
    assert "train: from 2.000 at step 1 to 0.05000 at step 40; val: from 0.7500 at step 4" in alts[1]
    assert alts[3].endswith("on the test set")
    for image in page.all("img"):
        width, height = decoded(image["src"])
        assert width == pytest.approx(2 * int(image["width"]), abs=2)
        assert height == pytest.approx(2 * int(image["height"]), abs=2)


def test_it_says_what_the_files_say(tmp_path: Path) -> None:
    text = Page(write_report(run_folder(tmp_path))).text
    for words in (
        "my run", "finished", "1,080 steps", "20 epochs", "12 min 34 s", "23,466 parameters", "one thing to know",
        "Accuracy", "0.9778", "0.9833", "0.09120", "0.02130", "best val 1.000 at step 40", "train +optimizer=sophia",
        "sophia", "lightrail 0.1.0", "lr=0.001", "betas=[0.9, 0.95]", "maximize=false", "foreach=null", "runs/before",
        "4be1c2a90f77 with changes that were not committed", "checkpoints/last.ckpt", "val accuracy 0.9861",
        "torch 2.9.0",        "optimizer:\n  lr: 0.001", "lightrail_optimizers.sophia:SophiaG",
    ):  # fmt: skip
        assert words in text, words
    order = ["my run", "0.9778", "Curves", "Composition", "The run", "Configuration", "Resolved configuration"]
    assert [text.index(words, text.index("my run")) for words in order] == sorted(map(text.index, order))


def test_whatever_a_name_holds_is_text(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>\"&"
    plugin = dict.fromkeys(("kind", "name", "target", "distribution", "version"), evil)
    lock = LOCK | {"command": evil, "seed": evil, "git": {"commit": evil}, "config": evil,
                   "plugins": [plugin | {"options": {evil: evil}}]}  # fmt: skip
    summary = SUMMARY | {"name": evil, "status": evil, "notes": [evil], "device": evil, "resumed_from": evil,
                         "metrics": {evil: 1.0, f"val_{evil}": 2.0, "words": evil},
                         "monitor": {"name": evil, "mode": "max", "best": evil}}  # fmt: skip
    run_folder(tmp_path, lock=lock, summary=summary)
    (tmp_path / "config.yaml").write_text(f"key: {evil}\n")
    quoted = '"' + evil.replace('"', '""') + '"'
    (tmp_path / "metrics.csv").write_text(f"step,{quoted}\n1,1.0\n2,0.5\n")
    page = Page(write_report(tmp_path, figures={evil: picture()}))
    assert not page.all("script")
    assert page.open == []
    assert page.text.count("<script>") >= 15
    assert any(evil in image["alt"] for image in page.all("img"))


@pytest.mark.parametrize("name", ["metrics.csv", "config.yaml", "lock.json", "summary.json"])
def test_a_file_that_is_missing_is_said(tmp_path: Path, name: str) -> None:
    (run_folder(tmp_path) / name).unlink()
    text = Page(write_report(tmp_path)).text
    assert f"{name} is not in this folder." in text


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "step,loss\n1,fast\n", "\x00"])
def test_files_that_cannot_be_read_are_said(tmp_path: Path, content: str) -> None:
    for name in ("metrics.csv", "lock.json", "summary.json"):
        (tmp_path / name).write_text(content)
    text = Page(write_report(tmp_path)).text
    assert text.count("lock.json could not be read") == 2
    assert "summary.json could not be read" in text
    assert "config.yaml is not in this folder." in text


def test_an_empty_folder_gets_a_page_with_its_name(tmp_path: Path) -> None:
    assert tmp_path.name in Page(write_report(tmp_path)).text


def test_sparse_inputs_are_fine(tmp_path: Path) -> None:
    lock = LOCK | {"git": None, "plugins": [{"kind": "task", "name": "mine", "options": None}]}
    summary = {"status": "failed", "metrics": {"loss": float("nan")}, "monitor": None, "notes": None}
    text = Page(write_report(run_folder(tmp_path, lock=lock, summary=summary))).text
    assert "failed" in text
    assert "NaN" in text
    assert "None" not in text


def test_a_figure_that_fails_costs_only_itself(tmp_path: Path) -> None:
    class Broken(Figure):
        def savefig(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("no ink")

    page = Page(write_report(run_folder(tmp_path), figures={"ink_test": Broken(), "fine": picture()}))
    assert "Ink test could not be drawn: RuntimeError: no ink" in page.text
    assert page.all("img")[-1]["alt"].startswith("Fine")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"report\.html cannot be written"):
        write_report(tmp_path / "nowhere")


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    first = write_report(run_folder(tmp_path)).read_bytes()
    assert write_report(tmp_path).read_bytes() == first


def test_what_is_measured_shares_axes() -> None:
    two = [(1, 1.0), (2, 0.5)]
    metrics = {"lr-AdamW/pg1": two, "lr-AdamW/pg2": two, "sam/norm": two, "train_loss_step": two,
               "train_loss_epoch": two, "val/loss": two, "train_f1": two, "test_loss": [(2, 1.0)],
               "test_only": [(2, 1.0)], "one": [(1, 1.0)],
               "val_nan": [(1, float("nan")), (2, float("inf"))]}  # fmt: skip
    shown = {chart.base: [line.label for line in chart.series] for chart in charts(metrics, {})}
    assert list(shown.items()) == [
        ("loss", ["train (step)", "train (epoch)", "val"]),
        ("f1", ["train"]),
        ("learning_rate", ["AdamW/pg1", "AdamW/pg2"]),
        ("sam/norm", ["sam/norm"]),
    ]


def test_series_after_a_colon_share_the_chart_of_their_plugin() -> None:
    two = [(1, 1.0), (2, 0.5)]
    names = ["probe/sharpness:largest", "probe/trace", "other/sharpness:largest", "probe/sharpness:stable_below",
             "val_loss:x", "train_loss"]  # fmt: skip
    drawn = charts(dict.fromkeys(names, two), {})
    assert [(chart.base, [line.label for line in chart.series]) for chart in drawn] == [
        ("loss", ["train"]),
        ("loss:x", ["val"]),
        ("probe/sharpness", ["largest", "stable below"]),
        ("probe/trace", ["probe/trace"]),
        ("other/sharpness", ["largest"]),
    ]
    legend = draw(drawn[2]).axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["largest", "stable below"]


def test_the_best_point_follows_the_monitor() -> None:
    metrics = {"val_loss": [(1, 3.0), (2, 1.0), (3, 2.0)], "train_loss": [(1, 0.0), (2, 0.0)]}
    (lowest,) = charts(metrics, {"monitor": {"name": "val_loss", "mode": "min"}})
    (highest,) = charts(metrics, {"monitor": {"name": "val_loss", "mode": "max"}})
    assert (lowest.best, highest.best) == (("val", 2, 1.0), ("val", 1, 3.0))


def test_long_series_are_thinned_and_carry_their_mean() -> None:
    (chart,) = charts({"train_loss": [(step, float(step % 2)) for step in range(20_001)]}, {})
    raw, mean = draw(chart).axes[0].lines
    assert len(raw.get_xdata()) <= 4000  # type: ignore[arg-type]
    assert all(abs(value - 0.5) < 0.01 for value in mean.get_ydata()[100:-100])  # type: ignore[index]
    assert chart.remark == "bold: running mean"


def test_a_wide_range_is_drawn_on_a_logarithm() -> None:
    (wide, narrow) = charts({"a": [(1, 1e3), (2, 1e-3)], "b": [(1, 1.0), (2, -1.0)]}, {})
    assert (draw(wide).axes[0].get_yscale(), draw(narrow).axes[0].get_yscale()) == ("log", "linear")
