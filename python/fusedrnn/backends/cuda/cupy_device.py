"""A GPU as the CUDA backend's device: CuPy's arrays, streams and products, launches by cuda-bindings.

CuPy launches no clusters, and cuts a cooperative grid that does not fit; the driver's own cuLaunchKernelEx,
which takes a job by value, does neither. Work goes to CuPy's current stream. Importing this file imports
neither package.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import threading
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from fusedrnn.backends.cpu import CpuBackend
from fusedrnn.backends.cuda import cublas, nvrtc
from fusedrnn.backends.cuda.graphs import GraphCache, Work
from fusedrnn.backends.protocol import Array

INSTALL = "pip install 'fusedrnn[cuda13]', or 'fusedrnn[cuda12]' for a driver of CUDA 12"
OLDEST = (7, 0)  # compute capability of the instructions that order memory
CLUSTER = 8  # blocks that every GPU that has clusters runs as one
_first = threading.Lock()  # threads get the same device: packed weights know theirs


@functools.cache
def unavailable() -> str | None:
    """None, or what is missing or too old, in one line."""
    if (missing := CpuBackend().unavailable()) is not None:
        return missing
    for package, module in (("CuPy", "cupy"), ("cuda-bindings", "cuda.bindings")):
        if not _installed(module):
            return f"{package} is not installed: {INSTALL}"
    try:
        import cupy

        majors = {
            "CuPy": cupy.cuda.runtime.runtimeGetVersion() // 1000,
            "cuda-bindings": int(importlib.import_module("cuda.bindings").__version__.split(".")[0]),
            "NVRTC": nvrtc.version()[0],
        }
    except Exception as error:  # of many kinds: a missing library, another version
        return f"CuPy, cuda-bindings or NVRTC cannot be loaded ({_line(error)}): {INSTALL}"
    if len(set(majors.values())) > 1:
        listed = ", ".join(f"{name} {major}" for name, major in majors.items())
        return f"packages for different versions of CUDA ({listed}): {INSTALL}"
    try:
        _call("cuInit", 0)
        newest = _call("cuDriverGetVersion") // 1000
        if _call("cuDeviceGetCount") == 0:
            return "there is no NVIDIA GPU"
        if newest < majors["CuPy"]:
            return f"the driver is of CUDA {newest}, the packages of CUDA {majors['CuPy']}: {INSTALL}"
        capability = _capability(_call("cuDeviceGet", cupy.cuda.runtime.getDevice()))
    except Exception as error:  # RuntimeError by the driver; another where there is none
        return f"there is no NVIDIA driver, or no GPU ({_line(error)})"
    if capability < OLDEST:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, expected at least 7.0"
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
    """One GPU; see ``device.Device``."""

    warps = nvrtc.WARPS

    def __init__(self, number: int) -> None:
        import cupy

        self._cupy = cupy
        self.number = number
        handle = _call("cuDeviceGet", number)
        self.multiprocessors = _attribute("MULTIPROCESSOR_COUNT", handle)
        self.shared_bytes = _attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN", handle)
        capability = _capability(handle)
        self.architecture = "sm_{}{}".format(*capability)
        self.cluster = CLUSTER if capability >= (9, 0) else 0
        self.matrix_units = capability >= (8, 0)
        self._modules: dict[tuple[nvrtc.Code, str], Any] = {}
        self._functions: dict[tuple[nvrtc.Code, str], Any] = {}
        self._known: dict[Hashable, int] = {}  # blocks of a multiprocessor, or clusters, that run at once
        self._lock = threading.Lock()
        self._graphs = GraphCache(self._record)
        self._of_thread = threading.local()  # workspace: of the work that is repeated
        self._recording = cupy.cuda.Stream(non_blocking=True)  # where nothing ever runs

    def is_array(self, a: Any) -> bool:
        """Whether this is a CuPy array on this GPU."""
        return isinstance(a, self._cupy.ndarray) and a.device.id == self.number

    def empty(self, shape: Any, dtype: Any) -> Array:
        """A new array."""
        return self._cupy.empty(shape, dtype)

    def asarray(self, a: Array) -> Array:
        """A copy of a NumPy array."""
        return self._cupy.asarray(a)

    def pointer(self, a: Any) -> int:
        """The address of the first element."""
        return int(a.data.ptr)

    def matmul(self, a: Array, b: Array, out: Array, precision: str = "ieee") -> None:
        """By cuBLAS, whose default mode keeps float32's precision."""
        workspace = getattr(self._of_thread, "workspace", None)
        if workspace is None and self.captured():
            workspace = self._new_workspace()
        cuda = self._cupy.cuda
        cublas.multiply(
            cuda.device.get_cublas_handle(),
            cuda.get_current_stream().ptr,
            None if workspace is None else (self.pointer(workspace), workspace.nbytes),
            *(a, b, out),
            self.pointer,
            precision,
        )

    def _new_workspace(self) -> Array:
        """What cuBLAS works in, as large as its own where it has one."""
        return self.empty(((32 if self.cluster else 4) << 20,), np.uint8)

    def captured(self) -> bool:
        """Whether somebody records what goes to CuPy's current stream."""
        try:
            return bool(self._cupy.cuda.get_current_stream().is_capturing())
        except Exception:  # of the oldest stream nobody may ask that while any other is recorded
            return True

    def repeat(self, key: Hashable, work: Work) -> None:
        """By a CUDA graph, when it comes again; not within a graph that somebody else records."""
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
        """Run a kernel on CuPy's current stream."""
        driver = _driver()
        self._cupy.cuda.runtime.setDevice(self.number)  # its context becomes this thread's
        function = self._function(code, kernel)
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = *grid, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = 32 * self.warps, 1, 1
        config.sharedMemBytes = shared
        config.hStream = driver.CUstream(self._cupy.cuda.get_current_stream().ptr)
        attribute, kinds = driver.CUlaunchAttribute(), driver.CUlaunchAttributeID
        if kernel.startswith("cluster"):
            attribute.id = kinds.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            attribute.value.clusterDim.x = grid[0]
            attribute.value.clusterDim.y = attribute.value.clusterDim.z = 1
            config.attrs, config.numAttrs = [attribute], 1
            key = code, kernel, shared, grid[0]
            if self._places(key, "cuOccupancyMaxActiveClusters", function, config) == 0:
                raise RuntimeError(f"{kernel}: a cluster of {grid[0]} blocks does not run on this GPU")
        elif kernel.startswith("grid"):
            of_one = ("cuOccupancyMaxActiveBlocksPerMultiprocessor", function, 32 * self.warps, shared)
            most = self._places((code, kernel, shared), *of_one) * self.multiprocessors
            if grid[0] * grid[1] > most:
                raise RuntimeError(
                    f"{kernel}: {grid[0]} x {grid[1]} blocks do not run at once on this GPU, {most} do"
                )
            attribute.id = kinds.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
            attribute.value.cooperative = 1
            config.attrs, config.numAttrs = [attribute], 1
        addresses = (ctypes.c_void_p * len(args))(*map(ctypes.addressof, args))
        _call("cuLaunchKernelEx", config, function, ctypes.addressof(addresses), 0)

    def _places(self, key: Hashable, *asked: Any) -> int:
        """How many run at once: what the driver says, which is asked once."""
        if key not in self._known:
            self._known[key] = _call(*asked)
        return self._known[key]

    def _function(self, code: nvrtc.Code, kernel: str) -> Any:
        """A kernel, loaded."""
        variant = nvrtc.variant_of(kernel)
        with self._lock:
            if (code, kernel) not in self._functions:
                if (code, variant) not in self._modules:
                    compiled = nvrtc.cubin(code, self.architecture, variant)
                    self._modules[code, variant] = _call("cuModuleLoadData", compiled)
                function = _call("cuModuleGetFunction", self._modules[code, variant], kernel.encode())
                if variant != "steps":  # beyond 48 KiB only when asked for
                    attribute = _driver().CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                    _call("cuFuncSetAttribute", function, attribute, self.shared_bytes)
                self._functions[code, kernel] = function
            return self._functions[code, kernel]


@functools.cache
def _device(number: int) -> CupyDevice:
    return CupyDevice(number)


@functools.cache
def _driver() -> Any:
    return importlib.import_module("cuda.bindings.driver")


def _call(name: str, *arguments: Any) -> Any:
    """A function of the driver: what it gives beside its status, which is checked."""
    status, *values = getattr(_driver(), name)(*arguments)
    if status != _driver().CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{name}: {status.name}")
    return values[0] if len(values) == 1 else None


def _attribute(name: str, handle: Any) -> int:
    attribute = getattr(_driver().CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
    return int(_call("cuDeviceGetAttribute", attribute, handle))


def _capability(handle: Any) -> tuple[int, int]:
    return (
        _attribute("COMPUTE_CAPABILITY_MAJOR", handle),
        _attribute("COMPUTE_CAPABILITY_MINOR", handle),
    )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even what it is part of
        return False


def _line(error: Exception) -> str:
    """The first line of an error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
