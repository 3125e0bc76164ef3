"""What is recorded of the steps of a call and repeated in the next, and what a GPU is told of it.

The emulated device records launches with their addresses and numbers, and products with the places of their
matrices, as a CUDA graph does.
"""

from __future__ import annotations

import gc
import threading
import types
import warnings
import weakref
from dataclasses import replace

import numpy as np
import pytest

import emulated
from emulated import EmulatedDevice
from fusedrnn.backends.cuda import CudaBackend, cupy_device
from fusedrnn.backends.cuda.graphs import GraphCache
from fusedrnn.cells import GRU, LSTM
from problems import CELLS, NORMED, assert_bitwise_equal, name, named, problem, run

needs_compiler = pytest.mark.skipif(emulated.COMPILER is None, reason="needs a C++ compiler")
EVERYTHING = {"lengths": True, "reset": True, "return_states": True, "detach_every": 2}


class Rewinding(EmulatedDevice):
    """After ``rewind`` the memory that was given out is given out again in the same order, as by a pool."""

    def __init__(self, **options):
        super().__init__(16, **options)
        self.given, self.next = [], 0

    def rewind(self):
        self.next = 0

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


def call(backend, p, packed):
    forward = backend.forward(p.cell, p.x, packed, p.state0, **p.options)
    gradients = backend.backward(forward.tape, p.dy, p.dstateT, p.dstates)
    return {key: a.copy() for key, a in named(p.cell, forward, gradients).items()}


def overwrite(p, q):
    """The problem p with the numbers of q where its own were."""
    pairs = [(p.x, q.x), *zip(p.weights, q.weights, strict=True)]
    for ours, theirs in ((p.state0, q.state0), (p.dstateT, q.dstateT), (p.dstates, q.dstates)):
        pairs += zip(ours or (), theirs or (), strict=True)
    for to, of in (*pairs, (p.dy, q.dy), (p.lengths, q.lengths), (p.reset, q.reset)):
        if to is not None:
            to[...] = of


@needs_compiler
@pytest.mark.parametrize(
    "options", [{}, EVERYTHING, {**EVERYTHING, "reverse": True}], ids=["", "all", "reverse"]
)
@pytest.mark.parametrize("cell", [*CELLS, NORMED[2]], ids=name)
def test_what_is_repeated_takes_the_numbers_that_are_there_now(cell, options):
    device = Rewinding()
    backend, plain = CudaBackend(device, "steps", _tested=True), CudaBackend(Plain(16), "steps", _tested=True)
    p = problem(cell, 5, 4, 3, 7, **options)
    packed = backend.pack(cell, p.weights)
    first = device.next
    for seed in range(4):
        q = problem(cell, 5, 4, 3, 7, seed=seed, **options)
        overwrite(p, replace(q, weights=p.weights))  # what is packed of weights stays as it is
        device.next = first
        replays = device.replays
        assert_bitwise_equal(call(backend, p, packed), run(plain, replace(q, weights=p.weights)))
        assert device.replays - replays == (0 if seed == 0 else 2)  # forward and back
    assert len(device.graphs) == 2


@needs_compiler
def test_weights_may_change_in_place():
    """Those of the recurrence are read where they lie, by a packing that was made anew."""
    device = Rewinding()
    backend, plain = CudaBackend(device, "steps", _tested=True), CudaBackend(Plain(16), "steps", _tested=True)
    p = problem(LSTM(), 5, 4, 3, 7)
    for seed in range(3):
        overwrite(p, problem(LSTM(), 5, 4, 3, 7, seed=seed))
        device.rewind()
        assert_bitwise_equal(call(backend, p, p.weights), run(plain, p))
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
        lambda p: replace(p, weights=p.weights._replace(weight_hh=2 * p.weights.weight_hh)),
        lambda p: replace(p, reset=np.ones(p.x.shape[:2], bool)),
    ],
    ids=["T", "reverse", "detach_every", "state0", "dy", "weight_hh", "reset"],
)
def test_another_call_is_not_taken_for_the_same(change):
    device = Rewinding()
    backend, plain = CudaBackend(device, "steps", _tested=True), CudaBackend(Plain(16), "steps", _tested=True)
    p = problem(LSTM(), 5, 4, 3, 7)
    other = change(p)
    for q in (p, p, other, p, other):
        device.rewind()
        assert_bitwise_equal(call(backend, q, q.weights), run(plain, q))


@needs_compiler
def test_another_precision_is_another_call():
    device = Rewinding()
    p = problem(LSTM(), 5, 4, 3, 7, dtype=np.float32)
    for precision in ("ieee", "ieee", "bf16", "ieee", "bf16", "bf16"):
        device.rewind()
        backend, plain = (CudaBackend(d, "steps", precision, _tested=True) for d in (device, Plain(16)))
        assert_bitwise_equal(call(backend, p, p.weights), run(plain, p))


@needs_compiler
def test_a_need_without_the_initial_state_is_another_call():
    device = Rewinding()
    backend = CudaBackend(device, "steps", _tested=True)
    p = problem(GRU(), 5, 4, 3, 7)
    want = run(CudaBackend(Plain(16), "steps", _tested=True), p)
    for need in (("weight_hh",), ("weight_hh",), ("weight_hh", "state0"), ("weight_hh",), None):
        device.rewind()
        got = run(backend, p, need=need)
        assert_bitwise_equal(got, {key: want[key] for key in got})


# --- what is kept -------------------------------------------------------------------------------------------


def graphs(max_size=3):
    """A GraphCache that writes down what it does."""
    done = []

    def record(work):
        done.append("record")
        return lambda: done.append("repeat")

    return GraphCache(record, max_size), done


def test_what_comes_once_is_not_recorded():
    kept, done = graphs()
    for key in "abcd":
        kept.run(key, lambda key=key: done.append(key))
    assert done == list("abcd")
    assert len(kept) == 0


def test_what_comes_again_is_recorded_once():
    kept, done = graphs()
    for _ in range(4):
        kept.run("a", lambda: done.append("work"))
    assert done == ["work", "record", "repeat", "repeat", "repeat"]


def test_the_oldest_goes_first():
    kept, done = graphs(max_size=2)
    for key in "aabbabcb":  # c takes a's place
        kept.run(key, lambda: None)
    assert done.count("record") == 2
    done.clear()
    kept.run("b", lambda: None)
    kept.run("a", lambda: done.append("work"))
    assert done == ["repeat", "work"]


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


class Stream:
    """CuPy's stream, as far as recording goes."""

    def __init__(self, log, capturing=False):
        self.log, self.capturing = log, capturing

    def is_capturing(self):
        if isinstance(self.capturing, Exception):
            raise self.capturing
        return self.capturing

    def __enter__(self):
        self.log.append("on the stream")
        return self

    def __exit__(self, *_):
        self.log.append("off the stream")

    def begin_capture(self, mode):
        self.log.append(f"begin, {mode}")

    def end_capture(self):
        self.log.append("end")
        return types.SimpleNamespace(launch=lambda: self.log.append("launch"))


@pytest.fixture
def gpu():
    log = []
    device = object.__new__(cupy_device.CupyDevice)
    cuda = types.SimpleNamespace(
        get_current_stream=lambda: current,
        device=types.SimpleNamespace(get_cublas_handle=lambda: log.append("handle")),
        runtime=types.SimpleNamespace(streamCaptureModeThreadLocal="thread local"),
    )
    current = Stream(log)
    device._cupy = types.SimpleNamespace(cuda=cuda)
    device._recording = Stream(log)
    device._graphs = GraphCache(device._record)
    device._of_thread = threading.local()
    device.empty, device.pointer = np.empty, lambda a: 4711
    device.cluster = 0
    return device, current, log


def test_a_graph_is_captured_and_launched(gpu):
    device, _, log = gpu
    for _ in range(3):
        device.repeat("a", lambda: log.append("work"))
    captured = ["handle", "on the stream", "begin, thread local", "work", "end", "off the stream"]
    assert log == ["work", *captured, "launch", "launch"]


@pytest.mark.parametrize(
    "capturing", [True, RuntimeError("cudaErrorStreamCaptureImplicit")], ids=["", "error"]
)
def test_within_a_graph_of_somebody_else_nothing_is_captured(gpu, capturing):
    device, current, log = gpu
    current.capturing = capturing
    for _ in range(3):
        device.repeat("a", lambda: log.append("work"))
    assert log == ["work"] * 3


def test_a_capture_that_fails_is_ended(gpu):
    device, _, log = gpu

    def work():
        log.append("work")
        if len(log) == 5:
            raise RuntimeError("not while capturing")

    device.repeat("a", work)
    with pytest.warns(RuntimeWarning, match="not while capturing"):
        device.repeat("a", work)
    assert log == [
        "work", "handle", "on the stream", "begin, thread local", "work", "end", "off the stream", "work"
    ]  # fmt: skip


def test_the_workspace_is_part_of_the_key(gpu):
    device, _, log = gpu
    for at in (1, 2, 2, 1):
        device.pointer = lambda a, at=at: at
        device.repeat("a", lambda: log.append("work"))
    assert log.count("launch") == 2
    assert log.count("begin, thread local") == 2


@pytest.mark.skipif(not cupy_device._installed("cupy"), reason="CuPy is not installed")
def test_cupy_has_what_is_used_of_it():
    import cupy

    for method in ("begin_capture", "end_capture", "is_capturing", "__enter__"):
        assert hasattr(cupy.cuda.Stream, method)
        assert hasattr(cupy.cuda.ExternalStream, method)
    assert hasattr(cupy.cuda.graph.Graph, "launch")
    assert isinstance(cupy.cuda.runtime.streamCaptureModeThreadLocal, int)
