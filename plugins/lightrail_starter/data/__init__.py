"""Embedded and user-supplied data."""
