"""What the CUDA backend asks of a device: arrays, products, launches. The protocol alone; CuPy is elsewhere.

Two devices exist: ``cupy_device.CupyDevice``, a GPU, and the emulation of the tests, whose memory is NumPy's.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

from fusedrnn.backends.cuda.nvrtc import Code
from fusedrnn.backends.protocol import Array


class Device(Protocol):
    """A GPU. Its arrays have the methods that NumPy's and CuPy's share; work runs in the order of calls."""

    multiprocessors: int
    shared_bytes: int  # most dynamic shared memory that a block may ask for
    warps: int  # of a block; FUSEDRNN_WARPS of the kernels
    cluster: int  # most blocks of a cluster; 0 where there are none
    matrix_units: bool  # whether there are precisions but ieee

    def is_array(self, a: Any) -> bool:
        """Whether this is an array in the device's memory."""

    def empty(self, shape: Any, dtype: Any) -> Array:
        """A C-contiguous array of whatever was there."""

    def asarray(self, a: Array) -> Array:
        """A NumPy array's copy in the device's memory."""

    def pointer(self, a: Array) -> int:
        """The address of the first element."""

    def matmul(self, a: Array, b: Array, out: Array, precision: str = "ieee") -> None:
        """``out = a b``: 2-D, each of ``a`` and ``b`` with one axis contiguous (a transpose, a slice of
        columns), ``out`` C-contiguous, of their dtype or, where that is of 16 bits, float32; no size is 0.

        ``precision``: what float32 factors are rounded to, out of ``nvrtc.PRECISIONS``, or better:
        sums are float32, or of float64 float64, always.
        """

    def captured(self) -> bool:
        """Whether somebody records what runs now, in a graph for later."""

    def repeat(self, key: Hashable, work: Callable[[], None]) -> None:
        """Do what ``work`` launches and multiplies, which for the same key, on this device, is the same."""

    def launch(
        self, code: Code, kernel: str, grid: tuple[int, int], args: Sequence[Any], shared: int = 0
    ) -> None:
        """Run a kernel of csrc/cuda/kernels.cu in blocks of 32 times ``warps`` threads.

        ``args`` are ctypes structures and numbers, passed by value; ``shared`` is in bytes. Of a kernel whose
        name begins with cluster each row of the grid is a cluster; with grid, all blocks run at once. Where
        they cannot it is a RuntimeError.
        """
