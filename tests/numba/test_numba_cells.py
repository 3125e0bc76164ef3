"""The Numba backend runs any cell: published and random ones, every operation, over sequences.

Compared with steps in NumPy, row by row, in long double. The tolerance is a multiple of the error that the
same steps make in the dtype at hand.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from fusedrnn.backends import get
from fusedrnn.backends import numba as module
from fusedrnn.backends.arguments import BackwardArguments, ForwardArguments, Sizes
from fusedrnn.cells import activations
from fusedrnn.cells.definition import cell
from fusedrnn.cells.evaluation import Evaluation
from fusedrnn.cells.symbols import absolute, maximum, minimum, relu, tanh, where
from fusedrnn.cells.zoo import ALL
from interpreter import python
from problems import assert_bitwise_equal, errors
from published import PUBLISHED, everything, gru_d, slstm
from test_random_cells import made as made_from
from test_random_cells import sources
from test_selections import NUMBERS, UPSTREAM

REASON = get("numba").unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

T, B, I = 5, 3, 3
DTYPES = (np.float32, np.float64)
EPS = {np.float32: 2.0**-23, np.float64: 2.0**-52}


# --- sequences ----------------------------------------------------------------------------------------------


def draw(made, H, seed=0, *, rows=True, state0=True, biases=True):
    """The arguments of forward and backward, in float32; NaN in what must not be read."""
    rng = np.random.default_rng(seed)
    t = made.trace

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    weights = {}
    for name, blocks in t.blocks.items():
        columns = {"weight_ih": (I,), "weight_hh": (H,)}.get(name, ())
        values = normal(len(blocks) * H, *columns)
        weights[name] = values / np.float32(H**0.5) if columns else values / 4 + float(t.begin.get(name) == 1)
    if not biases:
        weights = {name: w for name, w in weights.items() if name not in ("bias_ih", "bias_hh")}
    scalars = {name: np.abs(normal(T, B)) + np.float32(0.25) for name in t.scalars}
    x, dy, dstates = normal(T, B, I), normal(T, B, H), [normal(T, B, H) for _ in t.states]
    initial = [np.abs(normal(B, H)) + start if start else normal(B, H) for start in t.start.values()]
    lengths, reset = None, None
    if rows:
        lengths, reset = np.array([T, 0, 3]), rng.random((T, B)) < 0.3
        reset[0, 0] = reset[2, 2] = True
        for a in (x, dy, *dstates, *scalars.values()):
            a[np.arange(T)[:, None] >= lengths] = np.nan
    return {
        "weights": weights,
        "x": x,
        "scalars": scalars,
        "state0": initial if state0 else None,
        "lengths": lengths,
        "reset": reset,
        "dy": dy,
        "dstateT": [normal(B, H) for _ in t.states],
        "dstates": dstates,
    }


def cast(values, dtype):
    """Floats in another dtype."""
    if isinstance(values, dict):
        return {name: cast(v, dtype) for name, v in values.items()}
    if isinstance(values, list):
        return [cast(v, dtype) for v in values]
    return values.astype(dtype) if getattr(values, "dtype", None) == np.float32 else values


def steps_of(made, p, reverse):
    """Every result by its name, from one step after the other of each row alone."""
    weights, x, H = p["weights"], p["x"], p["dy"].shape[2]
    states, starts = list(made.trace.states), [*made.trace.start.values()]
    S = range(len(states))
    start = [np.full((1, H), s, x.dtype) for s in starts]
    found = {"y": np.zeros((T, B, H), x.dtype), "dx": np.zeros_like(x)}
    found |= {name: np.zeros((T, B, H), x.dtype) for name in states}
    found |= {f"{name}T": np.zeros((B, H), x.dtype) for name in states}
    found |= {f"d{name}0": np.zeros((B, H), x.dtype) for name in states}
    dweights = {name: np.zeros_like(w) for name, w in (weights | p["scalars"]).items()}
    for b in range(B):
        n = T if p["lengths"] is None else p["lengths"][b]
        order = range(n)[::-1] if reverse else range(n)
        state = start if p["state0"] is None else [s[b : b + 1] for s in p["state0"]]
        first, done = state, []
        for t in order:
            at = t + 1 if reverse else t  # where the cut between this step and the one before it is noted
            cut = p["reset"] is not None and at < n and p["reset"][at, b]
            rows = {name: s[t, b] for name, s in p["scalars"].items()}
            step = Evaluation(made, weights, x[t, b : b + 1], start if cut else state, rows)
            state = step.after
            done.append((t, cut, step))
            found["y"][t, b] = state[0][0]
            for s in S:
                found[states[s]][t, b] = state[s][0]
        chain = [p["dstateT"][s][b : b + 1] for s in S]
        for s in S:
            found[f"{states[s]}T"][b] = state[s][0]
            found[states[s]][n:, b] = (first if reverse else state)[s][0]
        for t, cut, step in reversed(done):
            upstream = [chain[s] + p["dstates"][s][t, b] + (p["dy"][t, b] if s == 0 else 0) for s in S]
            chain = step.backward(upstream)
            chain = [np.zeros_like(d) if cut else d for d in chain]
            step.add_weight_gradients({name: dweights[name] for name in weights})
            for name in p["scalars"]:
                dweights[name][t, b] = step.scalar_gradient(name)[0]
            found["dx"][t, b] = step.input_gradient()[0]
        for s in S:
            found[f"d{states[s]}0"][b] = chain[s][0]
    return found | {f"d{name}": d for name, d in dweights.items()}


def run(made, p, reverse, save="all"):
    """The same from the Numba backend."""
    H, states = p["dy"].shape[2], list(made.trace.states)
    packed = module.pack(made, p["weights"])
    a = ForwardArguments(
        made, p["x"], p["weights"], p["state0"], p["lengths"], p["reset"], reverse, True, None, None, save,
        Sizes(T, B, I, H, H), p["scalars"],
    )  # fmt: skip
    forward = module.forward(packed, a)
    found = {"y": forward.y} | {f"{name}T": s for name, s in zip(states, forward.stateT, strict=True)}
    found |= dict(zip(states, forward.states, strict=True))
    if save is None:
        return found
    need = frozenset({"x", "state0", *p["weights"], *p["scalars"]})
    dx, dweights, dstate0, dscalars = module.backward(
        forward.tape, BackwardArguments(p["dy"], p["dstateT"], p["dstates"], need)
    )
    dweights |= dscalars
    found |= {"dx": dx} | {f"d{name}": d for name, d in dweights.items()}
    return found | {f"d{name}0": d for name, d in zip(states, dstate0, strict=True)}


def check(made, dtype, H, reverse=False, **options):
    p = draw(made, H, **options)
    with np.errstate(all="ignore"):
        exact = steps_of(made, cast(p, np.longdouble), reverse)
        plain = steps_of(made, cast(p, dtype), reverse)
    got = run(made, cast(p, dtype), reverse)
    assert {a.dtype for a in got.values()} == {np.dtype(dtype)}
    usual = max(errors(plain, exact).values())
    bad = {name: e for name, e in errors(got, exact).items() if not e <= 4 * usual + 8 * EPS[dtype]}
    assert not bad, (usual, bad)
    bare = run(made, cast(p, dtype), reverse, save=None)
    assert_bitwise_equal(bare, {name: got[name] for name in bare})


# Each takes seconds to compile.
USUAL = {(slstm, np.float64), (gru_d, np.float32), (everything, np.float32)}
EACH = [
    pytest.param(made, t, id=f"{made!r}-{t.__name__}", marks=[] if (made, t) in USUAL else pytest.mark.slow)
    for made in [*PUBLISHED, everything]
    for t in DTYPES
    if not made.projects
]


@pytest.mark.parametrize(("made", "dtype"), EACH)
def test_published_cells(made, dtype):
    for H in (5, 17):
        for reverse in (False, True):
            check(made, dtype, H, reverse)
            check(made, dtype, H, reverse, rows=False)
    check(made, dtype, 5, state0=False, biases=False)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("made", [c for c in ALL if c not in PUBLISHED], ids=repr)
def test_the_rest_of_the_zoo(made):
    check(made, np.float64, 5)
    check(made, np.float64, 17, reverse=True)


def check_the_zoo():
    """Run by Python itself, which is quick; it has no fma."""
    from fusedrnn.backends import numba_functions

    numba_functions.fma = lambda x, y, z: x * y + z
    for made in ALL:
        if not made.projects:
            check(made, np.float64, 5)
            check(made, np.float64, 17, reverse=True)


def test_the_source_of_every_cell_in_the_zoo():
    """What the slow tests compile."""
    code = "import test_numba_cells; test_numba_cells.check_the_zoo()"
    python(code, cwd=Path(__file__).parent, NUMBA_DISABLE_JIT="1")


# --- cells that lay out what they keep in other ways --------------------------------------------------------


@cell
def apart(p, x, h, c, m, u):
    """Operands whose gates do not lie side by side, and one that is a product; states that are others, or a
    product that nothing else uses.
    """
    a, b = p.dense("a b", x, h)
    d, e = p.dense("d e", h, c)
    f = p.dense("f", x, c, a * tanh(b))
    g = p.dense("g", d, bias=False)
    k = where(p.dense("k", m) > 0, f, g)
    return tanh(k + e), h, g, p.dense("u", k)


@cell
def without_gradient(p, x, h, c):
    """A norm, a product and a state that only a condition reads."""
    n = p.rms_norm("n", p.dense("a", x, h))
    return where(n > c, tanh(h), p.dense("b", x)), 0.5 * h


@pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.float64, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "made", [apart, pytest.param(without_gradient, marks=pytest.mark.slow)], ids=["apart", "without_gradient"]
)
def test_other_layouts(made, dtype):
    check(made, dtype, 5)
    check(made, dtype, 17, reverse=True)


@pytest.mark.slow
@settings(max_examples=100)
@given(sources())
def test_random_cells(source):
    made = made_from(source)
    for dtype in DTYPES:
        check(made, dtype, 5)
        check(made, dtype, 6, reverse=True, rows=False)


def test_a_missing_state_and_a_cut_are_what_the_state_starts_from():
    """sLSTM divides by n, which starts from 1."""
    p = cast(draw(slstm, 5), np.float64)
    ones = [np.full((B, 5), start) for start in slstm.trace.start.values()]
    got = run(slstm, {**p, "state0": None}, False)
    assert_bitwise_equal(got, run(slstm, {**p, "state0": ones}, False))
    assert (got["dn0"][0] == 0).all()  # row 0 is cut before its first step
    assert (got["nT"][1] == 1).all()  # row 1 has no step
    assert (got["dn0"][1] == p["dstateT"][2][1]).all()


# --- operations ---------------------------------------------------------------------------------------------


def loop(f):
    from numba import njit

    @njit(error_model="numpy", fastmath={"contract"})
    def apply(x, y):
        for i in range(x.shape[0]):
            y[i] = f(x[i])

    return lambda x: (y := np.empty_like(x), apply(x, y))[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("name", ["exp", "log", "sqrt", "softplus"])
def test_functions_are_within_2_ulp(name, dtype):
    """tanh and sigmoid: test_numba.py"""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal(20_000) * scale for scale in (1e-5, 0.1, 1, 5, 15)]).astype(dtype)
    x = abs(x) if name in ("log", "sqrt") else x
    function = activations.OPERATIONS[name]
    want = function(x.astype(np.longdouble))
    usual = np.abs(want) >= np.finfo(dtype).tiny
    found = loop(function)(x)
    off = np.abs(found - want) / np.spacing(np.abs(want).astype(dtype))
    assert off[usual].max() <= 2
    assert (found[~usual] <= np.finfo(dtype).tiny).all()
    edges = np.array([0, -0.0, np.inf, -np.inf, np.nan, np.finfo(dtype).max, np.finfo(dtype).min], dtype)
    with np.errstate(all="ignore"):
        assert_bitwise_equal({"": loop(function)(edges)}, {"": function(edges)})


@cell
def choices(p, x, a, b, c, d, e, f, g, *, k=0.5):
    return (
        maximum(a, b),
        minimum(a, b),
        where(a > b, c, d),
        where(a <= b, c, minimum(d, k)),
        relu(a),
        absolute(b),
        p.dense("g", x),
    )


@pytest.mark.parametrize("upstream", UPSTREAM)
@pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.float64, marks=pytest.mark.slow)])
def test_selections_are_those_of_numpy(dtype, upstream):
    """At NaN, ties, zeros of both signs and infinities; NumPy's are judged in cells/test_selections.py."""
    pairs = np.array([(a, b) for a in NUMBERS for b in NUMBERS], dtype).T
    H, S = pairs.shape[1], len(choices.trace.states)
    state = [*pairs[:, None], *(np.full((1, H), s, dtype) for s in (5, np.inf, 1, 2, 3))]
    weights = {"weight_ih": np.ones((H, 1), dtype)}
    x = np.ones((1, 1, 1), dtype)
    packed = module.pack(choices, weights)
    a = ForwardArguments(
        choices, x, weights, state, None, None, False, True, None, None, "all", Sizes(1, 1, 1, H, H), {}
    )
    for alone in range(S):
        with np.errstate(all="ignore"):
            step = Evaluation(choices, weights, x[0], state)
            d = [np.full((1, H), upstream if s == alone else 0, dtype) for s in range(S)]
            dstate = step.backward(d)
        forward = module.forward(packed, a)
        assert_bitwise_equal(dict(enumerate(forward.stateT)), dict(enumerate(step.after)))
        *_, found, _ = module.backward(forward.tape, BackwardArguments(None, d, None, frozenset(["state0"])))
        # The sign of a gradient of 0 is nobody's concern.
        assert_bitwise_equal(
            {s: v + 0 for s, v in enumerate(found)}, {s: v + 0 for s, v in enumerate(dstate)}
        )
