"""The device that is a GPU, without one: what is missing, and what goes to CuPy, cuBLAS and the driver."""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import sys
import threading
import time
import types

import ml_dtypes
import numpy as np
import pytest

import fusedrnn
from at_once import at_once
from fusedrnn import backends, kernels
from fusedrnn import layers as L
from fusedrnn.backends.cuda import cublas, cupy_device, nvrtc
from fusedrnn.cells import lstm
from problems import problem

# --- what is missing ----------------------------------------------------------------------------------------


def unavailable(
    monkeypatch, *, absent=(), majors=(13, 13, 13), driver=13, count=1, capability=(9, 0), cublas=True
):
    """``cupy_device.unavailable()`` on a computer of such a kind."""
    runtime = types.SimpleNamespace(runtimeGetVersion=lambda: majors[0] * 1000, getDevice=lambda: 0)
    fake_cuda = types.SimpleNamespace(runtime=runtime, **({"cublas": None} if cublas else {}))
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=fake_cuda))
    monkeypatch.setattr(cupy_device, "_installed", lambda module: module not in absent)
    bindings = types.SimpleNamespace(__version__=f"{majors[1]}.1.0")
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setattr(cupy_device.nvrtc, "version", lambda: (majors[2], 0))
    answers = {"cuDriverGetVersion": 1000 * (driver or 0), "cuDeviceGetCount": count}

    def call(function, *_):
        if driver is None:
            raise RuntimeError(f"{function}: CUDA_ERROR_NO_DEVICE")
        return answers.get(function)

    monkeypatch.setattr(cupy_device, "_call", call)
    monkeypatch.setattr(cupy_device, "_capability", lambda handle: capability)
    return cupy_device.unavailable.__wrapped__()


@pytest.mark.parametrize(
    ("computer", "reason"),
    [
        ({"absent": ("cupy",)}, "CuPy is not installed: pip install 'fusedrnn[cuda13]'"),
        ({"absent": ("cuda.bindings",)}, "cuda-bindings is not installed: pip install 'fusedrnn[cuda13]'"),
        (
            {"majors": (12, 13, 13)},
            "packages for different versions of CUDA (CuPy 12, cuda-bindings 13, NVRTC 13)",
        ),
        ({"driver": None}, "there is no NVIDIA driver, or no GPU (cuInit: CUDA_ERROR_NO_DEVICE)"),
        ({"driver": 12}, "the driver is of CUDA 12, the packages of CUDA 13: pip install"),
        ({"count": 0}, "there is no NVIDIA GPU"),
        ({"capability": (6, 1)}, "the GPU has compute capability 6.1, expected at least 7.0"),
        ({"cublas": False}, "cuBLAS cannot be loaded"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_why_it_cannot_run_is_one_line(monkeypatch, computer, reason):
    said = unavailable(monkeypatch, **computer)
    assert said.startswith(reason)
    assert "\n" not in said


def test_it_can_run_where_nothing_is_missing(monkeypatch):
    assert unavailable(monkeypatch) is None


def test_named_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(cupy_device, "unavailable", lambda: "the moon is full")
    p = problem(lstm, 3, 2, 3, 7)
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run here: the moon is full"):
        kernels.forward(p.cell, p.x, p.weights, backend="cuda")
    for call in (
        lambda: L.LSTM(3).to_gpu(),
        lambda: fusedrnn.DataLoader(fusedrnn.datasets.SinCurve(), 10, gpu=True),
        lambda: fusedrnn.DataLoader(fusedrnn.datasets.SinCurve(), 10).to_gpu(),
        lambda: fusedrnn.cuda.as_cupy(np.zeros(3)),
    ):
        with pytest.raises(RuntimeError, match="the moon is full"):
            call()
    assert not fusedrnn.cuda.gpu_enable
    assert backends.get().name != "cuda"


# --- the device that is a GPU: what can be seen of it without one -------------------------------------------


class FakeCublas:
    """cuBLAS's functions that are called, with the types of its manual, on this computer's memory."""

    DTYPES = (np.float32, np.float64, np.float16) + (None,) * 11 + (ml_dtypes.bfloat16,)
    INVALID_VALUE, NOT_SUPPORTED = 7, 15

    def __init__(self):
        for name, types_ in cublas.FUNCTIONS.items():
            setattr(self, name, ctypes.CFUNCTYPE(ctypes.c_int, *types_)(getattr(self, f"_{name}")))

    def _cublasSetStream_v2(self, handle, stream):
        self.stream, self.workspace = stream, None  # as in cuBLAS
        return 0

    def _cublasSetWorkspace_v2(self, handle, workspace, size):
        self.workspace = workspace
        return int(size < 4 << 20)

    def _cublasGemmEx(self, handle, op_a, op_b, m, n, k, alpha, a, a_type, lda, b, b_type, ldb, beta,
                      c, c_type, ldc, compute, algorithm):  # fmt: skip
        self.compute, halves = compute, a_type not in (0, 1)
        if a_type != b_type or algorithm != -1 or c_type not in ((a_type, 0) if halves else (a_type,)):
            return self.NOT_SUPPORTED
        if (a_type == 1) != (compute == 70) or (halves and compute != 68):
            return self.NOT_SUPPORTED
        if lda < (k if op_a else m) or ldb < (n if op_b else k) or ldc < m:
            return self.INVALID_VALUE

        def matrix(address, dtype, step, rows, columns):
            """Column by column."""
            dtype = np.dtype(self.DTYPES[dtype])
            memory = (ctypes.c_char * ((step * (columns - 1) + rows) * dtype.itemsize)).from_address(address)
            return np.ndarray((rows, columns), dtype, memory, 0, (dtype.itemsize, step * dtype.itemsize))

        sums = np.float64 if a_type == 1 else np.float32
        if [float(matrix(x, a_type == 1, 1, 1, 1)[0, 0]) for x in (alpha, beta)] != [1, 0]:
            return self.INVALID_VALUE
        left = matrix(a, a_type, lda, *((k, m) if op_a else (m, k))).astype(sums)
        right = matrix(b, b_type, ldb, *((n, k) if op_b else (k, n))).astype(sums)
        matrix(c, c_type, ldc, m, n)[...] = (left.T if op_a else left) @ (right.T if op_b else right)
        return 0


@pytest.fixture
def gpu(monkeypatch):
    """A device in the stream 4711 and this computer's memory, its cuBLAS, whether somebody records."""
    library, capturing = FakeCublas(), [False]
    monkeypatch.setattr(cublas, "_library", lambda: library)
    cuda = types.SimpleNamespace(
        device=types.SimpleNamespace(get_cublas_handle=lambda: 1),
        get_current_stream=lambda: types.SimpleNamespace(ptr=4711, is_capturing=lambda: capturing[0]),
    )
    device = object.__new__(cupy_device.CupyDevice)
    device._cupy, device._of_thread, device.cluster = types.SimpleNamespace(cuda=cuda), threading.local(), 0
    device.empty, device.pointer = np.empty, lambda a: a.ctypes.data
    return device, library, capturing


@pytest.mark.parametrize("precision", nvrtc.PRECISIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_products_by_cublas(gpu, dtype, precision):
    device, library, _ = gpu
    halves = np.dtype(dtype).itemsize == 2
    rng = np.random.default_rng(0)

    def shapes(rows, columns):
        """A matrix in every form that the backend passes; the room about it is NaN."""
        values = rng.standard_normal((rows, columns)).astype(dtype)
        wide = np.full((rows + 2, columns + 5), np.nan, dtype)
        wide[:rows, 3 : 3 + columns] = values
        tall = np.full((columns + 1, rows + 5), np.nan, dtype)
        tall[:columns, 3 : 3 + rows] = values.T
        return values, np.asfortranarray(values), wide[:rows, 3 : 3 + columns], tall[:columns, 3 : 3 + rows].T

    for m, n, k in itertools.product((1, 2, 5), (1, 3), (1, 4)):
        for a, b in itertools.product(shapes(m, k), shapes(k, n)):
            want = a.astype(float) @ b.astype(float)
            for result in (dtype, np.float32) if halves else (dtype,):
                out = np.full((m, n), np.nan, result)
                device.matmul(a, b, out, precision)
                rtol = 2 * float(ml_dtypes.finfo(result).eps) if result in (dtype,) and halves else 1e-5
                np.testing.assert_allclose(out.astype(float), want, rtol=rtol, atol=1e-5)
    # cublasComputeType_t of the toolkit's cublas_api.h.
    by_precision = {"ieee": 68, "tf32x3": 68, "tf32": 77, "bf16": 75, "fp16": 74}
    how = by_precision[precision] if dtype == np.float32 else 70 if dtype == np.float64 else 68
    assert (library.stream, library.compute) == (4711, how)
    with pytest.raises(ValueError, match="matmul: expected an axis of neighbours"):
        device.matmul(np.zeros((6, 6), dtype)[::2, ::2], np.zeros((3, 3), dtype), np.zeros((3, 3), dtype))


def test_a_captured_product_has_a_workspace_of_its_own(gpu):
    """That of repeated work for all of its products; cuBLAS's own where nobody records."""
    device, library, capturing = gpu
    a, out, used = np.ones((2, 2)), np.empty((2, 2)), []

    def work():
        for _ in range(2):
            device.matmul(a, a, out)
            used.append(library.workspace)

    empty, all_of = device.empty, []
    device.empty = lambda shape, dtype: all_of.append(empty(shape, dtype)) or all_of[-1]
    work()
    assert used == [None, None]
    capturing[0] = True
    device.repeat("a", work)
    assert used[2:] == [all_of[0].ctypes.data] * 2
    device.matmul(a, a, out)
    assert library.workspace not in (None, *used)  # the work's is free again


def test_an_error_of_cublas_names_its_function(gpu):
    device, _, capturing = gpu
    capturing[0] = True
    device.empty = lambda shape, dtype: np.empty(1, dtype)
    with pytest.raises(RuntimeError, match=r"^cublasSetWorkspace_v2: status 1"):
        device.matmul(np.ones((2, 2)), np.ones((2, 2)), np.empty((2, 2)))


bindings = pytest.mark.skipif(
    not cupy_device._installed("cuda.bindings"), reason="cuda-bindings is not installed"
)


@pytest.fixture
def driver(monkeypatch):
    """A device on NVIDIA's own bindings, with the calls into the driver recorded instead of made."""
    real = importlib.import_module("cuda.bindings.driver")
    calls = []

    def parameters(at):
        """The address of the first argument, and the numbers that both begin with."""
        addresses = (ctypes.c_void_p * 2).from_address(at)
        return addresses[0], *(ctypes.c_int64.from_address(a).value for a in addresses)

    class Driver:
        def __getattr__(self, name):
            if not name.startswith("cu"):
                return getattr(real, name)
            assert callable(getattr(real, name))

            def call(*arguments):
                last = arguments[-1]
                value = {
                    "cuOccupancyMaxActiveBlocksPerMultiprocessor": lambda: 1,
                    "cuOccupancyMaxActiveClusters": lambda: int(last.gridDimX <= 8),
                    "cuModuleLoadData": lambda: "module",
                    "cuModuleGetFunction": lambda: last,
                }.get(name, lambda: None)()
                if name == "cuLaunchKernelEx":
                    config, function, at, extra = arguments
                    assert extra == 0
                    arguments = (function, config, parameters(at))
                calls.append((name, *arguments))
                return (failing.get(name, real.CUresult.CUDA_SUCCESS), *(() if value is None else (value,)))

            return call

    failing = {}
    fake = Driver()
    monkeypatch.setattr(cupy_device, "_driver", lambda: fake)
    monkeypatch.setattr(cupy_device.nvrtc, "cubin", lambda code, *more: " ".join((*code, *more)).encode())
    device = object.__new__(cupy_device.CupyDevice)
    streams = types.SimpleNamespace(
        runtime=types.SimpleNamespace(setDevice=lambda n: calls.append(("setDevice", n))),
        get_current_stream=lambda: types.SimpleNamespace(ptr=4711),
    )
    device._cupy = types.SimpleNamespace(cuda=streams)
    device.number, device.multiprocessors, device.shared_bytes, device.architecture = 1, 4, 99_000, "sm_90"
    device._modules, device._functions, device._known = {}, {}, {}
    device._lock = threading.Lock()
    return device, calls, failing, real


CODE = nvrtc.Code("Lstm", "float")
JOB, STEP = ctypes.c_int64(123), ctypes.c_int64(456)


def launches(calls):
    """Of each its function, blocks, threads, bytes, stream, what it needs beside them, and arguments."""
    found = []
    for _, function, c, parameters in (call for call in calls if call[0] == "cuLaunchKernelEx"):
        assert c.numAttrs == len(c.attrs)
        grid, block = (c.gridDimX, c.gridDimY, c.gridDimZ), (c.blockDimX, c.blockDimY, c.blockDimZ)
        found.append((function, grid, block, c.sharedMemBytes, int(c.hStream), c.attrs, parameters))
    return found


@bindings
def test_launches(driver):
    device, calls, _, real = driver
    device.launch(CODE, "step_forward", (7, 1), (JOB, STEP))
    device.launch(CODE, "grid_forward", (2, 2), (JOB, STEP), 50_000)
    given = ctypes.addressof(JOB), 123, 456
    plain, (*cooperative, (attribute,), parameters) = launches(calls)
    assert plain == (b"step_forward", (7, 1, 1), (256, 1, 1), 0, 4711, [], given)
    assert (cooperative, parameters) == ([b"grid_forward", (2, 2, 1), (256, 1, 1), 50_000, 4711], given)
    assert attribute.id == real.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
    assert attribute.value.cooperative == 1
    loads = [call for call in calls if call[0] == "cuModuleLoadData"]
    assert [code for _, code in loads] == [b"Lstm float ieee sm_90 steps", b"Lstm float ieee sm_90 grid"]
    beyond = real.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    assert ("cuFuncSetAttribute", b"grid_forward", beyond, 99_000) in calls
    assert [call for call in calls if call[0] == "setDevice"] == [("setDevice", 1)] * 2


@bindings
def test_a_cluster_is_a_row_of_the_grid(driver):
    device, calls, _, real = driver
    device.launch(CODE._replace(precision="tf32"), "cluster_forward", (3, 50), (JOB, STEP), 60_000)
    ((_, grid, _, shared, _, (attribute,), _),) = launches(calls)
    assert attribute.id == real.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    assert (attribute.value.clusterDim.x, grid, shared) == (3, (3, 50, 1), 60_000)
    assert ("cuModuleLoadData", b"Lstm float tf32 sm_90 cluster") in calls
    with pytest.raises(RuntimeError, match=r"^cluster_forward: a cluster of 9 blocks does not run on this"):
        device.launch(CODE, "cluster_forward", (9, 1), (JOB, STEP))


@bindings
def test_a_grid_that_does_not_run_at_once_is_an_error(driver):
    device, calls, failing, real = driver
    too_many = r"^grid_forward: 5 x 1 blocks do not run at once on this GPU, 4 do"
    with pytest.raises(RuntimeError, match=too_many):
        device.launch(CODE, "grid_forward", (5, 1), (JOB, STEP))
    assert not launches(calls)
    failing["cuLaunchKernelEx"] = real.CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(RuntimeError, match=r"^cuLaunchKernelEx: CUDA_ERROR_INVALID_VALUE"):
        device.launch(CODE, "step_forward", (1, 1), (JOB, STEP))


def test_threads_get_the_same_device(monkeypatch):
    """Weights are packed for a device, and a call with them on another one is an error."""
    runtime = types.SimpleNamespace(getDevice=lambda: 0)
    monkeypatch.setitem(
        sys.modules, "cupy", types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=runtime))
    )
    monkeypatch.setattr(cupy_device, "CupyDevice", lambda number: time.sleep(0.05) or object())
    cupy_device._device.cache_clear()
    try:
        first, second = at_once([cupy_device.current] * 2)
        assert first is second
    finally:
        cupy_device._device.cache_clear()
