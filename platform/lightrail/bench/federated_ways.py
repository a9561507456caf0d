"""One way of training over clients, measured in a process of its own.

Run as ``python -m lightrail.bench.federated_ways WAY MODEL --clients N --rounds R``; prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

__all__ = ["MODELS", "WAYS", "Classifier", "Pictures", "main"]

PER_CLIENT, BATCH = 128, 16


def _tiny() -> nn.Module:
    return nn.Linear(64, 10)


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1024, 10),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"tiny": _tiny, "cnn": _cnn}


def _records(clients: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    count = clients * PER_CLIENT
    x = torch.rand(count, 64, generator=generator)
    return TensorDataset(x, (x[:, :10].argmax(1)))


class Classifier(LightningModule):
    """A classifier of 8 x 8 pictures.

    Args:
        network: ``tiny`` or ``cnn``.
    """

    def __init__(self, network: str = "tiny") -> None:
        super().__init__()
        self.network = MODELS[network]()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        x, y = batch
        return {"loss": nn.functional.cross_entropy(self.network(x), y)}


class Pictures(LightningDataModule):
    """Random pictures, so many for each client.

    Args:
        clients: How many.
    """

    def __init__(self, clients: int = 8) -> None:
        super().__init__()
        self.dataset = _records(clients)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset, batch_size=BATCH, shuffle=True)


def _run(model: str, clients: int, *overrides: str) -> Any:
    import lightrail

    here = "lightrail.bench.federated_ways"
    common = ["trainer.accelerator=cpu", "schedule=null", "optimizer=sgd", "optimizer.lr=0.05", "logger=[]"]
    own = [f"task={here}.Classifier", f"task.network={model}", "model=null", f"data={here}.Pictures"]
    folder = tempfile.mkdtemp()
    return lightrail.compose([*own, f"data.clients={clients}", *common, f"run.root={folder}", *overrides])


def _ours(model: str, clients: int, rounds: int, *overrides: str) -> dict[str, float]:
    """Rounds after the first, which includes what happens once."""
    from lightrail.federated.pool import ClientPool
    from lightrail.federated.rounds import Rounds

    every = f"federated.evaluate_every={rounds + 1}"
    run = _run(model, clients, "+federated=fedavg", f"federated.clients={clients}", f"federated.rounds={rounds + 1}",
               every, *overrides)  # fmt: skip
    carried_out = next(each for each in run.callbacks if isinstance(each, Rounds))
    times: list[float] = []
    step = carried_out.step

    def timed() -> dict[str, Tensor]:
        found = step()
        if not times and isinstance(carried_out.transport, ClientPool):  # type: ignore[attr-defined]
            carried_out.transport.wait()  # type: ignore[attr-defined]
            step()  # in which the others take part for the first time
        times.append(time.perf_counter())
        return found

    carried_out.step = timed  # type: ignore[method-assign]
    run.execute(show_progress=False)
    seconds = times[-1] - times[0]
    chosen = len(carried_out.record.last["clients"])
    steps = chosen * (PER_CLIENT // BATCH) * rounds
    return {"rounds_per_second": rounds / seconds, "milliseconds_per_step": 1e3 * seconds / steps}


def _here(model: str, clients: int, rounds: int) -> dict[str, float]:
    return _ours(model, clients, rounds)


def _here_in_two(model: str, clients: int, rounds: int) -> dict[str, float]:
    return _ours(model, clients, rounds, "federated.processes=2")


def _ours_over_flower(model: str, clients: int, rounds: int) -> dict[str, float]:
    return _ours(model, clients, rounds, "federated.engine=flower", "federated.processes=2")


def _many(model: str, clients: int, rounds: int) -> dict[str, float]:
    return _ours(model, clients, rounds, "federated.fraction=0.01")


def _plain(model: str, clients: int, rounds: int) -> dict[str, float]:
    """The plain run over as many steps as the clients make together."""
    from lightning.pytorch import Callback

    class Clock(Callback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.times.append(time.perf_counter())

    run = _run(model, clients, f"trainer.max_epochs={rounds + 1}", "trainer.checkpoint_every=1000000")
    clock = Clock()
    run.callbacks = [*run.callbacks, clock]
    run.execute(show_progress=False)
    steps = clients * (PER_CLIENT // BATCH) * rounds
    return {"milliseconds_per_step": 1e3 * (clock.times[-1] - clock.times[0]) / steps}


def _steps_alone(model: str, clients: int, rounds: int) -> dict[str, float]:
    """The steps of all clients in torch, on batches that lie ready: what no round can be faster than in one process."""
    x, y = _records(clients).tensors
    batches = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
    each = PER_CLIENT // BATCH
    networks = [MODELS[model]() for _ in range(clients)]
    began = 0.0
    for number in range(rounds + 1):
        for client, network in enumerate(networks):
            optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
            for images, labels in batches[client * each : (client + 1) * each]:
                optimizer.zero_grad()
                nn.functional.cross_entropy(network(images), labels).backward()
                optimizer.step()
        if number == 0:
            began = time.perf_counter()
    return {"rounds_per_second": rounds / (time.perf_counter() - began)}


def _by_hand(network: nn.Module, loader: DataLoader[Any]) -> None:
    """A plain loop of torch."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()


def _by_trainer(network: nn.Module, loader: DataLoader[Any]) -> None:
    """A Lightning Trainer, as a client whose model is a LightningModule has one."""
    import logging

    from lightning.pytorch import Trainer

    class Task(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    task = Task()
    task.network = network
    quiet = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "logger"), False)
    Trainer(max_epochs=1, accelerator="cpu", **quiet).fit(task, loader)


def _flower(
    model: str, clients: int, rounds: int, fit: Callable[[nn.Module, DataLoader[Any]], None] = _by_hand
) -> dict[str, float]:
    """Flower's own FedAvg in its simulation."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    from flwr.app import ArrayRecord, MetricRecord, RecordDict  # type: ignore[import-not-found]
    from flwr.clientapp import ClientApp  # type: ignore[import-not-found]
    from flwr.serverapp import ServerApp  # type: ignore[import-not-found]
    from flwr.serverapp.strategy import FedAvg  # type: ignore[import-not-found]
    from flwr.simulation import run_simulation  # type: ignore[import-not-found]

    client, server = ClientApp(), ServerApp()
    times: list[float] = []

    @client.train()
    def train(message: Any, context: Any) -> Any:
        from flwr.app import Message  # type: ignore[import-not-found]

        torch.set_num_threads(1)
        number = int(context.node_config["partition-id"])
        part: Dataset[Any] = Subset(_records(clients), range(number * PER_CLIENT, (number + 1) * PER_CLIENT))
        network = MODELS[model]()
        network.load_state_dict(message.content["arrays"].to_torch_state_dict())
        fit(network, DataLoader(part, batch_size=BATCH, shuffle=True))
        content = {"arrays": ArrayRecord(network.state_dict()), "metrics": MetricRecord({"num-examples": PER_CLIENT})}
        return Message(content=RecordDict(content), reply_to=message)

    class Timed(FedAvg):  # type: ignore[misc]
        def aggregate_train(self, *args: Any, **kwargs: Any) -> Any:
            found = super().aggregate_train(*args, **kwargs)
            times.append(time.perf_counter())
            return found

    @server.main()
    def main(grid: Any, context: Any) -> None:
        strategy = Timed(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=clients)
        strategy.start(grid=grid, initial_arrays=ArrayRecord(MODELS[model]().state_dict()), num_rounds=rounds + 1)

    run_simulation(
        server_app=server,
        client_app=client,
        num_supernodes=clients,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
    return {"rounds_per_second": rounds / (times[-1] - times[0])}


WAYS: dict[str, Callable[[str, int, int], dict[str, float]]] = {
    "here": _here,
    "here in two processes": _here_in_two,
    "plain": _plain,
    "steps alone": _steps_alone,
    "many": _many,
    "flower": _flower,
    "flower with trainers": partial(_flower, fit=_by_trainer),
    "ours over flower": _ours_over_flower,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures one way.

    Args:
        arguments: The words after ``python -m lightrail.bench.federated_ways``.
    """
    parser = argparse.ArgumentParser(prog="lightrail.bench.federated_ways")
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(Path(folder))
        found = WAYS[options.way](options.model, options.clients, options.rounds)
    found["megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
