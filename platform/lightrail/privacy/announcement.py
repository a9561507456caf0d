"""What a private run will cost, said before it begins."""

from __future__ import annotations

import sys

from lightrail.privacy.ledger import Ledger, plan_table

__all__ = ["announce"]


def announce(ledger: Ledger) -> None:
    """Prints the plan of a run on standard error.

    Args:
        ledger: With the releases of the whole run.
    """
    rows = plan_table(ledger)
    width = max(len(name) for name, _ in rows)
    print("\n".join(["privacy", *(f"  {name:<{width}}  {value}" for name, value in rows)]), file=sys.stderr)
