"""``python -m dsv3.book NOTEBOOK ...``: run chapters and store outputs and measured budgets."""

import sys
from pathlib import Path

from dsv3.book.notebook import run
from dsv3.errors import DSV3Error

if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
    print(__doc__)
    sys.exit(2)
for name in sys.argv[1:]:
    try:
        print(f"{name}: {run(Path(name))}")
    except DSV3Error as error:
        sys.exit(f"{name}: {error.what}\n{error.found}")
