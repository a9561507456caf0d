"""Starts Flower's SuperLink or SuperNode as a child that goes when its parent goes, however that ends.

``python -P daemon.py superlink|supernode PARENT_PID ARGUMENTS…``; a file of its own, so that the child loads no torch.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from flwr.supercore.app_utils import start_parent_process_monitor

    role = sys.argv.pop(1)
    start_parent_process_monitor(int(sys.argv.pop(1)))
    if role == "superlink":
        from flwr.superlink.cli import flower_superlink as start
    else:
        from flwr.supernode.cli import flower_supernode as start
    sys.exit(start())
