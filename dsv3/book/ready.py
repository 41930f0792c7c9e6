"""One line instead of a NameError, for a cell that is run before the cell it leans on.

A notebook that is opened the next day shows all its outputs and knows none of its names: the
kernel that had them is gone. An exercise is where readers come back to, so each begins with

    from dsv3.book import needs

    needs("Before you start")

which names the section whose cell has to be run first, as long as it has not been.
"""

from __future__ import annotations

import sys

from dsv3.errors import DSV3Error


class NotReady(DSV3Error):
    """A cell came before the one it needs. In a notebook it shows as its line, with no traceback:
    nothing is wrong with any code."""

    def _render_traceback_(self) -> list[str]:
        """What IPython prints of it."""
        return [str(self)]


def needs(section: str, name: str = "check") -> None:
    """Stop the calling cell unless the section's cell was run in this kernel.

    name: of what that cell makes. Raises NotReady.
    """
    if name not in sys._getframe(1).f_globals:
        raise NotReady(
            f"run the cell under “{section}” first, then this one again",
            fix="This kernel is new and knows nothing of what was run before",
        )
