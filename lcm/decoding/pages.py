"""Which pages of the pool belong to which row."""

import numpy as np


class Pool:
    """A free list of pages, and the table of those that rows have: int32 `[R, N]`, -1 for none.

    A row is given all the pages that its request can come to need, so no row ever waits for a page
    that only another one waiting could give back.
    """

    def __init__(self, pages: int, rows: int, page: int) -> None:
        self.page = page
        self.table_RN = np.full((rows, 1), -1, np.int32)
        self._free = list(range(pages - 1, -1, -1))

    @property
    def free(self) -> int:
        """Pages that no row has."""
        return len(self._free)

    def needs(self, tokens: int) -> int:
        """Pages for so many tokens."""
        return pages_of(tokens, self.page)

    def widen(self, tokens: int) -> None:
        """Room in the table for rows of so many tokens."""
        missing = self.needs(tokens) - self.table_RN.shape[1]
        if missing > 0:
            self.table_RN = np.pad(self.table_RN, [(0, 0), (0, missing)], constant_values=-1)

    def take(self, row: int, tokens: int) -> None:
        """Gives a row that has none its pages."""
        count = self.needs(tokens)
        self.table_RN[row, :count] = [self._free.pop() for _ in range(count)]

    def release(self, row: int) -> None:
        """Takes a row's pages back."""
        self._free += [int(page) for page in self.table_RN[row] if page >= 0]
        self.table_RN[row] = -1


def pages_of(tokens: int, page: int) -> int:
    """How many pages of `page` tokens it takes to hold so many."""
    return -(-tokens // page)
