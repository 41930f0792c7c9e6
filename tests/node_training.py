"""``dsv3 train`` on little text, as a program for launchers: the words after its name."""

from __future__ import annotations

import sys

from training_cases import little_text

from dsv3.cli import main

if __name__ == "__main__":
    little_text()
    sys.exit(main(sys.argv[1:]))
