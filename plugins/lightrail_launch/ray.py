"""On a Ray cluster that is already there."""

from __future__ import annotations

import logging
import os
import socket
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightrail import Launch
from lightrail.errors import CompositionError, ConfigurationError, PluginError
from lightrail.launch import Job, JobState, Order
from lightrail.launch.job import write_outcome
from lightrail.options import at_least, non_negative, positive
from lightrail.run.processes import Processes, fitted_trainer

__all__ = ["Ray"]

NAMESPACE = "lightrail"
# Of the environment here, what a job on another machine has to have as well.
_CARRIED = ("WANDB_", "LIGHTRAIL_", "HF_", "OMP_NUM_THREADS", "PYTHONPATH")


class Ray(Launch):
    """Carries runs out on a Ray cluster, in an actor that outlives whoever started it.

    Every machine of the cluster needs this environment and the run folder at the same path. Where several processes
    make one run, each is an actor of its own, a machine of its own to Lightning, and they are placed close together.

    Args:
        address: HOST:PORT of the cluster's head; ``auto`` for RAY_ADDRESS, or else for the cluster to which the last
            ``ray start`` on this machine belongs.
        processes: Processes of one run, each with the resources below, at least 1.
        cpus: Processor cores for each, above 0.
        gpus: Graphics cards for each, at least 0; ``None`` for one where the trainer's accelerator is one.
        parallel: Jobs of a sweep at a time, at least 1; ``None`` for as many as there is room for.
        restarts: How often a job that died without making progress is started again, at least 0.
    """

    def __init__(
        self,
        *,
        address: str = "auto",
        processes: int = 1,
        cpus: float = 1.0,
        gpus: float | None = None,
        parallel: int | None = None,
        restarts: int = 2,
    ) -> None:
        super().__init__(parallel=parallel, restarts=restarts)
        at_least(1, processes=processes)
        positive(cpus=cpus)
        if gpus is not None:
            non_negative(gpus=gpus)
        self.address, self.processes, self.cpus, self.gpus = address, processes, cpus, gpus

    def check(self, trainer: dict[str, object]) -> None:
        """See :meth:`lightrail.Launch.check`."""
        if self.processes > 1:
            fitted_trainer(trainer, [], Processes(0, self.processes, 0, 1, "launch=ray"))
        ray = connect(self.address)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        for name, each in self._resources(trainer).items():
            amounts = [node.get(name, 0) for node in nodes]
            total, most = sum(amounts), max(amounts, default=0)
            if each > most or each * self.processes > total:
                raise CompositionError(
                    "the run asks for more than the cluster has",
                    found=f"{name}: {each:g} for each of {self.processes} processes",
                    allowed=f"{total:g} {name} on {len(nodes)} machines, at most {most:g} on one",
                    remedy="Ask for less with launch.cpus, launch.gpus or launch.processes, or add machines.",
                )

    def start(self, order: Order) -> Job:
        """Leaves the order to a detached actor, which begins as soon as the cluster has room."""
        from lightrail_launch.ray_actors import Carrier

        ray = connect(self.address)
        number = f"ray-{uuid.uuid4().hex[:8]}"
        resources = self._resources(order.trainer)
        command = [*order.command, "--restarts", str(self.restarts)]
        if self.processes > 1:
            words = [f"{name}={amount}" for name, amount in resources.items()]
            command = [*order.rank_command[:1], "-m", "lightrail_launch.ray_ranks", str(order.folder), *words]
            command += ["--processes", str(self.processes), "--restarts", str(self.restarts)]
            resources = {}
        ray.remote(Carrier).options(
            name=number,
            namespace=NAMESPACE,
            lifetime="detached",
            max_restarts=-1,
            max_concurrency=4,
            num_cpus=resources.get("CPU", 0),
            num_gpus=resources.get("GPU", 0),
        ).remote(str(order.folder), command, str(order.directory), _carried_environment())
        head = ray.get_runtime_context().gcs_address
        return self.job(order, number, address=head, log=str(order.workspace / "output.log"))

    def state(self, job: Job) -> JobState:
        """What its actor says; pending while it has none of the cluster's resources yet."""
        try:
            ray = connect(job.known["address"])
        except ConfigurationError as error:
            return JobState("lost", f"{error.what}: {error.found}")
        try:
            actor = ray.get_actor(job.number, namespace=NAMESPACE)
            return JobState(*ray.get(actor.phase.remote(), timeout=5))
        except ValueError:
            return JobState("lost", f"the cluster knows no actor {job.number}")
        except ray.exceptions.GetTimeoutError:
            return JobState("pending", "it waits for resources of the cluster")
        except ray.exceptions.RayError as error:
            return JobState("pending", f"its actor is being started again: {str(error).splitlines()[0]}")

    def cancel(self, job: Job) -> None:
        """Asks its actor to stop the run, or takes it out of the queue."""
        ray = connect(job.known["address"])
        try:
            actor = ray.get_actor(job.number, namespace=NAMESPACE)
            ray.get(actor.stop.remote(), timeout=5)
        except ValueError:
            return
        except ray.exceptions.GetTimeoutError:
            ray.kill(actor, no_restart=True)
            write_outcome(job.folder, JobState("stopped", "cancelled before it began"))

    def _resources(self, trainer: Mapping[str, object]) -> dict[str, float]:
        gpus = self.gpus
        if gpus is None:
            gpus = 1.0 if trainer.get("accelerator") in ("gpu", "cuda") else 0.0
        return {"CPU": self.cpus, **({"GPU": gpus} if gpus else {})}


def connect(address: str) -> Any:
    """Ray's module, connected to a cluster.

    Args:
        address: HOST:PORT of its head; or ``auto``.

    Raises:
        ConfigurationError: There is no cluster.
        PluginError: Ray is not installed.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise PluginError(
            "launch 'ray' needs a package that is not installed",
            found="no module ray",
            allowed="lightrail[ray]",
            remedy="Install it: pip install 'lightrail[ray]'.",
        ) from error
    found = f"launch.address={address}"
    try:
        if address == "auto":
            address = _own_address()
            found += f", which is {address}"
        if ray.is_initialized():
            if address == ray.get_runtime_context().gcs_address:
                return ray
            ray.shutdown()
        _knock(address)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of Ray, about its own defaults
            ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigurationError(
            "no Ray cluster answers",
            found=f"{found}: {str(error).splitlines()[0]}",
            allowed="HOST:PORT of a running cluster's head, or auto on one of its machines",
            remedy="Start one with `ray start --head`, and name its address.",
        ) from error
    return ray


def _own_address() -> str:
    """What this machine says of its cluster.

    Ray itself would join whatever it finds among the processes, such as the simulation of somebody's federated run.
    """
    if address := os.environ.get("RAY_ADDRESS"):
        return address
    root = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    written = Path(root, "ray", "ray_current_cluster")
    try:
        return written.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise ConnectionError("RAY_ADDRESS is not set, and no `ray start` was made on this machine") from None


def _knock(address: str) -> None:
    """Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdigit() and "://" not in address:
        socket.create_connection((host, int(port)), timeout=5).close()


def _carried_environment() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(_CARRIED) and name != "LIGHTRAIL_RUN_FOLDER"
    }
