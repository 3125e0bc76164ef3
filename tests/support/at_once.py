"""Calls from several Python threads at the same moment."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def at_once(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Make each call in a thread of its own, all from the same moment on; return their results in order."""
    start = threading.Barrier(len(calls))

    def make(call: Callable[[], Any]) -> Any:
        start.wait(60)
        return call()

    with switching_often(), ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(make, calls))


@contextlib.contextmanager
def switching_often() -> Iterator[None]:
    """Within the block, threads hand over the GIL as often as possible. Free-threaded Python has none."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
