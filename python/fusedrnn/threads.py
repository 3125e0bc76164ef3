"""The number of threads of the compiled kernels, and their thread pool. The results depend on neither."""

from __future__ import annotations

import os
from typing import Any

from fusedrnn.backends.arguments import check_whole

_without_core: int | None = None  # the number that was set, if no compiled module keeps it


def _compiled() -> Any:
    """The compiled module, or None where it is missing."""
    try:
        from fusedrnn import _core
    except ImportError:
        return None
    return _core


def get_num_threads() -> int:
    """The number of threads that the ``cpu`` and ``numba`` backends use."""
    core = _compiled()
    return (_without_core or _default()) if core is None else core.num_threads()


def _default() -> int:
    """The default number of threads without the compiled module, which knows the cgroup limit too."""
    if own := os.environ.get("FUSEDRNN_NUM_THREADS"):
        if not (own.strip().isdecimal() and int(own)):
            raise ValueError(f"FUSEDRNN_NUM_THREADS: expected an integer of at least 1, got {own!r}")
        return int(own)
    omp = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if omp.isdecimal() and int(omp):
        return int(omp)
    return _usable()


def _usable() -> int:
    """The CPUs that the process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_num_threads(threads: int) -> None:
    """Set the number of threads.

    The default is the environment variable FUSEDRNN_NUM_THREADS, else OMP_NUM_THREADS, else the number of
    CPUs that the process may use (affinity, and with the compiled module the cgroup limit).

    Raises:
        TypeError, ValueError: ``threads`` is not an integer of at least 1.
    """
    threads = check_whole("threads", threads, 1, 2**31 - 1)
    if (core := _compiled()) is not None:
        core.set_num_threads(threads)
        return
    global _without_core
    _without_core = threads


def get_thread_pool() -> str:
    """The thread pool of the ``cpu`` backend: ``"own"`` or ``"openmp"``."""
    core = _compiled()
    return "own" if core is None else core.thread_pool()


def set_thread_pool(pool: str) -> None:
    """Run the kernels on our own threads or on OpenMP's, from now on and in the whole process.

    OpenMP's threads, such as PyTorch's, keep spinning after their work, which slows other threads down.
    Between PyTorch's operations, the kernels are therefore faster on the same threads. A call uses at most
    OpenMP's number of threads, which ``torch.set_num_threads`` sets. Calls from several Python threads have
    separate OpenMP threads. A forked child uses our own threads again.

    Args:
        pool: ``"own"``, the default, or ``"openmp"``.

    Raises:
        TypeError, ValueError: ``pool`` is neither of the two.
        RuntimeError: No OpenMP runtime is loaded in this process (PyTorch has one: import it first), or there
            is no compiled module, or this process was forked from one that used ``"openmp"``.
    """
    if not isinstance(pool, str):
        raise TypeError(f"pool: expected 'own' or 'openmp', got {type(pool).__name__}")
    if pool not in ("own", "openmp"):
        raise ValueError(f"pool: expected 'own' or 'openmp', got {pool!r}")
    if (core := _compiled()) is not None:
        core.set_thread_pool(pool == "openmp")
    elif pool == "openmp":
        raise RuntimeError("pool: 'openmp' needs the compiled module fusedrnn._core, which is missing")
