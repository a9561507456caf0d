"""What is put around a sampler."""
