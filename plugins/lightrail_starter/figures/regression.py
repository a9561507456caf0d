"""How near a regression came."""

from __future__ import annotations

from matplotlib.figure import Figure
from torch import Tensor

from lightrail_starter.figures.style import ACCENT, FAINT, INK, new_figure, titled

__all__ = ["predicted_against_true"]


def predicted_against_true(prediction: Tensor, target: Tensor, name: str) -> Figure:
    """Each sample as a dot; on the diagonal the prediction is the truth.

    Args:
        prediction: ``[N]`` or ``[N, D]``.
        target: In the same shape and units.
        name: Of the target.
    """
    prediction, target = prediction.flatten(), target.flatten()
    figure, (axes,) = new_figure(5.2, 5.2)
    low = float(min(prediction.min(), target.min()))
    high = float(max(prediction.max(), target.max()))
    margin = 0.04 * (high - low) or 1.0
    ends = (low - margin, high + margin)
    axes.plot(ends, ends, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
    dots = 60 if len(target) < 100 else 25 if len(target) < 1000 else 8
    axes.scatter(target, prediction, s=dots, color=ACCENT, alpha=0.55, linewidths=0, zorder=3)
    axes.set(xlim=ends, ylim=ends, aspect="equal", xlabel=f"true {name}", ylabel=f"predicted {name}")
    axes.grid(color=FAINT, linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    error = float((prediction - target).abs().mean())
    variance = float((target - target.mean()).square().mean())
    explained = 1 - float((prediction - target).square().mean()) / variance if variance else float("nan")
    titled(axes, f"mean absolute error {error:.4g}, R² {explained:.3f}")
    return figure
