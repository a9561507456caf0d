"""lightrail: any published training or sampling method on your own model, with one flag.

Nothing is imported until it is used, so that the command line answers without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lightrail.catalogue import available, load
    from lightrail.errors import LightrailError, UserError
    from lightrail.federated import (
        Client,
        Compressor,
        DecentralisedMethod,
        Gossip,
        Partition,
        ServerMethod,
        ServerPrivacy,
        Topology,
    )
    from lightrail.generation import Denoiser, Guidance, Measurement, Sampler, SamplerWrapper, TimeGrid
    from lightrail.generation.search import Search
    from lightrail.generation.text import TokenSampler
    from lightrail.launch import Launch
    from lightrail.privacy import PrivacyMethod
    from lightrail.run import Result, Run, compose
    from lightrail.sample_gradients import SampleGradients
    from lightrail.step import Batching, Closure, CombinedOptimizer, Extent, Portion, Transform, TransformedOptimizer
    from lightrail.sweep import SweepMethod
    from lightrail.traits import Claim, Peer, SamplingClaim, Traits

__all__ = [
    "Batching",
    "Claim",
    "Client",
    "Closure",
    "CombinedOptimizer",
    "Compressor",
    "DecentralisedMethod",
    "Denoiser",
    "Extent",
    "Gossip",
    "Guidance",
    "Launch",
    "LightrailError",
    "Measurement",
    "Partition",
    "Peer",
    "Portion",
    "PrivacyMethod",
    "Result",
    "Run",
    "SampleGradients",
    "Sampler",
    "SamplerWrapper",
    "SamplingClaim",
    "Search",
    "ServerMethod",
    "ServerPrivacy",
    "SweepMethod",
    "TimeGrid",
    "TokenSampler",
    "Topology",
    "Traits",
    "Transform",
    "TransformedOptimizer",
    "UserError",
    "available",
    "compose",
    "load",
]

_HOMES = {
    "Batching": "lightrail.step",
    "Claim": "lightrail.traits",
    "Client": "lightrail.federated",
    "Closure": "lightrail.step",
    "CombinedOptimizer": "lightrail.step",
    "Compressor": "lightrail.federated",
    "DecentralisedMethod": "lightrail.federated",
    "Denoiser": "lightrail.generation",
    "Extent": "lightrail.step",
    "Gossip": "lightrail.federated",
    "Guidance": "lightrail.generation",
    "Launch": "lightrail.launch",
    "LightrailError": "lightrail.errors",
    "Measurement": "lightrail.generation",
    "Partition": "lightrail.federated",
    "Peer": "lightrail.traits",
    "Portion": "lightrail.step",
    "PrivacyMethod": "lightrail.privacy",
    "Result": "lightrail.run",
    "Run": "lightrail.run",
    "SampleGradients": "lightrail.sample_gradients",
    "Sampler": "lightrail.generation",
    "SamplerWrapper": "lightrail.generation",
    "SamplingClaim": "lightrail.traits",
    "Search": "lightrail.generation.search",
    "ServerMethod": "lightrail.federated",
    "ServerPrivacy": "lightrail.federated",
    "SweepMethod": "lightrail.sweep",
    "TimeGrid": "lightrail.generation",
    "TokenSampler": "lightrail.generation.text",
    "Topology": "lightrail.federated",
    "Traits": "lightrail.traits",
    "Transform": "lightrail.step",
    "TransformedOptimizer": "lightrail.step",
    "UserError": "lightrail.errors",
    "available": "lightrail.catalogue",
    "compose": "lightrail.run",
    "load": "lightrail.catalogue",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lightrail' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
