"""docs/bptt.md is right: its code is executed and compared with complex-step derivatives, and the published
gradients that it calls wrong are wrong."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from fusedrnn import kernels
from fusedrnn.cells import gru, lstm, rnn

pytestmark = pytest.mark.quick

PAGE = (Path(__file__).parents[2] / "docs" / "bptt.md").read_text()
T, B, I, H = 5, 3, 2, 7


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


page: dict = {"np": np, "sigmoid": sigmoid}
for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
    exec(compile(block, "docs/bptt.md", "exec"), page)


@pytest.mark.parametrize("cell", [rnn, lstm, gru, gru.with_options(reset_after=False)], ids=repr)
def test_what_is_derived_stands_on_the_page(cell):
    assert f"```text\n{cell}\n```" in PAGE


def make(gates: int, two_biases: bool, seed: int = 1):
    draw = np.random.default_rng(seed).standard_normal
    weights = {
        "weight_ih": draw((gates * H, I)),
        "weight_hh": draw((gates * H, H)) * 0.5,
        "bias_ih": draw(gates * H),
    }
    if two_biases:
        weights["bias_hh"] = draw(gates * H)
    return weights, draw((T, B, I)), draw((B, H)), draw((T, B, H))


def complex_step(loss, array):
    """Derivative of ``loss`` by every entry of ``array``, by the complex step: exact to rounding."""
    found = np.empty(array.shape)
    for index in np.ndindex(array.shape):
        moved = array.astype(complex)
        moved[index] += 1e-30j
        found[index] = loss(moved).imag / 1e-30
    return found


def assert_gradient(got, truth):
    assert got.shape == truth.shape
    assert np.max(np.abs(got - truth)) <= 1e-13 * np.max(np.abs(truth))


CELLS = {"elman": (1, False), "gru_after": (3, True), "gru_before": (3, False)}


@pytest.mark.parametrize("name", CELLS)
def test_one_state_cells(name):
    gates, two_biases = CELLS[name]
    weights, x, h0, dy = make(gates, two_biases)
    step, back = page[f"{name}_step"], page[f"{name}_back"]

    def loss(weights, x, h):
        total = 0
        for t in range(T):
            h, _ = step(weights, x[t], h)
            total = total + (h * dy[t]).sum()
        return total

    h, states, tape = h0, [h0], []
    for t in range(T):
        h, saved = step(weights, x[t], h)
        states.append(h)
        tape.append(saved)
    dx = np.empty_like(x)
    dweights = {key: np.zeros_like(w) for key, w in weights.items()}
    carry = 0
    for t in reversed(range(T)):
        da_x, da_h, v, chain, direct = back(weights, dy[t] + carry, tape[t], states[t])
        carry = chain + direct
        dx[t] = da_x @ weights["weight_ih"]
        dweights["weight_ih"] += da_x.T @ x[t]
        if isinstance(v, tuple):
            dweights["weight_hh"] += np.concatenate([da_h[:, : 2 * H].T @ v[0], da_h[:, 2 * H :].T @ v[1]])
        else:
            dweights["weight_hh"] += da_h.T @ v
        dweights["bias_ih"] += da_x.sum(axis=0)
        if two_biases:
            dweights["bias_hh"] += da_h.sum(axis=0)

    assert_gradient(dx, complex_step(lambda v: loss(weights, v, h0), x))
    assert_gradient(carry, complex_step(lambda v: loss(weights, x, v), h0))
    for key, got in dweights.items():
        truth = complex_step(lambda v, key=key: loss(weights | {key: v}, x, h0), weights[key])
        assert_gradient(got, truth)


def test_recurrent_dropout_and_zoneout():
    weights, x, h0, dy = make(4, False)
    rng = np.random.default_rng(3)
    c0, dc = rng.standard_normal((2, B, H))
    m = np.where(rng.random((B, H)) < 0.4, 0, 1 / 0.6)
    for k in (np.where(rng.random((T, 2, B, H)) < 0.4, 0, 1), np.full((T, 2, B, H), 0.7)):

        def loss(weights, x, h, c, k=k):
            total = 0
            for t in range(T):
                h, c, _ = page["regularized_lstm_step"](weights, x[t], h, c, m, *k[t])
                total = total + (h * dy[t]).sum()
            return total + (c * dc).sum()

        before, tape, h, c = [], [], h0, c0
        for t in range(T):
            before.append((h, c))
            h, c, saved = page["regularized_lstm_step"](weights, x[t], h, c, m, *k[t])
            tape.append(saved)
        dx, dweight_hh, dh, dc_carried = np.empty_like(x), 0, 0, dc
        for t in reversed(range(T)):
            da, v, dh, dc_carried = page["regularized_lstm_back"](
                weights, dy[t] + dh, dc_carried, tape[t], *before[t], m, *k[t]
            )
            dx[t] = da @ weights["weight_ih"]
            dweight_hh = dweight_hh + da.T @ v
        assert_gradient(dx, complex_step(lambda v: loss(weights, v, h0, c0), x))
        assert_gradient(dh, complex_step(lambda v: loss(weights, x, v, c0), h0))
        assert_gradient(dc_carried, complex_step(lambda v: loss(weights, x, h0, v), c0))
        truth = complex_step(lambda v: loss(weights | {"weight_hh": v}, x, h0, c0), weights["weight_hh"])
        assert_gradient(dweight_hh, truth)


@pytest.fixture(scope="module")
def example():
    """Forward and backward of the page's LSTM, with every intermediate value, and the loss as a function."""
    weights, x, h0, dy = make(4, False)
    c0 = np.random.default_rng(2).standard_normal((B, H))

    def loss(weights, x, h, c, add=None):
        """``add`` = (name, t, what): added to h or c after step t, to differentiate by them."""
        total = 0
        for t in range(T):
            h, c, _ = page["lstm_step"](weights, x[t], h, c)
            if add is not None and add[1] == t:
                if add[0] == "h":
                    h = h + add[2]
                else:  # h is computed from c
                    o = page["lstm_step"](weights, x[t], *before[t])[2][3]
                    c = c + add[2]
                    h = o * np.tanh(c)
            total = total + (h * dy[t]).sum()
        return total

    before, tape, h, c = [], [], h0, c0
    for t in range(T):
        before.append((h, c))
        h, c, saved = page["lstm_step"](weights, x[t], h, c)
        tape.append(saved)
    dh_all, dc_all, da_all = [None] * T, [None] * T, [None] * T
    chain = dc = np.zeros((B, H))
    for t in reversed(range(T)):
        dh_all[t] = dy[t] + chain
        da_all[t], chain, dc_all[t], dc = page["lstm_back"](weights, dh_all[t], dc, tape[t], before[t][1])
    return {
        "weights": weights, "x": x, "h0": h0, "c0": c0, "dy": dy, "loss": loss, "before": before,
        "tape": tape, "dh": dh_all, "dc": dc_all, "da": da_all, "dh0": chain, "dc0": dc,
    }  # fmt: skip


def test_lstm_cell(example):
    w, x, h0, c0, loss = (example[k] for k in ("weights", "x", "h0", "c0", "loss"))
    da = np.stack(example["da"])
    h_prev = np.stack([h for h, _ in example["before"]])
    assert_gradient(da @ w["weight_ih"], complex_step(lambda v: loss(w, v, h0, c0), x))
    assert_gradient(example["dh0"], complex_step(lambda v: loss(w, x, v, c0), h0))
    assert_gradient(example["dc0"], complex_step(lambda v: loss(w, x, h0, v), c0))
    products = {
        "weight_ih": np.einsum("tbg,tbi->gi", da, x),
        "weight_hh": np.einsum("tbg,tbh->gh", da, h_prev),
        "bias_ih": da.sum(axis=(0, 1)),
    }
    for key, got in products.items():
        assert_gradient(got, complex_step(lambda v, key=key: loss(w | {key: v}, x, h0, c0), w[key]))


def test_lstm_with_layer_norm():
    weights, x, h0, dy = make(4, False)
    draw = np.random.default_rng(3).standard_normal
    weights |= {"gain_ih": draw(4 * H), "gain_hh": draw(4 * H), "gain_c": draw(H), "bias_c": draw(H)}
    c0 = draw((B, H))
    step, back = page["lstm_norm_step"], page["lstm_norm_back"]

    def loss(weights, x, h, c):
        total = 0
        for t in range(T):
            h, c, _ = step(weights, x[t], h, c)
            total = total + (h * dy[t]).sum()
        return total

    before, tape, y, h, c = [], [], [], h0, c0
    for t in range(T):
        before.append((h, c))
        h, c, saved = step(weights, x[t], h, c)
        tape.append(saved)
        y.append(h)
    run = kernels.forward(lstm.with_options(layer_norm=True), x, weights, (h0, c0), backend="reference")
    np.testing.assert_allclose(y, run.y, rtol=0, atol=1e-13)

    dweights = {key: np.zeros_like(w) for key, w in weights.items()}
    dx, chain, dc = np.empty_like(x), 0, 0
    for t in reversed(range(T)):
        h_prev, c_prev = before[t]
        da, dm, dproduct_x, dproduct_h, chain, dc = back(weights, dy[t] + chain, dc, tape[t], c_prev)
        *_, norm_x, norm_h, norm_c = tape[t]
        dx[t] = dproduct_x @ weights["weight_ih"]
        dweights["weight_ih"] += dproduct_x.T @ x[t]
        dweights["weight_hh"] += dproduct_h.T @ h_prev
        for key, d in (("bias_ih", da), ("gain_ih", da * norm_x[0]), ("gain_hh", da * norm_h[0])):
            dweights[key] += d.sum(axis=0)
        dweights["gain_c"] += (dm * norm_c[0]).sum(axis=0)
        dweights["bias_c"] += dm.sum(axis=0)

    assert_gradient(dx, complex_step(lambda v: loss(weights, v, h0, c0), x))
    assert_gradient(chain, complex_step(lambda v: loss(weights, x, v, c0), h0))
    assert_gradient(dc, complex_step(lambda v: loss(weights, x, h0, v), c0))
    for key, got in dweights.items():
        truth = complex_step(lambda v, key=key: loss(weights | {key: v}, x, h0, c0), weights[key])
        assert_gradient(got, truth)


def truths(example, t):
    """Whole derivatives at step t by the complex step, for the quantities of the page's table."""
    w, x, h0, c0, loss = (example[k] for k in ("weights", "x", "h0", "c0", "loss"))

    def by_state(name, t):
        return complex_step(lambda v: loss(w, x, h0, c0, (name, t, v)), np.zeros((B, H)))

    def by_x(v):
        moved = x.astype(complex)
        moved[t] = v
        return loss(w, moved, h0, c0)

    return {
        "dh": by_state("h", t),
        "dc": by_state("c", t),
        "dh_prev": by_state("h", t - 1),
        "dc_prev": by_state("c", t - 1),
        "dx": complex_step(by_x, x[t]),
    }


# (number, left side as printed, which quantity, the printed right side in our names)
PRINTED = [
    ("1", "dE/dh_t = dE/dc_t · o(1-o)", "dh", "dc * o * (1 - o)"),
    ("2", "dE/dc_t = dE/dh_t · o · tanh(c_t)", "dc", "dh * o * np.tanh(c)"),
    ("3", "dE/dh_{t-1} = dE/dc_t · f(1-f)", "dh_prev", "dc * f * (1 - f)"),
    ("4", "dE/dx_t = dE/dh_t · (U_o o)(1-o)", "dx", "(dh * o * (1 - o)) @ U_o"),
    ("5", "dE/dx_t = dE/dh_t · (U_o o)(1-o)", "dx", "(dh * o * (1 - o)) @ U_o"),
    ("6", "dE/dh_{t-1} = dE/dh_t · o · tanh(c_t)", "dh_prev", "dh * o * np.tanh(c)"),
    ("7", "dE/dc_{t-1} = dE/dh_t · o · tanh(c_t)(1-o) f", "dc_prev", "dh * o * np.tanh(c) * (1 - o) * f"),
]


@pytest.mark.parametrize(("number", "printed", "quantity", "formula"), PRINTED, ids=[p[0] for p in PRINTED])
def test_published_error(example, number, printed, quantity, formula):
    """Row ``number`` of the page: the right formula is right, the printed one off by more than a tenth."""
    (row,) = re.findall(rf"^\| {number} \| (.*?) \| `(.*?)` \|", PAGE, re.MULTILINE)
    assert row[0] == printed
    name, _, right = row[1].partition(" = ")
    assert name == quantity

    t = 2
    _, f, _, o, c = example["tape"][t]
    values = {
        "np": np, "tanh": np.tanh, "f": f, "o": o, "c": c, "U_o": example["weights"]["weight_ih"][3 * H :],
        "weight_ih": example["weights"]["weight_ih"], "weight_hh": example["weights"]["weight_hh"],
        "dh": example["dh"][t], "dc": example["dc"][t], "da": example["da"][t], "dy": example["dy"][t],
        "dc_next": example["dc"][t + 1], "f_next": example["tape"][t + 1][1], "da_next": example["da"][t + 1],
        "dy_prev": example["dy"][t - 1], "dh_prev": example["dh"][t - 1],
        "o_prev": example["tape"][t - 1][3], "c_prev": example["before"][t][1],
    }  # fmt: skip
    truth = truths(example, t)[quantity]
    assert_gradient(eval(right, values), truth)
    wrong = eval(formula, values)
    assert wrong.shape == truth.shape
    assert np.max(np.abs(wrong - truth)) > 0.1 * np.max(np.abs(truth))


@pytest.mark.parametrize("cut", range(1, T))
def test_chunks_with_gradients_passed_on_are_full_bptt(example, cut):
    """Dropping dstate0 at a chunk boundary truncates; passing it on as dstateT gives the full gradient."""
    w, x, dy, h0, c0 = (example[k] for k in ("weights", "x", "dy", "h0", "c0"))
    first = kernels.forward(lstm, x[:cut], w, (h0, c0), backend="reference")
    second = kernels.forward(lstm, x[cut:], w, first.stateT, backend="reference")
    late = kernels.backward(second.tape, dy[cut:])
    early = kernels.backward(first.tape, dy[:cut], late.dstate0)
    cut_off = kernels.backward(first.tape, dy[:cut])
    assert_gradient(np.concatenate([early.dx, late.dx]), np.stack(example["da"]) @ w["weight_ih"])
    assert_gradient(early.dstate0[0], example["dh0"])
    assert_gradient(early.dstate0[1], example["dc0"])
    assert np.max(np.abs(cut_off.dx - early.dx)) > 1e-3 * np.max(np.abs(early.dx))


@pytest.mark.parametrize("name", CELLS)
def test_page_is_what_the_library_computes(name):
    cell = {"elman": rnn, "gru_after": gru, "gru_before": gru.with_options(reset_after=False)}[name]
    weights, x, h0, _ = make(*CELLS[name])
    y = kernels.forward(cell, x, weights, (h0,), backend="reference").y
    h = h0
    for t in range(T):
        h, _ = page[f"{name}_step"](weights, x[t], h)
        np.testing.assert_allclose(y[t], h, rtol=0, atol=1e-14)


def test_update_gate_the_other_way_round():
    """Both forms with z swapped, written out here, equal ours with the sign of z's rows changed."""
    for name in ("gru_after", "gru_before"):
        weights, x, h, _ = make(3, name == "gru_after")
        ours, (_, z, *_) = page[f"{name}_step"](weights, x[0], h)
        theirs = page["swap_update_gate"](weights)
        _, (_, z_theirs, n_theirs, *_) = page[f"{name}_step"](theirs, x[0], h)
        np.testing.assert_allclose(z_theirs, 1 - z, rtol=0, atol=1e-15)
        np.testing.assert_allclose((1 - z_theirs) * h + z_theirs * n_theirs, ours, rtol=0, atol=1e-15)


def test_parameter_counts():
    """An LSTM has four times the parameters of an Elman network, not fewer; a GRU three times."""
    count = {gates: sum(w.size for w in make(gates, False)[0].values()) for gates in (1, 3, 4)}
    assert count[1] == H * (I + H + 1)
    assert count[4] == 4 * count[1]
    assert count[3] == 3 * count[1]
