"""How names, numbers and times are written for people."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

__all__ = ["by_base", "duration", "number", "size", "stage_and_base", "title"]

STAGES = ("test", "val", "train", "guided", "unguided")
_STAGE = re.compile(r"(train|val|valid|validation|test)[_/.](.+)")
_ACRONYMS = {
    "auc": "AUC",
    "auroc": "AUROC",
    "f1": "F1",
    "frechet": "Fréchet",
    "kid": "KID",
    "lr": "Learning rate",
    "mae": "MAE",
    "mse": "MSE",
    "psnr": "PSNR",
    "r2": "R²",
}


def stage_and_base(name: str) -> tuple[str, str]:
    """The stage that a metric's name begins with, and what is measured.

    Example:
        >>> stage_and_base("val_loss"), stage_and_base("train/top5"), stage_and_base("lr")
        (('val', 'loss'), ('train', 'top5'), ('', 'lr'))
    """
    match = _STAGE.fullmatch(name)
    if match is None:
        return "", name
    stage = "val" if match[1].startswith("val") else match[1]
    return stage, match[2]


def title(base: str) -> str:
    """A name as a heading.

    Example:
        >>> title("calibration_error"), title("f1_score"), title("sam/sharpness")
        ('Calibration error', 'F1 score', 'Sam · sharpness')
    """
    words = base.replace("_", " ").replace("/", " · ").split()
    words = [_ACRONYMS.get(word.lower(), word) for word in words]
    text = " ".join(words) or base
    return text[:1].upper() + text[1:]


def number(value: object) -> str:
    """A number in four significant digits; whole numbers keep all of theirs, in groups of three.

    Example:
        >>> number(0.97777), number(23466), number(3.1e-05), number(float("nan"))
        ('0.9778', '23,466', '3.1e-5', 'NaN')
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "-∞"
    text = f"{value:.4g}"
    if 1e-3 <= abs(value) < 1e4:
        text = f"{value:#.4g}".rstrip(".")
    return re.sub(r"e([+-])0*(\d)", lambda m: "e" + m[1].replace("+", "") + m[2], text)


def duration(seconds: object) -> str:
    """A time in the two units that matter.

    Example:
        >>> duration(0.4), duration(12.34), duration(754), duration(93784)
        ('0.4 s', '12.3 s', '12 min 34 s', '26 h 3 min')
    """
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return str(seconds)
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


_SIZES = (
    ("samples", "sample"),
    ("tokens", "token"),
    ("evaluations", "evaluation"),
    ("rounds", "round"),
    ("steps", "step"),
    ("epochs", "epoch"),
    ("wall_time", ""),
    ("parameters", "parameter"),
)


def size(summary: Mapping[str, object]) -> list[str]:
    """Samples, rounds, steps, epochs, time and the like, as far as a summary holds them, each with its unit.

    A run that counts rounds has no steps and epochs besides.

    Example:
        >>> size({"steps": 1080, "epochs": 1, "wall_time": 12.34, "device": "cpu"})
        ['1,080 steps', '1 epoch', '12.3 s', 'cpu']
    """
    facts = []
    for key, unit in _SIZES:
        value = summary.get(key)
        if value is None or (key in ("steps", "epochs") and summary.get("rounds") is not None):
            continue
        facts.append(f"{number(value)} {unit}{'' if value == 1 else 's'}" if unit else duration(value))
    if device := summary.get("device"):
        facts.append(str(device))
    return facts


def by_base(summary: Mapping[str, object]) -> dict[str, dict[str, float]]:
    """The final metrics as ``{base: {stage: value}}``: the monitored one first, then the loss, then as they come.

    Example:
        >>> by_base({"metrics": {"train_loss": 0.5, "test_loss": 0.75, "test_accuracy": 1.0},
        ...          "monitor": {"name": "val_accuracy"}})
        {'accuracy': {'test': 1.0}, 'loss': {'train': 0.5, 'test': 0.75}}
    """
    table: dict[str, dict[str, float]] = {}
    metrics = summary.get("metrics")
    for name, value in metrics.items() if isinstance(metrics, Mapping) else ():
        if name not in ("epoch", "step"):
            stage, base = stage_and_base(name)
            table.setdefault(base, {})[stage] = value
    beside = summary.get("unguided")
    if isinstance(beside, Mapping):
        table = {base: {"guided": next(iter(values.values()))} for base, values in table.items()}
        for name, value in beside.get("metrics", {}).items():
            table.setdefault(name, {})["unguided"] = value
    first = (monitored(summary), "loss")
    return dict(sorted(table.items(), key=lambda item: first.index(item[0]) if item[0] in first else len(first)))


def monitored(summary: Mapping[str, object]) -> str:
    """The base name of the metric that chose the best checkpoint; empty where none did."""
    monitor = summary.get("monitor")
    return stage_and_base(str(monitor.get("name", "")))[1] if isinstance(monitor, Mapping) else ""
