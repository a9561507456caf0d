"""Messages as Flower's records: arrays by name, figures and words; nothing that is executed when it is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from lightrail.federated.wire import Wire

__all__ = ["Parcel", "parcel_of", "records_of"]

# Types that NumPy lacks travel as whole numbers of their width.
_CARRIERS = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8, torch.float8_e5m2: torch.uint8}
_NATIVE = (
    *(torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128, torch.bool),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)
_TYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (*_NATIVE, *_CARRIERS)}


@dataclass(frozen=True)
class Parcel:
    """What one message holds.

    Args:
        wire: Tensors by name.
        figures: Numbers about them by name.
        metrics: Numbers that the training gave by name.
        words: Texts by name.
    """

    wire: Wire = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)


def records_of(parcel: Parcel) -> RecordDict:
    """A parcel as what Flower sends.

    Example:
        >>> sent = records_of(Parcel({"w": torch.tensor([1.5], dtype=torch.bfloat16)}, {"samples": 3}))
        >>> back = parcel_of(sent)
        >>> back.wire["w"], back.figures["samples"]
        (tensor([1.5000], dtype=torch.bfloat16), 3)
    """
    arrays, types = {}, {}
    for name, tensor in parcel.wire.items():
        plain = tensor.detach().cpu().contiguous()
        types[name] = str(plain.dtype).removeprefix("torch.")
        arrays[name] = Array(plain.view(_CARRIERS.get(plain.dtype, plain.dtype)).numpy())
    return RecordDict(
        {
            "wire": ArrayRecord(arrays),
            "types": ConfigRecord(types),
            "figures": MetricRecord(dict(parcel.figures)),
            "metrics": MetricRecord({name: float(value) for name, value in parcel.metrics.items()}),
            "words": ConfigRecord(dict(parcel.words)),
        }
    )


def parcel_of(records: RecordDict) -> Parcel:
    """The parcel in a message from a stranger, who may have sent anything.

    Args:
        records: What arrived.

    Raises:
        ValueError: It is no parcel.
    """
    try:
        wire = dict(records.array_records["wire"])
        types = {name: _TYPES[str(word)] for name, word in records.config_records["types"].items()}
        if types.keys() != wire.keys():
            raise ValueError("arrays and their types do not go together")
        return Parcel(
            {name: _tensor(array.numpy(), types[name]) for name, array in wire.items()},
            _numbers(records.metric_records["figures"]),
            _numbers(records.metric_records["metrics"]),
            {name: str(text) for name, text in records.config_records["words"].items()},
        )
    except (KeyError, TypeError, ValueError, EOFError, OSError, RuntimeError) as error:
        raise ValueError(f"no message of lightrail: {type(error).__name__}: {error}") from error


def _tensor(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    # A copy: the array may stand on bytes that are read-only.
    tensor = torch.from_numpy(np.array(array))
    carrier = _CARRIERS.get(dtype, dtype)
    if tensor.dtype != carrier:
        raise ValueError(f"an array of {tensor.dtype} is said to be {dtype}")
    return tensor.view(dtype)


def _numbers(record: Mapping[str, object]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"'{name}' is no number")
        numbers[name] = value
    return numbers


def whole(figures: Mapping[str, float], name: str) -> int:
    """A figure that counts something.

    Raises:
        ValueError: It is missing, or no whole number of at least 0.
    """
    value = figures.get(name, math.nan)
    if not math.isfinite(value) or value != int(value) or value < 0:
        raise ValueError(f"'{name}' is {value}, and counts nothing")
    return int(value)
