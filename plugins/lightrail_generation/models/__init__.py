"""Networks that take a noisy state, a time and a label."""
