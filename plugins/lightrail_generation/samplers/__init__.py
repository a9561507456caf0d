"""Samplers: solvers of the generative process."""
