"""``python -m lightrail`` is the ``lightrail`` command."""

import sys

from lightrail.command import main

if __name__ == "__main__":
    sys.exit(main())
