"""Data for generative tasks."""
