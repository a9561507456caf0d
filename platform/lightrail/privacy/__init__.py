"""Differential privacy: what is released, what it costs, and the account of it."""

from lightrail.privacy.method import PrivacyMethod, PrivateHorizon, Release

__all__ = ["PrivacyMethod", "PrivateHorizon", "Release"]
