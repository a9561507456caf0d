"""Conformance of tasks, each on the first data and installed model that it can work with."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightrail import catalogue
from lightrail.testing.building import check_is_documented, missing_options, refuses_unknown_options
from lightrail.testing.data import ready_data
from lightrail.testing.model import filled
from lightrail.testing.suite import Check, NonConformance, NotApplicable, Suite, known_exceptions, name_of, require
from lightrail.traits import traits_of

__all__ = ["TaskSuite"]

Options = Mapping[str, Any]


@dataclass(frozen=True)
class _Setting:
    """Data, and a model by name, on which a task works."""

    data: Any
    dimensions: Mapping[str, int]
    model: str

    def task(self, plugin: Any, options: Options) -> Any:
        """A new task with a new model, from one seed."""
        torch.manual_seed(3)
        model_class = catalogue.load("model", self.model)
        # Sizes in a model's example are those of made-up data; here they are those of the data.
        example = {k: v for k, v in traits_of(model_class).example.items() if k not in self.dimensions}
        model = model_class(**filled(model_class, example, self.dimensions))
        return plugin(model, **filled(plugin, options, self.dimensions))

    @property
    def batch(self) -> Any:
        torch.manual_seed(5)
        return next(iter(self.data.train_dataloader()))


@functools.cache
def _known_data() -> tuple[tuple[str, Any], ...]:
    """Installed data that need no file of the user's, and a made-up table."""
    from lightrail.testing.made_up import MadeUpTable

    found = []
    for name in catalogue.available("data"):
        try:
            plugin = catalogue.load("data", name)
            found.append((name, ready_data(plugin, traits_of(plugin).example)))
        except Exception:  # whatever it is, this data is not for us; the suite of data will say why
            continue
    return (*found, ("a made-up table", ready_data(MadeUpTable, {})))


@functools.cache
def _setting_or_attempts(plugin: Any, options: tuple[tuple[str, Any], ...]) -> _Setting | str:
    attempts = []
    for data_name, data in _known_data():
        for model_name in catalogue.available("model"):
            setting = _Setting(data, data.dimensions(), model_name)
            try:
                with warnings.catch_warnings():
                    # torch only warns where a target is broadcast against a prediction that it does not belong to.
                    warnings.filterwarnings("error", message=".*target size.*")
                    loss = _loss_of(setting.task(plugin, dict(options)).training_step(setting.batch, 0))
                if bool(loss.isfinite()):
                    return setting
            except Exception as error:
                attempts.append(f"{data_name} with {model_name}: {type(error).__name__}: {str(error)[:120]}")
    return "\n  ".join(["its training_step works with no installed data and model:", *attempts])


def _setting(plugin: Any, options: Options) -> _Setting:
    sizes = {name for _, data in _known_data() for name in data.dimensions()}
    missing = [name for name in missing_options(plugin, options, given=1) if name not in sizes]
    if missing:
        raise NotApplicable(
            f"it needs something of the user's own: {', '.join(missing)} has no default and traits.example gives none"
        )
    found = _setting_or_attempts(plugin, tuple(options.items()))
    if isinstance(found, str):
        raise NonConformance(found)
    return found


def _loss_of(result: Any) -> Tensor:
    return result["loss"] if isinstance(result, Mapping) else result


def check_builds_from_options(plugin: Any, options: Options) -> None:
    """``plugin(model, **options)`` is a LightningModule that leaves optimizers to the platform."""
    from lightning.pytorch import LightningModule

    require(issubclass(plugin, LightningModule), "it is no LightningModule")
    setting = _setting(plugin, options)
    missing = missing_options(plugin, filled(plugin, options, setting.dimensions), given=1)
    require(not missing, f"options without a default are not in traits.example: {missing}")


def check_rejects_unknown_options(plugin: Any, options: Options) -> None:
    """An option that the signature lacks is an error."""
    setting = _setting(plugin, options)
    refuses_unknown_options(lambda **given: setting.task(plugin, given), options)


def check_gives_a_loss(plugin: Any, options: Options) -> None:
    """``training_step`` gives a finite 0-d loss with a graph; beside it, 0-d tensors without one."""
    setting = _setting(plugin, options)
    result = setting.task(plugin, options).training_step(setting.batch, 0)
    loss = _loss_of(result)
    require(loss.dim() == 0 and loss.requires_grad, f"the loss has shape {tuple(loss.shape)}, or no graph")
    require(bool(loss.isfinite()), f"the loss is {float(loss.detach())}")
    for name, value in result.items() if isinstance(result, Mapping) else ():
        if name != "loss":
            is_figure = isinstance(value, Tensor) and value.dim() == 0 and not value.requires_grad
            require(is_figure, f"training_step gives '{name}', which is no 0-d tensor without a graph")


def check_learns(plugin: Any, options: Options) -> None:
    """Thirty steps of AdamW on one batch lower its loss."""
    setting = _setting(plugin, options)
    task, batch = setting.task(plugin, options), setting.batch
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = _loss_of(task.training_step(batch, 0))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    require(min(losses[-5:]) < losses[0], f"the loss went from {losses[0]:.4g} to {losses[-1]:.4g} on one batch")


def check_samples_its_loss(plugin: Any, options: Options) -> None:
    """``sampled_loss`` is a 0-d loss with a graph that the generator, and nothing else, decides."""
    if not hasattr(plugin, "sampled_loss"):
        raise NotApplicable("it offers no sampled_loss")
    setting = _setting(plugin, options)
    task, batch = setting.task(plugin, options).eval(), setting.batch

    def sampled(seed: int) -> Tensor:
        return task.sampled_loss(batch, torch.Generator().manual_seed(seed))

    losses = [sampled(seed) for seed in range(6)]
    require(all(loss.dim() == 0 and loss.requires_grad for loss in losses), "it is not 0-d, or it has no graph")
    require(all(bool(loss.isfinite()) for loss in losses), "it is not finite")
    require(len({float(loss.detach()) for loss in losses}) > 1, "six generators give one sampled loss")
    outside = torch.get_rng_state()
    require(float(sampled(0).detach()) == float(losses[0].detach()), "one generator gives two sampled losses")
    require(torch.equal(torch.get_rng_state(), outside), "it draws from torch's global generator")


def check_gives_its_objectives(plugin: Any, options: Options) -> None:
    """``objectives`` gives several 0-d losses with graphs."""
    if not hasattr(plugin, "objectives"):
        raise NotApplicable("it offers no objectives")
    setting = _setting(plugin, options)
    found = setting.task(plugin, options).objectives(setting.batch)
    losses = list(found.values()) if isinstance(found, Mapping) else list(found)
    require(len(losses) >= 1, "it gives no objective")
    require(all(loss.dim() == 0 and loss.requires_grad for loss in losses), "an objective is not 0-d, or has no graph")


def _trainer() -> Any:
    from lightrail.testing.quiet_trainer import quiet_trainer

    return quiet_trainer(limit_val_batches=1, limit_test_batches=1)


def check_validates(plugin: Any, options: Options) -> None:
    """One batch of validation and of test goes through a Trainer, and what ``monitor`` names is logged."""
    setting = _setting(plugin, options)
    task = setting.task(plugin, options)
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    with _trainer() as trainer:
        trainer.validate(task, setting.data.val_dataloader(), verbose=False)
        logged = dict(trainer.callback_metrics)
        trainer.test(task, setting.data.test_dataloader(), verbose=False)
    require(logged, "validation_step logs nothing")
    require(all(bool(torch.as_tensor(value).isfinite()) for value in logged.values()), f"it logs {logged}")
    for name, p in task.named_parameters():
        require(torch.equal(p, before[name]), f"validation changes the parameter '{name}'")
    monitor = getattr(task, "monitor", None)
    if monitor is not None:
        require(
            len(monitor) == 2 and monitor[1] in ("min", "max"), f"monitor is {monitor!r}, not (metric, 'min'|'max')"
        )
        require(monitor[0] in logged, f"monitor names '{monitor[0]}'; validation logs {', '.join(logged)}")


def check_draws_figures(plugin: Any, options: Options) -> None:
    """After a test, ``figures()`` gives named matplotlib figures."""
    if not hasattr(plugin, "figures"):
        raise NotApplicable("it offers no figures")
    from matplotlib import pyplot
    from matplotlib.figure import Figure

    setting = _setting(plugin, options)
    task = setting.task(plugin, options)
    opened = set(pyplot.get_fignums())
    with _trainer() as trainer:
        trainer.test(task, setting.data.test_dataloader(), verbose=False)
        figures = task.figures()
    require(isinstance(figures, Mapping) and figures, f"figures() gives {figures!r}")
    for name, figure in figures.items():
        require(isinstance(name, str) and isinstance(figure, Figure), f"figures() gives {name!r}: {figure!r}")
    left = set(pyplot.get_fignums()) - opened
    require(not left, "its figures belong to pyplot, which keeps them open for good; make them with Figure()")


CHECKS: tuple[Check, ...] = (
    check_is_documented,
    check_builds_from_options,
    check_rejects_unknown_options,
    check_gives_a_loss,
    check_learns,
    check_samples_its_loss,
    check_gives_its_objectives,
    check_validates,
    check_draws_figures,
)


class TaskSuite(Suite):
    """Every check of a task.

    Tasks that need something of the user's own, such as a run that was trained before, are checked by a subclass that
    makes it and names it in ``options``.
    """

    kind: ClassVar[str] = "task"
    checks: ClassVar[tuple[Check, ...]] = (*CHECKS, known_exceptions(frozenset(map(name_of, CHECKS))))
