"""Composition: what a command line means, and what a mistake in it gets."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lightrail.catalogue import available
from lightrail.configuration import (
    Chosen,
    Composition,
    check_trainer_options,
    compose,
    fingerprint,
    help_text,
    is_sweep,
    sweep,
)
from lightrail.configuration.folders import own_folder, yaml_options
from lightrail.errors import ConfigurationError, PluginError, UserError
from lightrail.kinds import KINDS

Write = Callable[[str, str], Path]


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("LIGHTRAIL_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file of the user's own configuration, and returns the folder."""

    def write(path: str, text: str) -> Path:
        file = tmp_path / "conf" / f"{path}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return tmp_path / "conf"

    return write


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of the user's own in the current folder."""
    (tmp_path / "mine_for_tests.py").write_text(
        "from typing import Literal\n"
        "class LightningModule: pass\n"
        "class Task(LightningModule):\n"
        "    def __init__(self, model, width: int = 3, depth: int = 1, loss: Literal['l1', 'l2'] = 'l2'): ...\n"
        "class Optimizer: pass\n"
        "class Opt(Optimizer):\n"
        "    def __init__(self, params, lr: float = 7.0, betas: tuple[float, ...] = (0.5,), size: 'Path' = None): ...\n"
        "class Callback:\n"
        "    def __init__(self, every: int = 5): ...\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "mine_for_tests"
    sys.modules.pop("mine_for_tests", None)


def one(composition: Composition, kind: str) -> Chosen:
    (found,) = [each for each in composition.chosen if each.kind == kind]
    return found


def mistake(*overrides: str, **options: object) -> UserError:
    with pytest.raises(UserError) as caught:
        compose(list(overrides), **options)  # type: ignore[arg-type]
    error = caught.value
    assert all((error.what, error.found, error.allowed, error.remedy))
    return error


class TestDefault:
    def test_every_kind_has_its_place(self) -> None:
        for command in ("train", "generate"):
            config = compose(config_name=command).config
            kinds = [kind for kind in KINDS.values() if command in kind.commands]
            assert [str(key) for key in config if key in KINDS] == [kind.name for kind in kinds]
            listed = OmegaConf.load(Path(own_folder(), f"{command}.yaml")).defaults
            assert {kind.name for kind in kinds} <= {str(key) for each in listed if each != "_self_" for key in each}

    def test_what_is_chosen(self) -> None:
        chosen = compose().chosen
        names = [(each.kind, each.name) for each in chosen]
        assert names[:5] == [
            ("task", "classification"),
            ("model", "cnn"),
            ("data", "digits"),
            ("optimizer", "adamw"),
            ("schedule", "cosine"),
        ]
        assert not any(each.explicit for each in chosen)
        assert all(each.plugin is not None and each.target == each.plugin.target for each in chosen)

    def test_a_node_holds_every_default_of_the_signature(self) -> None:
        composition = compose()
        node = composition.config.optimizer
        assert node._target_ == "torch.optim.AdamW"
        assert list(node.betas) == [0.9, 0.999]
        assert "params" not in node
        assert one(composition, "optimizer").options["betas"] == [0.9, 0.999]

    def test_composing_twice_changes_nothing(self) -> None:
        compose(["optimizer=sgd", "seed=5"])
        assert compose().config == compose().config

    def test_every_experiment_of_ours_composes(self) -> None:
        names = yaml_options([own_folder()], "experiment")
        assert "docs_lm" in names
        for name in names:
            composition = compose([f"experiment={name}"])
            assert composition.notes == ()


class TestChoosing:
    @pytest.mark.parametrize("operator", ["", "+", "++"])
    def test_every_operator_means_the_same(self, operator: str) -> None:
        composition = compose([f"{operator}optimizer=sgd", f"{operator}optimizer.lr=0.25", f"{operator}seed=4"])
        assert composition.config == compose(["optimizer=sgd", "optimizer.lr=0.25", "seed=4"]).config
        assert one(composition, "optimizer").name == "sgd"
        assert composition.config.optimizer.lr == 0.25
        assert "betas" not in composition.config.optimizer

    def test_explicit_is_what_the_user_touched(self) -> None:
        assert one(compose(["optimizer=adamw"]), "optimizer").explicit
        assert one(compose(["optimizer.lr=0.1"]), "optimizer").explicit
        assert not one(compose(["seed=2"]), "optimizer").explicit
        assert one(compose(["experiment=docs_lm"]), "task").explicit
        assert not one(compose(["experiment=docs_lm"]), "schedule").explicit

    @pytest.mark.parametrize("nothing", ["schedule=null", "+schedule=null", "~schedule", "schedule=none"])
    def test_nothing(self, nothing: str) -> None:
        composition = compose([nothing])
        assert composition.config.schedule is None
        assert "schedule" not in {each.kind for each in composition.chosen}

    def test_the_last_choice_counts(self) -> None:
        assert one(compose(["optimizer=sgd", "+optimizer=lion"]), "optimizer").name == "lion"
        assert one(compose(["schedule=null", "schedule=constant"]), "schedule").name == "constant"

    @pytest.mark.parametrize(
        "typed", ["transform=[sam,clip_norm]", "+transform=[sam, clip_norm]", "++transform=[sam,clip_norm]"]
    )
    def test_several_of_one_kind_keep_their_order(self, typed: str) -> None:
        composition = compose([typed, "transform.sam.rho=0.2"])
        several = [each for each in composition.chosen if each.kind == "transform"]
        assert [each.path for each in several] == ["transform.sam", "transform.clip_norm"]
        assert list(composition.config.transform) == ["sam", "clip_norm"]
        assert several[0].options["rho"] == 0.2

    def test_one_of_many_without_brackets(self) -> None:
        assert list(compose(["transform=sam"]).config.transform) == ["sam"]
        assert list(compose(["logger=null"]).config.logger) == []
        assert list(compose(["~logger"]).config.logger) == []
        assert list(compose(["logger=csv"]).config.logger) == ["csv"]

    def test_a_distribution_can_be_named(self) -> None:
        assert one(compose(["optimizer=lightrail:sgd"]), "optimizer").target == "torch.optim.SGD"
        assert list(compose(["transform=[lightrail:sam]", "transform.sam.rho=0.1"]).config.transform) == ["sam"]

    def test_interpolations_stay_and_are_checked(self) -> None:
        composition = compose(["model.dropout=${optimizer.weight_decay}"])
        assert one(composition, "model").options["dropout"] == 0.01
        assert OmegaConf.to_container(composition.config)["model"]["dropout"] == "${optimizer.weight_decay}"  # type: ignore[index]
        assert mistake("optimizer.lr=${optimizer.foreach}", "optimizer.foreach=true").what.startswith(
            "optimizer.lr has"
        )


class TestTargets:
    def test_ones_own_class(self, mine: str) -> None:
        composition = compose([f"task._target_={mine}.Task", "task.width=9"])
        task = one(composition, "task")
        assert (task.name, task.target, task.plugin, task.explicit) == (f"{mine}.Task", f"{mine}.Task", None, True)
        assert task.options == {"width": 9, "depth": 1, "loss": "l2"}
        assert composition.config == compose([f"task={mine}.Task", "task.width=9"]).config

    def test_its_options_are_checked_too(self, mine: str) -> None:
        assert "'width'" in mistake(f"task={mine}.Task", "task.widht=9").remedy
        assert mistake(f"task={mine}.Task", "task.loss=l3").allowed.startswith("l1, l2")

    def test_one_more_of_a_kind(self, mine: str) -> None:
        composition = compose([f"callback.mine._target_={mine}.Callback", "+callback.mine.every=2"])
        callback = one(composition, "callback")
        assert (callback.name, callback.path, callback.options) == ("mine", "callback.mine", {"every": 2})

    def test_a_target_in_an_experiment_replaces_the_option(self, mine: str, write: Write) -> None:
        folder = write("experiment/own", f"optimizer:\n  _target_: {mine}.Opt\n  betas: [0.1, 0.2]\n")
        composition = compose(["experiment=own"], config_dirs=[folder])
        # Nothing of AdamW is left, not even the learning rate that the default gives it.
        assert one(composition, "optimizer").options == {"lr": 7.0, "betas": [0.1, 0.2], "size": None}
        assert one(composition, "optimizer").name == f"{mine}.Opt"

    def test_the_command_line_wins_over_it(self, mine: str, write: Write) -> None:
        folder = write("experiment/own", f"optimizer:\n  _target_: {mine}.Opt\n  betas: [0.1, 0.2]\n")
        composition = compose(["experiment=own", "optimizer=sgd"], config_dirs=[folder])
        assert one(composition, "optimizer").target == "torch.optim.SGD"

    def test_a_target_where_nothing_was_chosen(self, mine: str, write: Write) -> None:
        folder = write("experiment/own", f"schedule:\n  _target_: {mine}.Opt\n")
        composition = compose(["experiment=own", "optimizer.weight_decay=0"], config_dirs=[folder])
        assert one(composition, "schedule").target == f"{mine}.Opt"


class TestExperiments:
    def test_the_command_line_wins_in_any_order(self) -> None:
        first = compose(["experiment=docs_lm", "+optimizer=lion", "seed=7", "trainer.max_epochs=1"])
        last = compose(["trainer.max_epochs=1", "seed=7", "+optimizer=lion", "+experiment=docs_lm"])
        assert first.config == last.config
        assert one(first, "optimizer").name == "lion"
        assert first.config.trainer.max_epochs == 1
        assert one(first, "task").name == "language_modeling"

    def test_options_belong_to_the_plugin_that_the_file_chose(self) -> None:
        composition = compose(["experiment=docs_lm", "optimizer=sgd"])
        assert composition.config.optimizer == compose(["optimizer=sgd"]).config.optimizer
        assert any("optimizer.betas" in note and "sgd" in note for note in composition.notes)

    def test_and_hold_for_it(self) -> None:
        written: Any = OmegaConf.load(Path(own_folder(), "experiment", "docs_lm.yaml"))
        config = compose(["experiment=docs_lm"]).config
        for kind in ("data", "model", "optimizer", "schedule"):
            assert all(config[kind][key] == value for key, value in written[kind].items())

    def test_one_can_build_on_another(self, write: Write) -> None:
        write("experiment/first", "defaults:\n  - override /optimizer: sgd\noptimizer:\n  momentum: 0.5\n  lr: 2.0\n")
        folder = write("experiment/second", "defaults:\n  - first\n  - _self_\noptimizer:\n  lr: 3.0\n")
        node = compose(["experiment=second"], config_dirs=[folder]).config.optimizer
        assert (node.momentum, node.lr) == (0.5, 3.0)
        write("experiment/third", "defaults:\n  - first\n  - override /optimizer: lion\n")
        composition = compose(["experiment=third"], config_dirs=[folder])
        assert composition.config.optimizer == compose(["optimizer=lion"]).config.optimizer

    def test_a_stale_key_names_its_file(self, write: Write) -> None:
        folder = write("experiment/stale", "optimizer:\n  learning_rate: 1\n")
        error = mistake("experiment=stale", config_dirs=[folder])
        assert error.what == "optimizer 'adamw' has no option 'learning_rate'"
        assert "experiment/stale.yaml" in error.found
        write("experiment/stale", "optimiser:\n  lr: 1\n")
        error = mistake("experiment=stale", config_dirs=[folder])
        assert "experiment/stale.yaml" in error.found
        assert "'optimizer'" in error.remedy
        write("experiment/stale", "transform:\n  sam:\n    rho: 1.0\n")
        assert "'+transform=[sam]'" in mistake("experiment=stale", config_dirs=[folder]).remedy

    def test_an_unreadable_file_is_told(self, write: Write) -> None:
        folder = write("experiment/torn", "optimizer: {lr: ")
        assert isinstance(mistake("experiment=torn", config_dirs=[folder]), ConfigurationError)


class TestVariants:
    def test_a_file_varies_a_plugin(self, write: Write) -> None:
        folder = write("optimizer/heavy", "defaults: [sgd]\nmomentum: 0.99\n")
        chosen = one(compose(["optimizer=heavy", "optimizer.lr=1.0"], config_dirs=[folder]), "optimizer")
        assert (chosen.name, chosen.target) == ("heavy", "torch.optim.SGD")
        assert chosen.plugin is not None
        assert chosen.plugin.name == "sgd"
        assert (chosen.options["momentum"], chosen.options["lr"], chosen.options["nesterov"]) == (0.99, 1.0, False)

    def test_one_of_many_keeps_its_own_name(self, write: Write) -> None:
        folder = write("transform/wide", "defaults: [sam]\nrho: 0.5\n")
        composition = compose(["transform=[wide,sam]"], config_dirs=[folder])
        rhos = {each.path: each.options["rho"] for each in composition.chosen if each.kind == "transform"}
        assert rhos["transform.wide"] == 0.5 != rhos["transform.sam"]

    def test_it_can_vary_its_namesake_and_another_variant(self, write: Write) -> None:
        write("optimizer/sgd", "defaults: [sgd]\nmomentum: 0.9\n")
        folder = write("optimizer/faster", "defaults: [sgd]\nlr: 9.0\n")
        assert compose(["optimizer=sgd"], config_dirs=[folder]).config.optimizer.momentum == 0.9
        node = compose(["optimizer=faster"], config_dirs=[folder]).config.optimizer
        assert (node.momentum, node.lr) == (0.9, 9.0)

    def test_a_target_alone_is_enough(self, write: Write) -> None:
        folder = write("optimizer/plain", "_target_: torch.optim.SGD\nlr: 0.5\n")
        chosen = one(compose(["optimizer=plain"], config_dirs=[folder]), "optimizer")
        assert chosen.options["momentum"] == 0
        assert chosen.plugin is None

    def test_a_group_of_ones_own(self, write: Write) -> None:
        folder = write("recipe/quick", "# @package _global_\ntrainer:\n  max_epochs: 2\n")
        assert compose(["recipe=quick"], config_dirs=[folder]).config.trainer.max_epochs == 2


class TestMistakes:
    @pytest.mark.parametrize(
        ("typed", "what", "remedy"),
        [
            ("optimizer=sofia", "optimizer 'sofia' is not installed", "'sophia'"),
            ("optimiser=sgd", "no kind, group or key 'optimiser'", "'optimizer'"),
            ("optimiser.lr=1", "no kind or group 'optimiser'", "'optimizer'"),
            ("sed=1", "no kind, group or key 'sed'", "'seed'"),
            ("optimizer.lrr=1", "optimizer 'adamw' has no option 'lrr'", "'lr'"),
            ("+optimizer.typo=1", "optimizer 'adamw' has no option 'typo'", "lightrail plugins adamw"),
            ("++optimizer.typo=1", "optimizer 'adamw' has no option 'typo'", "lightrail plugins adamw"),
            ("optimizer.lr=fast", "optimizer.lr has the wrong type", "optimizer.lr"),
            ("optimizer.lr=true", "optimizer.lr has the wrong type", "optimizer.lr"),
            ("optimizer.lr=null", "optimizer.lr has the wrong type", "optimizer.lr"),
            ("optimizer.betas=[1,2,3]", "optimizer.betas has the wrong type", "optimizer.betas"),
            ("optimizer.betas=0.9", "optimizer.betas has the wrong type", "optimizer.betas"),
            ("optimizer.amsgrad=1", "optimizer.amsgrad has the wrong type", "optimizer.amsgrad"),
            ("optimizer.lr=???", "optimizer.lr has no value", "optimizer.lr=VALUE"),
            ("optimizer.lr=${nowhere}", "optimizer.lr cannot be resolved", "optimizer.lr"),
            ("transform.sam.rho=0.1", "transform 'sam' has options but is not chosen", "'+transform=[sam]'"),
            ("transform=[sam,sam]", "transform 'sam' is chosen twice", "_target_"),
            ("privacy.epsilon=3", "privacy has options, but no privacy is chosen", "privacy=NAME"),
            ("task.model=cnn", "task.model is supplied by lightrail", "model=NAME"),
            ("sampler=ddim", "no kind, group or key 'sampler'", "`generate`"),
            ("trainer=dpp", "there is no trainer 'dpp'", "'ddp'"),
            ("experiment=docs", "there is no experiment 'docs'", "'docs_lm'"),
            ("seed=-1", "seed has the wrong type", "seed"),
            ("seed=1.5", "seed has the wrong type", "seed"),
            ("run.on_nan=ignore", "run.on_nan has the wrong type", "run.on_nan"),
            ("run.name=7", "run.name has the wrong type", "'run.name=\"7\"'"),
            ("run.nmae=x", "run has no option 'nmae'", "'name'"),
            ("run=7", "run.root is needed", "run.root"),
            ("~run.root", "run.root is needed", "run.root"),
            ("trainer.accumulate=0", "trainer.accumulate has the wrong type", "trainer.accumulate"),
            ("trainer.max_epochs=-2", "trainer.max_epochs has the wrong type", "trainer.max_epochs"),
            ("trainer.devices=0", "trainer.devices has the wrong type", "trainer.devices"),
            ("trainer.precision=8", "trainer.precision has the wrong type", "trainer.precision"),
            ("trainer.checkpoint_every=0", "trainer.checkpoint_every has the wrong type", "checkpoint_every"),
            ("optimizer=sgd,lion", "'optimizer' has several values", "-m"),
            ("seed=range(3)", "'seed' has several values", "-m"),
            ("optimizer=[sgd", "cannot be read", "Quote"),
            ("seed", "'seed' is not an override", "equals sign"),
            ("task=json.JSONDecoder", "'json.JSONDecoder' cannot be a task", "task"),
            ("task=no_module_here.Task", "'no_module_here.Task' was not found", "no_module_here.py"),
            ("optimizer=nobody:sgd", "optimizer 'nobody:sgd' is not installed", "reinstall"),
        ],
    )
    def test_it_is_told_in_four_parts(self, typed: str, what: str, remedy: str) -> None:
        error = mistake(typed)
        assert what in error.what
        assert remedy in error.remedy

    def test_a_missing_folder(self, tmp_path: Path) -> None:
        assert "absent" in mistake(config_dirs=[tmp_path / "absent"]).found

    def test_what_is_right_is_accepted(self) -> None:
        compose(
            ["optimizer.lr=1", "optimizer.foreach=null", "trainer.devices=[0,1]", "trainer.precision=32", "run.name=x"]
        )
        compose(["trainer.devices=auto", "trainer.devices=-1", "optimizer.lr={_target_: torch.tensor, data: 0.1}"])

    def test_a_key_of_a_default_can_be_taken_away(self) -> None:
        assert list(compose(["~optimizer.betas"]).config.optimizer.betas) == [0.9, 0.999]

    def test_lightnings_own_keys(self) -> None:
        check_trainer_options(
            compose(["trainer.gradient_clip_val=1.0", "trainer.limit_train_batches=3"]).config.trainer
        )
        for typed, remedy in (
            ("trainer.gradient_clip=1.0", "'gradient_clip_val'"),
            ("trainer.accumulate_grad_batches=2", "trainer.accumulate"),
            ("trainer.benchmark=fast", "trainer.benchmark"),
        ):
            with pytest.raises(ConfigurationError) as caught:
                check_trainer_options(compose([typed]).config.trainer)
            assert remedy in caught.value.remedy


class TestSweeps:
    def test_every_combination_the_last_fastest(self) -> None:
        jobs = sweep(["optimizer=adamw,sgd", "seed=1,2", "run.root=out"])
        assert jobs == [
            ["optimizer=adamw", "seed=1", "run.root=out"],
            ["optimizer=adamw", "seed=2", "run.root=out"],
            ["optimizer=sgd", "seed=1", "run.root=out"],
            ["optimizer=sgd", "seed=2", "run.root=out"],
        ]

    def test_the_order_is_that_of_hydras_own_sweeper(self) -> None:
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
        from hydra.core.override_parser.overrides_parser import OverridesParser

        typed = ["a=1,2", "+b=choice(x,y,z)", "c=range(0,4,2)", "d=[1,2]", "++e.f='x,y'"]
        (expected,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(typed), None)
        assert sweep(typed) == expected

    def test_globs_see_plugins(self) -> None:
        names = [job[0].partition("=")[2] for job in sweep(["optimizer=glob(soph*)"])]
        assert names == [name for name in available("optimizer") if name.startswith("soph")]

    def test_lists_and_nothing_can_be_swept(self) -> None:
        jobs = sweep(["transform=[sam],[]", "schedule=null,cosine"])
        assert len(jobs) == 4
        assert [len(compose(job).config.transform) for job in jobs] == [1, 1, 0, 0]

    def test_what_is_a_sweep(self) -> None:
        assert is_sweep(["seed=1", "optimizer=a,b"])
        assert is_sweep(["seed=range(3)"])
        assert not is_sweep(["seed=1", "optimizer.betas=[0.9,0.99]", "run.name='a,b'", "transform=[a,b]"])

    def test_an_interval_is_none(self) -> None:
        with pytest.raises(ConfigurationError, match="interval"):
            sweep(["optimizer.lr=interval(0,1)"])


class TestFingerprint:
    def test_only_what_shapes_the_run_counts(self) -> None:
        base = fingerprint(compose().config)
        assert base == fingerprint(compose(["run.root=elsewhere", "run.name=x", "optimizer=adamw"]).config)
        assert base != fingerprint(compose(["seed=2"]).config)
        assert base != fingerprint(compose(["optimizer.lr=1"]).config)

    def test_the_order_of_several_counts(self) -> None:
        first, second = (
            fingerprint(compose([f"transform=[{names}]"]).config) for names in ("sam,clip_norm", "clip_norm,sam")
        )
        assert first != second


class TestBesideHydra:
    def test_another_hydra_program_is_left_alone(self, tmp_path: Path) -> None:
        from hydra import compose as hydras_compose
        from hydra import initialize_config_dir
        from hydra.core.global_hydra import GlobalHydra
        from hydra.version import getbase

        (tmp_path / "app.yaml").write_text("x: 1\n")
        with initialize_config_dir(str(tmp_path), version_base="1.2"):
            before = getbase()
            assert compose(["seed=3"]).config.seed == 3
            assert getbase() == before
            assert hydras_compose("app").x == 1
        assert not GlobalHydra.instance().is_initialized()

    def test_composing_needs_no_import_of_a_plugin_that_is_known(self) -> None:
        compose()
        code = "import sys; from lightrail.configuration import compose; compose(); sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_folders_of_other_distributions_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs_with_conf" / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "theirs_with_conf" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "theirs_with_conf" / "conf" / "experiment" / "theirs.yaml").write_text("seed: 41\n")
    (tmp_path / "theirs-1.dist-info").mkdir()
    (tmp_path / "theirs-1.dist-info" / "entry_points.txt").write_text("[lightrail.conf]\nx = theirs_with_conf.conf\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert compose(["experiment=theirs"]).config.seed == 41
    assert "theirs" in help_text()


def test_help_shows_what_there_is(write: Write) -> None:
    text = help_text()
    for name in ("sophia", "docs_lm", "batch_size: 32", "_target_: torch.optim.AdamW", "lr: 0.003", "on_nan: stop"):
        assert name in text
    assert "trainer" not in help_text("generate")
    folder = write("experiment/of_mine", "seed: 3\n")
    assert "of_mine" in help_text(config_dirs=[folder])


def test_the_help_follows_its_files(write: Write) -> None:
    folder = write("trainer/default", "max_epochs: 77\nmax_steps: -1\n")
    assert "max_epochs: 77" in help_text(config_dirs=[folder])
    write("trainer/default", "max_epochs: 7\nmax_steps: -1\n")
    assert "max_epochs: 7\n" in help_text(config_dirs=[folder])


def test_naming_a_broken_plugin_chains_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_for_tests.py").write_text("1 / 0\n")
    (tmp_path / "broken-1.dist-info").mkdir()
    (tmp_path / "broken-1.dist-info" / "entry_points.txt").write_text(
        "[lightrail.optimizer]\nbad = broken_for_tests:X\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    compose()  # stops nothing else
    with pytest.raises(PluginError, match="optimizer 'bad' cannot be loaded") as caught:
        compose(["optimizer=bad"])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
