"""Recurrent dropout and zoneout: the masks, the reference, the kernels, the native API.

The oracle draws its masks by a program of its own. Tolerances are those of test_reference.py and
accuracy.py; where bits are compared there is none.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest

import oracle
from array_calls import Arrays
from fusedrnn import gradcheck, kernels, layers, masks, multilayer
from fusedrnn import test_mode as evaluation
from fusedrnn.backends import get
from fusedrnn.backends.protocol import Regularization
from fusedrnn.backends.reference import ReferenceBackend
from fusedrnn.cells import gru, lstm, rnn
from interpreter import python
from problems import CELLS, NORMED, assert_bitwise_equal, assert_close, name, problem, run
from test_reference import oracle_results

REFERENCE = ReferenceBackend()
DTYPES = (np.float32, np.float64)
TOLERANCE = {np.float32: (2e-6, 5e-6), np.float64: (1e-14, 2e-14)}  # outputs, gradients
EVERYTHING = {"lengths": True, "reset": True, "return_states": True, "biases": "both"}
CALLS = ({}, EVERYTHING | {"detach_every": 2}, EVERYTHING | {"reverse": True, "detach_every": 3})
BIG_SEED = 2**63 - 25  # both words of the key

# Of the LSTM; other cells have no zoneout_c.
KINDS = {
    "dropout": Regularization(recurrent_dropout=0.3, seed=7),
    "zoneout h": Regularization(zoneout_h=0.4, seed=BIG_SEED, stream=5),
    "zoneout c": Regularization(zoneout_c=0.4, seed=8),
    "all": Regularization(0.3, 0.2, 0.4, seed=9, stream=2**30 - 1),
    "evaluation": Regularization(0.3, 0.2, 0.4),
}


def of(kind, cell):
    """The regularization for a cell; None where that would be nothing."""
    r = KINDS[kind]
    if "c" in cell.states:
        return r
    return None if kind == "zoneout c" else r._replace(zoneout_c=0.0)


KERNELS = (*CELLS, *NORMED[:4])  # the kernels have no layer norm for GRU with reset before


def cases(*chosen, cells=CELLS):
    """Every cell with these kinds, but those that are nothing for it."""
    return pytest.mark.parametrize(
        ("cell", "kind"),
        [pytest.param(c, k, id=f"{name(c)}-{k}") for c in cells for k in chosen if of(k, c)],
    )


cells = pytest.mark.parametrize("cell", CELLS, ids=name)
kernel_cells = pytest.mark.parametrize("cell", KERNELS, ids=name)
every_case = cases(*KINDS)


@pytest.fixture
def cpu(poison):
    return get("cpu")


# --- the masks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the known answers that Salmon et al. publish with Random123
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    counter, key, words = ([int(word, 16) for word in text.split()] for text in (counter, key, words))
    got = masks.philox(np.array([counter, counter], np.uint32), (key[0], key[1]))
    assert got.dtype == np.uint32
    assert got.tolist() == [words, words]


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_masks_keep_the_share_they_say(rate):
    kept = masks.keep(rate, "zoneout_h", 3, 0, 11, np.arange(300), 333)
    assert kept.shape == (300, 333)
    n = kept.size
    assert abs(kept.sum() - (1 - rate) * n) <= 5 * (rate * (1 - rate) * n) ** 0.5


def test_masks_differ_in_kind_seed_stream_time_row_and_unit_and_in_nothing_else():
    """A mask is a function of these alone: a row's does not depend on the other rows, a unit's not on H."""
    rows = np.arange(4)
    first = ("zoneout_h", 3, 0, 11)
    drawn = [masks.keep(0.5, *first, rows, 64)]
    for other in (("zoneout_c", 3, 0, 11), ("zoneout_h", 2**40 + 3, 0, 11), ("zoneout_h", 3, 1, 11)):
        drawn.append(masks.keep(0.5, *other, rows, 64))
    drawn.append(masks.keep(0.5, *first[:3], 12, rows, 64))
    every = np.concatenate(drawn)
    assert len({row.tobytes() for row in every}) == len(every)
    np.testing.assert_array_equal(masks.keep(0.5, *first, rows[[3, 1]], 61), drawn[0][[3, 1], :61])


@pytest.mark.quick
def test_masks_are_those_of_another_program():
    for k, kind in enumerate(masks.KINDS):
        got = masks.keep(0.3, kind, BIG_SEED, 2**30 - 1, 2**31, np.array([0, 5]), 9)
        want = [oracle.kept(k, 0.3, BIG_SEED, 2**30 - 1, 2**31, b, 9) for b in (0, 5)]
        np.testing.assert_array_equal(got, want)


# --- the reference against the oracle -----------------------------------------------------------------------


@pytest.mark.quick
@every_case
@pytest.mark.parametrize("call", CALLS, ids=["plain", "all", "reverse"])
def test_reference_against_complex_steps(cell, kind, call):
    p = problem(cell, 5, 4, 2, 3, regularization=of(kind, cell), **call)
    want = oracle_results(p)
    for dtype, tolerance in ((np.float64, 2e-14), (np.longdouble, 1e-17)):
        got = run(REFERENCE, p.astype(dtype))
        assert all(a.dtype == dtype for a in got.values())
        assert_close(got, want, tolerance)


@every_case
def test_reference_recomputes_the_same_bits(cell, kind):
    p = problem(cell, 11, 5, 3, 7, regularization=of(kind, cell), **EVERYTHING)
    assert_bitwise_equal(run(REFERENCE, p, save="boundary_states"), run(REFERENCE, p))


# --- the kernels against the reference ----------------------------------------------------------------------


def assert_right(backend, p, save="all"):
    want = run(REFERENCE, p.astype(np.longdouble))
    for dtype in DTYPES:
        got = run(backend, p.astype(dtype), save=save)
        assert got.keys() == want.keys()
        for gradients, tolerance in zip((False, True), TOLERANCE[dtype], strict=True):
            part = {key: a for key, a in want.items() if key.startswith("d") == gradients}
            assert_close({key: got[key] for key in part}, part, tolerance)


@pytest.mark.quick
@pytest.mark.kernel
@pytest.mark.mutation
@cases(*KINDS, cells=KERNELS)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_kernels(cell, kind, reverse, cpu):
    assert_right(
        cpu, problem(cell, 7, 11, 5, 35, regularization=of(kind, cell), reverse=reverse, **EVERYTHING)
    )


# One row, one unit block and less, several chunks, W x of several steps at once, weights beyond a megabyte.
@pytest.mark.slow
@pytest.mark.kernel
@pytest.mark.parametrize("size", [(9, 1, 3, 7), (5, 2, 20, 64), (52, 64, 2, 7), (3, 9, 67, 297)], ids=str)
@cases("all", "evaluation")
def test_kernels_at_other_sizes(cell, size, kind, cpu, threads):
    for call in ({}, EVERYTHING):
        p = problem(cell, *size, regularization=of(kind, cell), **call)
        for count in (1, 2, 3):
            threads(count)
            assert_right(cpu, p)


@pytest.mark.kernel
@every_case
def test_an_upstream_gradient_of_the_last_state_alone(cell, kind, cpu):
    """Nothing but the carried gradient reaches the first steps."""
    assert_right(cpu, problem(cell, 6, 5, 3, 19, regularization=of(kind, cell), upstream=("dstateT",)))


@pytest.mark.kernel
@pytest.mark.parametrize("size", [(0, 3, 2, 7), (4, 0, 2, 7), (1, 1, 1, 7)], ids=str)
@cells
def test_no_steps_no_rows_one_of_each(cell, size, cpu):
    assert_right(cpu, problem(cell, *size, regularization=of("all", cell), return_states=True))


# --- the same bits ------------------------------------------------------------------------------------------


@pytest.mark.kernel
@pytest.mark.parametrize("size", [(9, 37, 5, 33), (3, 3, 150, 290), (130, 40, 3, 17)], ids=str)
@kernel_cells
def test_bits_for_any_threads_and_what_is_saved(cell, size, cpu, threads):
    """Split by rows, by units, in several chunks; kept, made again, or kept in an array."""
    for kind, dtype in (("all", np.float32), ("evaluation", np.float64)):
        p = problem(cell, *size, dtype=dtype, regularization=of(kind, cell), **EVERYTHING)
        threads(1)
        want = run(cpu, p)
        for count in (1, 2, 3):
            threads(count)
            assert_bitwise_equal(run(cpu, p), want)
            assert_bitwise_equal(run(cpu, p, save="boundary_states"), want)
            for recompute in (False, True):
                call = Arrays(p, recompute)
                out = call.forward()
                assert np.array_equal(out["y"], want["y"])
                for key, value in call.backward(out["y"], out["tape"]).items():
                    assert np.array_equal(value, want[key]), key


@pytest.mark.kernel
@kernel_cells
def test_a_row_keeps_its_bits_whatever_the_rows_after_it(cell, cpu):
    p = problem(cell, 6, 9, 3, 19, regularization=of("all", cell), **EVERYTHING)
    want = run(cpu, p)
    for B in (1, 4, 8):
        first = replace(
            p,
            x=p.x[:, :B],
            state0=tuple(s[:B] for s in p.state0),
            lengths=p.lengths[:B],
            reset=p.reset[:, :B],
            dy=p.dy[:, :B],
            dstateT=tuple(d[:B] for d in p.dstateT),
            dstates=tuple(d[:, :B] for d in p.dstates),
        )
        got = {k: a for k, a in run(cpu, first).items() if not k.startswith(("dweight", "dbias", "dgain"))}
        assert_bitwise_equal(got, {k: want[k][..., :B, :] for k in got})


def digest():
    """Everything that comes out, hashed; for a process of its own."""
    joined = hashlib.sha256()
    for cell in KERNELS:
        for dtype in DTYPES:
            for kind in ("all", "evaluation"):
                p = problem(cell, 7, 13, 5, 133, dtype=dtype, regularization=of(kind, cell), **EVERYTHING)
                for key, a in sorted(run(get("cpu"), p).items()):
                    joined.update(key.encode() + a.tobytes())
    return joined.hexdigest()


@pytest.mark.kernel
def test_bits_on_every_instruction_set_with_fma(cpu):
    from fusedrnn import _core

    info = _core.info()
    found = {}
    for isa in (level for level in info["built"] if level in info["detected"] and level != "portable"):
        code = "import test_regularization as t, fusedrnn._core as c; print(c.info()['isa'], t.digest())"
        used, found[isa] = python(code, FUSEDRNN_ISA=isa).split()
        assert used == isa
    if not found:
        pytest.skip("no level with FMA here")
    assert len(set(found.values())) == 1, found


BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.kernel)]
backends = pytest.mark.parametrize("backend", BACKENDS)


# --- what it means ------------------------------------------------------------------------------------------


@backends
@kernel_cells
def test_rates_of_zero_are_the_plain_cell(cell, backend):
    p = problem(cell, 5, 4, 2, 19, **EVERYTHING)
    want = run(get(backend), p)
    for r in (Regularization(), Regularization(seed=1), Regularization(recurrent_dropout=0.5)):
        assert_bitwise_equal(run(get(backend), replace(p, regularization=r)), want)


@backends
@cells
@pytest.mark.parametrize("seed", [None, 3])
def test_zoneout_of_one_holds_the_state(cell, backend, seed):
    """And the gradient goes to the initial state as it came; the weights get none."""
    r = Regularization(0, 1, 1 if "c" in cell.states else 0, seed)
    p = problem(cell, 5, 4, 2, 19, regularization=r, return_states=True)
    got = run(get(backend), p)
    for k, s in enumerate(cell.states):
        np.testing.assert_array_equal(got[s], np.broadcast_to(p.state0[k], got[s].shape))
        np.testing.assert_array_equal(got[f"{s}T"], p.state0[k])
        came = p.dstateT[k] + p.dstates[k].sum(axis=0) + (p.dy.sum(axis=0) if s == "h" else 0)
        np.testing.assert_allclose(got[f"d{s}0"], came, rtol=0, atol=1e-14)
    for key in ("dx", "dweight_ih", "dweight_hh", "dbias_ih"):
        assert not got[key].any(), key


@backends
@cells
def test_dropout_of_one_leaves_no_recurrent_product(cell, backend):
    """GRU reset-after keeps bias_hh, and its z * h_prev."""
    p = problem(cell, 5, 4, 2, 19, **EVERYTHING)
    got = run(get(backend), replace(p, regularization=Regularization(1, seed=3)))
    without = p.weights | {"weight_hh": np.zeros_like(p.weights["weight_hh"])}
    want = run(get(backend), replace(p, weights=without))
    assert not got.pop("dweight_hh").any()
    assert want.pop("dweight_hh").any()
    assert_close(got, want, 1e-14)


@backends
@pytest.mark.parametrize("cell", [lstm, gru], ids=name)
def test_evaluation_is_the_mean_of_training(cell, backend):
    """Of one step with zoneout, over many rows of the same input: within 5 standard deviations."""
    B = 4000
    p = problem(cell, 1, 1, 2, 7)
    rates = 0.0, 0.3, 0.2 if "c" in cell.states else 0.0
    x, state0 = p.x.repeat(B, axis=1), tuple(s.repeat(B, axis=0) for s in p.state0)
    out = {
        seed: get(backend).forward(cell, x, p.weights, state0, regularization=Regularization(*rates, seed))
        for seed in (None, 1)
    }
    for mean, drawn in zip(out[None].stateT, out[1].stateT, strict=True):
        assert (mean == mean[0]).all()
        assert (abs(drawn.mean(axis=0) - mean[0]) <= 5 * drawn.std(axis=0) / B**0.5).all()


@backends
def test_dropout_is_one_mask_for_the_whole_call_and_scaled(backend):
    """An Elman cell with weight_hh = 1 shows what it multiplied."""
    cell, H = rnn.with_options(relu=True), 9
    weights = {"weight_ih": np.zeros((H, 2)), "weight_hh": np.eye(H)}
    x, h0 = np.zeros((3, 4, 2)), np.ones((4, H))
    y = kernels.forward(
        cell, x, weights, (h0,), backend=backend, regularization=Regularization(0.25, seed=5)
    ).y
    kept = masks.keep(0.25, "recurrent_dropout", 5, 0, 0, np.arange(4), H)
    assert kept.any()
    assert not kept.all()
    for t in range(3):
        np.testing.assert_allclose(y[t], np.where(kept, (4 / 3) ** (t + 1), 0), rtol=1e-15)


# --- wrong arguments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "cpu", "numba"])
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ((0.1, 0.1), TypeError, "regularization: expected a Regularization or None, got tuple"),
        (Regularization("0.1"), TypeError, "recurrent_dropout: expected a number, got str"),
        (Regularization(0, True), TypeError, "zoneout_h: expected a number, got bool"),
        (Regularization(-0.1), ValueError, "recurrent_dropout: expected a number from 0 to 1, got -0.1"),
        (Regularization(0, np.nan), ValueError, "zoneout_h: expected a number from 0 to 1, got nan"),
        (Regularization(0, 0, np.inf), ValueError, "zoneout_c: expected a number from 0 to 1, got inf"),
        (
            Regularization(0, 0, 0.5),
            ValueError,
            "zoneout_c: expected 0 for the cell gru, which has no c, got 0.5",
        ),
        (Regularization(0.1, seed=1.5), TypeError, "seed: expected a whole number, got float"),
        (Regularization(0.1, seed=-1), ValueError, "seed: expected 0 to 9223372036854775807, got -1"),
        (Regularization(0.1, seed=2**63), ValueError, "seed: expected 0 to 9223372036854775807, got"),
        (Regularization(0.1, seed=1, stream=2**30), ValueError, "stream: expected 0 to 1073741823, got"),
        (
            Regularization(0.1, seed=1, stream=None),
            TypeError,
            "stream: expected a whole number, got NoneType",
        ),
    ],
)
def test_wrong_arguments_are_named(backend, wrong, error, message):
    if (reason := get(backend).unavailable()) is not None:
        pytest.skip(reason)
    p = problem(gru, 2, 3, 2, 5)
    with pytest.raises(error, match=message):
        kernels.forward(p.cell, p.x, p.weights, regularization=wrong, backend=backend)
    with pytest.raises(error, match=message):
        multilayer.forward_multilayer(p.cell, p.x, [p.weights], regularization=wrong, backend=backend)


@pytest.mark.kernel
def test_the_compiled_module_refuses_what_would_be_unsafe(cpu):
    from fusedrnn import _core

    p = problem(rnn, 2, 3, 2, 5)
    packed = cpu.pack(p.cell, p.weights).core

    def forward(regularization):
        return _core.forward(packed, None, p.x, (), (), None, None, False, 0, regularization, False, 1)

    assert len(forward((0.5, 0.5, 0.0, 1, 0))) == 4
    for wrong in ((2.0, 0.0, 0.0, 1, 0), (0.0, np.nan, 0.0, 1, 0), (0.0, 0.0, 0.5, 1, 0)):
        with pytest.raises(ValueError, match="expected"):
            forward(wrong)
    for wrong in ((0.5,), (0.5, 0.5, 0.0, -1, 0), (0.5, 0.5, 0.0, 1, 2**32), "abcde", 3):
        with pytest.raises(TypeError):
            forward(wrong)
    r = Regularization(zoneout_h=0.5, seed=1)
    sizes = (2, 3, 2, 5, 5)
    assert cpu.tape_shape(p.cell, sizes, regularization=r)[1] > cpu.tape_shape(p.cell, sizes)[1]
    out = Arrays(replace(p, regularization=r), False).forward()
    with pytest.raises(ValueError, match="tape: expected"):
        Arrays(p, False).backward(out["y"], out["tape"])


def test_numba_refuses_by_name():
    if (reason := get("numba").unavailable()) is not None:
        pytest.skip(reason)
    p = problem(gru, 2, 3, 2, 5)
    with pytest.raises(ValueError, match=r"^recurrent_dropout: not supported by the numba backend"):
        get("numba").forward(p.cell, p.x, p.weights, regularization=Regularization(0.1, seed=1))
    get("numba").forward(p.cell, p.x, p.weights, regularization=Regularization(0.1))  # does nothing


# --- several layers and directions --------------------------------------------------------------------------


@backends
def test_each_layer_and_direction_has_masks_of_its_own(backend):
    cell, r = gru, Regularization(0.3, 0.2, seed=4)
    first, second = (problem(cell, 5, 3, I, 7, seed).weights for seed, I in ((1, 2), (2, 14)))
    other = [problem(cell, 5, 3, I, 7, seed).weights for seed, I in ((3, 2), (4, 14))]
    x = problem(cell, 5, 3, 2, 7).x
    weights = [first, other[0], second, other[1]]
    out = multilayer.forward_multilayer(
        cell, x, weights, bidirectional=True, regularization=r, backend=backend
    )
    y = x
    for layer in range(2):
        outs = [
            kernels.forward(cell, y, weights[n], reverse=n % 2 == 1, backend=backend,
                               regularization=r._replace(stream=n))
            for n in (2 * layer, 2 * layer + 1)
        ]  # fmt: skip
        y = np.concatenate([o.y for o in outs], axis=2)
    np.testing.assert_array_equal(out.y, y)
    equal = multilayer.forward_multilayer(
        cell,
        x,
        [first, first],
        bidirectional=True,
        regularization=Regularization(0.9, seed=4),
        backend=backend,
    )
    assert (equal.y[0, :, :7] != equal.y[-1, :, 7:]).any()


@backends
def test_packed_rows(backend):
    r = Regularization(0.3, 0.2, 0.1, seed=4)
    p = problem(lstm, 3, 4, 2, 5)
    sizes = np.array([4, 3, 1])
    ragged = kernels.Ragged.of(sizes)
    x = ragged.rows(p.x)
    packed = kernels.forward(p.cell, x, p.weights, batch_sizes=sizes, regularization=r, backend=backend)
    padded = kernels.forward(
        p.cell, p.x, p.weights, lengths=ragged.lengths, regularization=r, backend=backend
    )
    np.testing.assert_array_equal(packed.y, ragged.rows(padded.y))


# --- the native layers --------------------------------------------------------------------------------------

LAYERS = [
    (layers.LSTM, {"zoneout_c": 0.2}),
    (layers.GRU, {}),
    (layers.GRU, {"reset_after": False}),
    (layers.RNN, {}),
]


@pytest.mark.parametrize(("layer", "options"), LAYERS, ids=["lstm", "gru", "gru before", "rnn"])
@pytest.mark.parametrize("more", [{}, {"num_layers": 2, "bidirectional": True, "dropout": 0.3}], ids=str)
def test_layers_pass_the_gradient_check(layer, options, more):
    np.random.seed(0)
    net = layer(5, 3, recurrent_dropout=0.3, zoneout_h=0.2, dtype=np.float64, **options, **more)
    x = np.random.randn(4, 3, 3)
    gradcheck(net, (x,))
    gradcheck(net, (x,), method="central", fast_mode=True)
    with evaluation():
        gradcheck(net, (x,))
        gradcheck(net, (x,), method="central", fast_mode=True)
    if not more:
        gradcheck(net, (x[0],))


def test_layers_draw_in_training_and_not_in_evaluation():
    x = np.random.default_rng(0).standard_normal((6, 4, 3)).astype(np.float32)
    net = layers.LSTM(9, 3, recurrent_dropout=0.3, zoneout_h=0.2, zoneout_c=0.1)

    def y(seed):
        np.random.seed(seed)
        net.reset_state()
        return net(x).data

    np.testing.assert_array_equal(y(1), y(1))
    assert (y(1) != y(2)).any()
    assert (net(x).data != net(x).data).any()
    with evaluation():
        np.testing.assert_array_equal(y(1), y(2))
        w = {n: p.data for n, p in net.named_params()}
        want = kernels.forward(lstm, x, w, regularization=Regularization(0, 0.2, 0.1))
        np.testing.assert_array_equal(y(1), want.y)
    plain = layers.LSTM(9, 3, recurrent_dropout=0.0)
    before = np.random.get_state()[2]
    plain(x)
    assert np.random.get_state()[2] == before  # draws nothing where there is nothing to draw for


def test_a_layer_in_training_is_fusedrnn_kernels_with_its_seed():
    net = layers.GRU(9, 3, recurrent_dropout=0.3, zoneout_h=0.2)
    x = np.random.default_rng(0).standard_normal((6, 4, 3)).astype(np.float32)
    y = net(x)
    r = y.creator.options["regularization"]
    assert r[:3] == (0.3, 0.2, 0.0)
    w = {n: p.data for n, p in net.named_params()}
    np.testing.assert_array_equal(kernels.forward(gru, x, w, regularization=r).y, y.data)


def test_layers_refuse_by_name():
    for wrong in ({"recurrent_dropout": 1.5}, {"zoneout_h": -1}, {"zoneout_h": "a"}, {"zoneout_c": 0.5}):
        with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
            layers.GRU(4, **wrong)
    with pytest.raises(ValueError, match="fused=False"):
        layers.LSTM(4, zoneout_c=0.5, fused=False)
