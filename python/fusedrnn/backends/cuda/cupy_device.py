"""A GPU as the CUDA backend's device: CuPy's arrays, streams and launches.

Importing this file imports no CuPy. The tests have another device with the same methods, this computer.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from fusedrnn.backends.cpu import CpuBackend
from fusedrnn.backends.cuda import cublas, nvrtc
from fusedrnn.backends.cuda.graphs import GraphCache, Work
from fusedrnn.backends.protocol import Array

INSTALL = "pip install 'fusedrnn[cuda13]', or 'fusedrnn[cuda12]' for a driver of CUDA 12"
OLDEST = 70  # compute capability of the instructions that order memory
CLUSTER = 8  # blocks; FUSEDRNN_CLUSTER in csrc/cuda/device.h
_first = threading.Lock()  # threads get the same device: packed weights know theirs


@functools.cache
def unavailable() -> str | None:
    """None, or what is missing or too old, in one line."""
    if (missing := CpuBackend().unavailable()) is not None:
        return missing
    try:
        import cupy

        runtime, major = cupy.cuda.runtime, cupy.cuda.runtime.runtimeGetVersion() // 1000
        nvrtc.version()
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed: {INSTALL}"
    except Exception as error:  # of many kinds: a missing library, another version
        return f"CuPy or NVRTC cannot be loaded ({_line(error)}): {INSTALL}"
    try:
        if runtime.getDeviceCount() == 0:
            return "there is no NVIDIA GPU"
        if (newest := runtime.driverGetVersion() // 1000) < major:
            return f"the driver is of CUDA {newest}, the packages of CUDA {major}: {INSTALL}"
        capability = int(cupy.cuda.Device().compute_capability)
    except Exception as error:  # CuPy's own
        return f"there is no NVIDIA driver, or no GPU ({_line(error)})"
    if capability < OLDEST:
        return f"the GPU has compute capability {capability / 10}, expected at least {OLDEST / 10}"
    try:
        _ = cupy.cuda.cublas  # loads the library
    except (ImportError, AttributeError) as error:
        return f"cuBLAS cannot be loaded ({_line(error)}): {INSTALL}"
    return None


def current() -> CupyDevice:
    """CuPy's current GPU."""
    import cupy

    with _first:
        return _device(cupy.cuda.runtime.getDevice())


class CupyDevice:
    """One GPU. Its arrays have the methods that NumPy's and CuPy's share; work goes to CuPy's stream."""

    warps = nvrtc.WARPS  # of a block
    shared_bytes: int  # most dynamic shared memory that a block may ask for
    cluster: int  # blocks of a cluster; 0 where there are none
    matrix_units: bool  # whether there are precisions but ieee

    def __init__(self, number: int) -> None:
        import cupy

        self._cupy = cupy
        self.number = number
        gpu = cupy.cuda.Device(number)
        self.multiprocessors = gpu.attributes["MultiProcessorCount"]
        self.shared_bytes = gpu.attributes["MaxSharedMemoryPerBlockOptin"]
        self.architecture = f"sm_{gpu.compute_capability}"
        self.cluster = CLUSTER if int(gpu.compute_capability) >= 90 else 0
        self.matrix_units = int(gpu.compute_capability) >= 80
        self._modules: dict[tuple[nvrtc.Code, str], Any] = {}
        self._lock = threading.Lock()
        self._graphs = GraphCache(self._record)
        self._of_thread = threading.local()  # workspace: of the work that is repeated
        self._recording = cupy.cuda.Stream(non_blocking=True)  # where nothing ever runs

    def is_array(self, a: Any) -> bool:
        """Whether this is a CuPy array on this GPU."""
        return isinstance(a, self._cupy.ndarray) and a.device.id == self.number

    def empty(self, shape: Any, dtype: Any) -> Array:
        """A C-contiguous array of whatever was there."""
        return self._cupy.empty(shape, dtype)

    def asarray(self, a: Array) -> Array:
        """A copy of a NumPy array.

        Raises:
            RuntimeError: A CUDA graph is being captured, and such a copy would end the capture.
        """
        if self.captured():
            raise RuntimeError("lengths and NumPy arrays cannot be used while a CUDA graph is captured")
        return self._cupy.asarray(a)

    def pointer(self, a: Any) -> int:
        """The address of the first element."""
        return int(a.data.ptr)

    def matmul(self, a: Array, b: Array, out: Array, precision: str = "ieee") -> None:
        """``out = a b``: 2-D, each of ``a`` and ``b`` with one axis contiguous (a transpose, a slice of
        columns), ``out`` C-contiguous, of their dtype or, where that is of 16 bits, float32; no size is 0.

        ``precision``: what float32 factors are rounded to, out of ``nvrtc.PRECISIONS``; sums are always
        float32, or of float64 float64.
        """
        workspace = getattr(self._of_thread, "workspace", None)
        if workspace is None and self.captured():
            workspace = self._new_workspace()
        cublas.multiply(self._cupy.cuda, self.pointer, workspace, a, b, out, precision)

    def _new_workspace(self) -> Array:
        """What cuBLAS works in, as large as its own where it has one."""
        return self.empty(((32 if self.cluster else 4) << 20,), np.uint8)

    def captured(self) -> bool:
        """Whether CuPy's current stream is being captured into a CUDA graph."""
        try:
            return bool(self._cupy.cuda.get_current_stream().is_capturing())
        except Exception:  # CUDA does not allow this for the legacy stream while another is captured
            return True

    def repeat(self, key: Hashable, work: Work) -> None:
        """Run ``work``, whose launches and products depend on the key alone.

        If the same key comes again, they are launched as one CUDA graph, unless the stream is being captured.
        """
        # Memory of this call, as all that the work depends on: part of the key, free again after it.
        self._of_thread.workspace = workspace = self._new_workspace()
        try:
            if self.captured():
                work()
            else:
                self._graphs.run((key, self.pointer(workspace)), work)
        finally:
            self._of_thread.workspace = None

    def _record(self, work: Work) -> Work:
        """A graph of the work, to be launched on CuPy's current stream."""
        cuda = self._cupy.cuda
        cuda.device.get_cublas_handle()  # made for each thread, which cannot be recorded
        with self._recording as stream:
            stream.begin_capture(cuda.runtime.streamCaptureModeThreadLocal)
            try:
                work()
            finally:
                graph = stream.end_capture()
        return graph.launch

    def launch(
        self, code: nvrtc.Code, kernel: str, grid: tuple[int, int], args: Sequence[Any], shared: int = 0
    ) -> None:
        """Run a kernel of csrc/cuda/kernels.cu in blocks of 32 times ``warps`` threads.

        ``args`` are ctypes structures and numbers, passed by value; ``shared`` is in bytes. Of a kernel whose
        name begins with cluster each row of the grid is a cluster; with grid, all blocks run at once. Where
        they cannot, the driver makes it a RuntimeError: CuPy's own kernels would launch fewer.
        """
        cuda, variant = self._cupy.cuda, nvrtc.variant_of(kernel)
        cuda.runtime.setDevice(self.number)  # its context becomes this thread's
        with self._lock:
            if (code, variant) not in self._modules:
                module = cuda.Module()
                module.load(nvrtc.cubin(code, self.architecture, variant))
                self._modules[code, variant] = module
        function = self._modules[code, variant].get_function(kernel).ptr
        if shared > 48 << 10:  # only when asked for
            attribute = cuda.driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            cuda.driver.funcSetAttribute(function, attribute, shared)
        addresses = (ctypes.c_void_p * len(args))(*map(ctypes.addressof, args))
        stream, at = cuda.get_current_stream().ptr, ctypes.addressof(addresses)
        given = (function, *grid, 1, 32 * self.warps, 1, 1, shared, stream, at)
        if variant == "grid":
            cuda.driver.launchCooperativeKernel(*given)
        else:
            cuda.driver.launchKernel(*given, 0)


@functools.cache
def _device(number: int) -> CupyDevice:
    return CupyDevice(number)


def _line(error: Exception) -> str:
    """The first line of an error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
