"""The keys that are lightrail's own, with what each may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightrail.catalogue.forms import accepts

__all__ = ["OWN_KEYS", "PRECISIONS", "OwnKey"]

PRECISIONS = (
    "32-true", "32", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true", "64", "16", "bf16",
    "transformer-engine", "transformer-engine-float16",
)  # fmt: skip


@dataclass(frozen=True)
class OwnKey:
    """What one key may be.

    Args:
        fits: Whether a value is of the right type and in range.
        allowed: The same in words.
    """

    fits: Callable[[Any], bool]
    allowed: str


def _whole(low: int, *, null: bool = False) -> OwnKey:
    def fits(value: Any) -> bool:
        return (null and value is None) or (accepts({"is": "int"}, value) and value >= low)

    return OwnKey(fits, f"a whole number of at least {low}" + (", or null" if null else ""))


def _text(*, null: bool = False) -> OwnKey:
    return OwnKey(
        lambda value: isinstance(value, str) or (null and value is None), "text" + (", or null" if null else "")
    )


def _word(*words: str) -> OwnKey:
    return OwnKey(lambda value: value in words, ", ".join(words))


def _is_devices(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(accepts({"is": "int"}, each) and each >= 0 for each in value)
    if isinstance(value, str):
        return value in ("auto", "-1") or all(part.strip().isdigit() for part in value.split(","))
    return accepts({"is": "int"}, value) and (value >= 1 or value == -1)


def _is_classes(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(each, str) for each in value))


def _is_prompt(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(each, str) for each in value)
    return value is None or isinstance(value, str)


def _is_label(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(accepts({"is": "int"}, each) and each >= 0 for each in value)
    return value is None or (accepts({"is": "int"}, value) and value >= 0)


_YES_OR_NO = OwnKey(lambda value: isinstance(value, bool), "true or false")

GENERATION: Mapping[str, OwnKey] = {
    "seed": _whole(0),
    "run.from": _text(null=True),
    "run.root": _text(),
    "run.name": _text(null=True),
    "run.resume": _text(null=True),
    "generate.count": _whole(1),
    "generate.batch_size": _whole(1),
    "generate.label": OwnKey(_is_label, "a class from 0, a list of classes, or null"),
    "generate.prompt": OwnKey(_is_prompt, "a text, a list of texts, or null"),
    "generate.length": _whole(1),
    "generate.image": _text(null=True),
    "generate.observed": _text(null=True),
    "generate.compare": _YES_OR_NO,
    "generate.invert": _text(null=True),
    "generate.devices": OwnKey(
        lambda value: value == "auto" or (accepts({"is": "int"}, value) and value >= 1), "at least 1, or auto"
    ),
    "generate.accelerator": _word("auto", "cpu", "gpu", "cuda", "mps"),
}

OWN_KEYS: Mapping[str, Mapping[str, OwnKey]] = {
    "train": {
        "seed": _whole(0),
        "run.root": _text(),
        "run.name": _text(null=True),
        "run.resume": _text(null=True),
        "run.on_nan": _word("stop", "skip"),
        "run.accept_changes": _YES_OR_NO,
        "run.rank_timeout": _whole(1),
        "trainer.max_epochs": _whole(-1),
        "trainer.max_steps": _whole(-1),
        "trainer.max_samples": _whole(1, null=True),
        "trainer.devices": OwnKey(_is_devices, "a number of at least 1, a list of device numbers, auto, or -1 for all"),
        "trainer.accelerator": _word("auto", "cpu", "gpu", "cuda", "mps", "tpu"),
        "trainer.precision": OwnKey(lambda value: str(value) in PRECISIONS, ", ".join(PRECISIONS)),
        "trainer.accumulate": _whole(1),
        "trainer.checkpoint_every": _whole(1, null=True),
        "trainer.strategy": _text(),
        "trainer.shard": OwnKey(_is_classes, "a list of the names of classes, or null for blocks that repeat"),
        "trainer.distributed_checkpoint": _YES_OR_NO,
    },
    "generate": GENERATION,
    "search": {
        key: GENERATION[key]
        for key in (
            "seed",
            "run.from",
            "run.root",
            "generate.batch_size",
            "generate.label",
            "generate.prompt",
            "generate.accelerator",
        )
    },
}
