"""Batchings: how much data goes into a step over time."""
