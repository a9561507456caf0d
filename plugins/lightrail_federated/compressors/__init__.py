"""Compressors: vectors in fewer bytes."""
