"""The figures that the basic tasks draw after a test; matplotlib is imported with this package, so import it late."""
