"""CUDA graph cache: repeated work is recorded once and then replayed as a whole."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable

Work = Callable[[], None]


class GraphCache:
    """Recorded work by key.

    A key says everything that its work depends on, addresses too, so that under the same one the same work is
    asked for. It is recorded when it comes for the second time: what comes once is not worth it.

    Args:
        record: Of some work something that does it, without it being done now.
        max_size: At most so many keys are kept; the least recently used goes first.
    """

    def __init__(self, record: Callable[[Work], Work], max_size: int = 32) -> None:
        self._record, self._max_size = record, max_size
        self._kept: OrderedDict[Hashable, Work | None] = OrderedDict()  # None: came once
        self._lock = threading.Lock()  # one thread records at a time
        self._off = False

    def __len__(self) -> int:
        """How many keys are recorded."""
        return sum(work is not None for work in self._kept.values())

    def run(self, key: Hashable, work: Work) -> None:
        """Do this work, by what it was recorded as where it was."""
        recorded = None if self._off else self._of(key, work)
        (recorded or work)()

    def _of(self, key: Hashable, work: Work) -> Work | None:
        with self._lock:
            again = key in self._kept
            recorded = self._kept.pop(key, None)
            if again and recorded is None:
                try:
                    recorded = self._record(work)
                except Exception as error:  # of many kinds; without graphs all is right, only slower
                    self._off = True
                    warnings.warn(
                        f"fusedrnn: CUDA graphs are off, steps are launched one by one: {error}",
                        RuntimeWarning,
                        stacklevel=2,
                    )
            self._kept[key] = recorded
            while len(self._kept) > self._max_size:
                self._kept.popitem(last=False)
            return recorded
