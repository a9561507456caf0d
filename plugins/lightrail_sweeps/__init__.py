"""Searches over configurations."""
