"""Denoisers beside those of trained runs."""
