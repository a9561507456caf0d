"""What cannot be carried out in rounds is refused by name, before the first of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightrail.errors import CompositionError
from lightrail.federated.method import DecentralisedMethod, FederatedMethod, ServerMethod

if TYPE_CHECKING:
    from lightrail.run.run import Run

__all__ = ["check_engine", "check_method", "check_trainer"]


def _refusal(what: str, found: str, allowed: str, remedy: str) -> CompositionError:
    return CompositionError(f"a federated run cannot have {what}", found=found, allowed=allowed, remedy=remedy)


def check_method(method: FederatedMethod, run: Run) -> None:
    """Refuses what the method's theory forbids, and what would do nothing.

    Args:
        method: What clients, and a server or their neighbours, do.
        run: As it was composed.

    Raises:
        CompositionError: Something was chosen that the method cannot use.
    """
    name = next(each.name for each in run.composition.chosen if each.kind == "federated")
    chosen = {each.kind: each for each in run.composition.chosen if each.explicit}
    _check_compressor(method, name, chosen["compressor"].name if "compressor" in chosen else "")
    if method.needs_game and run.game is None:
        raise CompositionError(
            f"federated '{name}' solves games, and the task has one loss",
            found=f"task {type(run.task).__name__}",
            allowed="a task with players() and player_loss()",
            remedy="Choose a task with players, or another method.",
        )
    if not method.runs_optimizer:
        for kind in ("optimizer", "schedule", "transform", "batching", "privacy"):
            if kind in chosen:
                raise CompositionError(
                    f"federated '{name}' makes its steps itself, and {kind} '{chosen[kind].name}' would do nothing",
                    found=f"{kind}={chosen[kind].name} with federated={name}",
                    allowed=f"the method's own options; `lightrail plugins {name}` describes them",
                    remedy=f"Leave {kind} out.",
                )
    is_decentralised = isinstance(method, DecentralisedMethod)
    for kind, suits in (("topology", is_decentralised), ("server_privacy", not is_decentralised)):
        if kind in chosen and not suits:
            raise CompositionError(
                f"federated '{name}' has no use for a {kind}",
                found=f"federated.{kind}={chosen[kind].name}",
                allowed="one with a decentralised method" if kind == "topology" else "one with a server",
                remedy=f"Leave federated.{kind} out.",
            )
    if is_decentralised and run.privacy is not None:
        raise _refusal(
            "private steps without a server, since what nodes tell each other would not be accounted for",
            f"privacy with federated={name}",
            "privacy with a method that has a server",
            "Leave privacy out.",
        )
    if isinstance(method, ServerMethod):
        _check_server(method, name, run)
        _check_processes(method, run)


def _check_processes(method: ServerMethod, run: Run) -> None:
    if method.processes == 1 or method.engine != "here":
        return
    accelerator = run.trainer.get("accelerator")
    is_automatic = accelerator in ("auto", None)
    found = ""
    if run.privacy is not None:
        found = "privacy, whose noise nobody can draw twice"
    elif accelerator != "cpu" and not (is_automatic and not torch.accelerator.is_available()):
        found = f"trainer.accelerator={accelerator}, which the processes would share"
    if found:
        raise _refusal(
            f"{method.processes} processes for its clients",
            found,
            "one process, or several without privacy, on the processor",
            "Leave federated.processes out, or set trainer.accelerator=cpu.",
        )


def _check_compressor(method: FederatedMethod, name: str, chosen: str) -> None:
    compressor = method.compressor
    if compressor is None:
        return
    suits = {
        "none": False,
        "any": True,
        "unbiased": compressor.is_unbiased,
        "contractive": compressor.is_contractive,
    }[method.compressors]
    if not suits:
        allowed = "no compressor" if method.compressors == "none" else f"{method.compressors} compressors"
        raise CompositionError(
            f"the theory of federated '{name}' does not allow compressor '{chosen}'",
            found=f"federated.compressor={chosen}",
            allowed=allowed,
            remedy="Leave federated.compressor out, or choose one that `lightrail plugins --kind compressor` lists so.",
        )


def _check_server(method: ServerMethod, name: str, run: Run) -> None:
    from lightrail.federated.local_model import LocalModel

    has_buffers = LocalModel(run.task).has_buffers and not method.keeps_buffers
    if method.server_privacy is not None:
        if not method.is_one_update:
            raise CompositionError(
                f"federated '{name}' sends more than one update, which server privacy does not cover",
                found=f"federated.server_privacy with federated={name}",
                allowed="methods whose clients send one update",
                remedy="Use federated=fedavg, or leave federated.server_privacy out.",
            )
        if method.secure_aggregation:
            raise _refusal(
                "server privacy together with secure aggregation, since each client's update is clipped at the server",
                "federated.server_privacy and federated.secure_aggregation",
                "one of them",
                "Leave federated.secure_aggregation out.",
            )
        if has_buffers:
            raise _refusal(
                "server privacy with statistics of layers, which would leave clients without noise",
                "BatchNorm or other buffers in the model",
                "models without them, or federated=fedbn, which keeps them on the client",
                "Choose another model.",
            )
    compressor = method.compressor
    if method.feedback == "ef21" and compressor is not None and not compressor.is_contractive:
        raise CompositionError(
            "EF21 needs a contractive compressor",
            found=f"federated.feedback=ef21 with {type(compressor).__name__}",
            allowed="compressors such as top_k and sign",
            remedy="Use federated.compressor=top_k, or federated.feedback=ef.",
        )
    is_mean = type(method).averaged is ServerMethod.averaged
    if method.secure_aggregation and (method.compressor is not None or not is_mean):
        raise _refusal(
            "secure aggregation of anything but plain sums",
            "a compressor" if method.compressor is not None else f"federated={name}",
            "methods that use means of what clients send, without a compressor",
            "Leave federated.secure_aggregation out.",
        )
    if method.secure_aggregation and method.per_round < 2:
        raise _refusal(
            "secure aggregation of one client, which has nobody to hide among",
            f"federated.clients={method.clients} federated.fraction={method.fraction:g}",
            "at least two clients a round",
            "Ask for more clients, or leave federated.secure_aggregation out.",
        )


def check_engine(method: ServerMethod) -> None:
    """Refuses what clients cannot do that Flower simulates, or that are on machines of their own.

    Raises:
        CompositionError: Masked sums in a simulation, whose secrets a client has to keep from one message to the next;
            a number of processes where each client is one.
    """
    from lightrail.federated.flower import is_deployed

    if method.processes != 1 and is_deployed():
        raise _refusal(
            f"{method.processes} processes for clients on machines of their own",
            f"federated.processes={method.processes} at a server",
            "one `lightrail federated client` for each client",
            "Leave federated.processes out.",
        )
    if method.secure_aggregation and not is_deployed():
        raise _refusal(
            "secure aggregation in Flower's simulation, where a client keeps nothing between two messages",
            "federated.secure_aggregation=true federated.engine=flower",
            "federated.engine=here, or clients on machines of their own with `lightrail federated server`",
            "Set federated.engine=here, which follows the same protocol.",
        )


def check_trainer(run: Run) -> None:
    """Refuses what the trainer of rounds cannot do.

    Raises:
        CompositionError: Several devices, or a horizon other than rounds.
    """
    trainer = run.trainer
    if trainer.get("devices") not in (1, "1", "auto", None) or int(trainer.get("num_nodes") or 1) != 1:
        raise _refusal(
            "several devices at the server",
            f"trainer.devices={trainer.get('devices')}",
            "trainer.devices=1; clients on other machines with federated.engine=flower",
            "Leave trainer.devices out.",
        )
    for each in run.composition.overrides:
        key = each.lstrip("+~").partition("=")[0]
        if key in ("trainer.max_epochs", "trainer.max_steps", "trainer.max_samples"):
            raise _refusal(
                "another horizon than its rounds",
                each,
                "federated.rounds, and federated.local_epochs or federated.local_steps for a client's part",
                f"Leave {key} out.",
            )
