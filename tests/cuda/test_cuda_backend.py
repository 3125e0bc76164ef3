"""The CUDA backend on an emulated device: arguments, weights and their gradients, what is kept for backward,
the self-test. Whether the kernels are right is the matter of test_cuda_kernels.py.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

import emulated
import fake_cupy
from emulated import EmulatedDevice
from fusedrnn.backends import get as get_backend
from fusedrnn.backends.cuda import KERNEL, CudaBackend, cupy_device, nvrtc, plans
from fusedrnn.backends.cuda.jobs import kernels_of
from fusedrnn.backends.protocol import Regularization
from fusedrnn.cells import gru, lstm, rnn
from problems import (
    FORWARD,
    GRADIENT,
    OPTIONS,
    PLAIN,
    SIZES,
    assert_bitwise_equal,
    assert_close,
    assert_standard,
    name,
    named,
    problem,
    run,
)

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="needs a C++ compiler")

REFERENCE = get_backend("reference")
EVERYTHING = {"lengths": True, "reset": True, "return_states": True}
cells = pytest.mark.parametrize("cell", PLAIN, ids=name)


@pytest.fixture(scope="module")
def device():
    return EmulatedDevice(multiprocessors=16)


@pytest.fixture(scope="module")
def backend(device):
    return CudaBackend(device)


# --- results -----------------------------------------------------------------------------------------------


def launches_of(kernel):
    """Of all steps, forward and back."""
    return [f"{kernel}_{way}" for way in ("forward", "backward") if kernel != "steps"]


WHOLES = {launch for kernel in nvrtc.KERNELS for launch in launches_of(kernel)}


@pytest.mark.parametrize("kernel", nvrtc.KERNELS)
@cells
def test_every_kernel_by_argument_and_by_environment(device, monkeypatch, cell, kernel):
    p = problem(cell, *SIZES[0], **EVERYTHING)
    by_argument = CudaBackend(device, kernel)
    if kernel != "steps" and cell == gru.with_options(reset_after=False):
        with pytest.raises(
            ValueError, match=rf"^kernel: '{kernel}' cannot run GruResetBefore, which has two phases"
        ):
            run(by_argument, p)
        return
    device.launches.clear()
    got = assert_standard(by_argument, p)
    assert by_argument.last_plan.kernel == kernel
    assert set(device.launches) & WHOLES == set(launches_of(kernel))
    by_environment = CudaBackend(device)
    monkeypatch.setenv(KERNEL, kernel)
    assert_bitwise_equal(run(by_environment, p), got)
    assert by_environment.last_plan.kernel == kernel


@cells
def test_what_is_kept_for_backward(backend, cell):
    p = problem(cell, 5, 3, 4, 7, **EVERYTHING)
    everything, boundary = (run(backend, p, save=save) for save in ("all", "boundary_states"))
    assert_bitwise_equal(boundary, everything)
    tapes = {
        save: backend.forward(cell, p.x, p.weights, p.state0, **p.options, save=save).tape
        for save in ("all", "boundary_states", None)
    }
    kernels = kernels_of(cell)
    assert tapes["all"].bytes == 5 * 3 * 7 * 8 * (kernels.saved + kernels.has_c)
    assert tapes["boundary_states"].bytes == 0
    assert tapes[None] is None


@pytest.mark.parametrize("kernel", nvrtc.KERNELS)
def test_no_row_has_a_step(device, kernel):
    p = replace(problem(lstm, 4, 3, 2, 7, **EVERYTHING), lengths=np.zeros(3, np.int32))
    assert_bitwise_equal(run(CudaBackend(device, kernel), p), run(REFERENCE, p))


@cells
def test_padding_reaches_nothing_whatever_the_weights(backend, cell):
    """dx there is +0 though a weight is infinite."""
    p = problem(cell, 4, 3, 2, 7, lengths=True)
    ih = p.weights["weight_ih"].copy()
    ih[0, 0] = np.inf
    with np.errstate(all="ignore"):
        got = run(backend, replace(p, weights=p.weights | {"weight_ih": ih}))
    padding = np.arange(4)[:, np.newaxis] >= p.lengths
    for key in ("y", "dx"):
        assert not got[key][padding].any()
        assert not np.signbit(got[key][padding]).any()


@cells
def test_a_tape_does_not_borrow_the_state(backend, cell):
    p = problem(cell, 3, 2, 3, 7)
    want = run(backend, p)
    state0 = tuple(s.copy() for s in p.state0)
    out = backend.forward(cell, p.x, p.weights, state0)
    for s in state0:
        s[...] = np.nan
    assert_bitwise_equal(named(cell, out, backend.backward(out.tape, p.dy, p.dstateT)), want)


# --- arguments ---------------------------------------------------------------------------------------------


@cells
def test_all_arrays_stay_on_the_device(cell, backend):
    """Nothing is turned into NumPy's by the way: such an array would be an error."""
    p = problem(cell, 4, 3, 5, 7, **EVERYTHING)
    got = run(CudaBackend(fake_cupy.HiddenDevice(16)), fake_cupy.hidden(p))
    assert all(isinstance(a, fake_cupy.ndarray) for a in got.values())
    assert_bitwise_equal({key: a.get() for key, a in got.items()}, run(backend, p))


@pytest.mark.parametrize("argument", ["x", "weight_hh", "bias_ih", "state0", "dy", "dstateT", "dstates"])
def test_an_array_of_numpy_among_those_of_a_gpu(argument):
    p = problem(lstm, 3, 2, 3, 7, **EVERYTHING)
    mixed = fake_cupy.hidden(p)
    if argument in p.weights:
        mixed = replace(mixed, weights=mixed.weights | {argument: p.weights[argument]})
    else:
        mixed = replace(mixed, **{argument: getattr(p, argument)})
    with pytest.raises(
        TypeError, match=rf"^{argument}( h)?: expected an array of the GPU \(CuPy\), got numpy.ndarray"
    ):
        run(CudaBackend(fake_cupy.HiddenDevice(16), _tested=True), mixed)


@pytest.mark.parametrize("dtype", ["?", "u1", "i8"])
def test_resets_that_are_on_the_gpu_stay_there(backend, dtype, monkeypatch):
    """Of those that are no booleans one number is waited for: whether another than 0 and 1 is among them."""
    p = problem(lstm, 3, 2, 3, 7, **EVERYTHING)
    there = fake_cupy.hidden(replace(p, reset=p.reset.astype(dtype)))
    assert isinstance(there.reset, fake_cupy.ndarray)
    backend_there, expected = CudaBackend(fake_cupy.HiddenDevice(16), _tested=True), run(backend, p)
    with monkeypatch.context() as patch:
        for name in ("get", "__array__"):
            patch.setattr(fake_cupy.ndarray, name, None, raising=False)
        got = run(backend_there, there)
    assert_bitwise_equal({key: a.get() for key, a in got.items()}, expected)
    if dtype != "?":
        wrong = fake_cupy.hidden(replace(p, reset=3 * p.reset.astype(dtype)))
        with pytest.raises(ValueError, match=r"^reset: expected booleans, or 0 and 1, got 3 among them"):
            run(backend_there, wrong)


def test_lengths_may_be_numpys(backend):
    p = problem(lstm, 3, 2, 3, 7, **EVERYTHING)
    mixed = replace(fake_cupy.hidden(p), lengths=p.lengths)
    got = run(CudaBackend(fake_cupy.HiddenDevice(16), _tested=True), mixed)
    assert_bitwise_equal({key: a.get() for key, a in got.items()}, run(backend, p))
    with pytest.raises(ValueError, match=r"^lengths: expected 0 to T = 3"):
        run(CudaBackend(fake_cupy.HiddenDevice(16), _tested=True), replace(mixed, lengths=p.lengths + 1))


@pytest.mark.parametrize(
    ("matrix_units", "packages", "dtype", "expected"),
    [
        (False, True, np.float16, "dtype float32 or float64, got float16"),
        (False, True, ml_dtypes.bfloat16, "dtype float32 or float64, got bfloat16"),
        (True, False, np.float16, None),
        (True, False, ml_dtypes.bfloat16, ".* or float16, got bfloat16"),
    ],
)
def test_16_bits_need_matrix_units_and_bfloat16_a_package(
    monkeypatch, matrix_units, packages, dtype, expected
):
    device = EmulatedDevice(16)
    device.matrix_units = matrix_units
    backend, p = CudaBackend(device, _tested=True), problem(lstm, 3, 2, 3, 7).astype(dtype)
    if not packages:
        monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    if expected is None:
        run(backend, p)
        return
    with pytest.raises(TypeError, match=rf"^weight_ih: expected {expected}$"):
        run(backend, p)


def test_what_is_not_supported_names_who_has_it(backend):
    p = problem(gru.with_options(reset_after=False, layer_norm=True), 3, 2, 3, 7)
    with pytest.raises(ValueError, match=r"^cell: gru.* is not supported by the cuda backend; use the ref"):
        backend.forward(p.cell, p.x, p.weights)


@pytest.mark.parametrize("kernel", nvrtc.KERNELS[1:])
def test_what_runs_step_by_step_alone_says_so(device, kernel):
    r = Regularization(0.5, seed=1)
    for p, why in (
        (problem(lstm, 3, 2, 3, 7, regularization=r), "Regularized<Lstm>, which has recurrent dropout or"),
        (problem(lstm.with_options(layer_norm=True), 3, 2, 3, 7), "LstmLayerNorm, which has layer norm;"),
        (problem(gru.with_options(reset_after=False), 3, 2, 3, 7), "GruResetBefore, which has two phases;"),
    ):
        with pytest.raises(ValueError, match=rf"^kernel: '{kernel}' cannot run {why}.* use 'steps'$"):
            run(CudaBackend(device, kernel, _tested=True), p)
        chosen = CudaBackend(device, _tested=True)
        run(chosen, p)
        assert chosen.last_plan == plans.Plan("steps")


def test_a_kernel_that_there_is_not(backend, monkeypatch):
    with pytest.raises(ValueError, match=r"^kernel: expected one of .* got 'warp'"):
        CudaBackend(backend.device, "warp")
    monkeypatch.setenv(KERNEL, "warp")
    with pytest.raises(ValueError, match=rf"^environment variable {KERNEL}: expected one of .* got 'warp'"):
        run(backend, problem(lstm, 3, 2, 3, 7))


def test_a_tape_and_packed_weights_belong_to_one_gpu(device, monkeypatch):
    other = EmulatedDevice(multiprocessors=16)
    current = device
    monkeypatch.setattr(cupy_device, "current", lambda: current)
    backend = CudaBackend()
    p = problem(lstm, 3, 2, 3, 7)
    packed = backend.pack(p.cell, p.weights)
    tape = backend.forward(p.cell, p.x, packed).tape
    current = other
    with pytest.raises(ValueError, match=r"^weights: expected that of the current GPU"):
        backend.forward(p.cell, p.x, packed)
    with pytest.raises(ValueError, match=r"^tape: expected that of the current GPU"):
        backend.backward(tape, p.dy)


# --- the self-test ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("called", "tested", "kernel"),
    [
        (np.float64, np.float32, None),
        (np.float64, np.float32, "steps"),
        (np.float16, np.float16, None),
        (ml_dtypes.bfloat16, ml_dtypes.bfloat16, None),
    ],
)
def test_a_device_that_computes_wrongly_is_refused(called, tested, kernel):
    """In this dtype, and not only the first time."""

    class Wrong(EmulatedDevice):
        def matmul(self, a, b, out, precision="ieee"):
            super().matmul(a, b, out, precision)
            if a.dtype == tested:
                out[...] = out * np.float32(1.001 if tested == np.float32 else 1.2)

    backend = CudaBackend(Wrong(16), kernel)
    p = problem(rnn, 3, 2, 3, 7)
    if tested != np.float32:
        run(backend, p)
    for _ in range(2):
        said = rf"self-test failed on this GPU, in {np.dtype(tested)} with \w+[^:]*: \w+ is off"
        with pytest.raises(RuntimeError, match=said):
            run(backend, p.astype(called))


def test_a_first_call_cannot_be_captured():
    class Captured(EmulatedDevice):
        now = True

        def captured(self):
            return self.now

    device = Captured(16)
    backend = CudaBackend(device)
    p = problem(rnn, 3, 2, 3, 7, dtype=np.float32)
    with pytest.raises(RuntimeError, match=r"^the first call in float32 with kernel 'cluster' on a GPU"):
        run(backend, p)
    assert device.launches == []
    device.now = False
    run(backend, p)
    device.now = True
    run(backend, p)
    backend._kernel = "steps"
    with pytest.raises(RuntimeError, match=r"^the first call in float32 with kernel 'steps' on a GPU cannot"):
        run(backend, p)


@pytest.mark.parametrize("precision", nvrtc.PRECISIONS)
def test_the_self_test_takes_every_precision(precision):
    device = EmulatedDevice(multiprocessors=16)
    p = problem(lstm, 3, 2, 3, 7, dtype=np.float32)
    backend = CudaBackend(device, precision=precision)
    run(backend, p)
    assert set(device.products) == {precision}
    assert set(launches_of(backend.last_plan.kernel)) <= set(device.launches)


@pytest.mark.parametrize("kernel", nvrtc.KERNELS)
def test_each_kernel_variant_has_its_self_test_once(kernel):
    device = EmulatedDevice(multiprocessors=16)
    backend = CudaBackend(device, kernel)
    p = problem(rnn, 3, 2, 3, 7)
    mine = set(launches_of(kernel)) or {"begin_forward", "begin_backward"}
    for calls in (2, 3):  # the first goes before the call's own
        run(backend, p)
        assert {name: device.launches.count(name) for name in mine} == dict.fromkeys(mine, calls)
    assert set(device.launches) & WHOLES <= mine


needs_gpu = pytest.mark.skipif(get_backend("cuda").unavailable() is not None, reason="needs an NVIDIA GPU")


@needs_gpu
@cells
def test_on_a_gpu(cell):
    """The one test here that a GPU runs: all options and kernels, CuPy's arrays."""
    import cupy

    halves = (np.float16, ml_dtypes.bfloat16)
    for options, size, dtype in itertools.product(OPTIONS, SIZES, (np.float32, np.float64, *halves)):
        p = problem(cell, *size, **options).astype(dtype)
        q = fake_cupy.moved(p, cupy.asarray)
        want = run(REFERENCE, p.astype(np.longdouble))
        for kernel in nvrtc.KERNELS if cell != gru.with_options(reset_after=False) else (None,):
            got = {key: a.get() for key, a in run(CudaBackend(kernel=kernel), q).items()}
            for key, a in got.items():
                if dtype in halves:
                    tolerance = 4 * float(ml_dtypes.finfo(dtype).eps)
                else:
                    tolerance = (GRADIENT if key.startswith("d") else FORWARD)[dtype]
                assert_close({key: a}, {key: want[key]}, tolerance)
