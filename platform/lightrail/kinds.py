"""The one table of the kinds of plugin: a new kind is a new line here.

The kind's name is the configuration group, the word on the command line and the suffix of the entry-point group
``lightrail.<kind>``.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["KINDS", "Kind"]

ENTRY_POINT_PREFIX = "lightrail."
GENERATING = ("generate", "search")


@dataclass(frozen=True)
class Kind:
    """One kind of plugin.

    Args:
        name: The word on the command line.
        names: What an entry point of this kind names, for the listing and the documentation.
        many: Whether several can be chosen, in order; each then keeps its options under its own name
            (``transform.sam.rho``).
        base: The class that a class of this kind extends, by its name so that it need not be imported; a function
            that returns one is as good.
        supplied: Parameters that the platform hands over, by name; they are no options.
        supplies_first: Whether the first parameter, whatever its name, is handed over too.
        per_player: Whether ``players.NAME`` under its options overrides them for one player of a game.
        commands: The commands whose configuration has this group.
        within: The kind that it is a part of: ``federated.partition=NAME`` chooses it as ``partition=NAME`` does.
        default: What stands there, where it is needed and nothing is chosen.
    """

    name: str
    names: str
    many: bool = False
    base: str | None = None
    supplied: tuple[str, ...] = ()
    supplies_first: bool = False
    per_player: bool = False
    commands: tuple[str, ...] = ("train",)
    within: str | None = None
    default: str | None = None

    @property
    def entry_point_group(self) -> str:
        return ENTRY_POINT_PREFIX + self.name


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("task", "a LightningModule: owns the loss", base="LightningModule", supplied=("model",)),
        Kind("model", "a torch.nn.Module", base="Module"),
        Kind("data", "a LightningDataModule", base="LightningDataModule"),
        Kind("optimizer", "a torch.optim.Optimizer", base="Optimizer", supplies_first=True, per_player=True),
        Kind(
            "schedule",
            "a callable (optimizer, total_steps, **options) that returns a torch LRScheduler",
            supplied=("optimizer", "total_steps", "folder", "batch_size"),
        ),
        Kind(
            "transform",
            "a gradient transform: acts between the gradient and the update",
            many=True,
            base="Transform",
            supplied=("rebuild",),
        ),
        Kind("batching", "a lightrail.Batching: how much data goes into a step over time", base="Batching"),
        Kind("denoiser", "a lightrail.Denoiser: what is sampled", base="Denoiser", commands=GENERATING),
        Kind("sampler", "a lightrail.Sampler or TokenSampler: a solver of the generative process", commands=GENERATING),
        Kind(
            "sampler_wrapper",
            "what is put around the solver",
            many=True,
            base="SamplerWrapper",
            supplied=("sampler", "denoiser"),
            commands=GENERATING,
        ),
        Kind("time_grid", "a lightrail.TimeGrid: the times that it visits", base="TimeGrid", commands=GENERATING),
        Kind(
            "guidance",
            "a lightrail.Guidance: what steers a sampler",
            many=True,
            base="Guidance",
            supplied=("load_run",),
            commands=GENERATING,
        ),
        Kind(
            "measurement",
            "a lightrail.Measurement: a linear operator with its adjoint",
            base="Measurement",
            commands=("generate",),
        ),
        Kind("search", "a lightrail.Search: fits a schedule or statistics for later runs", commands=("search",)),
        Kind("privacy", "a wrapper: takes a run, returns a run"),
        Kind(
            "federated",
            "a lightrail.ServerMethod or DecentralisedMethod: a wrapper that carries a run out in rounds",
            base="FederatedMethod",
            supplied=("partition", "compressor", "topology", "server_privacy"),
        ),
        Kind(
            "partition",
            "a lightrail.Partition: which client has which samples",
            base="Partition",
            within="federated",
            default="iid",
        ),
        Kind(
            "compressor",
            "a lightrail.Compressor: a vector in fewer bytes",
            base="Compressor",
            within="federated",
        ),
        Kind(
            "topology",
            "a lightrail.Topology: which nodes speak with each other",
            base="Topology",
            within="federated",
            default="ring",
        ),
        Kind(
            "server_privacy",
            "a lightrail.ServerPrivacy: what hides a client's whole contribution",
            base="ServerPrivacy",
            within="federated",
        ),
        Kind("callback", "a Lightning Callback", many=True, base="Callback"),
        Kind("metric", "a torchmetrics Metric", many=True, base="Metric"),
        Kind(
            "logger",
            "a Lightning Logger",
            many=True,
            base="Logger",
            supplied=("folder",),
            commands=("train", *GENERATING),
        ),
        Kind(
            "problem",
            "a lightrail.bench.claims.Problem: small enough to train many times over",
            base="Problem",
            commands=(),
        ),
        Kind("launch", "a lightrail.Launch: where the run is carried out", base="Launch"),
        Kind(
            "sweep",
            "a lightrail.SweepMethod: which configuration of a sweep is tried next",
            base="SweepMethod",
            supplied=("space", "folder", "goal"),
        ),
    )
}
