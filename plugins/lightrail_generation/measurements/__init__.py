"""Linear operators of inverse problems."""
