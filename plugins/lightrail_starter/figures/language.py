"""What a language model knows and writes."""

from __future__ import annotations

import math
import textwrap

from matplotlib.figure import Figure
from torch import Tensor

from lightrail_starter.figures.style import ACCENT, FAINT, INK, new_figure, titled

__all__ = ["continuations", "loss_by_position"]

COLUMNS = 84
LINES = 5


def loss_by_position(losses: Tensor) -> Figure:
    """Mean bits at each position of the window: how much what went before helps.

    Args:
        losses: ``[N, T]``, in nats.
    """
    bits = losses.mean(dim=0) / math.log(2)
    spread = losses.std(dim=0, correction=0) / math.log(2) / max(1, len(losses)) ** 0.5
    where = range(1, len(bits) + 1)
    figure, (axes,) = new_figure(7, 3.6)
    axes.fill_between(where, bits - 2 * spread, bits + 2 * spread, color=ACCENT, alpha=0.15, linewidth=0)
    axes.plot(where, bits, color=ACCENT, linewidth=1.8)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set(xlim=(1, max(2, len(bits))), xlabel="position in the window", ylabel="bits per byte")
    titled(axes, f"{float(bits.mean()):.3f} bits per byte; the band is ± 2 standard errors")
    return figure


def continuations(prompts: Tensor, added: Tensor) -> Figure:
    """Each prompt in grey, and what the model wrote after it in colour.

    Args:
        prompts: Bytes, ``[N, T]``.
        added: Bytes, ``[N, L]``.
    """
    figure, places = new_figure(9, 0.5 + 1.95 * len(prompts), rows=len(prompts))
    for place, prompt, written in zip(places, prompts, added, strict=True):
        place.axis("off")
        place.set(xlim=(0, 1), ylim=(0, 1))
        before, after = _lines(prompt)[-LINES:], _lines(written)[:LINES]
        for row, line in enumerate(before + after):
            colour, weight = ("#9ca3af", "normal") if row < len(before) else (ACCENT, "medium")
            place.text(
                0.01, 0.97 - row * 0.1, line, family="monospace", fontsize=9, color=colour, fontweight=weight,
                va="top", parse_math=False,
            )  # fmt: skip
    figure.suptitle("Prompts from the test text (grey) and the model's continuation (blue)", x=0.01, ha="left",
                    fontsize=11, fontweight="bold", color=INK)  # fmt: skip
    return figure


def _lines(tokens: Tensor) -> list[str]:
    """Bytes as lines of text; what is not text becomes a replacement character or a dot."""
    text = bytes(int(token) % 256 for token in tokens).decode("utf-8", errors="replace").expandtabs(4)
    printable = "".join(c if c.isprintable() or c == "\n" else "·" for c in text)
    lines = [part for line in printable.split("\n") for part in textwrap.wrap(line, COLUMNS, drop_whitespace=False)]
    return lines or [""]
