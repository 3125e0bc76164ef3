"""A device for the CUDA backend that is this computer's CPU: the kernels' sources, compiled by g++.

Every CUDA thread is a fiber (``emulation.h``). Device arrays are NumPy arrays. Nothing here is fast; what
runs is right or wrong as on a GPU, and in every order of its threads.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusedrnn.backends.cuda.graphs import GraphCache
from fusedrnn.backends.cuda.nvrtc import Code

HERE = Path(__file__).parent
MUTANT = os.environ.get("FUSEDRNN_TEST_CSRC")  # other sources than those of this tree
CSRC = Path(MUTANT or HERE.parents[1] / "csrc")
RACES = ["-DFUSEDRNN_RACES", "-g"] if os.environ.get("FUSEDRNN_TEST_RACES") else []  # ThreadSanitizer watches
COMPILER = shutil.which("g++") or shutil.which("c++")
FLAGS = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-ffp-contract=off",
         "-fno-math-errno", "-DFUSEDRNN_EMULATED", f"-I{HERE}"]  # fmt: skip
GUARD = 8192  # bytes on both sides of every array, NaN, that no kernel may write

Argument = ctypes.Structure | ctypes._SimpleCData


def fma() -> list[str]:
    """The flag for FMA as an instruction, where this computer has it; the bits are the same without."""
    cpu = Path("/proc/cpuinfo")
    return ["-mfma"] if cpu.exists() and " fma " in cpu.read_text() else []


def build(
    sources: Sequence[Path], flags: Sequence[str], csrc: Path | None = None, folder: Path | None = None
) -> Path:
    """What g++ makes of the sources, which may include what is in this folder and in ``csrc``.

    It stays in a folder of this user's, or in the one given, and is found again by a hash of all that it is
    made of.
    """
    assert COMPILER is not None, "needs a C++ compiler"
    command = [COMPILER, *FLAGS, *([f"-I{csrc}"] if csrc else []), *flags]
    digest = hashlib.sha256(_version(COMPILER))
    for part in [*command, *map(str, sources)]:
        digest.update(part.encode() + b"\0")
    folders = [HERE, *(csrc / name for name in ("", "cuda", "cells", "simd"))] if csrc else [HERE]
    for path in sorted(
        p for folder in folders for p in folder.iterdir() if p.suffix in (".h", ".cu", ".cpp")
    ):
        digest.update(path.read_bytes() + b"\0")
    folder = folder or Path(tempfile.gettempdir()) / f"fusedrnn-emulation-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / f"{digest.hexdigest()[:32]}{'.o' if '-c' in flags else ''}"
    if not target.exists():
        made = folder / f"{target.name}.{os.getpid()}.{threading.get_ident()}"
        done = subprocess.run([*command, *sources, "-o", made], capture_output=True, text=True)
        assert done.returncode == 0, f"does not compile: {done.stderr[:3000]}"
        made.replace(target)  # at once: other processes may do the same
    return target


def runtime() -> Path:
    """The object of emulation.cpp, which is never watched itself."""
    return build([HERE / "emulation.cpp"], ["-c", "-fPIC", "-fvisibility=hidden", "-O2", *RACES])


@functools.cache
def _version(compiler: str) -> bytes:
    return subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout


@functools.cache
def library(code: Code, warps: int) -> ctypes.CDLL:
    """The kernels."""
    flags = ["-fPIC", "-shared", "-fvisibility=hidden", f"-DFUSEDRNN_WARPS={warps}", *fma(), *RACES]
    flags += [f"-DFUSEDRNN_{name.upper()}={value}" for name, value in code._asdict().items()]
    flags += ["-fsanitize=thread"] if RACES else []
    sources = [HERE / "library.cpp", runtime()]
    made = build(sources, [*flags, "-w"], CSRC, CSRC.parent) if MUTANT else build(sources, flags, CSRC)
    found = ctypes.CDLL(str(made))
    found.fusedrnn_launch.argtypes = [
        ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_size_t, ctypes.c_int, ctypes.c_uint64,
        ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_size_t), ctypes.c_size_t,
        ctypes.c_char_p, ctypes.c_size_t,
    ]  # fmt: skip
    return found


def rounded(a: Any, precision: str) -> Any:
    """Float32 as the matrix units take it, to nearest and ties to even; ieee leaves it."""
    if precision == "fp16":
        return a.astype(np.float16).astype(np.float32)
    lost = {"tf32": 13, "bf16": 16}.get(precision)  # bits of the mantissa
    if lost is None:
        return a
    bits = np.ascontiguousarray(a, np.float32).view(np.uint32)
    last = bits >> lost & 1
    nearest = (bits + ((1 << lost - 1) - 1) + last) >> lost << lost
    return np.where(np.isfinite(a), nearest.astype(np.uint32).view(np.float32), a)


class _Place:
    """Where an array lies, and how: the array may be gone."""

    def __init__(self, a: Any) -> None:
        self.dtype, self.__array_interface__ = a.dtype, a.__array_interface__

    def array(self) -> Any:
        return np.asarray(self).view(self.dtype)


class EmulatedDevice:
    """Has the methods of ``fusedrnn.backends.cuda.cupy_device.CupyDevice``.

    ``seed`` is that of the order in which threads run; each launch draws another one from it.
    """

    matrix_units = True
    shared_bytes = 227 * 1024
    _lock = threading.Lock()  # one launch at a time: the fibers are those of one thread

    def __init__(self, multiprocessors: int = 4, warps: int = 2, seed: int = 0, cluster: int = 8) -> None:
        self.multiprocessors, self.warps, self.seed, self.cluster = multiprocessors, warps, seed, cluster
        self.launches: list[str] = []  # the names of the kernels that ran
        self.products: list[str] = []  # the precisions of the products that ran
        self.replays = 0  # of what was recorded
        self.graphs = GraphCache(self._record)
        self._recorded: list[Any] | None = None  # what is launched, while it is only recorded
        self._guarded: dict[int, tuple[weakref.ref[Any], Any]] = {}

    def is_array(self, a: Any) -> bool:
        return isinstance(a, np.ndarray)

    def empty(self, shape: int | Sequence[int], dtype: Any) -> Any:
        """What nobody may use: NaN, and of integers large numbers."""
        dtype = np.dtype(dtype)
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        size = int(np.prod(shape)) * dtype.itemsize
        memory = np.full(size + 2 * GUARD, 0xFF, np.uint8)
        if dtype.kind in "iub":
            memory[GUARD : GUARD + size] = 0x55 if dtype.kind != "b" else 1
        made = memory[GUARD : GUARD + size].view(dtype).reshape(shape)
        key = id(memory)
        self._guarded[key] = weakref.ref(memory, lambda _: self._guarded.pop(key, None)), size
        return made

    def asarray(self, a: Any) -> Any:
        made = self.empty(a.shape, a.dtype)
        made[...] = a
        return made

    def pointer(self, a: Any) -> int:
        return int(a.ctypes.data)

    def matmul(self, a: Any, b: Any, out: Any, precision: str = "ieee") -> None:
        assert a.ndim == b.ndim == out.ndim == 2
        assert out.flags.c_contiguous
        if self._recorded is not None:
            views = [_Place(array) for array in (a, b, out)]
            product = EmulatedDevice.matmul  # whatever arrays a subclass has
            self._recorded.append(lambda: product(self, *(view.array() for view in views), precision))
            return
        self.products.append(precision)
        with np.errstate(all="ignore"):
            if a.dtype.itemsize == 2:
                out[...] = np.matmul(a.astype(np.float32), b.astype(np.float32))
            else:
                np.matmul(rounded(a, precision), rounded(b, precision), out=out)

    def captured(self) -> bool:
        """Nobody records what runs here but ``repeat`` itself."""
        return False

    def repeat(self, key: Any, work: Any) -> None:
        """Again under the same key: from what was recorded, addresses and numbers."""
        self.graphs.run(key, work)

    def _record(self, work: Any) -> Any:
        self._recorded = recorded = []
        try:
            work()
        finally:
            self._recorded = None

        def run() -> None:
            self.replays += 1
            for do in recorded:
                do()

        return run

    def launch(
        self, code: Code, kernel: str, grid: tuple[int, int], args: Sequence[Argument], shared: int = 0
    ) -> None:
        """Runs a kernel to its end.

        Raises:
            RuntimeError: The launch is impossible, or its threads wait for each other for ever, or
                diverge, or wrote where they must not.
        """
        cooperative = kernel.startswith("grid")
        for what, needed, most in (
            ("bytes of shared memory", shared, self.shared_bytes),
            ("blocks of a cluster", grid[0] * kernel.startswith("cluster"), self.cluster),
            ("blocks at once", grid[0] * grid[1] * cooperative, self.multiprocessors),
        ):
            if needed > most:
                raise RuntimeError(f"{kernel}: {needed} {what}, there is room for {most}")
        if self._recorded is not None:
            copies = [type(arg).from_buffer_copy(arg) for arg in args]
            self._recorded.append(lambda: self.launch(code, kernel, grid, copies, shared))
            return
        count = len(args)
        addresses = (ctypes.c_void_p * count)(*map(ctypes.addressof, args))
        sizes = (ctypes.c_size_t * count)(*map(ctypes.sizeof, args))
        error = ctypes.create_string_buffer(4096)
        run = library(code, self.warps).fusedrnn_launch
        seed = self.seed * 1_000_003 + len(self.launches)
        with self._lock:
            failed = run(
                kernel.encode(), *grid, shared, cooperative, seed, addresses, sizes, count, error, len(error)
            )
        self.launches.append(kernel)
        if failed:
            raise RuntimeError(f"{kernel}: {error.value.decode()}")
        for memory, size in list(self._guarded.values()):
            whole = memory()
            if whole is not None and (whole[:GUARD].min() != 0xFF or whole[GUARD + size :].min() != 0xFF):
                raise RuntimeError(f"{kernel}: a thread wrote outside an array of {size} bytes")
