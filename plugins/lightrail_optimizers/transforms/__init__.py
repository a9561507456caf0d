"""Gradient transforms: what acts between the gradient and the update."""
