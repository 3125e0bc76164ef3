"""Any argument may be anything: a result that is right, or an error that names the argument. Never a crash.

One argument at a time of an otherwise good call is spoiled. What comes out is either a TypeError, ValueError,
OverflowError or MemoryError, or what clean copies of the arguments give, to the bit; the inputs stay as
they were. The entries of the compiled module are called directly too: they have checks of their own.
"""

from __future__ import annotations

import itertools
import re
import warnings

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from problems import CELLS, NORMED, assert_bitwise_equal, assert_standard, name, named, problem
from published import mgu

pytest.importorskip("fusedrnn._core", reason="the compiled module is not built")
from fusedrnn import _core, kernels, threads
from fusedrnn.backends import get
from fusedrnn.backends.cpu import CpuBackend, core_of, names
from fusedrnn.cells import Cell, gru, lstm, program, rnn

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("poison")]

CPU = CpuBackend()
T, B, I, H = 4, 3, 2, 5
ERRORS = (TypeError, ValueError, OverflowError, MemoryError)
NAMES = (
    r"(x|weights?(_ih|_hh|_hr)?|(bias|gain)_(ih|hh|c)|state0|h0|c0|lengths|reset|dy|dstateT|dstates|d[hc]T|"
    r"d[hc]_states|"
)
NAMED = re.compile(
    NAMES + r"cell|packed|tape|save|need|reverse|return_states|backend|batch_sizes|threads|y)\b"
)
BEYOND_MEMORY = 2**50


# --- ways to spoil an array --------------------------------------------------------------------------------


def at_odd_address(a):
    buffer = np.zeros(a.nbytes + 1, np.uint8)
    view = buffer[1:].view(a.dtype).reshape(a.shape) if a.size else a
    view[...] = a
    return view


def with_odd_strides(a):
    records = np.zeros(a.shape, [("value", a.dtype), ("odd", np.uint8)])
    records["value"] = a
    return records["value"]


def read_only(a):
    a = a.copy()
    a.setflags(write=False)
    return a


def steps(a):
    return np.repeat(a, 2, axis=-1)[..., ::2] if a.ndim else a


def huge(a, axis):
    axis %= max(a.ndim, 1)
    shape = tuple(BEYOND_MEMORY if k == axis else n for k, n in enumerate(a.shape))
    return np.lib.stride_tricks.as_strided(a, shape, (0,) * a.ndim)


def longer(a, axis, by):
    axis %= max(a.ndim, 1)
    return np.zeros([max(n + by, 0) if k == axis else n for k, n in enumerate(a.shape)], a.dtype)


def filled(a, value):
    b = a.copy()
    b[...] = value if a.dtype.kind == "f" else value == value  # NaN as False
    return b


class Subclass(np.ndarray):
    def __array_finalize__(self, obj):
        pass


DTYPES = ["f2", "f4", "f8", "g", "F", "D", "i1", "i4", "i8", "u8", "?", "O", "S4", "U2", "M8[s]", "V8"]
AXES = st.integers(0, 2)
CORRUPTIONS = st.one_of(
    st.sampled_from(
        [
            *(
                at_odd_address,
                with_odd_strides,
                read_only,
                steps,
                np.asfortranarray,
                np.ndarray.copy,
                np.ravel,
            ),
            *(lambda a: a[None], lambda a: a[..., None], lambda a: a[:1], lambda a: a[:0], lambda a: a.T),
            *(lambda a: a[::-1], lambda a: np.flip(a), lambda a: a.sum(), lambda a: np.array(1, a.dtype)),
            *(lambda a: a.astype(a.dtype.newbyteorder()), lambda a: a.tolist(), np.ma.MaskedArray),
            *(lambda a: a.view(Subclass), lambda a: np.broadcast_to(a[:1], a.shape) if len(a) else a),
            *(memoryview, lambda a: a.tobytes(), lambda a: np.ones(a.shape[::-1], a.dtype)),
        ]
    ),
    st.sampled_from(DTYPES).map(lambda dtype: lambda a: np.zeros(a.shape, dtype)),
    st.tuples(AXES, st.sampled_from([-99, -1, 1, 2, 16])).map(lambda v: lambda a: longer(a, *v)),
    AXES.map(lambda axis: lambda a: huge(a, axis)),
    st.sampled_from([np.nan, np.inf, -np.inf, 1e38, -1e-42]).map(lambda v: lambda a: filled(a, v)),
    st.sampled_from(
        [None, 0, 1.5, "x", (), [], {}, b"", object(), float("nan"), np.float32, print, 10**30]
    ).map(lambda thing: lambda a: thing),
)
CELL = st.sampled_from((*CELLS, *NORMED[:4]))  # what the kernels have
FLOAT = st.sampled_from([np.float32, np.float64])


# --- entries: a flat dict of arguments in, a dict of arrays out --------------------------------------------


def arguments(cell, dtype):
    """A good call: of forward, and of backward."""
    p = problem(cell, T, B, I, H, dtype=dtype, lengths=True, reset=True, return_states=True, biases="both")
    forward = {"x": p.x, **p.weights, "lengths": p.lengths, "reset": p.reset}
    forward |= {f"{s}0": a for s, a in zip(cell.states, p.state0, strict=True)}
    backward = {"dy": p.dy} | {f"d{s}T": a for s, a in zip(cell.states, p.dstateT, strict=True)}
    return forward, backward | {f"d{s}_states": a for s, a in zip(cell.states, p.dstates, strict=True)}


def weights_of(a):
    return {key: w for key, w in a.items() if key.startswith(("weight", "bias", "gain"))}


def run_forward(backend, cell, a):
    state0 = tuple(a[f"{s}0"] for s in cell.states)
    return backend.forward(
        cell, a["x"], weights_of(a), state0, lengths=a["lengths"], reset=a["reset"], return_states=True
    )


def entries_of(cell, good):
    """The three entries behind a backend-like API, by name."""

    def forward(backend):
        return lambda a: named(cell, run_forward(backend, cell, a), None)

    def backward(backend):
        tape = run_forward(backend, cell, good).tape

        def call(a):
            dstateT = tuple(a[f"d{s}T"] for s in cell.states)
            dstates = tuple(a[f"d{s}_states"] for s in cell.states)
            return named(cell, None, backend.backward(tape, a["dy"], dstateT, dstates))

        return call

    def pack(backend):
        def call(a):
            packed = backend.pack(cell, weights_of(a))
            return named(cell, backend.forward(cell, good["x"], packed), None)

        return call

    return {"forward": forward, "backward": backward, "pack": pack}


def core_pack(cell, a):
    return _core.pack(core_of(cell), tuple(map(a.get, names(cell))))


def core_forward(cell, a, packed=None):
    state0 = tuple(a[f"{s}0"] for s in cell.states)
    options = a["lengths"], a["reset"], False, 0, None
    return _core.forward(packed or core_pack(cell, a), None, a["x"], state0, (), *options, True, 1)


def core_backward(cell, tape, a):
    return _core.backward(tape, *upstream_of(cell, a), [True] * (len(names(cell)) + 2))


def upstream_of(cell, a):
    return a["dy"], tuple(a[f"d{s}T"] for s in cell.states), tuple(a[f"d{s}_states"] for s in cell.states)


def numbered(results):
    flat = [a for each in results for a in (each if isinstance(each, tuple | list) else [each])]
    return {str(k): a for k, a in enumerate(flat) if isinstance(a, np.ndarray)}


def snapshot(args):
    return {k: a.tobytes() for k, a in args.items() if isinstance(a, np.ndarray) and a.nbytes < 1e6}


def check(call, good, which, corrupt):
    """One spoiled argument: see the top of the file."""
    spoiled = dict(good)
    try:
        spoiled[which] = corrupt(good[which])
    except Exception:  # not every array can be spoiled like this
        return
    before = snapshot(spoiled)
    try:
        results = call(spoiled)
    except ERRORS as error:
        assert NAMED.match(str(error)) or isinstance(error, MemoryError), f"{type(error).__name__}: {error}"  # noqa: PT017
        results = None
    assert snapshot(spoiled) == before, "an input was written to"
    if results is None:
        return
    for key, a in spoiled.items():
        taken = a is None or isinstance(a, np.ndarray) or key in ("lengths", "reset")  # of which lists are
        assert taken, f"{key}: {a!r} was taken for an array"
    clean = {k: None if a is None else np.array(a, order="C", subok=False) for k, a in spoiled.items()}
    assert_bitwise_equal(results, call(clean))
    for a in results.values():
        assert not any(np.shares_memory(a, b) for b in spoiled.values() if isinstance(b, np.ndarray))


# --- the APIs ----------------------------------------------------------------------------------------------


class Api:
    """``kernels`` with one backend, as a backend."""

    def __init__(self, backend):
        self.backend = backend

    def forward(self, cell, x, weights, state0=None, **options):
        backend = None if isinstance(weights, kernels.Packed) else self.backend
        return kernels.forward(cell, x, weights, state0, **options, backend=backend)

    def backward(self, *args):
        return kernels.backward(*args)

    def pack(self, cell, weights):
        return kernels.pack(cell, weights, self.backend)


APIS = {
    "kernels cpu": Api("cpu"),
    "kernels reference": Api("reference"),
    "cpu": CPU,
    "reference": get("reference"),
}


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("entry", ["forward", "backward", "pack"])
@settings(max_examples=250)
@given(cell=CELL, dtype=FLOAT, data=st.data(), corrupt=CORRUPTIONS)
def test_any_argument_of_an_api(api, entry, cell, dtype, data, corrupt):
    forward, backward = arguments(cell, dtype)
    good = {"forward": forward, "backward": backward, "pack": weights_of(forward)}[entry]
    which = data.draw(st.sampled_from(sorted(good)), "argument")
    check(entries_of(cell, forward)[entry](APIS[api]), good, which, corrupt)


@settings(max_examples=600)
@given(cell=CELL, dtype=FLOAT, data=st.data(), corrupt=CORRUPTIONS)
def test_any_argument_of_the_compiled_pack(cell, dtype, data, corrupt):
    forward, _ = arguments(cell, dtype)
    good = weights_of(forward)
    which = data.draw(st.sampled_from(sorted(good)), "argument")
    check(lambda a: numbered(core_forward(cell, forward, core_pack(cell, a))), good, which, corrupt)


@pytest.mark.quick
@settings(max_examples=800)
@given(cell=CELL, dtype=FLOAT, data=st.data(), corrupt=CORRUPTIONS)
def test_any_argument_of_the_compiled_forward(cell, dtype, data, corrupt):
    good, _ = arguments(cell, dtype)
    packed = core_pack(cell, good)
    which = data.draw(st.sampled_from(sorted(good.keys() - weights_of(good).keys())), "argument")
    check(lambda a: numbered(core_forward(cell, a, packed)), good, which, corrupt)


@settings(max_examples=800)
@given(cell=CELL, dtype=FLOAT, data=st.data(), corrupt=CORRUPTIONS)
def test_any_argument_of_the_compiled_backward(cell, dtype, data, corrupt):
    forward, good = arguments(cell, dtype)
    tape = core_forward(cell, forward)[-1]
    which = data.draw(st.sampled_from(sorted(good)), "argument")
    check(lambda a: numbered(core_backward(cell, tape, a)), good, which, corrupt)


THINGS = st.sampled_from(
    [
        None,
        -1,
        5,
        2**31,
        2**40,
        10**30,
        1.5,
        "x",
        "",
        (),
        [],
        [1],
        {},
        object(),
        Cell,
        np.float64(2),
        np.zeros(2),
        print,
    ]
)


@settings(max_examples=150)
@given(thing=THINGS, which=st.sampled_from(["cell", "x", "weights", "state0", "lengths", "reset", "reverse",
                                           "return_states", "save", "backend", "batch_sizes"]))  # fmt: skip
@example(thing=[lstm], which="cell")
@example(thing=np.int64(1), which="reverse")
def test_anything_for_any_argument_of_kernels_forward(thing, which):
    p = problem(lstm, T, B, I, H)
    good = {"cell": p.cell, "x": p.x, "weights": p.weights, "state0": p.state0}
    try:
        kernels.forward(**{**good, which: thing})
    except ERRORS as error:
        assert NAMED.match(str(error)), error  # noqa: PT017
    else:
        assert thing is None, f"{which} = {thing!r} was accepted"


@settings(max_examples=100)
@given(thing=THINGS, which=st.sampled_from(["tape", "dy", "dstateT", "dstates", "need"]))
def test_anything_for_any_argument_of_kernels_backward(thing, which):
    p = problem(lstm, T, B, I, H)
    tape = kernels.forward(p.cell, p.x, p.weights).tape
    try:
        kernels.backward(**{"tape": tape, which: thing})
    except ERRORS as error:
        assert NAMED.match(str(error)), error  # noqa: PT017
    else:
        assert thing is None or (which == "need" and len(thing) == 0), f"{which} = {thing!r} was accepted"


@settings(max_examples=300)
@given(data=st.data())
def test_anything_for_any_argument_of_the_compiled_module(data):
    """No crash; pybind11's own TypeErrors name every argument of the signature."""
    forward, backward = arguments(lstm, np.float32)
    packed = core_pack(lstm, forward)
    tape = core_forward(lstm, forward)[-1]
    given, plan = (forward["x"], (forward["h0"], forward["c0"]), ()), program.plan(mgu)
    calls = {
        _core.pack: [core_of(lstm), tuple(map(forward.get, names(lstm)))],
        _core.forward: [packed, core_of(lstm), *given, None, None, False, 0, None, True, 1],
        _core.backward: [tape, *upstream_of(lstm, backward), [True] * 6],
        _core.Cell: [2],
        _core.cell_layout: [core_of(lstm), False],
        _core.tape_shape: [core_of(lstm), T, B, I, H, H, False, False, False],
        _core.machine_plan: [np.array(plan.numbers(), np.int32), plan.start, plan.constants],
        _core.set_num_threads: [_core.num_threads()],
        _core.testing.activation: [1, forward["h0"][0], ""],
    }
    call = data.draw(st.sampled_from(list(calls)))
    args = list(calls[call])
    for _ in range(data.draw(st.integers(1, 2))):
        args[data.draw(st.integers(0, len(args) - 1))] = data.draw(
            st.one_of(THINGS, st.just(packed), st.just(tape))
        )
    count = _core.num_threads()
    try:
        call(*args)
    except ERRORS as error:
        assert str(error)  # noqa: PT017
    finally:
        _core.set_num_threads(count)


# --- single cases ------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_overlapping_inputs_are_read_only_and_right(cell):
    """x, dy and the states may be views of one another."""
    p = problem(cell, 6, 5, 9, 9, dtype=np.float32, P=9)
    memory = np.random.default_rng(0).standard_normal(6 * 5 * 9 + 50).astype(np.float32)
    before = memory.copy()
    x, dy = memory[:270].reshape(6, 5, 9), memory[7:277].reshape(6, 5, 9)
    state = tuple(memory[k : k + 45].reshape(5, 9) for k in range(len(cell.states)))

    def results(x, dy, state):
        forward = CPU.forward(cell, x, p.weights, state, return_states=True)
        return named(cell, forward, CPU.backward(forward.tape, dy, state, (dy,) * len(state)))

    got = results(x, dy, state)
    assert np.array_equal(memory, before)
    assert_bitwise_equal(got, results(x.copy(), dy.copy(), tuple(map(np.copy, state))))


@pytest.mark.parametrize("which", ["x", "y", "weight_ih", "weight_hh", "h0", "c0"])
def test_a_borrowed_array_that_changed_its_shape_is_found(which):
    """The tape borrows; an array that shrank, or has another shape or dtype by now, is an error that names
    it.
    """
    changes = [lambda a: a.resize((1,) * a.ndim, refcheck=False), lambda a: setattr(a, "shape", (-1,)),
               lambda a: setattr(a, "dtype", np.uint32)]  # fmt: skip
    changed = 0
    for change in changes:
        p = problem(lstm, 6, 5, 9, 9, dtype=np.float32)
        forward = CPU.forward(p.cell, p.x, p.weights, p.state0)
        h0, c0 = p.state0
        borrowed = {"x": p.x, "y": forward.y, **p.weights, "h0": h0, "c0": c0}[which]
        try:
            with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
                change(borrowed)
        except ValueError:  # numpy may forbid it
            continue
        changed += 1
        named_so = "state0" if which in ("h0", "c0") else which
        with pytest.raises((TypeError, ValueError), match=named_so):
            CPU.backward(forward.tape, p.dy, p.dstateT)
    assert changed


@pytest.mark.quick
@pytest.mark.parametrize("value", [-1, T + 1, 2**62, -(2**62)])
def test_lengths_out_of_range(value):
    forward, _ = arguments(lstm, np.float32)
    lengths = forward["lengths"].copy()
    lengths[1] = value
    with pytest.raises(ValueError, match="lengths"):
        run_forward(CPU, lstm, forward | {"lengths": lengths})
    with pytest.raises(ValueError, match="lengths"):
        core_forward(lstm, forward | {"lengths": lengths}, core_pack(lstm, forward))


@pytest.mark.parametrize("cell", [-1, len(_core.CELLS), 2**31 - 1, -(2**31)])
def test_the_compiled_module_refuses_unknown_cells(cell):
    with pytest.raises(ValueError, match="cell"):
        _core.Cell(cell)


def test_the_compiled_module_refuses_sizes_whose_products_overflow():
    for cell, recompute in itertools.product((lstm, mgu), (False, True)):
        with pytest.raises(OverflowError, match="size too large"):
            # B times the bytes of a row of a chunk would be 2**64
            _core.tape_shape(core_of(cell), 1, 2**56, 1, 1, 1, recompute, False, False)


@pytest.mark.parametrize("cell", [lstm, mgu], ids=name)
def test_the_compiled_module_refuses_to_do_without_a_cell(cell):
    p = problem(cell, T, B, I, H)
    weights = tuple(p.weights.values())
    call = p.x, (), (), None, None, False, 0, None, False
    for refused in (
        lambda: _core.pack(None, weights),
        lambda: _core.run_forward(None, weights, *call, p.dy, p.state0, (), None),
        lambda: _core.run_backward(None, weights, *call, p.dy, p.x, None, (), (), None, [], [], []),
        lambda: _core.tape_shape(None, T, B, I, H, H, False, False, False),
    ):
        with pytest.raises(TypeError, match="cell"):
            refused()


def test_what_programs_do_not_have_in_the_compiled_module():
    p = problem(mgu, T, B, I, H)
    core, weights = core_of(mgu), tuple(map(p.weights.get, names(mgu)))
    call = p.x, (), (), None, None, False, 0, None
    with pytest.raises(ValueError, match="cell: expected a compiled one, got a program"):
        _core.cell_layout(core, False)
    with pytest.raises(ValueError, match=r"cell: expected that of the packed weights"):
        _core.forward(CPU.pack(gru, problem(gru, T, B, I, H).weights).core, core, *call, False, 1)
    if _core.has_bfloat16():
        with pytest.raises(ValueError, match="bfloat16: expected False for a program, got True"):
            _core.pack(core, weights, True)


@pytest.mark.parametrize("shape", [(0, 3), (8, 0), (0, 0), (6, 3), (4, 3)])
def test_the_compiled_pack_refuses_weights_without_units_or_inputs(shape):
    w, square = np.zeros(shape, np.float32), np.zeros((shape[0], shape[0] // 4), np.float32)
    with pytest.raises(ValueError, match=r"weight_ih|weight_hh"):
        _core.pack(core_of(lstm), (w, square[:, 1:], None, None))
    if 0 in shape:
        with pytest.raises(ValueError, match="weight_ih"):
            _core.pack(core_of(lstm), (w, square, None, None))


def test_a_tape_of_another_backend_or_none_is_refused():
    p = problem(gru, T, B, I, H)
    other = get("reference").forward(p.cell, p.x, p.weights).tape
    none = CPU.forward(p.cell, p.x, p.weights, save=None).tape
    for tape in (other, none, object()):
        with pytest.raises(TypeError, match="tape"):
            CPU.backward(tape, p.dy)
        with pytest.raises(TypeError, match="tape"):
            kernels.backward(tape, p.dy)


def test_packed_weights_of_another_cell_or_dtype_are_refused():
    p = problem(rnn, T, B, I, H)
    with pytest.raises(ValueError, match="weights"):
        CPU.forward(rnn.with_options(relu=True), p.x, CPU.pack(rnn, p.weights))
    with pytest.raises(TypeError, match="x"):
        CPU.forward(rnn, p.x.astype(np.float32), CPU.pack(rnn, p.weights))
    forward, _ = arguments(lstm, np.float32)
    packed = core_pack(lstm, arguments(lstm, np.float64)[0])
    with pytest.raises(TypeError, match="x"):
        core_forward(lstm, forward, packed)


@pytest.mark.quick
@pytest.mark.parametrize("need", [("y",), ("x", "dx"), "x", 3, [None]])
def test_need_takes_known_names_alone(need):
    p = problem(rnn, T, B, I, H)
    tape = CPU.forward(p.cell, p.x, p.weights).tape
    with pytest.raises((TypeError, ValueError), match="need"):
        CPU.backward(tape, p.dy, need=need)
    assert CPU.backward(tape, p.dy, need=("x", *rnn.blocks, "state0")).dx is not None


@pytest.mark.quick
@pytest.mark.parametrize("count", [0, -1, 2**40, 1.5, "2", None, True])
def test_set_num_threads_refuses(count):
    before = threads.get_num_threads()
    with pytest.raises((TypeError, ValueError, OverflowError), match="threads"):
        threads.set_num_threads(count)
    assert threads.get_num_threads() == before


def test_the_number_of_threads_without_the_compiled_module(monkeypatch):
    monkeypatch.setattr(threads, "_compiled", lambda: None)
    monkeypatch.setattr(threads, "_without_core", None)
    for own, omp, wanted in (
        ("3", "2", 3),
        ("", "2,4", 2),
        ("", "many", threads._usable()),
        ("x", "2", None),
    ):
        monkeypatch.setenv("FUSEDRNN_NUM_THREADS", own)
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
        if wanted is None:
            with pytest.raises(
                ValueError, match="FUSEDRNN_NUM_THREADS: expected an integer of at least 1, got 'x'"
            ):
                threads.get_num_threads()
        else:
            assert threads.get_num_threads() == wanted


@pytest.mark.parametrize("api", APIS)
def test_the_checks_see_a_wrong_result(api):
    """An API that reads a spoiled argument differently from its clean copy does not pass."""
    forward, _ = arguments(gru, np.float32)
    call = entries_of(gru, forward)["forward"](APIS[api])

    def careless(a):
        results = call(a)
        return results if a["x"].flags.c_contiguous else {k: v * 2 for k, v in results.items()}

    def writing(a):
        a["x"][0, 0, 0] = 7
        return call(a)

    def vague(a):
        raise ValueError("something is wrong")

    check(call, forward, "x", np.asfortranarray)
    for wrong, message in ((careless, None), (writing, "written"), (vague, "something")):
        with pytest.raises(AssertionError, match=message):
            check(wrong, forward, "x", np.asfortranarray)


def test_after_all_this_the_kernels_still_work():
    assert_standard(CPU, problem(lstm, T, B, I, H, dtype=np.float32, return_states=True))
