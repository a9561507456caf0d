"""Clients on other machines, and simulated ones, with Flower: its SuperLink and SuperNodes carry, lightrail computes.

Nothing that a server sends is executed: a client builds its side from plugins that it has itself, and tensors and
plain figures are all that crosses. This package needs the extra ``flower``.
"""

from __future__ import annotations

import os

# Neither usage figures nor a look for a newer version leave the machine; who wants them sets these to 1 and 0.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
