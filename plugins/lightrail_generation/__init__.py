"""Generative tasks and models, samplers, time grids, and what measures samples."""
