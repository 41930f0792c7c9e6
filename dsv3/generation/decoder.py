"""What plain and speculative decoding share: caches, and which rows are still in the batch.

A row that has ended leaves the batch: the last row takes its place in the caches, and a pass
computes only what somebody waits for. A cache that the caller gave keeps all its rows, since
he will go on with it; there a row that has ended stays and is fed nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from dsv3.cache import rows_without
from dsv3.generation.sampling import Chooser


class Decoder:
    """Decodes a batch. cache: of the model. rows: numbers of the texts that are in the batch, in
    its order; at first all. nbytes: of all caches."""

    def __init__(self, model, cache, choose: Chooser, *others, owned: bool):
        """others: more caches with the same rows. owned: whether nobody else reads the caches."""
        self.model, self.choose = model, choose
        self._hold(cache, *others, owned=owned)

    def _hold(self, *caches, owned: bool) -> None:
        self.cache, self._caches, self._owned = caches[0], caches, owned
        self.rows = list(range(len(self.cache.lengths)))
        self.nbytes = sum(cache.nbytes for cache in caches)

    def drop_ended(self, left: Sequence[int]) -> list[int] | None:
        """Take the rows that may take no more tokens out of the batch: all, but for those that fill
        it up to a fitting size (``Transformer.fitting_rows``) and are fed nothing. Returns which
        places stay, in their new order, None for all. left: how many tokens each text may still
        take."""
        ended = [place for place, row in enumerate(self.rows) if not left[row]]
        if not self._owned or not ended:
            return None
        going_on = len(self.rows) - len(ended)
        leaving = ended[self.model.fitting_rows(going_on) - going_on :]
        if not leaving:
            return None
        staying = rows_without(leaving, len(self.rows))
        for cache in self._caches:
            cache.keep(staying)
        self.rows = [self.rows[place] for place in staying]
        return staying

    def by_text(self, answers: Sequence[list], texts: int) -> list[list]:
        """Answers of the rows in the batch as those of all texts: none for who is not in it."""
        given = dict(zip(self.rows, answers, strict=True))
        return [given.get(text, []) for text in range(texts)]
