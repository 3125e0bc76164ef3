"""The device that is a GPU, without one: what is missing, and what goes to CuPy, cuBLAS and the driver."""

from __future__ import annotations

import ctypes
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


def unavailable(monkeypatch, *, major=13, nvrtc=13, driver=13, count=1, capability="90", cublas=True):
    """``cupy_device.unavailable()`` on a computer of such a kind."""

    def counted():
        if count is None:
            raise RuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
        return count

    runtime = types.SimpleNamespace(
        runtimeGetVersion=lambda: major * 1000, driverGetVersion=lambda: driver * 1000, getDeviceCount=counted
    )
    parts = {"runtime": runtime, "Device": lambda: types.SimpleNamespace(compute_capability=capability)}
    fake_cuda = types.SimpleNamespace(**parts, **({"cublas": None} if cublas else {}))
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=fake_cuda) if major else None)

    def version():
        if nvrtc is None:
            raise RuntimeError("libnvrtc.so.13: cannot open")
        return nvrtc, 0

    monkeypatch.setattr(cupy_device.nvrtc, "version", version)
    return cupy_device.unavailable.__wrapped__()


@pytest.mark.parametrize(
    ("computer", "reason"),
    [
        ({"major": 0}, "cupy is not installed: pip install 'fusedrnn[cuda13]'"),
        ({"nvrtc": None}, "CuPy or NVRTC cannot be loaded (libnvrtc.so.13: cannot open): pip install"),
        ({"count": None}, "there is no NVIDIA driver, or no GPU (cudaErrorNoDevice: no CUDA-capable device"),
        ({"driver": 12}, "the driver is of CUDA 12, the packages of CUDA 13: pip install"),
        ({"count": 0}, "there is no NVIDIA GPU"),
        ({"capability": "61"}, "the GPU has compute capability 6.1, expected at least 7.0"),
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
    by_precision = {"ieee": 68, "tf32": 77, "bf16": 75, "fp16": 74}
    how = by_precision[precision] if dtype == np.float32 else 70 if dtype == np.float64 else 68
    assert (library.stream, library.compute) == (4711, how)


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


@pytest.fixture
def driver(monkeypatch):
    """A device, and the calls into CuPy's driver, which are recorded instead of made."""
    calls = []

    class Module:
        def load(self, code):
            calls.append(("load", code))

        def get_function(self, name):
            return types.SimpleNamespace(ptr=name)

    def launched(name):
        def call(*given):
            """The function and the numbers; then the address of the first argument, and the numbers that both
            begin with."""
            addresses = (ctypes.c_void_p * 2).from_address(given[9])
            values = (ctypes.c_int64.from_address(a).value for a in addresses)
            calls.append((name, *given[:9], *given[10:], addresses[0], *values))

        return call

    names = ("launchKernel", "launchCooperativeKernel")
    functions = {name: launched(name) for name in names}
    functions["funcSetAttribute"] = lambda *given: calls.append(given)
    attribute = {"CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES": "beyond"}
    cuda = types.SimpleNamespace(
        Module=Module,
        driver=types.SimpleNamespace(**functions, **attribute),
        runtime=types.SimpleNamespace(setDevice=lambda n: calls.append(("setDevice", n))),
        get_current_stream=lambda: types.SimpleNamespace(ptr=4711),
    )
    monkeypatch.setattr(cupy_device.nvrtc, "cubin", lambda code, *more: " ".join((*code, *more)))
    device = object.__new__(cupy_device.CupyDevice)
    device._cupy, device.number, device.architecture = types.SimpleNamespace(cuda=cuda), 1, "sm_90"
    device._modules, device._lock = {}, threading.Lock()
    return device, calls


CODE = nvrtc.Code("Lstm", "float")
JOB, STEP = ctypes.c_int64(123), ctypes.c_int64(456)


def test_launches(driver):
    """All blocks of a grid at once, or not at all; a cluster, whose size the compiler knows, as any other."""
    device, calls = driver
    for _ in range(2):
        device.launch(CODE, "step_forward", (7, 1), (JOB, STEP))
    device.launch(CODE._replace(precision="tf32"), "cluster_forward", (8, 50), (JOB, STEP), 60_000)
    device.launch(CODE, "grid_forward", (2, 2), (JOB, STEP), 50_000)
    given = ctypes.addressof(JOB), 123, 456
    step = ("launchKernel", "step_forward", 7, 1, 1, 256, 1, 1, 0, 4711, 0, *given)
    assert calls == [
        ("setDevice", 1),
        ("load", "Lstm float ieee sm_90 steps"),
        step,
        ("setDevice", 1),
        step,
        ("setDevice", 1),
        ("load", "Lstm float tf32 sm_90 cluster"),
        ("cluster_forward", "beyond", 60_000),
        ("launchKernel", "cluster_forward", 8, 50, 1, 256, 1, 1, 60_000, 4711, 0, *given),
        ("setDevice", 1),
        ("load", "Lstm float ieee sm_90 grid"),
        ("grid_forward", "beyond", 50_000),
        ("launchCooperativeKernel", "grid_forward", 2, 2, 1, 256, 1, 1, 50_000, 4711, *given),
    ]


def test_the_compiler_makes_clusters_of_as_many_blocks():
    text = (nvrtc.sources() / "cuda" / "device.h").read_text()
    assert f"#define FUSEDRNN_CLUSTER __cluster_dims__({cupy_device.CLUSTER}, 1, 1)" in text


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
