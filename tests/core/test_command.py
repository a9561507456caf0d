"""The `lightrail` command: the listing, completion, and how mistakes end."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightrail import __version__
from lightrail.catalogue import available
from lightrail.command import main, reporting_errors
from lightrail.command.candidates import candidates
from lightrail.errors import ConfigurationError, UserError
from lightrail.kinds import KINDS

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("LIGHTRAIL_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.delenv("LIGHTRAIL_TRACEBACK", raising=False)
    yield
    patch.undo()


class TestListing:
    def test_it_lists_everything(self, capsys: Captured) -> None:
        assert main(["plugins"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split() == ["kind", "name", "distribution", "state", "summary"]
        listed = {tuple(line.split()[:2]) for line in lines[1:]}
        assert {(kind, name) for kind in KINDS for name in available(kind)} <= listed
        assert re.search(rf"^optimizer +sophia +lightrail {re.escape(__version__)} +ready +\S", "\n".join(lines), re.M)
        assert "\x1b" not in "\n".join(lines)

    def test_one_kind(self, capsys: Captured) -> None:
        assert main(["plugins", "--kind", "transform"]) == 0
        assert {line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]} == {"transform"}
        assert main(["plugins", "--kind", "transfrom"]) == 2
        assert "'transform'" in capsys.readouterr().err

    def test_what_a_missing_extra_needs(self, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
        from lightrail.catalogue import plugin as catalogue

        monkeypatch.setattr(catalogue, "_lacking", lambda plugin: ["datasets"] if plugin.name == "hub" else [])
        main(["plugins", "--kind", "data"])
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.split()[1] == "hub"]
        assert "broken" in line
        assert "pip install 'lightrail[hub]'" in line

    def test_for_programs(self, capsys: Captured) -> None:
        assert main(["plugins", "--json"]) == 0
        found = json.loads(capsys.readouterr().out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
        keys = {"kind", "name", "summary", "distribution", "version", "state", "parameters", "traits"}
        assert all(keys <= set(each) for each in found)
        (sophia,) = [each for each in found if each["name"] == "sophia"]
        assert {"lr", "betas"} <= {each["name"] for each in sophia["parameters"]}
        assert sophia["traits"]["needs_sampled_loss"] is True

    def test_one_plugin(self, capsys: Captured) -> None:
        assert main(["plugins", "sophia"]) == 0
        out = capsys.readouterr().out
        for text in ("optimizer.lr", "float = ", "Learning rate", "rule: ", "paper: ", "needs sampled loss"):
            assert text in out
        main(["plugins", "sam"])
        assert "transform.sam.rho" in capsys.readouterr().out
        main(["plugins", "csv"])
        out = capsys.readouterr().out
        assert "data of" in out
        assert "logger of" in out

    def test_a_card_is_in_words(self, capsys: Captured) -> None:
        main(["plugins", "apg"])
        out = capsys.readouterr().out
        assert "  claim: at a scale of 8, samples are less saturated" in out
        assert "{" not in out
        main(["plugins", "bdia"])
        assert "steps from earlier states" in capsys.readouterr().out
        main(["plugins", "ddpm"])
        assert "fresh noise: η = 1" in capsys.readouterr().out

    def test_an_unknown_one(self, capsys: Captured) -> None:
        assert main(["plugins", "sofia"]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "Did you mean 'sophia'?" in captured.err
        assert "Traceback" not in captured.err


class TestEnds:
    def test_the_command_itself(self, capsys: Captured) -> None:
        assert main(["--version"]) == 0
        assert capsys.readouterr().out == f"lightrail {__version__}\n"
        assert main([]) == main(["--help"]) == 0
        assert "plugins" in capsys.readouterr().out
        assert main(["plugin"]) == 2
        assert "Did you mean 'plugins'?" in capsys.readouterr().err

    def test_a_mistake_has_four_parts_and_no_traceback(self, capsys: Captured) -> None:
        with reporting_errors() as outcome:
            raise UserError("what", found="found", allowed="allowed", remedy="remedy")
        assert outcome.status == 2
        error = capsys.readouterr().err
        assert error == "what\n  found:   found\n  allowed: allowed\n  remedy:  remedy\n"

    def test_a_traceback_where_it_is_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LIGHTRAIL_TRACEBACK", "1")
        with pytest.raises(ConfigurationError), reporting_errors():
            raise ConfigurationError("what", found="", allowed="", remedy="")

    def test_a_fault_of_ours_is_not_hidden(self) -> None:
        with pytest.raises(ZeroDivisionError), reporting_errors():
            _ = 1 / 0

    def test_a_reader_that_has_seen_enough(self) -> None:
        command = f"{sys.executable} -m lightrail.command plugins | head -n 1"
        done = subprocess.run(command, shell=True, capture_output=True, text=True)
        assert done.stdout.startswith("kind")
        assert done.stderr == ""


def after(line: str) -> list[str]:
    """The candidates for a command line, the cursor at its end."""
    return candidates(line.split(" "))


class TestCompletion:
    @pytest.mark.parametrize(
        ("line", "among"),
        [
            ("train opt", {"optimizer=", "optimizer."}),
            ("train se", {"seed="}),
            ("train ru", {"run."}),
            ("train run.on", {"run.on_nan="}),
            ("train optimizer=soph", {"optimizer=sophia", "optimizer=sophia_g"}),
            ("train +optimizer=soph", {"+optimizer=sophia"}),
            ("train optimizer=sophia optimizer.gam", {"optimizer.gamma="}),
            ("train +optimizer=sophia +optimizer.gam", {"+optimizer.gamma="}),
            ("train optimizer.weight", {"optimizer.weight_decay="}),
            ("train optimizer.amsgrad=", {"optimizer.amsgrad=true", "optimizer.amsgrad=false"}),
            ("train optimizer.foreach=", {"optimizer.foreach=null", "optimizer.foreach=true"}),
            ("train transform=[sam,cl", {"transform=[sam,clip_norm"}),
            ("train '+transform=[sa", {"'+transform=[sam"}),
            ("train transform=[sam] transform.", {"transform.sam."}),
            ("train transform=[sam] transform.sam.r", {"transform.sam.rho="}),
            ("train logger.", {"logger.csv.", "logger.wandb."}),
            ("train experiment=d", {"experiment=docs_lm"}),
            ("train experiment=docs_lm data.cont", {"data.context="}),
            ("train trainer=d", {"trainer=ddp", "trainer=default"}),
            ("train trainer.max_e", {"trainer.max_epochs="}),
            ("train run.accept_changes=", {"run.accept_changes=true"}),
            ("train --mul", {"--multirun"}),
            ("train optimizer=torch.optim.SGD optimizer.mom", {"optimizer.momentum="}),
            ("generate samp", {"sampler=", "sampler_wrapper="}),
            ("/usr/bin/train sche", {"schedule="}),
            ("lightrail pl", {"plugins"}),
            ("lightrail plugins soph", {"sophia"}),
            ("lightrail plugins --kind opt", {"optimizer"}),
            ("lightrail completion z", {"zsh"}),
        ],
    )
    def test_what_may_come_next(self, line: str, among: set[str]) -> None:
        found = after(line)
        assert among <= set(found)
        assert all(each.startswith(line.rpartition(" ")[2]) for each in found)

    @pytest.mark.parametrize(
        "line", ["train optimizer=nope optimizer.", "train nope.", "train nope=", "train", "train experiment=no x"]
    )
    def test_nothing_where_the_line_is_wrong(self, line: str) -> None:
        assert after(line) == []

    def test_a_list_is_not_offered_twice_the_same(self) -> None:
        assert "transform=[sam,sam" not in after("train transform=[sam,")

    def test_the_command(self, capsys: Captured) -> None:
        assert main(["complete", "--", "train", "optimizer=soph"]) == 0
        assert capsys.readouterr().out.splitlines() == ["optimizer=sophia", "optimizer=sophia_g", "optimizer=sophia_h"]

    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_the_scripts_are_valid(self, shell: str, capsys: Captured) -> None:
        assert main(["completion", shell]) == 0
        script = capsys.readouterr().out
        assert "lightrail complete --" in script
        if shutil.which(shell):
            assert subprocess.run([shell, "-n"], input=script, text=True, capture_output=True).returncode == 0

    def test_an_unknown_shell(self, capsys: Captured) -> None:
        assert main(["completion", "csh"]) == 2
        assert "bash, zsh, fish" in capsys.readouterr().err

    @pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
    def test_bash_replaces_what_follows_the_last_sign(self, tmp_path: Path) -> None:
        command = tmp_path / "lightrail"
        command.write_text(f'#!/bin/sh\nexec {sys.executable} -m lightrail.command "$@"\n')
        command.chmod(0o755)
        script = """
            eval "$(lightrail completion bash)"; compopt() { :; }
            try() { COMP_LINE="$1" COMP_POINT=$2; _lightrail_complete; echo "${COMPREPLY[@]}"; }
            try "train seed=1 optimizer=sophia_" 30
            try "train run." 8
        """
        done = subprocess.run(
            ["bash", "-c", script], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True
        )
        first, second = done.stdout.splitlines()
        assert first.split() == ["sophia_g", "sophia_h"]
        assert "run." in second.split()
