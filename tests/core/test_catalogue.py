"""Discovery: what is installed is found without importing it, and only what is named can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from lightrail.catalogue import Plugin, available, find, import_target, load, plugins
from lightrail.catalogue.schema import Schema
from lightrail.errors import PluginError
from lightrail.kinds import KINDS

Install = Callable[..., Path]

CLASSES = '''
"""A stranger's optimizers, which need no torch to be listed."""

class Optimizer:
    pass

class Theirs(Optimizer):
    """Walks downhill. Slowly.

    Args:
        params: What is optimized.
        lr: The step size,
            in units of the loss.
        mode: How.
    """
    def __init__(self, params, lr: float = 0.5, *, mode: "Literal['fast', 'safe']" = "safe", depth: int = 2, **more):
        pass

from typing import Literal
'''


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs a distribution that exists on disk only: its metadata and its modules."""
    monkeypatch.setenv("LIGHTRAIL_CACHE", str(tmp_path / "cache"))
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def install(
        name: str, entries: Mapping[str, str], modules: Mapping[str, str] | None = None, *, metadata: str = ""
    ) -> Path:
        for file, text in (modules or {}).items():
            (site / f"{file}.py").write_text(text)
        folder = site / f"{name.replace('-', '_')}-1.2.dist-info"
        folder.mkdir(exist_ok=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n{metadata}\nVersion: 9\n")
        groups: dict[str, list[str]] = {}
        for key, value in entries.items():
            kind, _, plugin = key.partition(".")
            groups.setdefault(kind, []).append(f"{plugin} = {value}")
        text = "\n".join(f"[lightrail.{kind}]\n" + "\n".join(lines) for kind, lines in groups.items())
        (folder / "entry_points.txt").write_text(f"[console_scripts]\nx = y:z\n\n{text}\n")
        return site

    yield install
    for module in [each for each in sys.modules if each.startswith("fake_")]:
        del sys.modules[module]


def named(name: str, found: list[Plugin] | None = None) -> Plugin:
    return next(each for each in (plugins("privacy") if found is None else found) if each.name == name)


def test_a_strangers_plugin_is_listed_with_its_origin(install: Install) -> None:
    install("Their-Things", {"optimizer.theirs": "fake_things:Theirs"}, {"fake_things": CLASSES})
    assert "theirs" in available("optimizer")
    assert "fake_things" not in sys.modules
    plugin = find("optimizer", "theirs")
    assert (plugin.distribution, plugin.version, plugin.target) == ("Their-Things", "1.2", "fake_things.Theirs")
    assert load("optimizer", "theirs").__name__ == "Theirs"


def test_its_signature_is_its_schema(install: Install) -> None:
    install("theirs", {"optimizer.theirs": "fake_things:Theirs"}, {"fake_things": CLASSES})
    schema = find("optimizer", "theirs").schema
    assert schema.summary == "Walks downhill."
    assert schema.supplied == ("params",)
    assert schema.accepts_any_key
    assert schema.defaults() == {"lr": 0.5, "mode": "safe", "depth": 2}
    lr, mode = schema.parameter("lr"), schema.parameter("mode")
    assert lr is not None
    assert mode is not None
    assert lr.doc == "The step size, in units of the loss."
    assert mode.choices == ("fast", "safe")
    assert Schema.from_dict(json.loads(json.dumps(schema.to_dict()))) == schema


def test_a_broken_plugin_is_listed_with_its_reason_and_stops_nothing_else(install: Install) -> None:
    install(
        "mixed",
        {"privacy.good": "fake_good:Theirs", "privacy.bad": "fake_bad:Bad", "privacy.none": "fake_good:Absent"},
        {"fake_good": CLASSES, "fake_bad": "import no_such_package_here"},
    )
    found = plugins("privacy")
    assert named("good", found).state == "ready"
    assert named("bad", found).state == "broken"
    assert "no_such_package_here" in named("bad", found).reason
    assert "Absent" in named("none", found).reason
    with pytest.raises(PluginError, match="privacy 'bad' cannot be loaded") as caught:
        load("privacy", "bad")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_a_plugin_that_ends_its_process_does_not_end_ours(install: Install) -> None:
    install(
        "deadly",
        {
            "privacy.alive": "fake_alive:Theirs",
            "privacy.deadly": "fake_deadly:X",
            "privacy.zalive": "fake_alive:Theirs",
        },
        {"fake_alive": CLASSES, "fake_deadly": "import os; os._exit(7)"},
    )
    found = plugins("privacy", in_process=False)
    assert "status 7" in named("deadly", found).reason
    assert named("alive", found).state == named("zalive", found).state == "ready"


def test_what_is_not_of_the_kind_is_broken(install: Install) -> None:
    install("wrong", {"optimizer.wrong": "fake_wrong:Wrong"}, {"fake_wrong": "class Wrong: pass"})
    with pytest.raises(PluginError, match="cannot be an optimizer"):
        _ = find("optimizer", "wrong").schema


def test_two_distributions_with_one_name(install: Install) -> None:
    install("first", {"privacy.same": "fake_first:Theirs"}, {"fake_first": CLASSES})
    install("second", {"privacy.same": "fake_second:Theirs"}, {"fake_second": CLASSES})
    assert {each.state for each in plugins("privacy") if each.name == "same"} == {"duplicate"}
    with pytest.raises(PluginError) as caught:
        find("privacy", "same")
    assert "first" in caught.value.found
    assert "second" in caught.value.found
    assert "first:same" in caught.value.remedy
    assert load("privacy", "second:same").__module__ == "fake_second"


def test_an_unknown_name_has_four_parts() -> None:
    with pytest.raises(PluginError) as caught:
        find("optimizer", "adamww")
    error = caught.value
    assert error.what == "optimizer 'adamww' is not installed"
    assert error.found == "adamww"
    assert "sgd" in error.allowed
    assert error.remedy == "Did you mean 'adamw'? If you have just added it, reinstall its package."
    with pytest.raises(PluginError, match="no kind of plugin named 'optimiser'"):
        available("optimiser")


def test_the_name_of_another_kind_is_recognised() -> None:
    with pytest.raises(PluginError) as caught:
        find("model", "sgd")
    assert "write optimizer=sgd" in caught.value.remedy


def test_a_missing_extra_is_named(install: Install) -> None:
    install(
        "extra",
        {"privacy.lacking": "fake_extra:Theirs [big]", "privacy.having": "fake_extra:Theirs [small]"},
        {"fake_extra": CLASSES},
        metadata='Requires-Dist: no-such-dist>=2; extra == "big"\nRequires-Dist: omegaconf; extra == "small"\n'
        'Requires-Dist: also-absent; extra == "small" and python_version < "3"',
    )
    found = plugins("privacy")
    assert named("lacking", found).state == "broken"
    assert named("lacking", found).install == "pip install 'extra[big]'"
    assert named("having", found).state == "ready"
    with pytest.raises(PluginError) as caught:
        load("privacy", "lacking")
    assert "no-such-dist" in caught.value.found
    assert "pip install 'extra[big]'" in caught.value.remedy


def test_an_unknown_kind_is_listed_and_nothing_more(install: Install) -> None:
    install("newer", {"optimiser.x": "fake_newer:X", "conf.x": "fake_newer"})
    found = [each for each in plugins("optimiser") if each.distribution == "newer"]
    assert [each.state for each in found] == ["broken"]
    assert "'optimizer'" in found[0].reason


def test_the_first_on_the_path_wins(install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install("twice", {"privacy.twice": "fake_new:Theirs"})
    older = tmp_path / "older"
    (older / "twice-0.1.dist-info").mkdir(parents=True)
    (older / "twice-0.1.dist-info" / "entry_points.txt").write_text("[lightrail.privacy]\ntwice = fake_old:Theirs\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(older)])
    assert find("privacy", "twice").value == "fake_new:Theirs"


class TestCache:
    """It may save time, and must change nothing."""

    def test_a_changed_file_is_read_again(self, install: Install) -> None:
        site = install("theirs", {"privacy.theirs": "fake_things:Theirs"}, {"fake_things": CLASSES})
        assert named("theirs", plugins("privacy", in_process=False)).schema.defaults()["lr"] == 0.5
        (site / "fake_things.py").write_text(CLASSES.replace("lr: float = 0.5", "lr: float = 0.25"))
        assert named("theirs", plugins("privacy", in_process=False)).schema.defaults()["lr"] == 0.25

    def test_only_what_is_stale_is_read_again(self, install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
        from lightrail.catalogue import schema_cache

        install("theirs", {"privacy.theirs": "fake_things:Theirs"}, {"fake_things": CLASSES})
        plugins("privacy", in_process=False)
        asked: list[str] = []
        read = schema_cache._read_apart

        def noting(sources: list[schema_cache.Source]) -> object:
            asked.extend(each.target for each in sources)
            return read(sources)

        monkeypatch.setattr(schema_cache, "_read_apart", noting)
        plugins("privacy", in_process=False)
        assert asked == []
        install("more", {"privacy.more": "fake_more:Theirs"}, {"fake_more": CLASSES})
        plugins("privacy", in_process=False)
        assert asked == ["fake_more.Theirs"]

    def test_a_mended_plugin_is_found_mended(self, install: Install) -> None:
        site = install("broken", {"privacy.broken": "fake_broken:Theirs"}, {"fake_broken": "1 / 0"})
        assert named("broken", plugins("privacy", in_process=False)).state == "broken"
        (site / "fake_broken.py").write_text(CLASSES)
        assert named("broken", plugins("privacy", in_process=False)).state == "ready"

    def test_what_a_broken_plugin_lacked_can_be_installed(self, install: Install) -> None:
        site = install("needy", {"privacy.needy": "fake_needy:Theirs"}, {"fake_needy": "import fake_need\n" + CLASSES})
        assert named("needy", plugins("privacy", in_process=False)).state == "broken"
        (site / "fake_need.py").write_text("")
        (site / "need-1.dist-info").mkdir()
        assert named("needy", plugins("privacy", in_process=False)).state == "ready"

    @pytest.mark.parametrize("damage", ["", "{", "[]", '{"form": 1, "entries": {}}', "\x00\xff"])
    def test_a_damaged_one_is_no_loss(self, install: Install, tmp_path: Path, damage: str) -> None:
        install("theirs", {"privacy.theirs": "fake_things:Theirs"}, {"fake_things": CLASSES})
        before = named("theirs", plugins("privacy", in_process=True)).schema
        (file,) = (tmp_path / "cache").glob("schemas-*.json")
        file.write_text(damage)
        assert named("theirs", plugins("privacy", in_process=True)).schema == before

    def test_damaged_entries_are_no_loss(self, install: Install, tmp_path: Path) -> None:
        install("theirs", {"privacy.theirs": "fake_things:Theirs"}, {"fake_things": CLASSES})
        before = named("theirs", plugins("privacy", in_process=True)).schema
        (file,) = (tmp_path / "cache").glob("schemas-*.json")
        data = json.loads(file.read_text())
        data["entries"] = {key: {"files": {}, "schema": {"target": 3}} for key in data["entries"]}
        file.write_text(json.dumps(data))
        assert named("theirs", plugins("privacy", in_process=True)).schema == before

    def test_a_folder_that_cannot_be_written_is_no_loss(
        self, install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("LIGHTRAIL_CACHE", str(tmp_path / "file" / "below"))
        install("theirs", {"privacy.theirs": "fake_things:Theirs"}, {"fake_things": CLASSES})
        assert named("theirs", plugins("privacy", in_process=True)).state == "ready"


class TestTargets:
    """A dotted path names anything that can be imported."""

    def test_a_module_in_the_current_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "fake_local.py").write_text("class Outer:\n    class Inner: pass\n")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [each for each in sys.path if each])
        assert import_target("fake_local.Outer.Inner").__qualname__ == "Outer.Inner"

    @pytest.mark.parametrize(
        ("target", "found"),
        [
            ("no_such_module.Thing", "no module named 'no_such_module'"),
            ("json.JSONDecode", "json, which has no 'JSONDecode'"),
            ("json", "json"),
            ("json.:x", "json.:x"),
        ],
    )
    def test_a_bad_one_has_four_parts(self, target: str, found: str) -> None:
        with pytest.raises(PluginError) as caught:
            import_target(target)
        assert caught.value.found == found
        assert caught.value.remedy

    def test_the_cause_of_a_failing_module_is_chained(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "fake_failing.py").write_text("raise OSError('no disk')")
        monkeypatch.syspath_prepend(str(tmp_path))
        with pytest.raises(PluginError, match="could not be imported") as caught:
            import_target("fake_failing.X")
        assert isinstance(caught.value.__cause__, OSError)
        assert "no disk" in caught.value.found


def test_every_plugin_of_ours_is_ready() -> None:
    ours = [each for each in plugins() if each.distribution == "lightrail"]
    assert {each.kind for each in ours} <= set(KINDS)
    problems = {f"{each.kind} {each.name}": each.reason for each in ours if each.state != "ready" and not each.extras}
    assert problems == {}
    assert [each.name for each in ours if each.known is not None and not each.summary] == []


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 installed distributions with one plugin each."""
    site = tmp_path_factory.mktemp("crowd")
    for number in range(300):
        (site / f"fake_crowd_{number}.py").write_text(CLASSES)
        folder = site / f"fake_crowd_{number}-0.{number}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fake-crowd-{number}\nVersion: 0.{number}\n")
        entry = f"[lightrail.optimizer]\ncrowd_{number} = fake_crowd_{number}:Theirs\n"
        (folder / "entry_points.txt").write_text(entry)
    return site


@pytest.mark.parametrize(
    "code",
    [
        "from lightrail.command import main; main(['plugins'])",
        "from lightrail.command import main; main(['plugins', 'crowd_17', '--json'])",
        "from lightrail.train import main; main(['--help'])",
        "from lightrail.command import main; main(['complete', '--', 'train', 'optimizer=crowd_29'])",
        "from lightrail.command import main; main(['complete', '--', 'train', 'optimizer=adamw', 'optimizer.'])",
    ],
)
def test_a_crowd_is_answered_without_torch(crowd: Path, code: str, request: pytest.FixtureRequest) -> None:
    """Even the first time, with nothing in the cache."""
    # One cache for all: the first command reads every signature, in a process of its own.
    environment = {**os.environ, "PYTHONPATH": str(crowd), "LIGHTRAIL_CACHE": str(crowd.parent / "crowd-cache")}
    check = "; import sys; heavy = {'torch', 'lightning', 'hydra'} & set(sys.modules); sys.exit(bool(heavy - ALLOWED))"
    # The first help composes the default once; nothing else ever starts Hydra.
    check = check.replace("ALLOWED", "{'hydra'}")
    done = subprocess.run([sys.executable, "-c", code + check], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "crowd_29" in done.stdout or "crowd_17" in done.stdout or "optimizer.lr=" in done.stdout


def test_reading_takes_the_time_of_one_scan() -> None:
    """The scan is remembered while nothing changes."""
    from lightrail.catalogue.distributions import environment

    if time.time() - max(Path(each or ".").stat().st_mtime for each in sys.path if Path(each or ".").exists()) < 1:
        pytest.skip("a folder of the path has just changed")
    assert environment() is environment()
