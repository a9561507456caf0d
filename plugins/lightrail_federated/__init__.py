"""Federated and decentralised training: methods, compressors, partitions and topologies."""
