"""The one table of the kinds of plugin: a new kind is a new line here.

The kind's name is the configuration group, the word on the command line and the suffix of the entry-point group
``lightrail.<kind>``.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["KINDS", "Kind"]

ENTRY_POINT_PREFIX = "lightrail."


@dataclass(frozen=True)
class Kind:
    """One kind of plugin.

    Args:
        name: The word on the command line.
        names: What an entry point of this kind names, for the listing and the documentation.
        many: Whether several can be chosen, in order; each then keeps its options under its own name
            (``transform.sam.rho``).
        commands: The commands whose configuration has this group.
    """

    name: str
    names: str
    many: bool = False
    commands: tuple[str, ...] = ("train",)

    @property
    def entry_point_group(self) -> str:
        return ENTRY_POINT_PREFIX + self.name


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("task", "a LightningModule: owns the loss"),
        Kind("model", "a torch.nn.Module"),
        Kind("data", "a LightningDataModule"),
        Kind("optimizer", "a torch.optim.Optimizer"),
        Kind("schedule", "a callable (optimizer, total_steps, **options) that returns a torch LRScheduler"),
        Kind("transform", "a gradient transform: acts between the gradient and the update", many=True),
        Kind("sampler", "a solver of the generative process", commands=("generate",)),
        Kind("sampler_wrapper", "what is put around the solver", many=True, commands=("generate",)),
        Kind("guidance", "what steers the prediction", many=True, commands=("generate",)),
        Kind("privacy", "a wrapper: takes a run, returns a run"),
        Kind("federated", "a wrapper: takes a run, returns a run"),
        Kind("callback", "a Lightning Callback", many=True),
        Kind("metric", "a torchmetrics Metric", many=True),
        Kind("logger", "a Lightning Logger", many=True),
        Kind("launch", "where the run executes", commands=("train", "generate")),
    )
}
