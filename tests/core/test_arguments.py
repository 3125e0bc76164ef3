"""Wrong arguments: a TypeError or a ValueError that names the argument, what it got and what was expected."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fusedrnn import kernels
from fusedrnn.backends import arguments
from fusedrnn.backends.protocol import Weights
from fusedrnn.cells import Cell, gru, lstm, rnn
from problems import problem

pytestmark = pytest.mark.quick

T, B, I, H = 4, 3, 2, 5


def good(cell: Any = None) -> dict[str, Any]:
    p = problem(cell or lstm, T, B, I, H, lengths=True, reset=True)
    return {
        "cell": p.cell,
        "x": p.x,
        "weights": p.weights,
        "state0": p.state0,
        "lengths": p.lengths,
        "reset": p.reset,
    }


def weights(**changed: Any) -> Weights:
    return good()["weights"] | changed


def swapped(a: np.ndarray) -> np.ndarray:
    return a.astype(a.dtype.newbyteorder())


G = good()
W = G["weights"]

BAD_FORWARD = [
    ("cell", "lstm", TypeError, "cell: expected a cell, such as .*, got str"),
    ("cell", Cell, TypeError, "cell: .*got type"),
    ("cell", gru, ValueError, r"weight_ih: expected shape \(3\*H, I\) for the cell gru.*got \(20, 2\)"),
    ("x", G["x"].tolist(), TypeError, "x: expected a NumPy array, got list"),
    ("x", None, TypeError, "x: expected a NumPy array, got NoneType"),
    ("x", np.ma.masked_array(G["x"]), TypeError, "x: expected a NumPy array, got numpy.ma"),
    ("x", G["x"].astype("f"), TypeError, r"x: expected dtype float64 \(that of weight_ih\), got float32"),
    ("x", np.ones((T, B, I), int), TypeError, "x: .*got int64"),
    ("x", np.ones((T, B, I), np.float16), TypeError, "x: .*got float16"),
    ("x", np.ones((T, B, I), object), TypeError, "x: .*got object"),
    ("x", swapped(G["x"]), TypeError, "x: expected native byte order, got dtype >f8"),
    ("x", G["x"][0], ValueError, r"x: expected shape \(T, B, 2\), got \(3, 2\)"),
    ("x", G["x"][..., :1], ValueError, r"x: expected shape \(T, B, 2\), got \(4, 3, 1\)"),
    ("x", G["x"][None], ValueError, r"x: .*got \(1, 4, 3, 2\)"),
    ("weights", tuple(W.values()), TypeError, "weights: expected a mapping .*got tuple"),
    ("weights", None, TypeError, "weights: .*got NoneType"),
    ("weights", weights(weight_ih=None), ValueError, r"weights: .*weight_ih of shape \(4\*H, I\).*got none"),
    ("weights", weights(weight_hh=None), ValueError, r"weights: .*weight_hh of shape \(20, 5\).*got none"),
    ("weights", {"weight_ih": W["weight_ih"]}, ValueError, "weights: expected weight_hh of .*got none"),
    (
        "weights",
        weights(gain_ih=W["bias_ih"]),
        ValueError,
        "weights: expected names out of weight_ih, weight_hh, bias_ih, bias_hh for lstm.*got gain_ih",
    ),
    ("weights", weights(weight_ih=W["weight_ih"].astype(int)), TypeError, "weight_ih: .*got int64"),
    ("weights", weights(weight_ih=W["weight_ih"][0]), ValueError, r"weight_ih: .*got \(2,\)"),
    ("weights", weights(weight_ih=W["weight_ih"][:19]), ValueError, r"weight_ih: .*got \(19, 2\)"),
    ("weights", weights(weight_ih=W["weight_ih"][:0]), ValueError, r"weight_ih: .*got \(0, 2\)"),
    ("weights", weights(weight_ih=W["weight_ih"][:, :0]), ValueError, r"weight_ih: .*got \(20, 0\)"),
    (
        "weights",
        weights(weight_hh=W["weight_hh"].T),
        ValueError,
        r"weight_hh: expected shape \(20, 5\), got \(5, 20\)",
    ),
    ("weights", weights(weight_hh=W["weight_hh"][:, :3]), ValueError, r"weight_hh: .*got \(20, 3\)"),
    ("weights", weights(weight_hh=W["weight_hh"].astype("f")), TypeError, "weight_hh: .*got float32"),
    (
        "weights",
        weights(weight_hh=swapped(W["weight_hh"])),
        TypeError,
        "weight_hh: expected native byte order",
    ),
    (
        "weights",
        weights(bias_ih=W["bias_ih"][:5]),
        ValueError,
        r"bias_ih: expected shape \(20,\), got \(5,\)",
    ),
    ("weights", weights(bias_ih=0.0), TypeError, "bias_ih: .*got float"),
    ("weights", weights(bias_hh=W["bias_ih"][None]), ValueError, r"bias_hh: .*got \(1, 20\)"),
    ("weights", weights(bias_hh=W["bias_ih"].astype("f")), TypeError, "bias_hh: .*got float32"),
    (
        "state0",
        G["state0"][0],
        TypeError,
        r"state0: expected a tuple \(h, c\) for lstm, got numpy.ndarray",
    ),
    ("state0", G["state0"][:1], ValueError, r"state0: .*got one of length 1"),
    ("state0", (None, None), TypeError, "state0 h: .*got NoneType"),
    (
        "state0",
        (G["state0"][0], G["state0"][1].T),
        ValueError,
        r"state0 c: expected shape \(3, 5\), got \(5, 3\)",
    ),
    ("state0", tuple(s.astype("f") for s in G["state0"]), TypeError, "state0 h: .*got float32"),
    ("lengths", 3, TypeError, "lengths: expected a list or a NumPy array, got int"),
    (
        "lengths",
        [[1, 2], [3]],
        ValueError,
        "lengths: expected numbers in rows of the same length",
    ),
    ("lengths", [1, 2, 10**30], TypeError, "lengths: expected whole numbers, got object"),
    ("lengths", np.ones(B), TypeError, "lengths: expected whole numbers, got float64; convert them"),
    ("lengths", np.ones(B, bool), TypeError, "lengths: .*got bool"),
    ("lengths", np.ones(B + 1, int), ValueError, r"lengths: expected shape \(3,\), got \(4,\)"),
    ("lengths", np.ones((B, 1), int), ValueError, r"lengths: .*got \(3, 1\)"),
    ("lengths", np.array([1, -1, 2]), ValueError, "lengths: expected 0 to T = 4, got -1 to 2"),
    ("lengths", np.array([1, 5, 2]), ValueError, "lengths: .*got 1 to 5"),
    ("lengths", np.array([1, 2**64 - 1, 2], np.uint64), ValueError, "lengths: .*18446744073709551615"),
    ("lengths", swapped(np.ones(B, int)), TypeError, "lengths: expected native byte order"),
    ("reset", G["reset"].astype("m8[s]"), TypeError, "reset: expected booleans, or 0 and 1, got timedelta64"),
    ("reset", 3 * G["reset"].astype("u1"), ValueError, "reset: expected booleans, or 0 and 1, got 3 among"),
    ("reset", G["reset"].T, ValueError, r"reset: expected shape \(4, 3\), got \(3, 4\); transpose it"),
    (
        "weights",
        W | {"weight_ih": np.ascontiguousarray(W["weight_ih"].T)},
        ValueError,
        r"weight_ih: expected shape \(20, 2\), got \(2, 20\); transpose it",
    ),
    ("reset", True, TypeError, "reset: expected lists or a NumPy array, got bool"),
    ("reverse", 1, TypeError, "reverse: expected True or False, got int"),
    ("reverse", None, TypeError, "reverse: .*got NoneType"),
    ("return_states", "yes", TypeError, "return_states: .*got str"),
    ("save", "some", ValueError, "save: .*got 'some'"),
    ("save", True, TypeError, "save: .*got bool"),
    ("backend", "gpu", ValueError, r"backend: expected one of \('cpu', .* 'cuda'\), got 'gpu'"),
    ("backend", 3, TypeError, "backend: .*got int"),
    ("batch_sizes", np.array([3, 1]), ValueError, "lengths: expected None together with batch_sizes"),
]


@pytest.mark.parametrize(("argument", "value", "exception", "message"), BAD_FORWARD)
def test_forward(argument: str, value: Any, exception: type[Exception], message: str) -> None:
    call = {"backend": "reference", **good(), argument: value}
    with pytest.raises(exception, match=f"^{message}"):
        kernels.forward(**call)


UP = problem(lstm, T, B, I, H, return_states=True)

BAD_BACKWARD = [
    ("dy", UP.dy.tolist(), TypeError, "dy: .*got list"),
    ("dy", UP.dy.astype("f"), TypeError, "dy: expected dtype float64 .*got float32"),
    ("dy", UP.dy[:1], ValueError, r"dy: expected shape \(4, 3, 5\), got \(1, 3, 5\)"),
    ("dy", swapped(UP.dy), TypeError, "dy: expected native byte order"),
    ("dstateT", UP.dstateT[0], TypeError, r"dstateT: expected a tuple \(h, c\) .*got numpy.ndarray"),
    ("dstateT", UP.dstateT[:1], ValueError, "dstateT: .*got one of length 1"),
    ("dstateT", (None, UP.dstateT[1][:2]), ValueError, r"dstateT c: expected shape \(3, 5\), got \(2, 5\)"),
    ("dstateT", (UP.dstateT[0].astype(int), None), TypeError, "dstateT h: .*got int64"),
    ("dstates", UP.dstateT, ValueError, r"dstates h: expected shape \(4, 3, 5\), got \(3, 5\)"),
    ("dstates", 0, TypeError, "dstates: .*got int"),
    ("need", "x", TypeError, "need: .*got str"),
    ("need", 1, TypeError, "need: .*got int"),
    ("need", ("x", "h0"), ValueError, "need: .*got 'h0'"),
    ("tape", None, TypeError, "tape: .*save=None"),
    ("tape", object(), TypeError, "tape: .*got object"),
]


@pytest.mark.parametrize(("argument", "value", "exception", "message"), BAD_BACKWARD)
def test_backward(argument: str, value: Any, exception: type[Exception], message: str) -> None:
    tape = kernels.forward(UP.cell, UP.x, UP.weights, UP.state0, return_states=True, backend="reference").tape
    with pytest.raises(exception, match=f"^{message}"):
        kernels.backward(**{"tape": tape, argument: value})


def test_dstates_without_return_states() -> None:
    p = replace(UP, return_states=False)
    tape = kernels.forward(p.cell, p.x, p.weights, backend="reference").tape
    with pytest.raises(ValueError, match=r"^dstates: .*return_states"):
        kernels.backward(tape, dstates=p.dstates)
    kernels.backward(tape, dstates=(None, None))


def test_what_is_allowed() -> None:
    """Lists of states, every integer dtype, numpy bools, read-only and non-contiguous arrays."""
    call = {**good(), "backend": "reference"}
    want = kernels.forward(**call)
    for dtype in "bBhHiIlLqQ":
        got = kernels.forward(**{**call, "lengths": call["lengths"].astype(dtype)})
        np.testing.assert_array_equal(got.y, want.y)
    changed = {
        "state0": [np.asfortranarray(s) for s in call["state0"]],
        "reset": np.asfortranarray(call["reset"]),
        "weights": {n: np.asfortranarray(w) for n, w in W.items()} | {"bias_hh": None},
        "reverse": np.False_,
    }
    for a in (call["x"], *changed["state0"]):
        a.flags.writeable = False
    np.testing.assert_array_equal(kernels.forward(**{**call, **changed}).y, want.y)


class TestNormalised:
    """What a kernel may rely on."""

    def test_forward(self) -> None:
        g = good()
        a = arguments.check_forward(
            g["cell"],
            np.asfortranarray(g["x"]),
            {n: np.asfortranarray(w) for n, w in W.items()},
            [np.asfortranarray(s) for s in g["state0"]],
            lengths=g["lengths"].astype("i2"),
            reset=np.asfortranarray(g["reset"]),
        )
        assert a.sizes == (T, B, I, H, H)
        assert a.x.strides[2] == a.x.itemsize
        for b in (*a.weights.values(), *a.state0, a.reset):
            assert b.flags.c_contiguous
            assert b.flags.aligned
        assert a.lengths.dtype == np.int64
        assert isinstance(a.state0, tuple)

    def test_x_is_borrowed_and_lengths_and_reset_are_copied(self) -> None:
        g = good()
        a = arguments.check_forward(g["cell"], g["x"], W, lengths=g["lengths"], reset=g["reset"])
        assert a.x is g["x"]
        assert not np.shares_memory(a.lengths, g["lengths"])
        assert not np.shares_memory(a.reset, g["reset"])

    def test_only_strides_of_whole_elements(self) -> None:
        packed = np.zeros((T, B, I), [("pad", "i4"), ("v", "f8")])
        a = arguments.check_forward(lstm, packed["v"], W)
        assert all(stride % 8 == 0 for stride in a.x.strides)
        odd = np.ndarray((T, B, I), "f8", np.zeros(1000, "u1").data, offset=8, strides=(100, 20, 8))
        a = arguments.check_forward(lstm, odd, W)
        assert all(stride % 8 == 0 for stride in a.x.strides)
        assert a.x.flags.aligned

    def test_dtypes_of_the_backend(self) -> None:
        w = {n: w.astype(np.longdouble) for n, w in W.items()}
        with pytest.raises(TypeError, match=r"^weight_ih: expected dtype float32 or float64, got"):
            arguments.check_weights(lstm, w)

    def test_need(self) -> None:
        names = {"x", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "state0"}
        assert arguments.check_need(lstm, None) == names
        assert arguments.check_need(lstm, None, W) == names - {"bias_hh"}
        assert arguments.check_need(lstm, ["x", "bias_hh"], W) == {"x"}
        assert arguments.check_need(lstm, ()) == frozenset()

    def test_all_none_is_none(self) -> None:
        p = problem(rnn, T, B, I, H)
        sizes = arguments.Sizes(T, B, I, H, H)
        b = arguments.check_backward(p.cell, p.weights, sizes, None, (None,), (None,), return_states=False)
        assert b.dstateT is None
        assert b.dstates is None
