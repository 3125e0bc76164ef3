"""What is recorded of the steps of a call and repeated in the next, and what a GPU is told of it.

The emulated device records launches with their addresses and numbers, and products with the places of their
matrices, as a CUDA graph does.
"""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest

import emulated
from emulated import EmulatedDevice
from fusedrnn.backends.cuda import CudaBackend, cupy_device
from fusedrnn.backends.cuda.graphs import GraphCache
from fusedrnn.cells import gru, lstm
from problems import NORMED, PLAIN, assert_bitwise_equal, name, problem, run

needs_compiler = pytest.mark.skipif(emulated.COMPILER is None, reason="needs a C++ compiler")
EVERYTHING = {"lengths": True, "reset": True, "return_states": True, "detach_every": 2}


class Rewinding(EmulatedDevice):
    """After ``rewind`` the memory that was given out is given out again in the same order, as by a pool."""

    def __init__(self, **options):
        super().__init__(16, **options)
        self.given, self.first, self.next = [], 0, 0

    def rewind(self):
        self.next = self.first

    def empty(self, shape, dtype):
        made = super().empty(shape, dtype)
        if self.next == len(self.given):
            self.given.append(made)
        before = self.given[self.next]
        if before.shape == made.shape and before.dtype == made.dtype:
            before[...] = made
            made = before
        else:
            self.given[self.next] = made
        self.next += 1
        return made


class Plain(EmulatedDevice):
    """Nothing is recorded."""

    def repeat(self, key, work):
        work()


def assert_same(device, p, weights=None, precision="ieee", need=None):
    """A call has the bits that it has where nothing is recorded."""
    device.rewind()
    given, plain = (CudaBackend(d, "steps", precision, _tested=True) for d in (device, Plain(16)))
    got = run(given, replace(p, weights=weights or p.weights), need=need)
    assert_bitwise_equal(got, run(plain, p, need=need))


def overwrite(p, q):
    """The problem p with the numbers of q where its own were."""
    pairs = [(p.x, q.x), *zip(p.weights.values(), q.weights.values(), strict=True)]
    for ours, theirs in ((p.state0, q.state0), (p.dstateT, q.dstateT), (p.dstates, q.dstates)):
        pairs += zip(ours or (), theirs or (), strict=True)
    for to, of in (*pairs, (p.dy, q.dy), (p.lengths, q.lengths), (p.reset, q.reset)):
        if to is not None:
            to[...] = of


@needs_compiler
@pytest.mark.parametrize(
    "options", [{}, EVERYTHING, {**EVERYTHING, "reverse": True}], ids=["", "all", "reverse"]
)
@pytest.mark.parametrize("cell", [*PLAIN, NORMED[2]], ids=name)
def test_what_is_repeated_takes_the_numbers_that_are_there_now(cell, options):
    device, p = Rewinding(), problem(cell, 5, 4, 3, 7, **options)
    packed = CudaBackend(device, _tested=True).pack(cell, p.weights)
    device.first = device.next  # what is packed of weights stays as it is
    for seed in range(4):
        overwrite(p, replace(problem(cell, 5, 4, 3, 7, seed=seed, **options), weights=p.weights))
        replays = device.replays
        assert_same(device, p, packed)
        assert device.replays - replays == (0 if seed == 0 else 2)  # forward and back
    assert len(device.graphs) == 2


@needs_compiler
def test_weights_may_change_in_place():
    """Those of the recurrence are read where they lie, by a packing that was made anew."""
    device, p = Rewinding(), problem(lstm, 5, 4, 3, 7)
    for seed in range(3):
        overwrite(p, problem(lstm, 5, 4, 3, 7, seed=seed))
        assert_same(device, p)
    assert device.replays == 4


@needs_compiler
@pytest.mark.parametrize(
    "change",
    [
        lambda p: replace(p, x=p.x[:4].copy(), dy=p.dy[:4].copy()),
        lambda p: replace(p, reverse=True),
        lambda p: replace(p, detach_every=2),
        lambda p: replace(p, state0=tuple(2 * s for s in p.state0)),
        lambda p: replace(p, dy=2 * p.dy),
        lambda p: replace(p, weights=p.weights | {"weight_hh": 2 * p.weights["weight_hh"]}),
        lambda p: replace(p, reset=np.ones(p.x.shape[:2], bool)),
    ],
    ids=["T", "reverse", "detach_every", "state0", "dy", "weight_hh", "reset"],
)
def test_another_call_is_not_taken_for_the_same(change):
    device, p = Rewinding(), problem(lstm, 5, 4, 3, 7)
    other = change(p)
    for q in (p, p, other, p, other):
        assert_same(device, q)


@needs_compiler
def test_another_precision_or_a_need_without_the_initial_state_is_another_call():
    device, p = Rewinding(), problem(lstm, 5, 4, 3, 7, dtype=np.float32)
    for precision in ("ieee", "ieee", "bf16", "ieee", "bf16", "bf16"):
        assert_same(device, p, precision=precision)
    device, p = Rewinding(), problem(gru, 5, 4, 3, 7)
    for need in (("weight_hh",), ("weight_hh",), ("weight_hh", "state0"), ("weight_hh",), None):
        assert_same(device, p, need=need)


# --- what is kept -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "max_size", "done", "kept"),
    [
        ("abcd", 3, "abcd", 0),  # what comes once is not recorded
        ("aaaa", 3, "a+rrr", 1),  # what comes again is, once
        ("aabbabcbba", 2, "a+rb+rrrcrra", 1),  # the oldest goes first: c takes a's place
    ],
)
def test_keys_and_what_is_done(keys, max_size, done, kept):
    """Work by its key, + where it is recorded, r where what was recorded runs."""
    log = []

    def record(work):
        log.append("+")
        return lambda: log.append("r")

    graphs = GraphCache(record, max_size)
    for key in keys:
        graphs.run(key, lambda key=key: log.append(key))
    assert "".join(log) == done
    assert len(graphs) == kept


def test_what_is_forgotten_is_let_go_of():
    class Graph:
        def __call__(self):
            pass

    alive = weakref.WeakSet()

    def record(work):
        graph = Graph()
        alive.add(graph)
        return graph

    kept = GraphCache(record, max_size=2)
    for k in range(10):
        for _ in range(2):
            kept.run(k, lambda: None)
    gc.collect()
    assert len(alive) == 2


def test_where_recording_fails_all_runs_as_before_and_says_so_once():
    def record(work):
        raise RuntimeError("no graphs here")

    kept, done = GraphCache(record), []
    kept.run("a", lambda: done.append("a"))
    with pytest.warns(RuntimeWarning, match="^fusedrnn: CUDA graphs are off, .*: no graphs here"):
        kept.run("a", lambda: done.append("a"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for key in "aabb":
            kept.run(key, lambda key=key: done.append(key))
    assert done == list("aaaabb")


# --- what a GPU is told ------------------------------------------------------------------------------------


@pytest.fixture
def gpu():
    """A device, and all that is asked of CuPy, of the stream where it records, and of the work."""
    asked = mock.MagicMock()
    asked.recording.__enter__.return_value = asked.recording
    asked.cuda.get_current_stream().is_capturing.return_value = False
    device = object.__new__(cupy_device.CupyDevice)
    device._cupy, device._recording = asked, asked.recording
    device._graphs, device._of_thread = GraphCache(device._record), threading.local()
    device.empty, device.pointer, device.cluster = np.empty, lambda a: 4711, 0
    return device, asked


CAPTURED = ["cuda.device.get_cublas_handle", "recording.__enter__", "recording.begin_capture", "work",
            "recording.end_capture", "recording.__exit__"]  # fmt: skip
LAUNCHED = "recording.end_capture().launch"


def log_of(asked):
    """Names of what was called, in order."""
    return [name for name, *_ in asked.mock_calls if "get_current_stream" not in name and "bool" not in name]


def test_a_graph_is_captured_and_launched(gpu):
    device, asked = gpu
    for _ in range(3):
        device.repeat("a", asked.work)
    assert log_of(asked) == ["work", *CAPTURED, LAUNCHED, LAUNCHED]
    mode = asked.cuda.runtime.streamCaptureModeThreadLocal
    asked.recording.begin_capture.assert_called_once_with(mode)


@pytest.mark.parametrize("capturing", [[True], RuntimeError("cudaErrorStreamCaptureImplicit")], ids=type)
def test_within_a_graph_of_somebody_else_nothing_is_captured(gpu, capturing):
    device, asked = gpu
    is_capturing = asked.cuda.get_current_stream().is_capturing
    is_capturing.side_effect = capturing * 3 if isinstance(capturing, list) else capturing
    for _ in range(3):
        device.repeat("a", asked.work)
    assert log_of(asked) == ["work"] * 3


def test_a_capture_that_fails_is_ended(gpu):
    device, asked = gpu
    asked.work.side_effect = [None, RuntimeError("not while capturing"), None]
    device.repeat("a", asked.work)
    with pytest.warns(RuntimeWarning, match="not while capturing"):
        device.repeat("a", asked.work)
    assert log_of(asked) == ["work", *CAPTURED, "work"]


def test_the_workspace_is_part_of_the_key(gpu):
    device, asked = gpu
    for at in (1, 2, 2, 1):
        device.pointer = lambda a, at=at: at
        device.repeat("a", asked.work)
    assert log_of(asked).count(LAUNCHED) == 2
    assert asked.recording.begin_capture.call_count == 2


def test_cupy_has_what_is_used_of_it():
    cupy = pytest.importorskip("cupy")

    for method in ("begin_capture", "end_capture", "is_capturing", "__enter__"):
        assert hasattr(cupy.cuda.Stream, method)
        assert hasattr(cupy.cuda.ExternalStream, method)
    assert hasattr(cupy.cuda.graph.Graph, "launch")
    assert isinstance(cupy.cuda.runtime.streamCaptureModeThreadLocal, int)
    assert isinstance(cupy.cuda.driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, int)
    for function, count in (("launchKernel", 11), ("launchCooperativeKernel", 10), ("funcSetAttribute", 3)):
        signature = getattr(cupy.cuda.driver, function).__doc__.partition("\n")[0]
        assert signature.count(",") == count - 1
    for method in ("load", "get_function"):
        assert hasattr(cupy.cuda.Module, method)
    assert hasattr(cupy.cuda.Function, "ptr")
    for attribute in ("attributes", "compute_capability"):
        assert hasattr(cupy.cuda.Device, attribute)
    assert issubclass(cupy.cuda.driver.CUDADriverError, RuntimeError)
