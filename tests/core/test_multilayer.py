"""Layers, directions and dropout between layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import problems
from fusedrnn import kernels
from fusedrnn.cells import Cell, gru, lstm, rnn
from fusedrnn.multilayer import backward_multilayer, dropout_mask, forward_multilayer
from problems import assert_bitwise_equal, assert_close, name, problem

pytestmark = pytest.mark.quick

T, B, I, H = 6, 4, 3, 5


def stacked(cell: Cell, L: int, D: int, dtype: Any = np.float64) -> dict[str, Any]:
    """Weights, state and upstream gradients of several layers."""
    P = problem(cell, T, B, I, H).dy.shape[2]
    widths = cell.widths(H, P)
    rng = np.random.default_rng([L, D])
    parts = [
        problem(cell, T, B, I if n < D else D * P, H, seed=n, biases="both", dtype=dtype)
        for n in range(L * D)
    ]
    return {
        "x": parts[0].x,
        "weights": [p.weights for p in parts],
        "state0": tuple(np.stack([p.state0[k] for p in parts]) for k in range(len(cell.states))),
        "dy": rng.standard_normal((T, B, D * P)).astype(dtype),
        "dstateT": tuple(rng.standard_normal((L * D, B, width)).astype(dtype) for width in widths),
        "dstates": tuple(rng.standard_normal((L * D, T, B, width)).astype(dtype) for width in widths),
    }


def run_multilayer(
    cell: Cell, s: dict[str, Any], dstates: bool = False, need: Any = None, **options: Any
) -> dict[str, np.ndarray]:
    """Forward and backward; every result by its name."""
    f = forward_multilayer(cell, s["x"], s["weights"], s["state0"], **options, backend="reference")
    g = backward_multilayer(f.tape, s["dy"], s["dstateT"], s["dstates"] if dstates else None, need=need)
    out = {"y": f.y, "dx": g.dx}
    for k, state in enumerate(cell.states):
        out[f"{state}T"] = f.stateT[k]
        if f.states is not None:
            out[state] = f.states[k]
        if g.dstate0 is not None:
            out[f"d{state}0"] = g.dstate0[k]
    for n, d in enumerate(g.dweights):
        out |= {f"d{key}_{n}": a for key, a in d.items()}
    return {key: a for key, a in out.items() if a is not None}


class TestTorch:
    @pytest.mark.parametrize("cell", [rnn, lstm, gru], ids=name)
    @pytest.mark.parametrize(("L", "D"), [(1, 2), (3, 1), (2, 2)])
    @pytest.mark.parametrize("packed", [False, True])
    def test_forward_and_gradients(self, cell: Any, L: int, D: int, packed: bool) -> None:
        torch = pytest.importorskip("torch")
        s = stacked(cell, L, D)
        lengths = np.array([2, 6, 1, 4]) if packed else None
        module = getattr(torch.nn, cell.name.upper())(I, H, L, bidirectional=D == 2, dtype=torch.float64)
        parameters = list(module.parameters())
        with torch.no_grad():
            for parameter, w in zip(parameters, (w for ws in s["weights"] for w in ws.values()), strict=True):
                parameter.copy_(torch.tensor(w))
        x = torch.tensor(s["x"], requires_grad=True)
        state0 = [torch.tensor(a, requires_grad=True) for a in s["state0"]]
        rnn = torch.nn.utils.rnn
        given = x if not packed else rnn.pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
        y, stateT = module(given, tuple(state0) if len(state0) == 2 else state0[0])
        if packed:
            y, _ = rnn.pad_packed_sequence(y, total_length=T)
        stateT = stateT if isinstance(stateT, tuple) else (stateT,)
        torch.autograd.backward((y, *stateT), [torch.tensor(d) for d in (s["dy"], *s["dstateT"])])
        want = {"y": y, "dx": x.grad}
        for state, a, d in zip(cell.states, stateT, state0, strict=True):
            want |= {f"{state}T": a, f"d{state}0": d.grad}
        keys = [f"d{key}_{n}" for n in range(L * D) for key in cell.blocks]
        want |= {key: a.grad for key, a in zip(keys, parameters, strict=True)}
        got = run_multilayer(cell, s, bidirectional=D == 2, lengths=lengths)
        assert_close(got, {key: a.detach().numpy() for key, a in want.items()}, 5e-15)


class TestComposition:
    @pytest.mark.parametrize("cell", [*problems.CELLS, *problems.NORMED], ids=name)
    def test_by_hand(self, cell: Any) -> None:
        """Two layers, two directions, masks, lengths, resets, gradients of all states: call by call."""
        s = stacked(cell, 2, 2)
        P = s["dy"].shape[2] // 2
        rng = np.random.default_rng(7)
        mask = dropout_mask(rng, 0.4, (T, B, 2 * P), np.float64)
        options = {
            "lengths": np.array([6, 0, 3, 5]),
            "reset": rng.random((T, B)) < 0.3,
            "return_states": True,
        }
        got = run_multilayer(cell, s, dstates=True, bidirectional=True, masks=[mask], **options)

        def layer(n: int, x: np.ndarray) -> kernels.Forward:
            state0 = tuple(a[n] for a in s["state0"])
            return kernels.forward(
                cell, x, s["weights"][n], state0, reverse=n % 2 == 1, **options, backend="reference"
            )

        def back(n: int, f: kernels.Forward, dy: np.ndarray) -> kernels.Gradients:
            return kernels.backward(
                f.tape, dy, tuple(a[n] for a in s["dstateT"]), tuple(a[n] for a in s["dstates"])
            )

        low = [layer(n, s["x"]) for n in (0, 1)]
        middle = np.concatenate([f.y for f in low], axis=2) * mask
        high = [layer(n, middle) for n in (2, 3)]
        np.testing.assert_array_equal(got["y"], np.concatenate([f.y for f in high], axis=2))
        g_high = [
            back(n, f, s["dy"][..., (n - 2) * P : (n - 1) * P]) for n, f in zip((2, 3), high, strict=True)
        ]
        dmiddle = (g_high[0].dx + g_high[1].dx) * mask
        g_low = [back(n, f, dmiddle[..., n * P : (n + 1) * P]) for n, f in enumerate(low)]
        np.testing.assert_array_equal(got["dx"], g_low[0].dx + g_low[1].dx)
        for n, (f, g) in enumerate(zip(low + high, g_low + g_high, strict=True)):
            for key, d in g.dweights.items():
                np.testing.assert_array_equal(got.get(f"d{key}_{n}"), d)
            for k, state in enumerate(cell.states):
                np.testing.assert_array_equal(got[f"{state}T"][n], f.stateT[k])
                np.testing.assert_array_equal(got[state][n], f.states[k])
                np.testing.assert_array_equal(got[f"d{state}0"][n], g.dstate0[k])

    def test_recompute_gives_the_same_bits(self) -> None:
        s = stacked(lstm, 2, 2)
        assert_bitwise_equal(
            run_multilayer(lstm, s, bidirectional=True, save="boundary_states"),
            run_multilayer(lstm, s, bidirectional=True),
        )

    @pytest.mark.parametrize("need", [(), ("x",), ("weight_hh",), ("state0", "bias_ih")], ids=str)
    def test_only_what_is_needed(self, need: tuple[str, ...]) -> None:
        s = stacked(lstm, 3, 1)
        got, whole = run_multilayer(lstm, s, need=need), run_multilayer(lstm, s)
        expected = {"y", "hT", "cT"}
        for key in need:
            if key == "x":
                expected |= {"dx"}
            elif key == "state0":
                expected |= {"dh0", "dc0"}
            else:
                expected |= {f"d{key}_{n}" for n in range(3)}
        assert_bitwise_equal(got, {key: whole[key] for key in expected})

    def test_no_upstream_gradient_and_no_tape(self) -> None:
        s = stacked(gru, 2, 1)
        f = forward_multilayer(gru, s["x"], s["weights"], backend="reference")
        g = backward_multilayer(f.tape)
        assert not g.dx.any()
        assert not g.dweights[0]["weight_ih"].any()
        assert forward_multilayer(gru, s["x"], s["weights"], save=None, backend="reference").tape is None

    def test_packed_weights(self) -> None:
        s = stacked(gru, 2, 1)
        packed = [kernels.pack(gru, w, "reference") for w in s["weights"]]
        assert_bitwise_equal(run_multilayer(gru, {**s, "weights": packed}), run_multilayer(gru, s))


class TestDropout:
    def test_mask(self) -> None:
        mask = dropout_mask(np.random.default_rng(0), 0.25, (100, 100), np.float32)
        assert mask.dtype == np.float32
        assert set(np.unique(mask)) == {np.float32(0), np.float32(1 / 0.75)}
        assert abs((mask == 0).mean() - 0.25) < 0.02  # 4.6 standard deviations
        assert not dropout_mask(np.random.default_rng(0), 1, (3, 3), np.float64).any()

    def test_drawn_from_the_callers_generator(self) -> None:
        s = stacked(rnn, 3, 1)
        options = {"dropout": 0.5, "backend": "reference"}
        first, second = (
            forward_multilayer(rnn, s["x"], s["weights"], rng=np.random.default_rng(1), **options)
            for _ in range(2)
        )
        np.testing.assert_array_equal(first.y, second.y)
        masks = first.tape.masks
        assert [m.shape for m in masks] == [(T, B, H)] * 2
        assert (masks[0] != masks[1]).any()
        by_masks = forward_multilayer(rnn, s["x"], s["weights"], masks=masks, backend="reference")
        np.testing.assert_array_equal(by_masks.y, first.y)

    def test_float32_stays_float32(self) -> None:
        s = stacked(lstm, 2, 2, np.float32)
        got = run_multilayer(lstm, s, bidirectional=True, dropout=0.5, rng=np.random.default_rng(1))
        assert {a.dtype for a in got.values()} == {np.dtype(np.float32)}

    def test_one_layer_has_no_dropout(self) -> None:
        s = stacked(lstm, 1, 2)
        assert_bitwise_equal(
            run_multilayer(lstm, s, bidirectional=True, dropout=0.5),
            run_multilayer(lstm, s, bidirectional=True),
        )


S = stacked(lstm, 2, 1)


@pytest.mark.parametrize(
    ("argument", "value", "exception", "message"),
    [
        ("cell", "lstm", TypeError, "cell: "),
        ("weights", S["weights"][0], TypeError, "weights: expected a list, .*got dict"),
        ("weights", [], ValueError, "weights: expected at least 1"),
        ("weights", S["weights"][::-1], ValueError, "x: expected shape"),
        ("state0", S["state0"][0], TypeError, r"state0: expected a tuple \(h, c\)"),
        ("state0", (S["state0"][0][:1], S["state0"][1]), ValueError, "state0 h: .* 2, layers"),
        ("state0", (None, None), TypeError, "state0 h: .*got NoneType"),
        ("bidirectional", 1, TypeError, "bidirectional: .*got int"),
        ("dropout", -0.1, ValueError, "dropout: .*got -0.1"),
        ("dropout", 1.5, ValueError, "dropout: .*got 1.5"),
        ("dropout", float("nan"), ValueError, "dropout: .*got nan"),
        ("dropout", 0.5, TypeError, "rng: expected a numpy Generator"),
        ("masks", [], ValueError, "masks: expected 1"),
        ("masks", [np.ones((T, B, H + 1))], ValueError, r"masks\[0\]: expected shape"),
        ("masks", [np.ones((T, B, H), "f")], TypeError, r"masks\[0\]: expected dtype float64"),
        ("masks", [0.5], TypeError, r"masks\[0\]: .*got float"),
    ],
)
def test_wrong_arguments(argument: str, value: Any, exception: type[Exception], message: str) -> None:
    call = {
        "cell": lstm,
        "x": S["x"],
        "weights": S["weights"],
        "state0": S["state0"],
        "backend": "reference",
    }
    with pytest.raises(exception, match=f"^{message}"):
        forward_multilayer(**{**call, argument: value})


@pytest.mark.parametrize(
    ("argument", "value", "exception", "message"),
    [
        ("tape", None, TypeError, "tape: .*got NoneType"),
        ("dy", S["dy"][..., :1], ValueError, r"dy: expected shape \(6, 4, 5\)"),
        ("dy", S["dy"].tolist(), TypeError, "dy: .*got list"),
        ("dstateT", S["dstateT"][:1], ValueError, "dstateT: .*got one of length 1"),
        ("dstateT", (S["dstateT"][0][0], None), ValueError, "dstateT h: .* 2, layers"),
        ("dstates", S["dstates"], ValueError, "dstates: .*return_states"),
        ("need", "x", TypeError, "need: .*got str"),
        ("need", ["h"], ValueError, "need: .*got 'h'"),
    ],
)
def test_wrong_arguments_backward(
    argument: str, value: Any, exception: type[Exception], message: str
) -> None:
    tape = forward_multilayer(lstm, S["x"], S["weights"], backend="reference").tape
    with pytest.raises(exception, match=f"^{message}"):
        backward_multilayer(**{"tape": tape, argument: value})
