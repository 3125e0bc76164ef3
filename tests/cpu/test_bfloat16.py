"""Arrays in bfloat16: kernels and native layers beside float64, PyTorch's bits, what is refused.

Errors are in units of 2**-8 of an array's largest entry, as much as one rounding may change a number.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
pytest.importorskip("fusedrnn._core", reason="the compiled module is not built")
import ml_dtypes

from bfloat16 import needs_bfloat16
from fusedrnn import cells, checkpoint, kernels, layers, multilayer, no_grad, optimizers
from fusedrnn import functions as F
from fusedrnn.autograd import Variable
from fusedrnn.backends import get
from fusedrnn.backends.cpu import CpuBackend
from fusedrnn.backends.protocol import Regularization
from fusedrnn.cells.builtin import COMPILED
from fusedrnn.cells.zoo import mgu
from problems import OPTIONS, assert_bitwise_equal, errors, expected_names, name, problem, run

BF16 = np.dtype(ml_dtypes.bfloat16)
CPU = CpuBackend()
pytestmark = [pytest.mark.kernel, pytest.mark.quick, pytest.mark.usefixtures("poison")]

every_kind = pytest.mark.parametrize("cell", COMPILED.values(), ids=name)
T, B, I, H = 9, 5, 11, 37


def wide(results):
    return {key: a.astype(np.float64) for key, a in results.items()}


def units(got, want):
    assert {a.dtype for a in got.values()} == {BF16}
    return 2**8 * np.array(list(errors(wide(got), want).values()))


def both(p):
    """The results of a problem, and the reference's of the same numbers in float64."""
    p = p.astype(BF16)
    got, want = run(CPU, p), run(get("reference"), p.astype(np.float64))
    assert got.keys() == expected_names(p)
    if p.cell.options.get("relu"):  # its gradient jumps where rounding changes a sign
        got, want = ({key: a for key, a in r.items() if not key.startswith("d")} for r in (got, want))
    return got, want


@needs_bfloat16
@every_kind
@pytest.mark.parametrize("sizes", [(T, B, I, H), (3, 17, 16, 16), (20, 1, 40, 70), (71, 21, 30, 50)], ids=str)
def test_errors(cell, sizes):
    """The last in several chunks, of an odd number of rows."""
    assert units(*both(problem(cell, *sizes))).max() < 2.5


@needs_bfloat16
@every_kind
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(cell, options):
    """As the reference; recompute and packed weights give the same bits."""
    p = problem(cell, 7, 4, 5, 19, **options)
    assert units(*both(p)).max() < 3.5
    p = p.astype(BF16)
    got = run(CPU, p)
    assert_bitwise_equal(run(CPU, p, save="boundary_states"), got)
    for save in ("all", "boundary_states"):
        assert_bitwise_equal(run(CPU, replace(p, weights=CPU.pack(cell, p.weights)), save=save), got)


@needs_bfloat16
@every_kind
@pytest.mark.parametrize("seed", [3, None])
def test_regularization(cell, seed):
    zoneout_c = 0.1 if "c" in cell.states else 0.0
    p = problem(cell, 7, 4, 5, 19, regularization=Regularization(0.3, 0.2, zoneout_c, seed))
    assert units(*both(p)).max() < 3.5


@needs_bfloat16
@every_kind
def test_any_strides_any_number_of_threads(cell, threads):
    """Large enough for several threads to convert the arrays."""
    p = problem(cell, 40, 30, 64, 50, return_states=True).astype(BF16)
    got = run(CPU, p)
    before = p.x.copy()
    other = replace(
        p,
        x=np.ascontiguousarray(p.x.transpose(1, 0, 2)).transpose(1, 0, 2),
        weights={n: np.asfortranarray(w) for n, w in p.weights.items()},
        state0=tuple(np.repeat(s, 2, axis=1)[:, ::2] for s in p.state0),
        dy=np.repeat(p.dy, 2, axis=0)[::2],
        dstates=tuple(d[::-1].copy()[::-1] for d in p.dstates),
    )
    for count in (1, 3):
        threads(count)
        assert_bitwise_equal(run(CPU, other), got)
    assert_bitwise_equal({"x": p.x}, {"x": before})
    same = np.broadcast_to(p.dy[:1, :1], p.dy.shape)  # all strides but the last are 0
    assert_bitwise_equal(run(CPU, replace(p, dy=same)), run(CPU, replace(p, dy=same.copy())))


@needs_bfloat16
@every_kind
def test_single_steps_and_parts_of_a_sequence(cell):
    """y has the same bits in parts of a sequence where h is all of the state; c is rounded between them."""
    p = problem(cell, T, B, I, H).astype(BF16)
    packed = kernels.pack(cell, p.weights)
    whole = kernels.forward(cell, p.x, packed, p.state0).y
    ys, state = [], p.state0
    for x in p.x:
        step = kernels.forward(cell, x[None], packed, state, save=None)
        assert_bitwise_equal({"y": step.y}, {"y": kernels.forward(cell, x[None], p.weights, state).y})
        ys, state = [*ys, step.y], step.stateT
    if "c" in cell.states:
        assert units({"y": np.concatenate(ys)}, wide({"y": whole})).max() < 2
    else:
        assert_bitwise_equal({"y": np.concatenate(ys)}, {"y": whole})


@needs_bfloat16
@every_kind
def test_no_steps_no_rows_and_special_numbers(cell):
    for sizes in ((0, 3, 2, 4), (3, 0, 2, 4)):
        p = problem(cell, *sizes).astype(BF16)
        got = run(CPU, p)
        assert got.keys() == expected_names(p)
        assert not any(a.any() for key, a in wide(got).items() if key.startswith("dw"))
    p = problem(cell, 2, 3, 4, 5).astype(BF16)
    x = p.x.copy()
    x[0, 1, 2] = np.nan
    y = kernels.forward(cell, x, p.weights).y.astype(np.float32)
    assert np.isnan(y[:, 1]).all() or cell.options.get("relu")
    assert np.isfinite(y[:, [0, 2]]).all()
    ends = np.array([[1.0, -(2.0**127), 2.0**-126, -0.0, np.inf]], BF16)  # past a row's end a state is itself
    state0 = tuple(np.repeat(ends[:, : s.shape[1]], 3, axis=0) for s in p.state0)
    stateT = kernels.forward(cell, p.x, p.weights, state0, lengths=[0, 0, 0]).stateT
    assert all(
        np.array_equal(a.view(np.int16), b.view(np.int16)) for a, b in zip(stateT, state0, strict=True)
    )


@needs_bfloat16
@pytest.mark.parametrize("units", [18, 19])
def test_an_infinity_reaches_no_unit_that_its_gates_are_finite_for(units):
    """With an odd number of units the last pair has one that does not exist, where 0 * inf is NaN."""
    for cell, sizes in (
        (cells.gru.with_options(reset_after=False), units),
        (cells.lstm.with_options(project=True), 5),
    ):
        p = problem(cell, 3, 2, 4, units, P=sizes).astype(BF16)
        x = p.x.copy()
        x[1, 0, 2] = np.inf
        y = kernels.forward(cell, x, p.weights).y.astype(np.float64)
        wide_weights = {key: a.astype(np.float64) for key, a in p.weights.items()}
        want = kernels.forward(cell, x.astype(np.float64), wide_weights, backend="reference").y
        np.testing.assert_array_equal(np.isfinite(y), np.isfinite(want))
        assert np.isfinite(y).all()


@needs_bfloat16
def test_packed_rows():
    p = problem(cells.lstm, 4, 3, I, H).astype(BF16)
    sizes = [3, 3, 2, 1]
    valid = np.arange(3) < np.array(sizes)[:, None]
    padded = kernels.forward(cells.lstm, p.x, p.weights, p.state0, lengths=[4, 3, 2])
    packed = kernels.forward(cells.lstm, p.x[valid], p.weights, p.state0, batch_sizes=sizes)
    assert_bitwise_equal({"y": packed.y}, {"y": padded.y[valid]})
    ours, theirs = kernels.backward(packed.tape, p.dy[valid]), kernels.backward(padded.tape, p.dy)
    assert_bitwise_equal(ours.dweights | {"x": ours.dx}, theirs.dweights | {"x": theirs.dx[valid]})


OF_TORCH = {
    "two layers, both directions": ({"num_layers": 2, "bidirectional": True}, {}),
    "lengths and states": ({"bidirectional": True}, {"lengths": [9, 0, 1, 9, 4], "return_states": True}),
    "resets, truncated": ({}, {"reset": np.arange(T * B).reshape(T, B) % 4 == 1, "detach_every": 4}),
    "no biases, recompute": ({"bias": False, "recompute": True}, {}),
    "relu": ({"nonlinearity": "relu"}, {}),
    "layer norm": (
        {"layer_norm": True, "num_layers": 2, "bidirectional": True},
        {"lengths": [9, 0, 1, 9, 4]},
    ),
    "projection": ({"proj_size": 21, "num_layers": 2, "bidirectional": True}, {"lengths": [9, 0, 1, 9, 4]}),
    "reset before": ({}, {"lengths": [9, 0, 1, 9, 4]}),
}
# Those of one kind of layer.
ONLY = {"relu": "RNN", "projection": "LSTM", "reset before": "Recurrent"}


@needs_bfloat16
@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize(
    ("kind", "option"),
    [(k, o) for o in OF_TORCH for k in ([ONLY[o]] if o in ONLY else ("LSTM", "GRU", "RNN"))],
)
def test_the_bits_of_pytorchs_layers(kind, option):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    import fusedrnn.torch as ft
    from torch_pairs import flat

    def array(t):
        return t.detach().contiguous().view(torch.int16).numpy().view(BF16)

    made, given = OF_TORCH[option]
    own = [cells.gru.with_options(reset_after=False)] if kind == "Recurrent" else []
    layer = getattr(ft, kind)(*own, I, H, dtype=torch.bfloat16, **made)
    cell, suffixes = layer.cell, [names[0].removeprefix("weight_ih") for names in layer._all_weights]
    P = made.get("proj_size", H)
    x = torch.randn(T, B, I).bfloat16().requires_grad_()
    hx = [torch.randn(len(suffixes), B, w).bfloat16().requires_grad_() for w in cell.widths(H, P)]
    result = layer(x, tuple(hx) if kind == "LSTM" else hx[0], **given)
    assert layer.last_path == "fused"
    results = flat(result)
    upstream = [torch.randn(t.shape).bfloat16() for t in results]
    parameters = dict(layer.named_parameters())
    slots = [{name: parameters.get(name + end) for name in cell.blocks} for end in suffixes]
    slots = [{name: p for name, p in slot.items() if p is not None} for slot in slots]
    assert len(parameters) == sum(map(len, slots))
    theirs = torch.autograd.grad(results, [x, *hx, *[p for slot in slots for p in slot.values()]], upstream)

    n = len(hx)
    weights = [{name: array(p) for name, p in slot.items()} for slot in slots]
    save = "boundary_states" if made.get("recompute") else "all"
    out = multilayer.forward_multilayer(
        cell, array(x), weights, tuple(map(array, hx)), bidirectional=layer.bidirectional, save=save, **given
    )
    dy, *ds = map(array, upstream)
    got = multilayer.backward_multilayer(out.tape, dy, tuple(ds[:n]), tuple(ds[n:]) or None)
    ours = [out.y, *out.stateT, *(out.states or ())]
    ours += [
        got.dx,
        *got.dstate0,
        *[d[name] for d, slot in zip(got.dweights, slots, strict=True) for name in slot],
    ]
    for a, t in zip(ours, [*results, *theirs], strict=True):
        assert_bitwise_equal({"": a}, {"": array(t)})


def built(kind, **options):
    np.random.seed(1)
    return getattr(layers, kind)(H, I, dtype=BF16, **options)


def normal(*shape):
    return np.random.standard_normal(shape).astype(np.float32)


@needs_bfloat16
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *[(kind, {"layer_norm": norm}) for kind in ("LSTM", "GRU", "RNN") for norm in (False, True)],
        ("LSTM", {"proj_size": 21}),
        ("GRU", {"reset_after": False}),
    ],
    ids=str,
)
def test_a_native_layer(kind, options, tmp_path):
    """Its values are those of a float32 layer, rounded; a call gives the kernels' bits, in steps too."""
    layer = built(kind, **options)
    np.random.seed(1)
    of_float32 = getattr(layers, kind)(H, I, **options)
    for p, q in zip(layer.params(), of_float32.params(), strict=True):
        assert_bitwise_equal({"": p.data}, {"": q.data.astype(BF16)})
    x = Variable(normal(T, B, I))
    y = layer(x)
    dy = normal(*y.shape).astype(BF16)
    y.backward(grad=dy)
    weights = layer.weights_of("")
    tape = kernels.forward(layer.cell, x.data.astype(BF16), {n: p.data for n, p in weights.items()})
    want = kernels.backward(tape.tape, dy)
    got = {n: p.grad.data for n, p in weights.items()} | {"y": y.data, "x": x.grad.data}
    assert_bitwise_equal(got, want.dweights | {"y": tape.y, "x": want.dx.astype(np.float32)})

    again = built(kind, **options)
    with no_grad():
        steps = np.stack([again.step(row).data for row in x.data])
    if kind != "LSTM":
        assert_bitwise_equal({"": steps}, {"": y.data})
    layer.save_weights(tmp_path / "weights.npz")
    for p in again.params():
        p.data = np.zeros_like(p.data)
    again.load_weights(tmp_path / "weights.npz")
    again.reset_state()
    assert_bitwise_equal({"": again(x.data).data}, {"": y.data})


@needs_bfloat16
def test_native_layers_together():
    """Layers, directions, dropout, zoneout, a float32 layer and loss on top; a checkpoint."""
    layer = built("LSTM", num_layers=2, bidirectional=True, dropout=0.2, recurrent_dropout=0.1, zoneout_h=0.1)
    np.random.seed(2)
    top = layers.Linear(1)
    x, t = normal(T, B, I), normal(T, B, 1)
    loss = F.mean_squared_error(top(layer(x, lengths=[9, 0, 1, 9, 4])), t)
    loss.backward()
    assert loss.dtype == top.W.grad.dtype == np.float32
    for p in layer.params():
        assert p.grad.dtype == BF16
        gradient = p.grad.data.astype(np.float32)
        assert np.isfinite(gradient).all()
        assert gradient.any()
    for optimizer in (optimizers.SGD(0.1), optimizers.Adam()):
        with pytest.raises(TypeError, match=r"^weight_ih_l0: expected float32 or float64, got bfloat16"):
            optimizer.setup(layer).update()


@needs_bfloat16
def test_a_checkpoint_with_a_state(tmp_path):
    layer, other = built("LSTM"), built("LSTM")
    x = normal(2, B, I)
    with no_grad():
        layer.step(x[0])
        for p in other.params():
            p.data = np.zeros_like(p.data)
        checkpoint.save(tmp_path / "c.npz", layer)
        checkpoint.load(tmp_path / "c.npz", other)
        want, got = layer.step(x[1]), other.step(x[1])
    assert_bitwise_equal({"h": got.data, "c": other.c.data}, {"h": want.data, "c": layer.c.data})


@needs_bfloat16
def test_what_is_of_another_dtype():
    p = problem(cells.lstm, T, B, I, H)
    low, f32 = p.astype(BF16), p.astype(np.float32)
    packed = kernels.pack(cells.lstm, low.weights)
    for weights in (low.weights, packed):
        for x in (f32.x, low.x.view(np.int16), low.x.view(np.float16)):
            with pytest.raises(TypeError, match=rf"^x: expected dtype bfloat16 .*, got {x.dtype}$"):
                kernels.forward(cells.lstm, x, weights)
        with pytest.raises(TypeError, match=r"^state0 h: expected dtype bfloat16 .*, got float32$"):
            kernels.forward(cells.lstm, low.x, weights, f32.state0)
    with pytest.raises(TypeError, match=r"^x: expected dtype float32 .*, got bfloat16$"):
        kernels.forward(cells.lstm, low.x, f32.weights)
    mixed = low.weights | {"bias_ih": f32.weights["bias_ih"]}
    with pytest.raises(TypeError, match=r"^bias_ih: expected dtype bfloat16 .*, got float32$"):
        kernels.forward(cells.lstm, low.x, mixed)
    tape = kernels.forward(cells.lstm, low.x, packed).tape
    for dy in (f32.dy, low.dy.view(np.int16)):
        with pytest.raises(TypeError, match=rf"^dy: expected dtype bfloat16 .*, got {dy.dtype}$"):
            kernels.backward(tape, dy)
    with pytest.raises(ValueError, match=r"^x: expected shape \(T, B, 11\)"):
        kernels.forward(cells.lstm, low.x[..., 1:], packed)
    for options, block in (({"layer_norm": True}, "gain_c"), ({"project": True}, "weight_hr")):
        p = problem(cells.lstm.with_options(**options), T, B, I, H).astype(BF16)
        mixed = p.weights | {block: p.weights[block].astype(np.float32)}
        with pytest.raises(TypeError, match=rf"^{block}: expected dtype bfloat16 .*, got float32$"):
            kernels.forward(p.cell, p.x, mixed)


OTHERS = {
    "layer norm and projection": cells.lstm.with_options(layer_norm=True, project=True),
    "layer norm and reset before": cells.gru.with_options(layer_norm=True, reset_after=False),
    "of one's own": mgu,
}


@pytest.mark.parametrize("other", OTHERS)
def test_cells_without_kernels(other):
    p = problem(OTHERS[other], 2, 3, 4, 5).astype(BF16)
    message = r"^weight_ih: expected dtype float32 or float64, got bfloat16; bfloat16 needs .*AVX512-BF16"
    with pytest.raises(TypeError, match=message):
        kernels.forward(p.cell, p.x, p.weights, backend="cpu")


@pytest.mark.parametrize("backend", ["reference", "numba", "cpu"])
def test_other_backends_and_processors(backend, monkeypatch):
    monkeypatch.setattr(CpuBackend, "has_bfloat16", lambda self: False)
    if reason := get(backend).unavailable():
        pytest.skip(reason)
    p = problem(cells.lstm, 2, 3, 4, 5).astype(BF16)
    with pytest.raises(TypeError, match=r"^weight_ih: .* float32 or .*, got bfloat16; .* cpu backend"):
        kernels.forward(p.cell, p.x, p.weights, backend=backend)


def test_layers_that_have_it_not():
    with pytest.raises(TypeError, match=r"^dtype: expected float32 or float64, got bfloat16$"):
        layers.LSTM(3, dtype=BF16, fused=False)
    with pytest.raises(TypeError, match=r"^dtype: expected float32 or float64, got bfloat16$"):
        layers.Linear(3, dtype=BF16)
    with pytest.raises(TypeError, match=r"^dtype: .* or bfloat16 of the package ml_dtypes, got float16$"):
        layers.LSTM(3, dtype=np.float16)


@needs_bfloat16
def test_a_lower_level_refuses():
    code = (
        "import numpy as np\n"
        "from fusedrnn import _core\n"
        "lstm = _core.Cell(2)\n"
        "calls = (\n"
        "    lambda: _core.pack(lstm, (*[np.zeros((4, 1), np.int16)] * 2, None, None), True),\n"
        "    lambda: _core.tape_shape(lstm, 1, 1, 1, 1, 1, False, False, False, True),\n"
        ")\n"
        "for call in calls:\n"
        "    try:\n"
        "        raise SystemExit(call())\n"
        "    except ValueError as error:\n"
        "        assert str(error) == 'bfloat16: expected False on this processor, got True'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"FUSEDRNN_ISA": "avx2"})


@needs_bfloat16
def test_levels_by_name():
    code = "from fusedrnn import system; found = system.info(); print(found['isa'], found['bfloat16'])"

    def found(isa):
        command, environment = [sys.executable, "-c", code], os.environ | {"FUSEDRNN_ISA": isa}
        return subprocess.run(
            command, check=True, capture_output=True, text=True, env=environment
        ).stdout.split()

    _, best = found("")
    assert best in ("avx512_bf16", "amx_bf16")
    for isa, low in (("avx512", best), ("avx512_bf16", "avx512_bf16"), (best, best)):
        assert found(isa) == ["avx512", low]


def test_the_package_is_imported_by_those_who_use_it():
    code = (
        "import sys, numpy as np\n"
        "from fusedrnn import layers, optimizers\n"
        "layer = layers.LSTM(3)\n"
        "layer(np.ones((2, 1, 2), np.float32)).sum().backward()\n"
        "optimizers.SGD().setup(layer).update()\n"
        "assert 'ml_dtypes' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
