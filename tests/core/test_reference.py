"""The reference backend, proved: against the oracle, against PyTorch, and by what every backend must keep."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest

import oracle
import problems
from fusedrnn.backends.reference import ReferenceBackend
from fusedrnn.cells import gru, lstm, rnn
from fusedrnn.cells.activations import relu, sigmoid, tanh
from problems import assert_bitwise_equal, assert_close, name, named, problem, run

REFERENCE = ReferenceBackend()
TINY = (5, 4, 2, 3)
POSSIBLE = ("x", *gru.blocks, "state0")
# float64 as every kernel promises; long double by the same number of eps (90)
TOLERANCE = {np.float64: 2e-14, np.longdouble: 1e-17}

cells = pytest.mark.parametrize("cell", problems.CELLS, ids=name)
options = pytest.mark.parametrize("options", problems.OPTIONS, ids=lambda o: name(lstm, o)[5:] or "plain")


def assert_right_along_a_direction(p: Any) -> None:
    """The reference's gradients, times random signs, against one complex step in that direction."""
    got = run(REFERENCE, p)
    rng = np.random.default_rng(5)
    gradients = {key: got[key] for key in oracle.variables(p)}
    directions = {key: rng.choice([-1.0, 1.0], a.shape) for key, a in gradients.items()}
    for key, value in oracle.directional(p, directions).items():
        norm = np.linalg.norm(gradients[key])
        assert norm > 0
        assert abs((gradients[key] * directions[key]).sum() - value) <= 1e-13 * norm, key


def oracle_results(p: problems.Problem) -> dict[str, np.ndarray]:
    """What ``run`` should return, from the oracle in long double."""
    forward = oracle.forward(oracle.with_states(p).astype(np.longdouble))
    if not p.return_states:
        forward = {key: a for key, a in forward.items() if key not in p.cell.states}
    return {**forward, **oracle.gradients(p)}


class TestOracle:
    @pytest.mark.quick
    @cells
    @options
    def test_everything(self, cell: Any, options: dict[str, Any]) -> None:
        p = problem(cell, *TINY, **options)
        want = oracle_results(p)
        assert want.keys() == problems.expected_names(p)
        for dtype, tolerance in TOLERANCE.items():
            got = run(REFERENCE, p.astype(dtype))
            assert all(a.dtype == dtype for a in got.values())
            assert_close(got, want, tolerance)

    @cells
    @pytest.mark.parametrize(
        "upstream", [u for n in range(4) for u in combinations(("dy", "dstateT", "dstates"), n)]
    )
    def test_any_upstream_gradient_may_be_missing(self, cell: Any, upstream: tuple[str, ...]) -> None:
        p = problem(cell, *TINY, lengths=True, reset=True, return_states=True, upstream=upstream)
        assert_close(run(REFERENCE, p), oracle_results(p), 2e-14)

    def test_an_upstream_gradient_of_one_state_only(self) -> None:
        p = problem(lstm, *TINY, return_states=True)
        for k in range(2):
            one = tuple(d if n == k else None for n, d in enumerate(p.dstates))
            q = replace(p, dy=None, dstateT=None, dstates=one)
            assert_close(run(REFERENCE, q), oracle_results(q), 2e-14)
            q = replace(
                p,
                dy=None,
                dstateT=tuple(d if n == k else None for n, d in enumerate(p.dstateT)),
                dstates=None,
            )
            assert_close(run(REFERENCE, q), oracle_results(q), 2e-14)

    @cells
    def test_along_a_direction_at_real_sizes(self, cell: Any) -> None:
        p = problem(cell, 48, 3, 7, 64, seed=4, lengths=True, reset=True, return_states=True)
        assert_right_along_a_direction(p)


class TestPrecision:
    @cells
    @pytest.mark.parametrize("size", problems.SIZES, ids=str)
    def test_float32_and_float64_against_long_double(self, cell: Any, size: tuple[int, ...]) -> None:
        p = problem(cell, *size, lengths=True, reset=True, return_states=True, seed=6)
        want = run(REFERENCE, p.astype(np.longdouble))
        assert_close(run(REFERENCE, p), want, 2e-14)
        got = run(REFERENCE, p.astype(np.float32))
        assert {a.dtype for a in got.values()} == {np.dtype(np.float32)}
        assert_close(got, want, 5e-6)

    @pytest.mark.parametrize("dtype", "fdgFDG")
    def test_activations_keep_the_dtype_and_do_not_overflow(self, dtype: str) -> None:
        x = np.array([-1e4, -89, -1, -0.0, 0.0, 1, 89, 1e4]).astype(dtype)
        for f in (tanh, sigmoid, relu):
            assert f(x).dtype == x.dtype
            assert f(x[2]).dtype == x.dtype
            assert np.isfinite(f(x)).all()
        s = sigmoid(x)
        np.testing.assert_allclose((s + sigmoid(-x)).real, 1, rtol=1e-6)
        assert 0 <= float(s.real[0]) < 1e-300
        assert s.real[-1] == 1

    def test_activations_of_nan_and_infinity(self) -> None:
        x = np.array([np.nan, np.inf, -np.inf])
        for f, want in ((tanh, [np.nan, 1, -1]), (sigmoid, [np.nan, 1, 0]), (relu, [np.nan, np.inf, 0])):
            np.testing.assert_array_equal(f(x), want)

    @cells
    def test_infinities_give_nan_without_a_warning(self, cell: Any) -> None:
        for value in (np.inf, 3e38):
            p = problem(cell, 3, 2, 2, 3, dtype=np.float32)
            p.x[1, 0] = value
            got = run(REFERENCE, p)
            assert np.isfinite(got["y"][:, 1]).all()


class TestBits:
    @cells
    @options
    def test_recompute_gives_the_same_bits(self, cell: Any, options: dict[str, Any]) -> None:
        for dtype in (np.float32, np.float64):
            p = problem(cell, 11, 5, 3, 17, dtype=dtype, **options)
            assert_bitwise_equal(run(REFERENCE, p, save="boundary_states"), run(REFERENCE, p))

    @cells
    def test_backward_twice_and_inputs_untouched(self, cell: Any) -> None:
        p = problem(cell, 7, 3, 2, 5, lengths=True, reset=True, return_states=True)
        copy = p.astype(np.float64)
        f = REFERENCE.forward(p.cell, p.x, p.weights, p.state0, **p.options)
        first, second = (
            named(cell, f, REFERENCE.backward(f.tape, p.dy, p.dstateT, p.dstates)) for _ in range(2)
        )
        assert_bitwise_equal(first, second)
        for a, b in zip(
            (p.x, *p.state0, p.dy, *p.dstateT), (copy.x, *copy.state0, copy.dy, *copy.dstateT), strict=True
        ):
            np.testing.assert_array_equal(a, b)

    @pytest.mark.quick
    @cells
    def test_any_split_with_the_state_carried(self, cell: Any) -> None:
        p = problem(cell, 7, 3, 2, 5, reset=True, return_states=True)
        whole = run(REFERENCE, p)
        for cut in range(1, 7):
            a = replace(p, x=p.x[:cut], reset=p.reset[:cut])
            f = REFERENCE.forward(cell, a.x, a.weights, a.state0, **a.options)
            b = replace(p, x=p.x[cut:], reset=p.reset[cut:], state0=f.stateT)
            g = REFERENCE.forward(cell, b.x, b.weights, b.state0, **b.options)
            db = REFERENCE.backward(g.tape, p.dy[cut:], p.dstateT, tuple(d[cut:] for d in p.dstates))
            da = REFERENCE.backward(f.tape, p.dy[:cut], db.dstate0, tuple(d[:cut] for d in p.dstates))
            np.testing.assert_array_equal(np.concatenate([f.y, g.y]), whole["y"])
            np.testing.assert_array_equal(np.concatenate([da.dx, db.dx]), whole["dx"])
            for k, s in enumerate(cell.states):
                np.testing.assert_array_equal(g.stateT[k], whole[f"{s}T"])
                np.testing.assert_array_equal(da.dstate0[k], whole[f"d{s}0"])

    @cells
    def test_x_of_any_strides(self, cell: Any) -> None:
        p = problem(cell, 6, 3, 4, 5)
        batch_first = np.ascontiguousarray(p.x.swapaxes(0, 1)).swapaxes(0, 1)
        last_axis = np.asfortranarray(p.x)
        backwards = np.ascontiguousarray(p.x[::-1, ::-1])[::-1, ::-1]
        wide = np.zeros((12, 6, 9))
        wide[::2, ::2, 2:6] = p.x
        packed = np.zeros(p.x.shape, [("pad", "i1"), ("v", "f8")])  # misaligned
        packed["v"] = p.x
        for x in (batch_first, last_axis, backwards, wide[::2, ::2, 2:6], packed["v"]):
            assert_bitwise_equal(run(REFERENCE, replace(p, x=x)), run(REFERENCE, p))


class TestNeed:
    @pytest.mark.parametrize("need", [c for n in (0, 1, 2, 6) for c in combinations(POSSIBLE, n)], ids=str)
    def test_only_what_is_needed_with_the_same_bits(self, need: tuple[str, ...]) -> None:
        p = problem(gru, *TINY)
        whole = run(REFERENCE, p)
        got = run(REFERENCE, p, need=need)
        forward = {"y", "hT"}
        assert got.keys() == forward | {"dh0" if n == "state0" else f"d{n}" for n in need}
        assert_bitwise_equal(got, {key: whole[key] for key in got})

    def test_a_bias_that_is_not_there(self) -> None:
        p = problem(lstm, *TINY)
        f = REFERENCE.forward(p.cell, p.x, p.weights)
        assert REFERENCE.backward(f.tape, p.dy, need=("bias_hh",)).dweights == dict.fromkeys(p.weights)


class TestMeaning:
    @cells
    @pytest.mark.parametrize("reverse", [False, True])
    def test_no_steps_and_no_rows(self, cell: Any, reverse: bool) -> None:
        for T, B in ((0, 3), (4, 0), (0, 0)):
            p = problem(cell, T, B, 2, 5, return_states=True, reverse=reverse)
            got = run(REFERENCE, p)
            for k, s in enumerate(cell.states):
                np.testing.assert_array_equal(got[f"{s}T"], p.state0[k])
                np.testing.assert_array_equal(got[f"d{s}0"], p.dstateT[k])
            assert got["y"].shape == p.dy.shape
            assert not got["dweight_hh"].any()

    @pytest.mark.quick
    @cells
    @pytest.mark.parametrize("reverse", [False, True])
    def test_padding(self, cell: Any, reverse: bool) -> None:
        p = problem(cell, 6, 4, 2, 5, lengths=True, return_states=True, reverse=reverse)
        got = run(REFERENCE, p)
        for b, n in enumerate(p.lengths):
            for key in ("y", "dx"):
                assert (got[key][n:, b] == 0).all()
                assert not np.signbit(got[key][n:, b]).any()
            alone = replace(
                p,
                x=p.x[:n, b : b + 1],
                state0=tuple(s[b : b + 1] for s in p.state0),
                lengths=None,
                dy=p.dy[:n, b : b + 1],
                dstateT=tuple(d[b : b + 1] for d in p.dstateT),
                dstates=tuple(d[:n, b : b + 1] for d in p.dstates),
            )
            for key, want in run(REFERENCE, alone).items():
                if key.startswith(("dweight", "dbias")):
                    continue
                mine = got[key][:n, b : b + 1] if want.ndim == 3 else got[key][b : b + 1]
                assert problems.error(mine, want) <= 2e-15, key
            for k, s in enumerate(cell.states):
                held = p.state0[k][b] if reverse else got[f"{s}T"][b]
                assert (got[s][n:, b] == held).all()

    @pytest.mark.quick
    @cells
    def test_segments_are_sequences_of_their_own(self, cell: Any) -> None:
        """A reset at step 3 of every row: two separate sequences, in both directions."""
        p = problem(cell, 7, 3, 2, 5)
        reset = np.zeros((7, 3), bool)
        reset[3] = True
        for reverse in (False, True):
            got = run(REFERENCE, replace(p, reset=reset, reverse=reverse))
            first, last = (slice(3, 7), slice(0, 3)) if reverse else (slice(0, 3), slice(3, 7))
            head = replace(p, x=p.x[first], dy=p.dy[first], dstateT=None, reverse=reverse)
            tail = replace(p, x=p.x[last], dy=p.dy[last], state0=None, reverse=reverse)
            a, b = run(REFERENCE, head), run(REFERENCE, tail)
            for key in ("y", "dx"):
                np.testing.assert_array_equal(got[key][first], a[key])
                np.testing.assert_array_equal(got[key][last], b[key])
            for s in cell.states:
                np.testing.assert_array_equal(got[f"{s}T"], b[f"{s}T"])
                np.testing.assert_array_equal(got[f"d{s}0"], a[f"d{s}0"])

    @cells
    def test_reset_of_the_first_step(self, cell: Any) -> None:
        """Forward it cuts state0 off; in reverse it does nothing."""
        p = problem(cell, 5, 3, 2, 5)
        reset = np.zeros((5, 3), bool)
        reset[0, 1] = True
        got = run(REFERENCE, replace(p, reset=reset))
        for s in cell.states:
            assert (got[f"d{s}0"][1] == 0).all()
            assert (got[f"d{s}0"][[0, 2]] != 0).any(axis=1).all()
        p = replace(p, reverse=True)
        assert_bitwise_equal(run(REFERENCE, replace(p, reset=reset)), run(REFERENCE, p))

    @cells
    @pytest.mark.parametrize("reverse", [False, True])
    def test_resets_beyond_the_length_do_nothing(self, cell: Any, reverse: bool) -> None:
        p = problem(cell, 6, 4, 2, 5, lengths=True, return_states=True, reverse=reverse)
        reset = np.arange(6)[:, None] >= p.lengths
        assert reset.any()
        assert_bitwise_equal(run(REFERENCE, replace(p, reset=reset)), run(REFERENCE, p))

    @pytest.mark.quick
    @cells
    def test_reverse_is_forward_on_the_flipped_sequence(self, cell: Any) -> None:
        p = problem(cell, 6, 3, 2, 5, return_states=True)
        flipped = replace(p, x=p.x[::-1], dy=p.dy[::-1], dstates=tuple(d[::-1] for d in p.dstates))
        want = run(REFERENCE, flipped)
        got = run(REFERENCE, replace(p, reverse=True))
        sequences = {"y", "dx", *cell.states}
        assert_bitwise_equal({key: a[::-1] if key in sequences else a for key, a in got.items()}, want)

    @pytest.mark.quick
    @cells
    def test_nan_stays_in_its_row_except_in_weight_gradients(self, cell: Any) -> None:
        p = problem(cell, 5, 3, 2, 5, return_states=True)
        p.x[2, 1, 0] = np.nan
        got = run(REFERENCE, p)
        for key, a in got.items():
            if key.startswith(("dweight", "dbias")):
                continue
            rows = np.isnan(a.reshape(-1, 3, a.shape[-1])).any(axis=(0, 2))
            assert not rows[[0, 2]].any(), key
            # the slope of relu is 1 for all that is not negative, NaN too: its gradient has no NaN
            assert rows[1] or (cell == rnn.with_options(relu=True) and key.startswith("d")), key
        assert np.isnan(got["dweight_hh"]).any()

    def test_two_biases_add(self) -> None:
        for cell in (lstm, rnn, gru.with_options(reset_after=False)):
            p = problem(cell, *TINY, biases="both")
            w = p.weights
            one = replace(p, weights=w | {"bias_ih": w["bias_ih"] + w["bias_hh"], "bias_hh": None})
            got, want = run(REFERENCE, p), run(REFERENCE, one)
            np.testing.assert_array_equal(got.pop("dbias_hh"), got["dbias_ih"])
            assert_close(got, want, 2e-14)


class TestTorch:
    """The formulas and layouts are PyTorch's."""

    @pytest.mark.quick
    @pytest.mark.parametrize("cell", [rnn, rnn.with_options(relu=True), lstm, gru], ids=name)
    @pytest.mark.parametrize("bias", [True, False])
    def test_forward_and_gradients(self, cell: Any, bias: bool) -> None:
        torch = pytest.importorskip("torch")
        T, B, I, H = 7, 5, 3, 11
        p = problem(cell, T, B, I, H, biases="both" if bias else "none")
        kwargs = {"nonlinearity": "relu"} if cell == rnn.with_options(relu=True) else {}
        module = getattr(torch.nn, cell.name.upper())(I, H, bias=bias, dtype=torch.float64, **kwargs)
        parameters = list(module.parameters())
        with torch.no_grad():
            for parameter, w in zip(parameters, p.weights.values(), strict=True):
                parameter.copy_(torch.tensor(w))
        x = torch.tensor(p.x, requires_grad=True)
        state0 = [torch.tensor(s[None], requires_grad=True) for s in p.state0]
        y, stateT = module(x, tuple(state0) if len(state0) == 2 else state0[0])
        stateT = stateT if isinstance(stateT, tuple) else (stateT,)
        outs = (y, *stateT)
        torch.autograd.backward(
            outs, [torch.tensor(d).reshape(o.shape) for d, o in zip((p.dy, *p.dstateT), outs, strict=True)]
        )
        want = {"y": y, "dx": x.grad}
        want |= {f"{s}T": a[0] for s, a in zip(cell.states, stateT, strict=True)}
        want |= {f"d{s}0": a.grad[0] for s, a in zip(cell.states, state0, strict=True)}
        want |= {f"d{n}": a.grad for n, a in zip(p.weights, parameters, strict=True)}
        assert_close(run(REFERENCE, p), {key: a.detach().numpy() for key, a in want.items()}, 5e-15)
