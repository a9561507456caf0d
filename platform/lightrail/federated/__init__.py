"""Federated and decentralised runs: a run carried out in rounds by clients, or by nodes that speak with each other."""

from lightrail.federated.client import Client
from lightrail.federated.compressor import Compressor, Encoded
from lightrail.federated.gossip import Gossip
from lightrail.federated.method import DecentralisedMethod, FederatedMethod, Heard, ServerMethod, State
from lightrail.federated.partition import Partition, Samples
from lightrail.federated.server_privacy import ClientHorizon, ServerPrivacy
from lightrail.federated.topology import Topology

__all__ = [
    "Client",
    "ClientHorizon",
    "Compressor",
    "DecentralisedMethod",
    "Encoded",
    "FederatedMethod",
    "Gossip",
    "Heard",
    "Partition",
    "Samples",
    "ServerMethod",
    "ServerPrivacy",
    "State",
    "Topology",
]
