"""Optimizers and gradient transforms."""
