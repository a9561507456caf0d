"""Generative tasks."""
