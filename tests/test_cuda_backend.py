"""The CUDA backend on an emulated device against the reference, and everything of it that needs no GPU.

Whether the kernels are right is the matter of test_cuda_kernels.py; here it is the way to them: arguments,
plans, weights and their gradients, what is kept for backward, and the native face on arrays that are not
NumPy's (fake_cupy.py). Tolerances as for every backend (test_kernels.py).
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import sys
import threading
import types
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

import fake_cupy
import fusedrnn
from cuda import emulated
from cuda.emulated import EmulatedDevice
from fusedrnn import backends, checkpoint, cli, functional, gradmatrix, optimizers, stack, system
from fusedrnn import functions as F
from fusedrnn import layers as L
from fusedrnn.backends import cuda_compile, cuda_cupy, cuda_plan
from fusedrnn.backends import get as get_backend
from fusedrnn.backends.cuda import KERNEL, CudaBackend, Tape
from fusedrnn.backends.cuda_jobs import kernels_of
from fusedrnn.backends.protocol import NEED, Regularization, Weights
from fusedrnn.cells import GRU, LSTM, RNN
from fusedrnn.gradcheck import GradcheckError, gradcheck
from problems import (
    CELLS,
    OPTIONS,
    SIZES,
    assert_close,
    assert_same_bits,
    error,
    expected_names,
    name,
    named,
    problem,
    run,
)

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="needs a C++ compiler")

REFERENCE = get_backend("reference")
FORWARD = {np.float32: 2e-6, np.float64: 1e-14}
GRADIENT = {np.float32: 5e-6, np.float64: 2e-14}
EVERYTHING = {"lengths": True, "reset": True, "return_states": True}
cells = pytest.mark.parametrize("cell", CELLS, ids=name)
H100 = cuda_plan.Device(132, 227 * 1024, 8, 8)


@pytest.fixture(scope="module")
def device():
    return EmulatedDevice(multiprocessors=16)


@pytest.fixture(scope="module")
def backend(device):
    return CudaBackend(device)


def assert_right(backend, p, **options):
    """The results are within the promised figures; they are returned."""
    dtype = p.x.dtype.type
    got, want = run(backend, p, **options), run(REFERENCE, p.astype(np.longdouble))
    assert got.keys() == want.keys() == expected_names(p)
    for key, a in got.items():
        assert a.dtype == dtype
        assert_close({key: a}, {key: want[key]}, (GRADIENT if key.startswith("d") else FORWARD)[dtype])
    return got


# --- results -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@cells
def test_every_option(backend, cell, dtype):
    for options in OPTIONS:
        assert_right(backend, problem(cell, *SIZES[0], dtype=dtype, **options))


@cells
def test_sizes(backend, cell):
    for k, size in enumerate(SIZES[1:]):
        assert_right(backend, problem(cell, *size, **EVERYTHING, reverse=k % 2 == 0))


@pytest.mark.parametrize("kernel", cuda_plan.KERNELS)
@cells
def test_every_kernel_by_argument_and_by_environment(device, monkeypatch, cell, kernel):
    p = problem(cell, *SIZES[0], **EVERYTHING)
    by_argument = CudaBackend(device, kernel)
    if kernel != "steps" and cell == GRU(reset_after=False):
        with pytest.raises(
            ValueError, match=rf"^kernel: '{kernel}' cannot run GruResetBefore, which has two phases"
        ):
            run(by_argument, p)
        return
    device.launches.clear()
    got = assert_right(by_argument, p)
    assert by_argument.last_plan.kernel == kernel
    wholes = {launch for launch in device.launches if launch.startswith(("grid", "cluster"))}
    name, _, streamed = kernel.partition("_")
    ends = [f"{way}{streamed and '_streamed'}" for way in ("forward", "backward")]
    assert wholes == (set() if kernel == "steps" else {f"{name}_{end}" for end in ends})
    by_environment = CudaBackend(device)
    monkeypatch.setenv(KERNEL, kernel)
    assert_same_bits(run(by_environment, p), got)
    assert by_environment.last_plan.kernel == kernel


@cells
def test_run_twice_gives_the_same_bits(backend, cell):
    p = problem(cell, 4, 3, 5, 9, **EVERYTHING)
    out = backend.forward(p.cell, p.x, p.weights, p.state0, **p.options)
    first, second = (backend.backward(out.tape, p.dy, p.dstateT, p.dstates) for _ in range(2))
    assert_same_bits(named(cell, out, first), named(cell, out, second))
    assert_same_bits(run(backend, p), named(cell, out, first))


@cells
def test_what_is_kept_for_backward(backend, cell):
    p = problem(cell, 5, 3, 4, 7, **EVERYTHING)
    everything, borders = (run(backend, p, save=save) for save in ("all", "borders"))
    assert_same_bits(borders, everything)
    tapes = {
        save: backend.forward(cell, p.x, p.weights, p.state0, **p.options, save=save).tape
        for save in ("all", "borders", None)
    }
    kernels = kernels_of(cell)
    assert tapes["all"].bytes == 5 * 3 * 7 * 8 * (kernels.saved + kernels.has_c)
    assert tapes["borders"].bytes == 0
    assert tapes[None] is None


@cells
def test_any_upstream_gradient_may_be_missing(backend, cell):
    for upstream in itertools.chain.from_iterable(
        itertools.combinations(("dy", "dstateT", "dstates"), n) for n in range(3)
    ):
        assert_right(backend, problem(cell, 3, 2, 3, 7, **EVERYTHING, upstream=upstream))
    p = problem(LSTM(), 3, 2, 3, 7, return_states=True)
    for k in range(2):  # of h, of c
        partial = replace(
            p,
            dstateT=tuple(None if i == k else d for i, d in enumerate(p.dstateT)),
            dstates=tuple(None if i == k else d for i, d in enumerate(p.dstates)),
        )
        assert_right(backend, partial)


@cells
def test_need(backend, cell):
    p = problem(cell, 3, 2, 3, 7, biases="both")
    everything = run(backend, p)
    for needed in [(n,) for n in NEED[:4]] + [("state0",), ("x", "weight_hh"), ()]:
        got = run(backend, p, need=needed)
        gradients = {key for key in got if key.startswith("d")}
        names = {f"d{s}0" for s in cell.states} if "state0" in needed else set()
        assert gradients == names | {f"d{n}" for n in needed if n != "state0"}
        assert_same_bits({key: got[key] for key in gradients}, {key: everything[key] for key in gradients})


@pytest.mark.parametrize(("T", "B"), [(0, 3), (4, 0), (0, 0)])
@cells
def test_nothing_to_do(backend, cell, T, B):
    for options in ({}, {"reverse": True, "lengths": True, "return_states": True}):
        p = problem(cell, T, B, 3, 7, **options)
        for kernel in (None, "grid"):
            if kernel is None or cell != GRU(reset_after=False):
                assert_same_bits(run(CudaBackend(backend.device, kernel), p), run(REFERENCE, p))


@cells
def test_no_row_has_a_step(backend, cell):
    p = replace(problem(cell, 4, 3, 2, 7, **EVERYTHING), lengths=np.zeros(3, np.int32))
    assert_same_bits(run(backend, p), run(REFERENCE, p))


@cells
def test_padding_reaches_nothing_whatever_the_weights(backend, cell):
    """dx there is +0 though a weight is infinite, and a row's infinity stays in that row."""
    p = problem(cell, 4, 3, 2, 7, lengths=True)
    ih = p.weights.weight_ih.copy()
    ih[0, 0] = np.inf
    with np.errstate(all="ignore"):
        got = run(backend, replace(p, weights=p.weights._replace(weight_ih=ih)))
    padding = np.arange(4)[:, np.newaxis] >= p.lengths
    for key in ("y", "dx"):
        assert not got[key][padding].any()
        assert not np.signbit(got[key][padding]).any()
    x = p.x.copy()
    x[0, 0] = np.nan
    got, want = run(backend, replace(p, x=x)), run(backend, p)
    assert np.isnan(got["y"][:, 0]).all()
    for key in ("y", "dx"):
        np.testing.assert_array_equal(got[key][:, 1:], want[key][:, 1:])


@cells
def test_inputs_of_any_strides_and_left_as_they_were(backend, cell):
    p = problem(cell, 4, 3, 5, 7, **EVERYTHING)
    want = run(backend, p)
    batch_first = np.ascontiguousarray(p.x.transpose(1, 0, 2)).transpose(1, 0, 2)
    wide = np.full((4, 3, 9), np.nan)
    wide[:, :, 2:7] = p.x
    for x in (batch_first, wide[:, :, 2:7], p.x[::-1][::-1]):
        before = x.copy()
        assert_same_bits(run(backend, replace(p, x=x, dy=np.asfortranarray(p.dy))), want)
        np.testing.assert_array_equal(x, before)


@cells
def test_a_tape_does_not_borrow_the_state(backend, cell):
    p = problem(cell, 3, 2, 3, 7)
    want = run(backend, p)
    state0 = tuple(s.copy() for s in p.state0)
    out = backend.forward(cell, p.x, p.weights, state0)
    for s in state0:
        s[...] = np.nan
    assert_same_bits(named(cell, out, backend.backward(out.tape, p.dy, p.dstateT)), want)


@cells
def test_packed_weights(backend, cell):
    p = problem(cell, 3, 2, 3, 7, biases="both")
    packed = backend.pack(cell, p.weights)
    assert_same_bits(run(backend, replace(p, weights=packed)), run(backend, p))
    other = RNN(relu=True) if cell != RNN(relu=True) else LSTM()
    with pytest.raises(ValueError, match=r"^weights: packed for"):
        backend.forward(other, p.x, packed)


def test_several_layers_and_directions(backend, monkeypatch):
    monkeypatch.setattr(backends, "get", lambda name=None: backend)
    rng = np.random.default_rng(0)
    weights = [
        Weights(rng.standard_normal((28, I)) / 3, rng.standard_normal((28, 7)) / 3, rng.standard_normal(28))
        for I in (3, 3, 14, 14)
    ]
    x, masks = rng.standard_normal((5, 4, 3)), [rng.random((5, 4, 14)) * 2]
    dy = rng.standard_normal((5, 4, 14))
    found = []
    for chosen in ("cuda", "reference"):
        monkeypatch.setattr(
            backends, "usable", lambda name=None, b=chosen: backend if b == "cuda" else REFERENCE
        )
        out = stack.forward_stack(
            LSTM(), x, weights, bidirectional=True, masks=masks, lengths=np.array([5, 3, 0, 1])
        )
        back = stack.backward_stack(out.tape, dy)
        found.append([out.y, *out.stateT, back.dx, *back.dstate0, *(d for w in back.dweights for d in w[:3])])
    for got, want in zip(*found, strict=True):
        assert error(got, want) <= 2e-14


# --- arguments ---------------------------------------------------------------------------------------------


ONE = ("x", "dy", "lengths", "reset")  # of a problem, beside tuples


def moved(p, put):
    """The problem with all its arrays elsewhere."""

    def all_of(arrays):
        return None if arrays is None else tuple(None if a is None else put(a) for a in arrays)

    tuples = {n: all_of(getattr(p, n)) for n in ("state0", "dstateT", "dstates")}
    ones = dict(zip(ONE, all_of(getattr(p, n) for n in ONE), strict=True))
    return replace(p, weights=Weights(*all_of(p.weights)), **tuples, **ones)


def hidden(p):
    """The problem with arrays of a device that are not NumPy's."""
    return moved(p, fake_cupy._asarray)


@cells
def test_all_arrays_stay_on_the_device(cell, backend):
    """Nothing is turned into NumPy's by the way: such an array would be an error."""
    p = problem(cell, 4, 3, 5, 7, **EVERYTHING)
    got = run(CudaBackend(fake_cupy.HiddenDevice(16)), hidden(p))
    assert all(isinstance(a, fake_cupy.ndarray) for a in got.values())
    assert_same_bits({key: a.get() for key, a in got.items()}, run(backend, p))


@pytest.mark.parametrize(
    "argument", ["x", "reset", "weight_hh", "bias_ih", "state0", "dy", "dstateT", "dstates"]
)
def test_an_array_of_numpy_among_those_of_a_gpu(argument):
    p = problem(LSTM(), 3, 2, 3, 7, **EVERYTHING)
    mixed = hidden(p)
    if argument in p.weights._fields:
        mixed = replace(mixed, weights=mixed.weights._replace(**{argument: getattr(p.weights, argument)}))
    else:
        mixed = replace(mixed, **{argument: getattr(p, argument)})
    with pytest.raises(
        TypeError, match=rf"^{argument}( h)?: expected an array of the GPU \(CuPy\), got numpy.ndarray"
    ):
        run(CudaBackend(fake_cupy.HiddenDevice(16), _tested=True), mixed)


def test_lengths_may_be_numpys(backend):
    p = problem(LSTM(), 3, 2, 3, 7, **EVERYTHING)
    mixed = replace(hidden(p), lengths=p.lengths)
    got = run(CudaBackend(fake_cupy.HiddenDevice(16), _tested=True), mixed)
    assert_same_bits({key: a.get() for key, a in got.items()}, run(backend, p))
    with pytest.raises(ValueError, match=r"^lengths: expected 0 <= lengths <= T = 3"):
        run(CudaBackend(fake_cupy.HiddenDevice(16), _tested=True), replace(mixed, lengths=p.lengths + 1))


@pytest.mark.parametrize("dtype", ["g", "i8", ">f4", ">f2"])
def test_wrong_dtypes(backend, dtype):
    p = problem(LSTM(), 3, 2, 3, 7).astype(dtype)
    with pytest.raises(TypeError, match=r"^weight_ih: expected"):
        run(backend, p)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_16_bits_need_matrix_units(dtype):
    class Old(EmulatedDevice):
        matrix_units = False

    p = problem(LSTM(), 3, 2, 3, 7)
    with pytest.raises(TypeError, match=r"^weight_ih: expected dtype float32 or float64, got b?float16$"):
        run(CudaBackend(Old(16), _tested=True), p.astype(dtype))


def test_bfloat16_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    p = problem(LSTM(), 3, 2, 3, 7)
    backend = CudaBackend(EmulatedDevice(16), _tested=True)
    run(backend, p.astype(np.float16))
    with pytest.raises(TypeError, match=r"^weight_ih: expected .* or float16, got bfloat16$"):
        run(backend, p.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@cells
def test_16_bits(backend, cell, dtype):
    for options in ({}, EVERYTHING):
        p = problem(cell, *SIZES[2], **options).astype(dtype)
        tolerance = 4 * float(ml_dtypes.finfo(dtype).eps)
        assert_close(run(backend, p), run(REFERENCE, p.astype(np.longdouble)), tolerance)


def test_what_is_not_built_names_who_has_it(backend):
    p = problem(GRU(reset_after=False, layer_norm=True), 3, 2, 3, 7)
    with pytest.raises(ValueError, match=r"^layer_norm: GRU.* is not built in the cuda backend; use the ref"):
        backend.forward(p.cell, p.x, p.weights)


@pytest.mark.parametrize("kernel", ["grid", "grid_streamed", "cluster"])
def test_what_runs_step_by_step_alone_says_so(device, kernel):
    r = Regularization(0.5, seed=1)
    for p, why in (
        (problem(LSTM(), 3, 2, 3, 7, regularization=r), "Regularized<Lstm>, which has recurrent dropout or"),
        (problem(LSTM(layer_norm=True), 3, 2, 3, 7), "LstmLayerNorm, which has layer norm;"),
        (problem(GRU(reset_after=False), 3, 2, 3, 7), "GruResetBefore, which has two phases;"),
    ):
        with pytest.raises(ValueError, match=rf"^kernel: '{kernel}' cannot run {why}.* use 'steps'$"):
            run(CudaBackend(device, kernel, _tested=True), p)
        chosen = CudaBackend(device, _tested=True)
        run(chosen, p)
        assert chosen.last_plan == cuda_plan.Plan("steps")


def test_wrong_arguments(backend, monkeypatch):
    p = problem(LSTM(), 3, 2, 3, 7)
    with pytest.raises(ValueError, match=r"^kernel: expected one of .* got 'warp'"):
        CudaBackend(backend.device, "warp")
    with pytest.raises(
        TypeError, match=r"^tape: expected what forward of the cuda backend returned, got NoneType"
    ):
        backend.backward(None)
    with pytest.raises(ValueError, match=r"^x: expected shape \(T, B, 3\)"):
        backend.forward(p.cell, p.x[:, :, 1:], p.weights)
    out = backend.forward(p.cell, p.x, p.weights)
    assert isinstance(out.tape, Tape)
    with pytest.raises(ValueError, match=r"^dstates: expected None"):
        backend.backward(out.tape, None, None, (p.dy, None))
    monkeypatch.setenv(KERNEL, "warp")
    with pytest.raises(ValueError, match=rf"^environment variable {KERNEL}: expected one of .* got 'warp'"):
        backend.forward(p.cell, p.x, p.weights)


def test_a_tape_and_packed_weights_belong_to_one_gpu(device, monkeypatch):
    other = EmulatedDevice(multiprocessors=16)
    current = device
    monkeypatch.setattr(cuda_cupy, "current", lambda: current)
    backend = CudaBackend()
    p = problem(LSTM(), 3, 2, 3, 7)
    packed = backend.pack(p.cell, p.weights)
    tape = backend.forward(p.cell, p.x, packed).tape
    current = other
    with pytest.raises(ValueError, match=r"^weights: expected that of the current GPU"):
        backend.forward(p.cell, p.x, packed)
    with pytest.raises(ValueError, match=r"^tape: expected that of the current GPU"):
        backend.backward(tape, p.dy)


# --- plans -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@cells
def test_every_plan_can_run(cell, backward):
    kernels = kernels_of(cell)
    seen = set()
    for B, H, itemsize, tile, (sms, shared, warps, cluster) in itertools.product(
        (1, 2, 7, 64, 300),
        (1, 5, 33, 100, 256, 1000, 4096),
        (4, 8),
        (8, 16),
        (H100, (2, 40_000, 2, 0), (48, 99 * 1024, 8, 0)),
    ):
        device = cuda_plan.Device(sms, shared, warps, cluster)
        precision = "ieee" if tile == 8 else "tf32"
        plan = cuda_plan.choose(kernels, 10, B, H, itemsize, device, precision=precision, backward=backward)
        seen.add(plan.kernel)
        if plan.kernel == "steps":
            continue
        across, tiles = plan.blocks
        assert plan.shared <= shared
        assert across == -(-H // plan.units)
        assert tiles == -(-B // plan.rows)
        if plan.kernel == "cluster":
            assert across <= cluster
        else:
            assert across * tiles <= sms
            per_unit = 1 if backward else kernels.recurrent.count
            assert plan.units * per_unit <= tile * warps
    assert seen == ({"steps"} if kernels.two_phases else set(cuda_plan.KERNELS))


def test_the_choice():
    def kernel(cell, T, B, H, itemsize=4, **options):
        return cuda_plan.choose(kernels_of(cell), T, B, H, itemsize, H100, **options).kernel

    assert kernel(LSTM(), 1, 16, 256) == "steps"  # one step
    assert kernel(GRU(reset_after=False), 50, 16, 256) == "steps"
    assert kernel(LSTM(), 50, 16, 64) == "cluster"
    assert kernel(LSTM(), 50, 16, 512) == "grid"
    assert kernel(LSTM(), 50, 16, 1024) == "grid"
    assert kernel(LSTM(), 50, 16, 4096) == "steps"  # no place for all blocks at once
    assert kernel(RNN(), 50, 8, 8000) == "grid_streamed"
    assert kernel(RNN(), 50, 200, 8000) == "steps"  # would read its weights many times a step
    assert kernel(LSTM(), 50, 16, 256, forced="grid_streamed") == "grid_streamed"
    with pytest.raises(
        ValueError, match=r"^kernel: 'grid' cannot run Lstm with B = 16, H = 4096 on this GPU"
    ):
        kernel(LSTM(), 50, 16, 4096, forced="grid")


def test_more_batch_or_units_cost_no_less():
    """The count behind the choice grows with the work."""
    for cell, backward in itertools.product((RNN(), LSTM(), GRU()), (False, True)):

        def cost(B, H, cell=cell, backward=backward):
            cuts = cuda_plan.cuts("grid_streamed", kernels_of(cell), B, H, 4, H100, backward=backward)
            return min(cuts).cost

        for B, H in itertools.product((1, 16, 128), (64, 256, 512)):
            assert cost(2 * B, H) >= cost(B, H)
            assert cost(B, 2 * H) >= cost(B, H)


# --- the self-test ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [None, "steps"])
def test_a_device_that_computes_wrongly_is_refused(kernel):
    class Wrong(EmulatedDevice):
        def matmul(self, a, b, out, precision="ieee"):
            super().matmul(a, b, out, precision)
            out *= 1 + 1e-3

    backend = CudaBackend(Wrong(16), kernel)
    p = problem(RNN(), 3, 2, 3, 7)
    for _ in range(2):  # not only the first time
        with pytest.raises(
            RuntimeError, match=r"self-test failed on this GPU, in float32 with steps: \w+ is off"
        ):
            run(backend, p)


@pytest.mark.parametrize("precision", cuda_compile.PRECISIONS)
def test_the_self_test_takes_every_precision(precision):
    device = EmulatedDevice(multiprocessors=16)
    p = problem(LSTM(), 3, 2, 3, 7, dtype=np.float32)
    run(CudaBackend(device, precision=precision), p)
    assert set(device.products) == {precision}
    assert {"step_forward", "grid_forward", "cluster_backward"} <= set(device.launches)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_the_self_test_is_of_each_dtype_of_16_bits(dtype):
    class Wrong(EmulatedDevice):
        def matmul(self, a, b, out, precision="ieee"):
            super().matmul(a, b, out, precision)
            if a.dtype == dtype:
                out[...] = out * np.float32(1.2)

    backend = CudaBackend(Wrong(16))
    p = problem(RNN(), 3, 2, 3, 7, dtype=np.float32)
    run(backend, p)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"self-test failed on this GPU, in {np.dtype(dtype)} with"):
            run(backend, p.astype(dtype))


def test_the_self_test_runs_every_kernel_that_may_be_chosen_once():
    device = EmulatedDevice(multiprocessors=16)
    backend = CudaBackend(device)
    p = problem(RNN(), 3, 2, 3, 7)
    run(backend, p)
    tested = list(device.launches)
    assert {"step_forward", "step_backward", "grid_forward", "grid_backward"} <= set(tested)
    run(backend, p)
    assert device.launches[len(tested) :] == ["grid_forward", "grid_backward", "operands"]
    forced = EmulatedDevice(multiprocessors=16)
    run(CudaBackend(forced, "steps"), p)
    assert not any(k.startswith("grid") for k in forced.launches)


# --- what is missing ----------------------------------------------------------------------------------------


def unavailable(
    monkeypatch, *, absent=(), majors=(13, 13, 13), driver=13, count=1, capability=(9, 0), cublas=True
):
    """``cuda_cupy.unavailable()`` on a computer of such a kind."""
    runtime = types.SimpleNamespace(runtimeGetVersion=lambda: majors[0] * 1000, getDevice=lambda: 0)
    fake_cuda = types.SimpleNamespace(runtime=runtime, **({"cublas": None} if cublas else {}))
    bindings = types.SimpleNamespace(__version__=f"{majors[1]}.1.0")
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=fake_cuda))
    monkeypatch.setattr(cuda_cupy, "_installed", lambda module: module not in absent)
    import_module = importlib.import_module
    monkeypatch.setattr(
        importlib, "import_module", lambda n, *a: bindings if n == "cuda.bindings" else import_module(n, *a)
    )
    monkeypatch.setattr(cuda_cupy.cuda_compile, "version", lambda: (majors[2], 0))
    answers = {"cuInit": None, "cuDeviceGetCount": count, "cuDeviceGet": 0}
    answers["cuDriverGetVersion"] = 1000 * (driver or 0)

    def call(function, *_):
        if driver is None:
            raise RuntimeError(f"{function}: CUDA_ERROR_NO_DEVICE")
        return answers[function]

    monkeypatch.setattr(cuda_cupy, "_call", call)
    monkeypatch.setattr(cuda_cupy, "_capability", lambda handle: capability)
    return cuda_cupy.unavailable.__wrapped__()


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
    monkeypatch.setattr(cuda_cupy, "unavailable", lambda: "the moon is full")
    p = problem(LSTM(), 3, 2, 3, 7)
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run here: the moon is full"):
        functional.forward(p.cell, p.x, p.weights, backend="cuda")
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


# --- the native face on arrays that are not NumPy's ---------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """A computer with CuPy and a GPU, as far as anything here can tell."""
    cupy, device = fake_cupy.module(), fake_cupy.HiddenDevice(multiprocessors=16)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(cuda_cupy, "unavailable", lambda: None)
    monkeypatch.setattr(cuda_cupy, "current", lambda: device)
    backend = CudaBackend()
    load = backends._load
    monkeypatch.setattr(backends, "_load", lambda name: backend if name == "cuda" else load(name))
    return cupy


def put(*arrays):
    made = tuple(fusedrnn.cuda.as_cupy(a) for a in arrays)
    return made if len(made) > 1 else made[0]


def test_modules_of_arrays(gpu):
    host, there = np.arange(3.0), put(np.arange(3.0))
    assert fusedrnn.cuda.gpu_enable
    assert fusedrnn.cuda.get_array_module(host) is np
    assert fusedrnn.cuda.get_array_module(there) is gpu
    assert fusedrnn.cuda.get_array_module(fusedrnn.Variable(there)) is gpu
    assert fusedrnn.cuda.get_array_module(3.5) is np
    np.testing.assert_array_equal(fusedrnn.cuda.as_numpy(there), host)
    assert fusedrnn.as_array(there) is there


def test_arrays_choose_the_backend(gpu, monkeypatch):
    p = problem(LSTM(), 3, 2, 3, 7, **EVERYTHING)
    on_gpu = hidden(p)
    monkeypatch.setenv("FUSEDRNN_BACKEND", "reference")  # what chooses among those for NumPy
    want = run(functional, p)
    got = run(functional, on_gpu)
    assert all(isinstance(a, fake_cupy.ndarray) for a in got.values())
    assert max(error(a.get(), want[key]) for key, a in got.items()) <= 2e-14
    packed = functional.pack(LSTM(), on_gpu.weights)
    assert packed.backend.name == "cuda"
    for x, weights, wrong in ((p.x, on_gpu.weights, "weight_ih"), (on_gpu.x, p.weights, "weight_ih")):
        with pytest.raises(TypeError, match=rf"^{wrong}: expected a"):
            functional.forward(LSTM(), x, weights)
    with pytest.raises(TypeError, match=r"^weight_ih: expected a NumPy array, got cupy.ndarray"):
        functional.forward(LSTM(), on_gpu.x, on_gpu.weights, backend="reference")


def test_packed_rows(gpu):
    rng = np.random.default_rng(0)
    x, weights = rng.standard_normal((6, 3)), problem(LSTM(), 2, 2, 3, 7).weights
    sizes = np.array([3, 2, 1])
    results = []
    for move in (np.asarray, put):
        out = functional.forward(
            LSTM(), move(x), Weights(*(None if w is None else move(w) for w in weights)), batch_sizes=sizes
        )
        back = functional.backward(out.tape, move(np.ones((6, 7))))
        results.append(
            [fusedrnn.cuda.as_numpy(a) for a in (out.y, *out.stateT, back.dx, back.dweights.weight_hh)]
        )
    for got, want in zip(*results, strict=True):
        assert error(want, got) <= 2e-14


class Net(fusedrnn.Model):
    """Both ways to run a layer, dropout, a loss with integers."""

    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = kind(5, **options)
        self.out = L.Linear(3)

    def forward(self, x):
        return self.out(F.dropout(self.rnn(x), 0.3))


KINDS = pytest.mark.parametrize(
    ("kind", "options"),
    [
        (L.RNN, {}),
        (L.LSTM, {"num_layers": 2, "dropout": 0.5}),
        (L.GRU, {"bidirectional": True}),
        (L.GRU, {"reset_after": False}),
        (L.LSTM, {"fused": False}),
        (L.LSTM, {"recompute": True}),
        (L.LSTM, {"fused": False, "layer_norm": True}),
    ],
    ids=["rnn", "lstm-2", "gru-bi", "gru-before", "unfused", "recompute", "unfused-norm"],
)


def trained(kind, options, *, gpu, optimizer=optimizers.Adam, moves=(), **more):
    """Parameters after a few steps of training, and the losses."""
    np.random.seed(3)
    net = Net(kind, dtype=np.float64, **options)
    if gpu:
        net.to_gpu()
    place = put if gpu else np.asarray
    opt = optimizer(0.05, **more).setup(net)
    rng = np.random.default_rng(1)
    x, t = rng.standard_normal((3, 6, 4, 2)), rng.integers(0, 3, (3, 24))
    reset = rng.random((6, 4)) < 0.2
    losses = []
    for k in range(3):
        if k in moves:  # to the other side and on
            (net.to_cpu if gpu else net.to_gpu)()
            gpu = not gpu
            place = put if gpu else np.asarray
        if not options.get("bidirectional"):
            net.rnn.sequence(place(x[k]), lengths=[6, 2, 0, 5], reset=place(reset))
        y = net(place(x[k]))
        loss = F.softmax_cross_entropy(F.reshape(y, (24, 3)), place(t[k]))
        loss = loss + F.mean_squared_error(y, place(np.zeros((6, 4, 3)))) * 0.1
        loss = loss + F.sum(F.relu(y[1:, [0, 0, 2]]) ** 2) / 7 - F.mean(F.tanh(y) * F.sigmoid(y))
        loss = loss + F.sum(F.log(F.exp(F.softmax(F.reshape(y, (24, 3)))[:, :2])))
        net.cleargrads()
        loss.backward()
        if not options.get("bidirectional"):
            loss.unchain_backward()
            net.rnn.reset_state()
        opt.update()
        losses.append(float(loss.data))
    return losses, {n: fusedrnn.cuda.as_numpy(p.data) for n, p in net.named_params()}, net, opt


def assert_same_training(got, want):
    np.testing.assert_allclose(got[0], want[0], rtol=1e-12)
    assert got[1].keys() == want[1].keys()
    for key in got[1]:
        assert error(got[1][key], want[1][key]) <= 1e-11, key


@KINDS
def test_training(gpu, kind, options):
    """The same numbers as on the CPU, masks of dropout included; every array stays where it belongs."""
    got = trained(kind, options, gpu=True, max_norm=1.0, weight_decay=0.01)
    assert_same_training(got, trained(kind, options, gpu=False, max_norm=1.0, weight_decay=0.01))
    assert all(isinstance(p.data, fake_cupy.ndarray) for p in got[2].params())


def test_training_that_moves(gpu):
    want = trained(L.LSTM, {}, gpu=False)
    assert_same_training(trained(L.LSTM, {}, gpu=True, moves=(1, 2)), want)
    assert_same_training(trained(L.LSTM, {}, gpu=False, moves=(2,)), want)
    assert_same_training(
        trained(L.LSTM, {}, gpu=True, optimizer=optimizers.SGD),
        trained(L.LSTM, {}, gpu=False, optimizer=optimizers.SGD),
    )


def test_single_steps(gpu):
    x = np.random.default_rng(0).standard_normal((4, 3, 2))
    results = []
    for on_gpu in (False, True):
        np.random.seed(0)
        layer = L.LSTM(5, dtype=np.float64)
        if on_gpu:
            layer.to_gpu()
        ys = [layer(put(step) if on_gpu else step) for step in x]
        loss = F.sum(F.stack(ys) * F.concatenate(ys, axis=0).reshape(4, 3, 5))
        loss.backward()
        results.append(
            [fusedrnn.cuda.as_numpy(a) for a in (loss.data, layer.c.data, layer.weight_hh.grad.data)]
        )
    for want, got in zip(*results, strict=True):
        assert error(got, want) <= 1e-13


def test_to_gpu_and_back(gpu):
    np.random.seed(0)
    net = fusedrnn.models.Sequential(L.LSTM(4, in_size=2), L.Linear(1))  # the second one's size is open
    x = np.random.randn(3, 2, 2).astype(np.float32)
    F.sum(net.layers[0](x)).backward()
    before = {n: p.data.copy() for n, p in net.named_params() if p.data is not None}
    gradient = net.layers[0].weight_hh.grad.data.copy()
    net.to_cpu()
    assert net.layers[0].h.creator is not None  # it was there already
    h = net.layers[0].h.data
    net.to_gpu()
    assert net.layers[0].h.creator is None
    np.testing.assert_array_equal(net.layers[0].h.data.get(), h)
    np.testing.assert_array_equal(net.layers[0].weight_hh.grad.data.get(), gradient)
    net(put(x))
    assert isinstance(net.layers[1].W.data, fake_cupy.ndarray)
    net.to_cpu()
    assert type(net.layers[1].W.data) is np.ndarray
    for n, p in net.named_params():
        if n in before:
            np.testing.assert_array_equal(p.data, before[n])
    assert net(x).shape == (3, 2, 1)


def test_mixing_is_an_error_that_names_the_argument(gpu):
    np.random.seed(0)
    x = np.zeros((3, 2, 4), np.float32)
    layer, linear = L.LSTM(4, in_size=4), L.Linear(2, in_size=4)
    with pytest.raises(
        TypeError, match=r"^x is an array of cupy, expected one of numpy, as the layer's parameters"
    ):
        layer(put(x))
    with pytest.raises(TypeError, match=r"^linear: x is an array of cupy, expected one of numpy, as W"):
        linear(put(x))
    layer.to_gpu()
    linear.to_gpu()
    with pytest.raises(
        TypeError, match=r"^x is an array of numpy, expected one of cupy, as the layer's parameters"
    ):
        layer(x)
    with pytest.raises(TypeError, match=r"^linear: x is an array of numpy, expected one of cupy, as W"):
        linear(x)
    state = np.zeros((2, 4), np.float32)
    with pytest.raises(TypeError, match=r"^the state passed in is an array of numpy, expected one of cupy"):
        layer.sequence(put(x), (state, state))
    layer.state = state, state
    with pytest.raises(TypeError, match=r"^the carried state is an array of numpy, expected one of cupy"):
        layer(put(x))
    weights = Weights(*(None if w is None else put(w) for w in problem(RNN(), 2, 1, 4, 4).weights))
    with pytest.raises(TypeError, match=r"^masks\[0\]: expected an array like x"):
        stack.forward_stack(RNN(), put(np.zeros((3, 2, 4))), [weights, weights], masks=[np.ones((3, 2, 4))])


def test_weights_and_checkpoints_go_through_files(gpu, tmp_path):
    _, _, net, opt = trained(L.LSTM, {}, gpu=True)
    net.rnn(put(np.ones((2, 4, 2))))
    net.rnn.h.unchain_backward()
    loader = fusedrnn.DataLoader(fusedrnn.datasets.SinCurve(), 10, gpu=True)
    net.save_weights(tmp_path / "w.npz")
    checkpoint.save(tmp_path / "c", net, opt, loader, losses=put(np.arange(3.0)))
    for on_gpu in (True, False):
        fresh = Net(L.LSTM, dtype=np.float64)
        new_opt = optimizers.Adam(0.05).setup(fresh)
        if on_gpu:
            fresh.to_gpu()
        fresh.load_weights(tmp_path / "w.npz")
        progress = checkpoint.load(tmp_path / "c", fresh, new_opt, loader)
        np.testing.assert_array_equal(progress["losses"], np.arange(3.0))
        for p, q in zip(fresh.params(), net.params(), strict=True):
            assert isinstance(p.data, fake_cupy.ndarray if on_gpu else np.ndarray)
            np.testing.assert_array_equal(fusedrnn.cuda.as_numpy(p.data), q.data.get())
        np.testing.assert_array_equal(fusedrnn.cuda.as_numpy(fresh.rnn.c.data), net.rnn.c.data.get())
        F.sum(fresh((put if on_gpu else np.asarray)(np.ones((2, 4, 2))))).backward()
        new_opt.update()  # its state has gone where the parameters are


def test_loaders(gpu):
    np.random.seed(0)
    dataset = fusedrnn.datasets.SinCurve()
    for loader in (
        fusedrnn.DataLoader(dataset, 7, shuffle=False, gpu=True),
        fusedrnn.SeqDataLoader(dataset, 7, gpu=True),
        fusedrnn.SeqDataLoader(dataset, 7, gpu=True, steps=5),
    ):
        there = next(loader)
        assert all(isinstance(a, fake_cupy.ndarray) for a in there)
        loader.reset()
        loader.to_cpu()
        for got, want in zip(there, next(loader), strict=True):
            np.testing.assert_array_equal(got.get(), want)
        loader.to_gpu()
        assert isinstance(next(loader)[0], fake_cupy.ndarray)


def test_the_gradient_matrix(gpu):
    """What ``fusedrnn gradcheck --backend cuda`` runs."""
    options = [
        "plain",
        "all together",
        "recompute",
        "2 layers, both directions, all",
        "zoneout",
        "layer norm",
    ]
    rows = gradmatrix.run_matrix(
        cells=["lstm", "gru"], backends=["cuda"], sizes=gradmatrix.QUICK[:1], options=options
    )
    assert [r for r in rows if r.passed is False] == []
    unbuilt = {(r.cell, r.option) for r in rows if r.passed is None}
    assert unbuilt == {("gru reset_after=False", "layer norm")}
    assert sum(r.passed is True for r in rows) == 3 * 2 * len(options) - 2


def test_the_gradient_matrix_of_a_forced_kernel_leaves_out_what_it_cannot_run(gpu, monkeypatch):
    monkeypatch.setenv("FUSEDRNN_CUDA_KERNEL", "grid_streamed")
    rows = gradmatrix.run_matrix(
        cells=["gru"], backends=["cuda"], sizes=gradmatrix.QUICK[:1], options=["plain", "zoneout"]
    )
    ran = {(r.cell, r.option): r.passed for r in rows}
    assert ran.pop(("gru", "plain")) is True
    assert set(ran.values()) == {None}


GRADCHECKS = pytest.mark.parametrize(
    ("kind", "options"),
    [
        (L.RNN, {}),
        (L.LSTM, {"num_layers": 2, "dropout": 0.5}),
        (L.GRU, {"num_layers": 2, "bidirectional": True}),
        (L.LSTM, {"fused": False, "layer_norm": True, "num_layers": 2, "dropout": 0.5}),
    ],
    ids=["rnn", "lstm-2", "gru-bi", "unfused-norm"],
)


@GRADCHECKS
@pytest.mark.parametrize("method", ["oracle", "central"])
def test_gradcheck_of_a_layer(gpu, kind, options, method):
    """With lengths and a reset; afterwards the layer is as it was, and where it was."""
    np.random.seed(0)
    layer = kind(3, dtype=np.float64, **options)
    layer.to_gpu()
    reset = np.zeros((4, 3), bool)
    reset[2, 0] = True
    calls = {"lengths": [4, 2, 3], "reset": put(reset)}
    x = put(np.random.randn(4, 3, 2))
    layer(x)  # its sizes are known from here on, and where it can it carries a state
    before = {n: p._data for n, p in layer.named_params()}
    h = layer.h
    assert gradcheck(layer, x, method=method, options=calls, fast_mode=method == "central")
    assert layer.gpu
    assert layer.h is h
    assert all(p._data is before[n] for n, p in layer.named_params())


@pytest.mark.parametrize("method", ["oracle", "central"])
def test_gradcheck_of_one_step_and_a_state(gpu, method):
    np.random.seed(0)
    layer = L.LSTM(3, in_size=2, dtype=np.float64)
    layer.to_gpu()
    x, h, c = put(*(np.random.randn(2, n) for n in (2, 3, 3)))
    assert gradcheck(layer, (x, (h, c)), method=method)


@pytest.mark.parametrize("method", ["oracle", "central"])
@pytest.mark.parametrize("tensor", ["dx", "dweights"])
def test_gradcheck_finds_a_wrong_gradient(gpu, monkeypatch, method, tensor):
    """Of the backend that runs there: that is what was evaluated."""
    backend = backends.get("cuda")
    backward = backend.backward

    def wrong(*args, **kwargs):
        found = backward(*args, **kwargs)
        array = found.dx if tensor == "dx" else found.dweights.weight_hh
        array[(0,) * array.ndim] = array[(0,) * array.ndim] * 1.01
        return found

    monkeypatch.setattr(backend, "backward", wrong)
    layer = L.GRU(3, in_size=2, dtype=np.float64)
    layer.to_gpu()
    name = {"dx": r"gradient of x|/ d inputs\[0\]", "dweights": "(gradient of|/ d) weight_hh"}[tensor]
    with pytest.raises(GradcheckError, match=name):
        gradcheck(layer, put(np.random.randn(4, 3, 2)), method=method)


def test_gradcheck_of_a_function_of_variables(gpu):
    a, b = (fusedrnn.Variable(put(np.random.randn(3, 2))) for _ in range(2))
    assert gradcheck(lambda a, b: F.tanh(a) * b, (a, b))


def test_gradcheck_of_a_model(gpu):
    np.random.seed(0)
    net = Net(L.GRU, dtype=np.float64)
    net.to_gpu()
    assert gradcheck(net, put(np.random.randn(3, 2, 2)))


def test_info_shows_plans(gpu, capsys):
    found = system.info()
    assert found["backends"]["cuda"] is None
    assert found["backend"] != "cuda"
    assert len(found["cuda"]) == len(system.PLANNED)
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    for size, plans in found["cuda"].items():
        assert f"cuda, {size}" in out
        assert plans in out


# --- the device that is a GPU: what can be seen of it without one -------------------------------------------


def cublas(monkeypatch):
    """CuPy with a cuBLAS that follows its manual on this computer's memory."""

    def read(pointer, dtype, rows, columns, step):
        """A matrix that lies column by column."""
        flat = np.ctypeslib.as_array(
            (ctypes.c_char * (step * columns * dtype.itemsize)).from_address(pointer)
        )
        return flat.view(dtype).reshape(columns, step)[:, :rows].T

    def gemm(dtype, result=None):
        scale = np.dtype("f8" if dtype == "f8" else "f4")

        def run(handle, op_a, op_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc):
            assert handle == "handle"
            assert read(alpha, scale, 1, 1, 1)[0, 0] == 1
            assert read(beta, scale, 1, 1, 1)[0, 0] == 0
            assert lda >= (k if op_a else m)
            assert ldb >= (n if op_b else k)
            assert ldc >= m
            left = read(a, dtype, k, m, lda).T if op_a else read(a, dtype, m, k, lda)
            right = read(b, dtype, n, k, ldb).T if op_b else read(b, dtype, k, n, ldb)
            read(c, result or dtype, m, n, ldc)[...] = left.astype(scale) @ right.astype(scale)

        return run

    def gemm_ex(
        handle, op_a, op_b, m, n, k, alpha, a, a_type, lda, b, b_type, ldb, beta, c, c_type, ldc, how, algo
    ):
        assert (a_type, algo) == (b_type, "any")
        asked.append(how)
        gemm(reals[a_type], reals[c_type])(handle, op_a, op_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc)

    asked = []
    reals = {cupy_type: np.dtype(name) for name, cupy_type in CUDA_TYPES.items()}
    made = types.SimpleNamespace(
        sgemm=gemm(np.dtype("f4")),
        dgemm=gemm(np.dtype("f8")),
        gemmEx=gemm_ex,
        asked=asked,  # of gemmEx: how it was to compute
        CUBLAS_COMPUTE_32F_FAST_TF32="tf32",
        CUBLAS_COMPUTE_32F_FAST_16BF="bf16",
        CUBLAS_COMPUTE_32F_FAST_16F="fp16",
        CUBLAS_COMPUTE_32F="sums in float32",
        CUBLAS_GEMM_DEFAULT="any",
    )
    device = types.SimpleNamespace(get_cublas_handle=lambda: "handle")
    return types.SimpleNamespace(cuda=types.SimpleNamespace(cublas=made, device=device))


CUDA_TYPES = {"float32": 0, "float16": 2, "bfloat16": 14}  # cudaDataType, of the toolkit's library_types.h


@pytest.mark.parametrize("precision", cuda_compile.PRECISIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_products_by_cublas(monkeypatch, dtype, precision):
    halves = np.dtype(dtype).itemsize == 2
    device = object.__new__(cuda_cupy.CupyDevice)
    device._cupy = cublas(monkeypatch)
    monkeypatch.setattr(device, "pointer", lambda a: a.ctypes.data, raising=False)
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
    rounds = dtype == np.float32 and precision in ("tf32", "bf16", "fp16")
    how = {"sums in float32"} if halves else {precision} if rounds else set()
    assert set(device._cupy.cuda.cublas.asked) == how
    with pytest.raises(ValueError, match="matmul: expected an axis of neighbours"):
        device.matmul(np.zeros((6, 6), dtype)[::2, ::2], np.zeros((3, 3), dtype), np.zeros((3, 3), dtype))


bindings = pytest.mark.skipif(
    not cuda_cupy._installed("cuda.bindings"), reason="cuda-bindings is not installed"
)


@pytest.fixture
def driver(monkeypatch):
    """A device on NVIDIA's own bindings, with the calls into the driver recorded instead of made."""
    real = importlib.import_module("cuda.bindings.driver")
    calls = []

    class Driver:
        def __getattr__(self, name):
            if not name.startswith("cu"):
                return getattr(real, name)
            assert callable(getattr(real, name))

            def call(*arguments):
                if name == "cuLaunchKernelEx":
                    config, function, parameters, extra = arguments
                    launch = {
                        "grid": (config.gridDimX, config.gridDimY, config.gridDimZ),
                        "block": (config.blockDimX, config.blockDimY, config.blockDimZ),
                        "shared": config.sharedMemBytes,
                        "stream": int(config.hStream),
                        "attributes": [
                            (a.id, a.value.cooperative, a.value.clusterDim.x) for a in config.attrs
                        ],
                        "count": config.numAttrs,
                        "parameters": ctypes.c_void_p.from_address(parameters).value,
                        "first": ctypes.c_int64.from_address(
                            ctypes.c_void_p.from_address(parameters).value
                        ).value,
                        "second": ctypes.c_int64.from_address(
                            ctypes.c_void_p.from_address(parameters + 8).value
                        ).value,
                        "extra": extra,
                    }
                    arguments = (function, launch)
                calls.append((name, *arguments))
                answers = {"cuOccupancyMaxActiveBlocksPerMultiprocessor": 1, "cuModuleLoadData": "module"}
                answers["cuDriverGetVersion"] = 13010  # CUDA 13.1
                answers["cuOccupancyMaxActiveClusters"] = (
                    1 if name != "cuOccupancyMaxActiveClusters" else (int(arguments[-1].gridDimX <= 8))
                )
                value = arguments[-1] if name == "cuModuleGetFunction" else answers.get(name)
                return (failing.get(name, real.CUresult.CUDA_SUCCESS), *(() if value is None else (value,)))

            return call

    failing = {}
    fake = Driver()
    monkeypatch.setattr(cuda_cupy, "_driver", lambda: fake)
    monkeypatch.setattr(cuda_cupy.cuda_compile, "cubin", lambda *key: " ".join(key).encode())
    device = object.__new__(cuda_cupy.CupyDevice)
    streams = types.SimpleNamespace(
        runtime=types.SimpleNamespace(setDevice=lambda n: calls.append(("setDevice", n))),
        get_current_stream=lambda: types.SimpleNamespace(ptr=4711),
    )
    device._cupy = types.SimpleNamespace(cuda=streams)
    device.number, device.multiprocessors, device.shared_bytes, device.architecture = 1, 4, 99_000, "sm_90"
    device._modules, device._functions, device._places = {}, {}, {}
    device._lock = threading.Lock()
    return device, calls, failing, real


@bindings
def test_launches(driver):
    device, calls, _, real = driver
    job, step = ctypes.c_int64(123), ctypes.c_int64(456)
    device.launch("Lstm", "float", "step_forward", (7, 1), (job, step))
    device.launch("Lstm", "float", "grid_forward", (2, 2), (job, step), 50_000, cooperative=True)
    launches = [call for call in calls if call[0] == "cuLaunchKernelEx"]
    (_, function, plain), (_, grid_function, cooperative) = launches
    assert (function, grid_function) == (b"step_forward", b"grid_forward")
    expected = {
        "grid": (7, 1, 1),
        "block": (256, 1, 1),
        "shared": 0,
        "stream": 4711,
        "attributes": [],
        "count": 0,
    }
    assert plain | expected == plain
    assert (plain["first"], plain["second"], plain["extra"]) == (123, 456, 0)
    assert plain["parameters"] == ctypes.addressof(job)
    flag = real.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
    assert (cooperative["grid"], cooperative["shared"]) == ((2, 2, 1), 50_000)
    ((found, value, _),) = cooperative["attributes"]
    assert (found, value, cooperative["count"]) == (flag, 1, 1)
    loads = [call for call in calls if call[0] == "cuModuleLoadData"]
    assert loads == [("cuModuleLoadData", b"Lstm float sm_90 ieee")]  # once for both
    beyond = real.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    assert ("cuFuncSetAttribute", b"grid_forward", beyond, 99_000) in calls
    assert [call for call in calls if call[0] == "setDevice"] == [("setDevice", 1)] * 2


@bindings
def test_a_fatbin_of_the_package_is_loaded_where_the_driver_takes_it(driver, monkeypatch):
    device, calls, _, _ = driver
    asked = []
    monkeypatch.setattr(cuda_cupy.cuda_compile, "shipped", lambda *key: asked.append(key) or b"fatbin")
    device.launch("Lstm", "float", "step_forward", (7, 1), (ctypes.c_int64(), ctypes.c_int64()))
    assert asked == [("Lstm", "float", "sm_90", "ieee", (13, 1))]
    assert ("cuModuleLoadData", b"fatbin") in calls


@bindings
def test_a_cluster_is_a_row_of_the_grid(driver):
    device, calls, _, real = driver
    job, step = ctypes.c_int64(123), ctypes.c_int64(456)
    device.launch("Lstm", "float", "cluster_forward", (3, 50), (job, step), 60_000, precision="tf32")
    (launch,) = (call[2] for call in calls if call[0] == "cuLaunchKernelEx")
    ((found, _, blocks),) = launch["attributes"]
    assert found == real.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    assert (blocks, launch["grid"], launch["shared"]) == (3, (3, 50, 1), 60_000)
    assert ("cuModuleLoadData", b"Lstm float sm_90 tf32") in calls
    with pytest.raises(RuntimeError, match=r"^cluster_forward: a cluster of 9 blocks does not run on this"):
        device.launch("Lstm", "float", "cluster_forward", (9, 1), (job, step))


@bindings
def test_a_grid_that_does_not_run_at_once_is_an_error(driver):
    device, calls, failing, real = driver
    args, too_many = (
        (ctypes.c_int64(), ctypes.c_int64()),
        r"5 x 1 blocks do not run at once on this GPU, 4 do",
    )
    with pytest.raises(RuntimeError, match=rf"^grid_forward: {too_many}"):
        device.launch("Lstm", "float", "grid_forward", (5, 1), args, cooperative=True)
    assert not any(call[0] == "cuLaunchKernelEx" for call in calls)
    failing["cuLaunchKernelEx"] = real.CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(RuntimeError, match=r"^cuLaunchKernelEx: CUDA_ERROR_INVALID_VALUE"):
        device.launch("Lstm", "float", "step_forward", (1, 1), args)


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed")
def test_what_the_fake_offers_exists_in_cupy():
    import cupy

    assert all(callable(getattr(cupy, n)) for n in fake_cupy.NAMES)
    assert callable(cupy.add.at)
    assert all(
        hasattr(cupy.ndarray, n)
        for n in fake_cupy.VALUES + fake_cupy.METHODS + ["get", "data", "device", "T"]
    )
    for n in fake_cupy.OPERATORS:
        assert hasattr(cupy.ndarray, f"__{n.strip('_')}__")


needs_gpu = pytest.mark.skipif(get_backend("cuda").unavailable() is not None, reason="needs an NVIDIA GPU")


@needs_gpu
@cells
def test_on_a_gpu(cell):
    """The one test here that a GPU runs: all options and kernels, CuPy's arrays."""
    import cupy

    halves = (np.float16, ml_dtypes.bfloat16)
    for options, size, dtype in itertools.product(OPTIONS, SIZES, (np.float32, np.float64, *halves)):
        p = problem(cell, *size, **options).astype(dtype)
        q = moved(p, cupy.asarray)
        want = run(REFERENCE, p.astype(np.longdouble))
        for kernel in cuda_plan.KERNELS if cell != GRU(reset_after=False) else (None,):
            got = {key: a.get() for key, a in run(CudaBackend(kernel=kernel), q).items()}
            for key, a in got.items():
                if dtype in halves:
                    tolerance = 4 * float(ml_dtypes.finfo(dtype).eps)
                else:
                    tolerance = (GRADIENT if key.startswith("d") else FORWARD)[dtype]
                assert_close({key: a}, {key: want[key]}, tolerance)
