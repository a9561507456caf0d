"""Topologies: who speaks with whom."""
