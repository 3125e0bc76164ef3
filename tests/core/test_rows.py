"""Lengths and resets: every API takes the same kinds of them, refuses the same with the same words, and holds
the states of every step past a row's end, as the plain loop of ``oracle`` does.
"""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import replace

import numpy as np
import pytest

import emulated
import fake_cupy
import fusedrnn.layers as L
import oracle
from fusedrnn import Variable, backends, kernels, multilayer
from fusedrnn.backends.cuda import CudaBackend
from fusedrnn.cells import gru, lstm, rnn
from problems import assert_bitwise_equal, assert_close, name, named, problem, run

pytestmark = pytest.mark.quick

with contextlib.suppress(ImportError):
    import torch

    import fusedrnn.torch
    from fusedrnn.torch import compilable

T, B, I, H = 5, 3, 2, 3
CELLS = (lstm, gru, rnn)
cells = pytest.mark.parametrize("cell", CELLS, ids=name)


def drawn(cell, **options):
    """A problem with random lengths and resets, 0 and T among the lengths; both biases, as PyTorch has."""
    biases = "both" if cell.name == "gru" else "bias_ih"
    more = {"lengths": True, "reset": True, "return_states": True, "biases": biases}
    return problem(cell, T, B, I, H, **more | options)


# --- the APIs: each runs a problem, forward and back, and gives every result by its name -------------------


class Functional:
    def __init__(self, backend):
        self.backend = backend

    def forward(self, *args, **options):
        return kernels.forward(*args, **options, backend=self.backend)

    backward = staticmethod(kernels.backward)


def through_functional(backend):
    def api(p):
        if (reason := backends.get(backend).unavailable()) is not None:
            pytest.skip(reason)
        return run(Functional(backend), p)

    return api


def through_cuda(p):
    """On an emulated GPU; lists, and NumPy's, are put there."""
    if emulated.COMPILER is None:
        pytest.skip("needs a C++ compiler")
    on_gpu = fake_cupy.hidden(replace(p, lengths=None, reset=None))
    given = replace(on_gpu, lengths=p.lengths, reset=p.reset)
    found = run(CudaBackend(fake_cupy.HiddenDevice(16), _tested=True), given)
    return {key: a.get() for key, a in found.items()}


def through_stack(p):
    state0 = tuple(s[None] for s in p.state0)
    options = {"lengths": p.lengths, "reset": p.reset, "return_states": p.return_states}
    out = multilayer.forward_multilayer(p.cell, p.x, [p.weights], state0, **options)
    upstream = [tuple(d[None] for d in given) for given in (p.dstateT, p.dstates)]
    back = multilayer.backward_multilayer(out.tape, p.dy, *upstream)
    out = out._replace(stateT=[s[0] for s in out.stateT], states=[s[0] for s in out.states])
    dstate0 = tuple(d[0] for d in back.dstate0)
    return named(p.cell, out, kernels.Gradients(back.dx, back.dweights[0], dstate0, {}))


def through_layers(fused):
    def api(p):
        kind = {"lstm": L.LSTM, "gru": L.GRU, "rnn": L.RNN}[p.cell.name]
        layer = kind(H, I, dtype=p.x.dtype, fused=fused)
        for key, w in p.weights.items():
            getattr(layer, key).data = w.copy()
        x, state0 = Variable(p.x), tuple(map(Variable, p.state0))
        y, states = layer.sequence(x, state0, lengths=p.lengths, reset=p.reset, return_states=True)
        found = {"y": y} | {f"{s}T": getattr(layer, s) for s in p.cell.states}
        found |= dict(zip(p.cell.states, states, strict=True))
        upstream = [p.dy, *p.dstateT, *p.dstates]
        sum((v * d).sum() for v, d in zip(found.values(), upstream, strict=True)).backward()
        given = {"x": x} | dict(layer.named_params())
        given |= {f"{s}0": v for s, v in zip(p.cell.states, state0, strict=True)}
        return {k: v.data for k, v in found.items()} | {f"d{k}": v.grad.data for k, v in given.items()}

    return api


def through_torch(compiled):
    def api(p):
        pytest.importorskip("torch", reason="needs PyTorch")
        names = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}
        face = compilable if compiled else fusedrnn.torch
        layer = getattr(face, names[p.cell.name])(I, H, dtype=torch.float64)
        with torch.no_grad():
            for key in p.cell.blocks:
                getattr(layer, f"{key}_l0").copy_(torch.tensor(p.weights.get(key, 0.0)))
        x, *state0 = (torch.tensor(a, requires_grad=True) for a in (p.x, *(s[None] for s in p.state0)))
        call = torch.compile(layer, backend="aot_eager") if compiled else layer
        pair = len(state0) == 2
        given = {"lengths": p.lengths, "reset": p.reset, "return_states": True}
        with warnings.catch_warnings():
            if compiled:  # of what PyTorch does by the way
                warnings.simplefilter("ignore")
            y, final, states = call(x, tuple(state0) if pair else state0[0], **given)
        assert layer.last_path == "fused"
        final, states = (s if pair else (s,) for s in (final, states))
        upstream = map(torch.tensor, [p.dy, *(d[None] for d in (*p.dstateT, *p.dstates))])
        torch.autograd.backward([y, *final, *states], list(upstream))
        found = {"y": y} | {f"{s}T": v[0] for s, v in zip(p.cell.states, final, strict=True)}
        found |= {s: v[0] for s, v in zip(p.cell.states, states, strict=True)}
        found |= {"dx": x.grad} | {f"d{s}0": v.grad[0] for s, v in zip(p.cell.states, state0, strict=True)}
        found |= {f"d{k}": getattr(layer, f"{k}_l0").grad for k in p.weights}
        return {key: v.detach().numpy() for key, v in found.items()}

    return api


APIS = {
    "cpu": through_functional("cpu"),
    "numba": through_functional("numba"),
    "reference": through_functional("reference"),
    "cuda": through_cuda,
    "stack": through_stack,
    "layers": through_layers(True),
    "layers, unfused": through_layers(False),
    "torch": through_torch(False),
    "torch, compiled": through_torch(True),
}
apis = pytest.mark.parametrize("api", APIS)


# --- states past a row's end -----------------------------------------------------------------------------


@cells
@apis
def test_states_are_held_past_a_rows_end(api, cell):
    """Against a loop over rows and steps, its gradients by complex steps. The gradients that come in at
    padding are NaN: whoever reads one shows it.
    """
    p = drawn(cell)
    assert sorted(p.lengths)[0] == 0
    assert np.isnan(p.dstates[0]).any()
    got, want = APIS[api](p), oracle.forward(p)
    for s in cell.states:
        for b, n in enumerate(p.lengths):
            np.testing.assert_array_equal(got[s][n:, b], np.broadcast_to(got[f"{s}T"][b], (T - n, H)))
    assert_close(got, want | oracle.gradients(p, np.complex128), 1e-13)


@apis
def test_states_are_held_where_a_direction_begins(api):
    """In reverse the padding comes first, and the initial state stands there."""
    p = drawn(lstm, reverse=True)
    if api in ("cpu", "numba", "reference", "cuda"):
        got = APIS[api](p)
        want = oracle.forward(p)
        assert_close({key: got[key] for key in want}, want, 1e-13)
        for s, begin in zip("hc", p.state0, strict=True):
            for b, n in enumerate(p.lengths):
                np.testing.assert_array_equal(got[s][n:, b], np.broadcast_to(begin[b], (T - n, H)))


# --- what is taken -----------------------------------------------------------------------------------------

LENGTHS = {
    "list": list,
    "list of Python's": lambda a: a.tolist(),
    "tuple": tuple,
    "not contiguous": lambda a: np.repeat(a, 2)[::2],
    "read only": lambda a: np.broadcast_to(a, a.shape),
} | {f"dtype {c}": lambda a, c=c: a.astype(c) for c in "bBhHiIlLqQ"}
RESETS = {
    "lists of booleans": lambda a: a.tolist(),
    "lists of 0 and 1": lambda a: a.astype(int).tolist(),
    "tuples": lambda a: tuple(map(tuple, a)),
    "list of arrays": list,
    "not contiguous": lambda a: np.asfortranarray(a.astype("i2")),
} | {f"dtype {c}": lambda a, c=c: a.astype(c) for c in "?bBhHiIlLqQfd"}


@apis
def test_every_kind_of_lengths_and_resets_is_taken(api):
    p = drawn(lstm)
    expected = APIS[api](p)
    if api == "torch, compiled":  # it compiles for seconds
        kinds = [("list of Python's", "lists of 0 and 1"), ("dtype i", "dtype B")]
    else:
        kinds = [(list(LENGTHS)[k % len(LENGTHS)], r) for k, r in enumerate(RESETS)]
    for lengths, reset in kinds:
        given = replace(p, lengths=LENGTHS[lengths](p.lengths), reset=RESETS[reset](p.reset))
        keep = [np.array(a) for a in (given.lengths, given.reset)]
        assert_bitwise_equal(APIS[api](given), expected)
        for a, b in zip((given.lengths, given.reset), keep, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["list", "array"])
def test_packed_rows_take_lists(kind):
    p = problem(gru, 3, 2, I, H)
    sizes, rows, reset = [2, 2, 1], p.x.reshape(-1, I)[:5], [1, 0, 0, 1, 0]
    expected = kernels.forward(gru, rows, p.weights, batch_sizes=np.array(sizes), reset=np.array(reset, bool))
    given = {"list": (sizes, reset), "array": (np.array(sizes, "i2"), np.array(reset, "u1"))}[kind]
    got = kernels.forward(gru, rows, p.weights, batch_sizes=given[0], reset=given[1])
    np.testing.assert_array_equal(got.y, expected.y)


# --- what is refused, and in which words -------------------------------------------------------------------

TRUE = np.ones((T, B), int)
WRONG = [
    ({"lengths": [1.0, 2.0, 0.0]}, TypeError, "lengths: expected whole numbers, got float"),
    ({"lengths": [1, np.nan, np.inf]}, TypeError, "lengths: expected whole numbers, got float"),
    ({"lengths": np.ones(B, bool)}, TypeError, "lengths: expected whole numbers, got bool"),
    ({"lengths": [1, 2]}, ValueError, r"lengths: expected shape \(3,\), got \(2,\)$"),
    (
        {"lengths": np.array([1, -1, 2])},
        ValueError,
        "lengths: expected 0 to T = 5, got -1 to 2; a length is",
    ),
    ({"lengths": (6, 1, 2)}, ValueError, "lengths: expected 0 to T = 5, got 1 to 6; a length"),
    ({"reset": TRUE.T}, ValueError, r"reset: expected shape \(5, 3\), got \(3, 5\); transpose it$"),
    ({"reset": TRUE[0]}, ValueError, r"reset: expected shape \(5, 3\), got \(3,\)$"),
    ({"reset": 2 * TRUE}, ValueError, "reset: expected booleans, or 0 and 1, got 2 among them"),
    ({"reset": (-TRUE).tolist()}, ValueError, "reset: expected booleans, or 0 and 1, got -1 among them"),
    ({"reset": TRUE * np.nan}, ValueError, "reset: expected booleans, or 0 and 1, got nan among them"),
]


@pytest.mark.parametrize(("changed", "error", "words"), WRONG, ids=lambda v: str(v)[:40])
@apis
def test_the_same_is_refused_in_the_same_words(api, changed, error, words):
    with pytest.raises(error, match=f"^{words}"):
        APIS[api](replace(drawn(lstm), **changed))
