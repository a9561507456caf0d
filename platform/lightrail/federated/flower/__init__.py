"""Clients on other machines, and simulated ones, with Flower: its SuperLink and SuperNodes carry, lightrail computes.

Nothing that a server sends is executed: a client builds its side from plugins that it has itself, and tensors and
plain figures are all that crosses. This package needs the extra ``flower``, and a simulation ``flower-simulation``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lightrail.errors import PluginError

if TYPE_CHECKING:
    from lightrail.federated.transport import Transport

__all__ = ["Deployment", "deployed", "is_deployed", "require_flower", "transport_for"]

# Neither usage figures nor a look for a newer version leave the machine; who wants them sets these to 1, 1 and 0.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
# Ray would answer SIGTERM too, and abort the process seconds after, while the run is being saved.
os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
# Which device simulated clients work on is for trainer.accelerator to say; Ray would hide every GPU from them.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


@dataclass(frozen=True)
class Deployment:
    """Where a server listens.

    Args:
        address: ``HOST:PORT``; ``0.0.0.0`` for every network of this machine.
        certificates: A folder of certificates; ``None`` for no encryption.
        patience: Seconds that the first round waits for clients to come; greater than 0.
        folder: Where what the SuperLink says goes.
    """

    address: str
    certificates: Path | None = None
    patience: float = 600.0
    folder: Path = Path("federated")


_deployment: ContextVar[Deployment | None] = ContextVar("deployment", default=None)


@contextlib.contextmanager
def deployed(deployment: Deployment) -> Iterator[None]:
    """Runs that are composed inside have their clients elsewhere; outside, Flower simulates them."""
    token = _deployment.set(deployment)
    try:
        yield
    finally:
        _deployment.reset(token)


def is_deployed() -> bool:
    """Whether a run that is composed now has its clients on machines of their own."""
    return _deployment.get() is not None


def transport_for(overrides: Sequence[str], *, timeout: float, processes: int) -> Transport:
    """What carries the rounds of a run with ``federated.engine=flower``.

    Args:
        overrides: That the run was composed of; clients compose their side of the same.
        timeout: Seconds that a round waits for an answer.
        processes: How many clients of a simulation work at a time.

    Raises:
        PluginError: Flower is not installed, or a simulation lacks Ray.
        ConfigurationError: An address that is none, or a certificate that is missing.
    """
    require_flower()
    from lightrail.configuration import compose
    from lightrail.federated.flower.terms import Terms
    from lightrail.run.lock import lock_of

    deployment = _deployment.get()
    if deployment is None:
        from lightrail.federated.flower.simulation import FlowerSimulation

        return FlowerSimulation(Terms(overrides, timeout=timeout), processes)
    from lightrail.federated.flower.deployment import FlowerDeployment

    terms = Terms(overrides, lock_of(compose(overrides)), timeout, deployment.patience)
    log = deployment.folder / "superlink.log"
    return FlowerDeployment(terms, deployment.address, deployment.certificates, log)


def require_flower() -> None:
    """Refuses to go on where Flower is missing.

    Raises:
        PluginError: It is not installed.
    """
    if importlib.util.find_spec("flwr") is None:
        raise PluginError(
            "clients on other machines need Flower",
            found="Flower is not installed",
            allowed="lightrail with the extra flower",
            remedy="Install it with pip install 'lightrail[flower]', or use federated.engine=here.",
        )
