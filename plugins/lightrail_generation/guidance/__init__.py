"""Guidance of samplers, by the place where each acts."""
