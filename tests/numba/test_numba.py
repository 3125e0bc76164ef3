"""The Numba backend against the reference in long double, and what else it promises beside what every backend
does (core/test_every_backend.py).

Tolerances as for the C++ kernels (accuracy.py): standard problems, relative to each tensor's largest
entry. The first run compiles every cell in both dtypes, which takes most of the time; later runs find them in
Numba's cache.
"""

from __future__ import annotations

import os
import textwrap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fusedrnn.backends import get
from fusedrnn.backends import numba as module
from fusedrnn.cells import activations, gru, lstm
from interpreter import python
from problems import (
    NORMED,
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
from test_every_backend import cells, cells_and_dtypes

NUMBA, REFERENCE = get("numba"), get("reference")
needs_numba = pytest.mark.skipif(NUMBA.unavailable() is not None, reason=str(NUMBA.unavailable()))
DTYPES = (np.float32, np.float64)
EVERYTHING = {"lengths": True, "reset": True, "return_states": True}


def truth(p):
    return run(REFERENCE, p.astype(np.longdouble))


# --- standard problems -------------------------------------------------------------------------------------


@needs_numba
@pytest.mark.parametrize(
    "options", [o for o in OPTIONS if "detach_every" not in o], ids=lambda o: "-".join(map(str, o)) or "plain"
)
@cells_and_dtypes
def test_options(cell, dtype, options):
    for size in SIZES:
        assert_standard(NUMBA, problem(cell, *size, dtype=dtype, **options))


@needs_numba
@cells_and_dtypes
def test_hidden_and_input_sizes(cell, dtype):
    for H in range(7, 35):
        options = EVERYTHING | {"reverse": H % 2 == 0}
        assert_standard(NUMBA, problem(cell, 4, 5, H % 19 + 1, H, dtype=dtype, **options))


@needs_numba
@cells_and_dtypes
def test_panels_and_long_sequences(cell, dtype):
    """Gates wider than a panel of the product, more rows than one of its blocks, 256 steps."""
    for size in ((3, 67, 37, 131), (256, 3, 2, 7)):
        assert_standard(NUMBA, problem(cell, *size, dtype=dtype, **EVERYTHING))


@needs_numba
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@cells
def test_chunks_of_the_backward_pass(monkeypatch, cell, reverse):
    p = problem(cell, 9, 5, 3, 11, **EVERYTHING, reverse=reverse)
    want = truth(p)
    for rows in (1, 7, 16):  # of da in a chunk; at least those of one step
        monkeypatch.setattr(module, "CHUNK", rows * cell.blocks["weight_ih"] * 11 * 8)
        assert_standard(NUMBA, p, want)


@needs_numba
@pytest.mark.parametrize("options", [{}, EVERYTHING, {**EVERYTHING, "reverse": True}], ids=len)
@cells
def test_rows_shared_among_threads(monkeypatch, cell, options):
    p = problem(cell, 5, 13, 3, 9, **options)
    alone = assert_standard(NUMBA, p)
    monkeypatch.setattr(module, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(module, "get_num_threads", lambda: 3)
    calls = []
    share = module._share
    monkeypatch.setattr(module, "_share", lambda f, groups: (calls.append(len(groups)), share(f, groups)))
    together = assert_standard(NUMBA, p)
    assert calls == [3, 3]
    for key in alone:
        if not key.startswith(("dw", "db")):  # the sums over rows are others
            assert_close({key: together[key]}, {key: alone[key]}, 1e-14)
    assert_bitwise_equal(together, run(NUMBA, p))


@needs_numba
@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", NORMED, ids=name)
def test_layer_norm(cell, dtype):
    """Sizes of which the norms are well conditioned: core/test_layer_norm.py. Not slow are the norms of
    test_numba_cells.py.
    """
    for size in ((2, 3, 5, 7), (7, 7, 3, 17), (3, 13, 17, 31), (11, 2, 4, 33), (5, 5, 37, 35)):
        for options in ({}, EVERYTHING, {**EVERYTHING, "reverse": True, "biases": "none"}):
            assert_standard(NUMBA, problem(cell, *size, dtype=dtype, **options))


# --- arguments ---------------------------------------------------------------------------------------------


@needs_numba
def test_boundary_states_are_a_named_error():
    p = problem(lstm, 3, 2, 3, 7)
    with pytest.raises(ValueError, match=r'save: "boundary_states" .* is not supported by the numba backend'):
        NUMBA.forward(p.cell, p.x, p.weights, save="boundary_states")


@needs_numba
def test_truncated_gradients_are_a_named_error():
    p = problem(lstm, 3, 2, 3, 7)
    with pytest.raises(ValueError, match="detach_every: is not supported by the numba backend"):
        NUMBA.forward(p.cell, p.x, p.weights, detach_every=2)


@needs_numba
def test_results_share_no_memory_but_the_last_state_in_y():
    p = problem(lstm, 5, 3, 4, 9, return_states=True)
    forward = NUMBA.forward(p.cell, p.x, p.weights, p.state0, **p.options)
    results = [forward.y, *forward.stateT, *forward.states, *p.state0, p.x]
    for i, a in enumerate(results):
        assert not any(np.shares_memory(a, b) for b in results[i + 1 :])


@needs_numba
def test_single_steps_with_packed_weights_are_the_sequence():
    for cell in (PLAIN[0], *PLAIN[2:]):  # not relu, which is compiled for slow tests alone
        p = problem(cell, 6, 3, 4, 9)
        packed, state = NUMBA.pack(cell, p.weights), p.state0
        whole = NUMBA.forward(cell, p.x, packed, state)
        for t in range(6):
            one = NUMBA.forward(cell, p.x[t : t + 1], packed, state, save=None)
            assert_close({"y": one.y[0]}, {"y": whole.y[t]}, 1e-14)
            state = one.stateT


# --- promises ----------------------------------------------------------------------------------------------


@needs_numba
@cells_and_dtypes
def test_the_same_bits_run_to_run(cell, dtype):
    p = problem(cell, 9, 7, 5, 19, dtype=dtype, **EVERYTHING)
    first = run(NUMBA, p)
    for _ in range(10):
        assert_bitwise_equal(run(NUMBA, p), first)
    tape = NUMBA.forward(p.cell, p.x, p.weights, p.state0, **p.options).tape
    for _ in range(2):
        again = named(p.cell, None, NUMBA.backward(tape, p.dy, p.dstateT, p.dstates))
        assert_bitwise_equal(again, {key: first[key] for key in again})


@needs_numba
def test_calls_from_many_threads(monkeypatch):
    monkeypatch.setattr(module, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(module, "get_num_threads", lambda: 2)
    ps = [problem(cell, 7, 9, 5, 19, seed, **EVERYTHING) for cell in (lstm, gru) for seed in range(4)]
    want = [run(NUMBA, p) for p in ps]
    with ThreadPoolExecutor(8) as pool:
        for got, w in zip(pool.map(lambda p: run(NUMBA, p), ps * 5), want * 5, strict=True):
            assert_bitwise_equal(got, w)


@needs_numba
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_threads_of_its_own():
    code = """
        import os, warnings
        from problems import assert_bitwise_equal, problem, run
        from fusedrnn.backends import numba as module
        from fusedrnn.cells import lstm
        module.WORTH_A_THREAD, module.get_num_threads = 1, lambda: 2
        p = problem(lstm, 7, 9, 5, 19)
        want = run(module.NumbaBackend(), p)
        warnings.simplefilter("ignore")  # of forking beside threads
        child = os.fork()
        assert_bitwise_equal(run(module.NumbaBackend(), p), want)
        if child:
            assert os.waitpid(child, 0)[1] == 0
    """
    python(textwrap.dedent(code), limit=100)


# Together they have tanh, sigmoid, relu, two states and a norm; each takes seconds to compile.
NARROW = [
    pytest.param(cell, marks=[] if cell in (PLAIN[1], lstm, NORMED[0]) else pytest.mark.slow)
    for cell in (*PLAIN, NORMED[0], lstm.with_options(layer_norm=True))
]


# --- activations and types ---------------------------------------------------------------------------------


@needs_numba
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
def test_activations_are_within_2_ulp(dtype):
    from numba import njit

    def loop(f):
        @njit(error_model="numpy", fastmath={"contract"})
        def apply(x, y):
            for i in range(x.shape[0]):
                y[i] = f(x[i])

        return lambda x: (y := np.empty_like(x), apply(x, y))[0]

    tanh, sigmoid = loop(activations.tanh), loop(activations.sigmoid)
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal(20_000) * scale for scale in (1e-5, 0.1, 1, 5, 30)]).astype(dtype)
    for f, exact in ((tanh, np.tanh), (sigmoid, lambda x: 1 / (1 + np.exp(-x)))):
        want = exact(x.astype(np.longdouble))
        usual = np.abs(want) >= np.finfo(dtype).tiny
        off = np.abs(f(x) - want) / np.spacing(np.abs(want).astype(dtype))
        assert off[usual].max() <= 2
        assert (np.abs(f(x))[~usual] <= np.finfo(dtype).tiny).all()
    assert_bitwise_equal({"odd": tanh(-x)}, {"odd": -tanh(x)})
    edges = np.array([0, -0.0, np.inf, -np.inf, np.nan], dtype)
    assert_bitwise_equal({"": tanh(edges)}, {"": np.array([0, -0.0, 1, -1, np.nan], dtype)})
    assert_bitwise_equal({"": sigmoid(edges)}, {"": np.array([0.5, 0.5, 1, 0, np.nan], dtype)})


@needs_numba
@pytest.mark.parametrize("cell", NARROW, ids=name)
def test_float32_stays_float32(cell):
    """No value in the compiled steps is a double: neither in the cells' formulas nor around them."""
    from numba import types

    from fusedrnn.backends import numba_kernels

    vector, matrix, matrices = (types.Array(types.float32, n, "C") for n in (1, 2, 3))
    states = (types.UniTuple(matrix, len(cell.states)), types.int64, matrix, vector)
    step = (matrix, matrices, *states, matrix, matrices, matrix)
    back = (
        matrix,
        matrices,
        types.int64,
        matrices,
        matrices,
        matrix,
        *states,
        matrix,
        matrix,
        matrices,
        matrix,
    )
    functions = numba_kernels.steps(cell, np.dtype("f4"))
    for function, signature in ((functions["step"], step), (functions["back"], back)):
        function.compile(signature)
        assert function.overloads[signature].signature.return_type == types.none
        code = function.inspect_llvm(signature)
        assert "float" in code
        assert "double" not in code


@needs_numba
def test_a_double_would_be_seen():
    from numba import njit, types

    @njit
    def widens(a):
        for i in range(a.shape[0]):
            a[i] = 0.5 * a[i]

    signature = (types.Array(types.float32, 1, "C"),)
    widens.compile(signature)
    assert "double" in widens.inspect_llvm(signature)


# --- compiling, and being absent ---------------------------------------------------------------------------


@needs_numba
def test_compiled_code_is_kept_between_processes(tmp_path):
    """And symbols of compiled code differ: one process compiles a cell, the other loads it, beside another
    one that it compiles itself.
    """
    code = """
import sys
import numpy as np
from fusedrnn.backends import get, numba_kernels
from fusedrnn.cells import rnn
for cell in {"alone": [rnn], "both": [rnn.with_options(relu=True), rnn]}[sys.argv[1]]:
    rows = 7 * cell.blocks["weight_ih"]
    w = {f"weight_{n}": np.linspace(-1, 1, rows * m, dtype=np.float32).reshape(-1, m)
         for n, m in (("ih", 2), ("hh", 7))}
    print(get("numba").forward(cell, np.ones((3, 2, 2), np.float32), w, save=None).y.tobytes().hex())
    print(sum(numba_kernels.loop("forward", cell, np.dtype("f4")).stats.cache_hits.values()))
"""
    alone, both = (python(code, which, NUMBA_CACHE_DIR=str(tmp_path)).split() for which in ("alone", "both"))
    assert [alone[1], *both[1::2]] == ["0", "0", "1"]
    assert both[2] == alone[0]


@needs_numba
def test_the_cache_knows_the_cells_sources(monkeypatch):
    from fusedrnn.backends import numba_kernels

    names = []
    monkeypatch.setattr(numba_kernels, "njit", lambda *a, **k: lambda f: names.append(f.__qualname__))
    for source in ("one", "one", "two"):
        monkeypatch.setattr(numba_kernels.inspect, "getsource", lambda m, source=source: source)
        numba_kernels._for_cell("forward", lstm, np.dtype("f4"))
    one, again, two = (n for n in names if n.startswith("forward"))
    assert one == again != two


@needs_numba
def test_without_a_place_for_the_cache(monkeypatch):
    from fusedrnn.backends import numba_kernels

    def njit(*args, **options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available for file")
        return lambda function: "compiled"

    monkeypatch.setattr(numba_kernels, "njit", njit)
    assert numba_kernels._for_cell("backward", gru, np.dtype("f8")) == "compiled"


def test_the_backend_does_not_import_numba_before_it_must():
    code = "import sys, fusedrnn.backends as b; b.get('numba'); print('numba' in sys.modules)"
    assert python(code) == "False\n"


def test_without_numba():
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "from fusedrnn.backends import get; print(get('numba').unavailable())"
    )
    assert python(code) == "numba is not installed: pip install 'fusedrnn[numba]'\n"
