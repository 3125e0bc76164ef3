"""How many threads the compiled kernels use. The results do not depend on it."""

from __future__ import annotations

import os

_without_core: int | None = None  # what was set where the compiled module, which keeps the number, is missing


def get_num_threads() -> int:
    """The number of threads that the ``cpu`` and ``numba`` backends use."""
    try:
        from fusedrnn import _core
    except ImportError:
        return _without_core or os.cpu_count() or 1
    return _core.num_threads()


def set_num_threads(threads: int) -> None:
    """Use ``threads`` threads from now on.

    At the start it is the environment's FUSEDRNN_NUM_THREADS, else OMP_NUM_THREADS, else as many as this
    process may use by its affinity and its cgroup.

    Raises:
        TypeError, ValueError: ``threads`` is not a whole number of at least 1.
    """
    if isinstance(threads, bool) or not isinstance(threads, int):
        raise TypeError(f"threads: expected a whole number, got {type(threads).__name__}")
    if threads < 1:
        raise ValueError(f"threads: expected at least 1, got {threads}")
    try:
        from fusedrnn import _core
    except ImportError:
        global _without_core
        _without_core = threads
        return
    _core.set_num_threads(threads)
