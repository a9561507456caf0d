"""Which part of this machine a job gets while others run beside it."""

from __future__ import annotations

import os
import socket
from collections import Counter
from pathlib import Path

from lightrail.launch import Job, Order

__all__ = ["share_of_machine"]

CARDS = "CUDA_VISIBLE_DEVICES"
THREADS = "OMP_NUM_THREADS"


def share_of_machine(order: Order, parallel: int) -> dict[str, str]:
    """The environment of a job that is about to start, as far as it differs from ours.

    Args:
        order: What it carries out.
        parallel: How many run at a time, at least 1.
    """
    if parallel == 1:
        return {}
    share = {}
    if THREADS not in os.environ:
        share[THREADS] = str(max(len(os.sched_getaffinity(0)) // parallel, 1) if _knows_affinity() else 1)
    cards, wanted = _cards(), order.trainer["devices"]
    is_for_cards = str(order.trainer["accelerator"]) in ("auto", "gpu", "cuda")
    # Cards that a user numbered are those that he means.
    if is_for_cards and isinstance(wanted, int) and 0 < wanted < len(cards):
        used = _used(order.folder.parent)
        share[CARDS] = ",".join(sorted(cards, key=lambda card: (used[card], cards.index(card)))[:wanted])
    return share


def _knows_affinity() -> bool:
    return hasattr(os, "sched_getaffinity")


def _cards() -> list[str]:
    named = os.environ.get(CARDS)
    if named is not None:
        return [card.strip() for card in named.split(",") if card.strip()]
    return [str(number) for number, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]


def _used(jobs: Path) -> Counter[str]:
    """How many living jobs beside this one use each card."""
    used: Counter[str] = Counter()
    for place in jobs.glob("*/launch/job.json"):
        job = Job.of(place.parent.parent)
        if job is None or job.outcome() is not None or job.known.get("host") != socket.gethostname():
            continue
        used.update(str(job.known.get("share", {}).get(CARDS, "")).split(","))
    return used
