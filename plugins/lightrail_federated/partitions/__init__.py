"""Partitions: which client has which samples."""
