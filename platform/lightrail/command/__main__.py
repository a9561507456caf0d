"""``python -m lightrail.command``."""

import sys

from lightrail.command import main

sys.exit(main())
