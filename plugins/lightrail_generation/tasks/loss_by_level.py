"""The loss by level of noise, as a figure."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor

__all__ = ["loss_by_level"]

INK, FAINT, ACCENT = "#374151", "#e5e7eb", "#3866d6"
_BINS = 16


def loss_by_level(times: Tensor, losses: Tensor, *, logarithmic: bool) -> Figure:
    """Each sample as a dot over its time, and the mean of equally filled bins.

    Args:
        times: ``[N]``.
        losses: ``[N]``.
        logarithmic: Whether times are spread over orders of magnitude.
    """
    order = times.argsort()
    times, losses = times[order], losses[order]
    bins = min(_BINS, len(times))
    centres = torch.stack([part.mean() for part in times.tensor_split(bins)])
    means = torch.stack([part.mean() for part in losses.tensor_split(bins)])
    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.scatter(times, losses, s=6, color=ACCENT, alpha=0.25, linewidths=0)
    axes.plot(centres, means, color=INK, linewidth=1.8, marker="o", markersize=3.5)
    axes.set_xscale("log" if logarithmic else "linear")
    if bool((losses > 0).all()):
        axes.set_yscale("log")
    axes.set_xlabel("time on the noise path, from data to noise", color=INK)
    axes.set_ylabel("loss", color=INK)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"mean test loss {float(losses.mean()):.4g}", loc="left", fontsize=11, fontweight="bold", color=INK)
    return figure
