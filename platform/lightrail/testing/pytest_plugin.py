"""The pytest plugin; it does nothing until asked with ``--lightrail-plugins``."""
