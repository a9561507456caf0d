"""Training under differential privacy, and evaluation that can be repeated."""
