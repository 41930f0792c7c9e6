"""What all chapters share: notation, ledgers, exercises, and breaking things on purpose.

``notation``, ``ledger`` and ``misreadings`` print tables from data files beside them; ``exercise``
judges a reader's answer; ``mutation`` changes one line of the package for a moment; ``team`` runs
a cell's function on several ranks; ``chNN`` holds the checks of a chapter's exercises, each of
which begins with ``needs``. ``python -m dsv3.book NOTEBOOK`` runs a chapter and writes its
measured budget; with ``--reset`` it brings the chapter back as it was shipped. Nothing in the
model's own code imports this package.
"""

from dsv3.book.ledger import equation_ledger, fact_ledger, misreadings
from dsv3.book.mutation import mutated
from dsv3.book.notation import notation_table
from dsv3.book.ready import needs
from dsv3.book.team import Team

__all__ = [
    "Team",
    "equation_ledger",
    "fact_ledger",
    "misreadings",
    "mutated",
    "needs",
    "notation_table",
]
