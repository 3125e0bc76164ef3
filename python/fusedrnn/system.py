"""Information about this installation: version, compiler, instruction sets, threads, backends, machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from fusedrnn import backends
from fusedrnn.cells import lstm
from fusedrnn.threads import get_num_threads, get_thread_pool

PLANNED = ((100, 1, 64), (50, 16, 256), (100, 64, 512), (25, 128, 1024))  # T, B, H whose plans info shows


def version() -> str:
    """The installed version, which is defined only in pyproject.toml."""
    from importlib.metadata import PackageNotFoundError, metadata

    try:
        return metadata("fusedrnn")["Version"]
    except PackageNotFoundError:
        return "not installed"


def info() -> dict[str, Any]:
    """What was built, what was found, what is used, and why a backend is not available.

    Keys: ``version``, ``python``, ``numpy``, ``compiler``, ``built`` and ``detected`` (instruction sets),
    ``isa`` (the one in use), ``ordered_copies`` (``"never"``, ``"large"`` or ``"always"``: for which layers
    the weight gradients read copies in the order of their tiles, which is faster on some machines),
    ``prefetch`` (whether products prefetch the weights that are read next, which is faster on some machines),
    ``bfloat16`` (the instruction set of its kernels; None: there are none here), ``threads``,
    ``thread_pool``, ``backends`` (by name: None, or why it is not available), ``backend`` (the default),
    ``cuda`` (how that backend would run some sizes; empty if it is not available).
    """
    found: dict[str, Any] = {
        "version": version(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "compiler": None,
        "built": [],
        "detected": [],
        "isa": None,
        "ordered_copies": None,
        "prefetch": None,
        "bfloat16": None,
        "threads": get_num_threads(),
        "thread_pool": get_thread_pool(),
    }
    try:
        from fusedrnn import _core
    except ImportError:
        pass  # the cpu backend gives the reason, below
    else:
        found |= {key: value for key, value in _core.info().items() if key != "version"}
    found["backends"] = {name: backends.get(name).unavailable() for name in backends.NAMES}
    found["backend"] = backends.get().name
    found["cuda"] = _cuda_plans() if found["backends"]["cuda"] is None else {}
    return found


def _cuda_plans() -> dict[str, str]:
    """The plans of an LSTM in float32, forward and backward, by its sizes."""
    backend: Any = backends.get("cuda")
    plans = {}
    for T, B, H in PLANNED:
        forward, backward = (backend.plan(lstm, T, B, H, "float32", backward=back) for back in (False, True))
        plans[f"LSTM T={T} B={B} H={H}"] = f"{forward}; back {backward}"
    return plans


def environment() -> dict[str, Any]:
    """What is recorded with a measurement."""
    found = {
        key: value for key, value in info().items() if key not in ("backends", "backend", "threads", "cuda")
    }
    found |= {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "system": platform.platform(),
        "gpu": gpu(),
    }
    for name in ("torch", "numba"):
        if name in sys.modules:
            found[name] = sys.modules[name].__version__
    return found


def machine() -> dict[str, Any]:
    """Processor, family, model, caches and the number of cores that this process may use."""
    found: dict[str, Any] = {"architecture": platform.machine()}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("vendor_id", "model name", "cpu family", "model"):
                found.setdefault(key.strip(), value.strip())
        caches = {}
        for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
            level, kind, size = ((folder / key).read_text().strip() for key in ("level", "type", "size"))
            caches[f"L{level} {kind.lower()}"] = size
        found["caches"] = caches
    except OSError:  # not Linux
        found.setdefault("model name", platform.processor())
    found["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return found


def gpu() -> str | None:
    """The NVIDIA GPU, its driver and memory, and the packages that use it. None if there is no driver."""
    from importlib.metadata import distributions

    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    prefixes = "torch", "cupy", "cuda-", "nvidia-cu", "ml_dtypes", "ml-dtypes"
    packages = {f"{d.name} {d.version}" for d in distributions() if f"{d.name}".startswith(prefixes)}
    return ", ".join([found, *sorted(packages)])


def commit() -> str | None:
    """The commit of the checkout that the current folder is in, with a plus if files differ from it.

    None if the current folder is not in a checkout of this project.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        if not Path(git("rev-parse", "--show-toplevel"), "python", "fusedrnn").is_dir():
            return None
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
