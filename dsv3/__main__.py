"""``python -m dsv3``: the command line."""

import sys

from dsv3.cli import main

sys.exit(main())
