"""Tables of which only the rows that were used are in memory.

Texts use few rows of a table of token embeddings, which may be larger than all else in its tower.
Mapped from its file, nearly all of it becomes resident, because Linux maps 64 KiB around each page
that is read. So a table has memory of its own, which the system provides page by page, and rows
are read from the file before they are first used.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from clip_server.towers.lookups import Lookup

# What a smaller table would save is not worth it.
_SMALLEST = 4 << 20


def pays(lookup: Lookup) -> bool:
    """Whether a table is better loaded row by row than mapped."""
    return sys.platform == "linux" and lookup.nbytes >= _SMALLEST


class Table:
    """A table [V, W] in a file, whose rows are zero until they are loaded. Thread-safe.

    values: the table, to be read as long as this object exists.
    """

    def __init__(self, lookup: Lookup) -> None:
        self.name, self.indices = lookup.table, lookup.indices
        memory = mmap.mmap(-1, lookup.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        self.values: NDArray[Any] = np.frombuffer(memory, lookup.dtype).reshape(lookup.shape)
        self._rows = np.frombuffer(memory, np.uint8).reshape(lookup.shape[0], -1)
        self._is_loaded = np.zeros(len(self._rows), np.bool_)
        self._lock = threading.Lock()
        # Held open, as a mapping would hold it: the file may be removed meanwhile.
        self._file, self._offset = os.open(lookup.file, os.O_RDONLY | os.O_CLOEXEC), lookup.offset
        weakref.finalize(self, os.close, self._file)

    def load(self, indices: NDArray[np.integer[Any]]) -> None:
        """Loads the rows of these numbers, an array of any shape; negative ones count from the end.

        Raises:
            OSError: they cannot be read.
        """
        if self._is_loaded.take(indices, mode="wrap").all():
            return
        rows = np.unique(indices % len(self._rows))
        with self._lock:
            for row in rows[~self._is_loaded[rows]]:
                self._read(int(row))
                self._is_loaded[row] = True

    def _read(self, row: int) -> None:
        values = self._rows[row]
        if os.preadv(self._file, [values], self._offset + row * values.nbytes) != values.nbytes:
            raise OSError(f"the file of the table {self.name} was cut off")
