"""What a language model knows and writes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.figure import Figure
from torch import Tensor

from lightrail_starter.figures.style import ACCENT, FAINT, INK, new_figure, titled

__all__ = ["continuations", "loss_by_position"]

COLUMNS = 84
LINES = 10


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
    figure, places = new_figure(6.6, 0.5 + 1.8 * len(prompts), rows=len(prompts))
    for place, prompt, written in zip(places, prompts, added, strict=True):
        place.axis("off")
        place.set(xlim=(0, 1), ylim=(0, 1))
        before, after = _text(prompt), _text(written)
        lines = _wrapped([(c, False) for c in before] + [(c, True) for c in after])
        first = max(0, next((i for i, line in enumerate(lines) if any(new for _, new in line)), 0) - LINES // 2)
        for row, line in enumerate(lines[first : first + LINES]):
            # One layer a colour, each with blanks where the other has letters: the font is monospaced.
            for new, colour in ((False, "#9ca3af"), (True, ACCENT)):
                layer = "".join(c if is_new is new else " " for c, is_new in line)
                place.text(0.0, 1 - row / LINES, layer, family="monospace", fontsize=9, color=colour, va="top",
                           parse_math=False)  # fmt: skip
    figure.suptitle("Prompts from the test text (grey) and how the model goes on (blue)", x=0.01, ha="left",
                    fontsize=11, fontweight="bold", color=INK)  # fmt: skip
    return figure


def _text(tokens: Tensor) -> str:
    """Bytes as text; what cannot be shown becomes a replacement character or a dot."""
    text = bytes(int(token) % 256 for token in tokens).decode("utf-8", errors="replace").expandtabs(4)
    return "".join(c if c.isprintable() or c == "\n" else "·" for c in text)


def _wrapped(letters: Sequence[tuple[str, bool]]) -> list[list[tuple[str, bool]]]:
    """Letters, with what belongs to each, in lines of at most ``COLUMNS``; empty lines are left out."""
    lines: list[list[tuple[str, bool]]] = [[]]
    for letter in letters:
        if letter[0] == "\n" or len(lines[-1]) == COLUMNS:
            lines.append([])
        if letter[0] != "\n":
            lines[-1].append(letter)
    return [line for line in lines if line]
