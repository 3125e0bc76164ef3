"""Layer norm in the cell: the reference proved, the kernels against it, the layers, wrong arguments.

The figures are those of the plain cells (accuracy.py), for standard problems with gains about 0.1. With
gains about 1, with H below 7 or with one input the problems are badly conditioned (a norm of few values, or
of values that are all proportional to one input, hardly depends on them, and what little gradient is left is
a difference): there the yardstick counts. That the bits are the same is in test_bitwise.py, which runs these
cells too.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

import oracle
from array_calls import Arrays
from fusedrnn import checkpoint, kernels
from fusedrnn import layers as L
from fusedrnn.backends import get
from fusedrnn.backends.reference import ReferenceBackend
from fusedrnn.cells import lstm
from fusedrnn.gradcheck import gradcheck
from problems import (
    NORMED,
    OPTIONS,
    assert_bitwise_equal,
    assert_close,
    errors,
    expected_names,
    name,
    problem,
    run,
)
from test_reference import assert_right_along_a_direction

REFERENCE = ReferenceBackend()
EVERYTHING = {"lengths": True, "reset": True, "return_states": True}
KERNELS = NORMED[:4]  # GRU with reset before is a program: tests/cpu/test_machine.py

normed = pytest.mark.parametrize("cell", NORMED, ids=name)
kernel_cells = pytest.mark.parametrize("cell", KERNELS, ids=name)


# --- the reference -----------------------------------------------------------------------------------------


@normed
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: name(lstm, o)[5:] or "plain")
def test_the_reference_against_complex_steps(cell, options):
    """Tiny, so that every entry has a step of its own. The figure is that of test_reference.py, 90 eps."""
    p = problem(cell, 5, 4, 3, 4, **options)
    forward = oracle.forward(oracle.with_states(p).astype(np.longdouble))
    if not p.return_states:
        forward = {key: a for key, a in forward.items() if key not in p.cell.states}
    want = {**forward, **oracle.gradients(p)}
    assert want.keys() == expected_names(p)
    for dtype in (np.float64, np.longdouble):
        assert_close(run(REFERENCE, p.astype(dtype)), want, 90 * float(np.finfo(dtype).eps))


@normed
def test_the_reference_along_a_direction_at_real_sizes(cell):
    p = problem(cell, 24, 3, 7, 64, seed=4, **EVERYTHING, reverse=True, detach_every=9)
    assert_right_along_a_direction(p)


def torch_step(torch, cell, w, x, state):
    """One step of torch.nn.functional.layer_norm and the formulas of torch.nn's cells."""
    normalise = torch.nn.functional.layer_norm
    H = w["weight_hh"].shape[1]

    def part(which, v):
        a = v @ w[f"weight_{which}"].T
        if cell.name == "gru":
            parts = (normalise(a[:, : 2 * H], (2 * H,)), normalise(a[:, 2 * H :], (H,)))
            a = torch.cat(parts, 1)
        else:
            a = normalise(a, a.shape[1:])
        return a * w[f"gain_{which}"] + w[f"bias_{which}"]

    ax, ah = part("ih", x), part("hh", state[0])
    if cell.name == "rnn":
        return [torch.relu(ax + ah) if cell.options["relu"] else torch.tanh(ax + ah)]
    if cell.name == "lstm":
        i, f, g, o = torch.chunk(ax + ah, 4, 1)
        c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        return [torch.sigmoid(o) * torch.tanh(normalise(c, (H,), w["gain_c"], w["bias_c"])), c]
    xr, xz, xn = torch.chunk(ax, 3, 1)
    hr, hz, hn = torch.chunk(ah, 3, 1)
    z, n = torch.sigmoid(xz + hz), torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
    return [(1 - z) * n + z * state[0]]


@kernel_cells
def test_against_pytorchs_layer_norm(cell):
    """A loop over time of PyTorch's own operations, and its own derivatives."""
    torch = pytest.importorskip("torch")
    p = problem(cell, 7, 5, 6, 19, biases="both", gain=0.5)
    given = {key: torch.tensor(w, requires_grad=True) for key, w in p.weights.items()}
    x = torch.tensor(p.x, requires_grad=True)
    state0 = [torch.tensor(s, requires_grad=True) for s in p.state0]
    state, ys = state0, []
    for t in range(len(p.x)):
        state = torch_step(torch, cell, given, x[t], state)
        ys.append(state[0])
    y = torch.stack(ys)
    torch.autograd.backward((y, *state), [torch.tensor(d) for d in (p.dy, *p.dstateT)])
    want = {"y": y.detach(), "dx": x.grad} | {f"d{key}": w.grad for key, w in given.items()}
    want |= {f"{s}T": a.detach() for s, a in zip(cell.states, state, strict=True)}
    want |= {f"d{s}0": a.grad for s, a in zip(cell.states, state0, strict=True)}
    got = run(REFERENCE, p)
    assert_close(got, {key: a.numpy() for key, a in want.items()}, 1e-12)


@normed
def test_without_gains_and_gates_of_any_size_the_scale_of_a_matrix_does_not_matter(cell):
    """What layer norm is for: weights ten times as large give the same, but for epsilon."""
    p = problem(cell, 5, 4, 6, 16, gain=0.5)
    ten = p.weights | {key: 1e3 * p.weights[key] for key in ("weight_ih", "weight_hh")}
    large = run(REFERENCE, replace(p, weights=ten))
    larger = run(REFERENCE, replace(p, weights=ten | {"weight_ih": 1e6 * p.weights["weight_ih"]}))
    assert_close({"y": larger["y"]}, {"y": large["y"]}, 1e-8)


# --- the kernels -------------------------------------------------------------------------------------------

kernel = [pytest.mark.kernel, pytest.mark.usefixtures("poison")]
SIZES = ((2, 3, 5, 7), (7, 7, 3, 17), (3, 13, 17, 31), (11, 2, 4, 33), (5, 5, 37, 35))


@pytest.fixture
def cpu():
    pytest.importorskip("fusedrnn._core", reason="the compiled module is not built")
    return get("cpu")


@pytest.fixture
def standard(cpu, threads):
    """The check of a standard problem, in float32 and float64, with each number of threads."""
    import accuracy

    def check(p, *counts):
        want = accuracy.truth(p)
        for count in counts or [None]:
            if count is not None:
                threads(count)
            for dtype in accuracy.DTYPES:
                accuracy.assert_standard(p, want, dtype)

    return check


class TestKernels:
    pytestmark = kernel

    @pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o)) or "plain")
    @pytest.mark.parametrize("size", SIZES, ids=str)
    @kernel_cells
    def test_options(self, cell, size, options, standard):
        standard(problem(cell, *size, **options))

    @pytest.mark.quick
    @pytest.mark.mutation
    @pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
    @pytest.mark.parametrize("size", [(7, 11, 5, 19), (5, 5, 37, 35)], ids=str)
    @kernel_cells
    def test_everything_at_once(self, cell, size, reverse, standard):
        standard(problem(cell, *size, **EVERYTHING, reverse=reverse, biases="both", detach_every=3))

    @pytest.mark.parametrize("H", range(7, 34))
    @kernel_cells
    def test_every_hidden_size(self, cell, H, standard):
        standard(problem(cell, 4, 5, 3 + H % 8, H, **EVERYTHING, reverse=H % 2 == 0))

    @pytest.mark.parametrize("B", [1, 2, 6, 7, 12, 13, 14, 15, 29, 64])
    @kernel_cells
    def test_batch_sizes(self, cell, B, standard):
        standard(problem(cell, 3, B, 5, 9, **EVERYTHING, reverse=B % 2 == 0))

    @pytest.mark.parametrize("size", [(256, 27, 3, 17), (52, 64, 4, 7), (101, 130, 5, 7)], ids=str)
    @kernel_cells
    def test_several_chunks(self, cell, size, standard):
        standard(problem(cell, *size, **EVERYTHING))

    # Beyond one megabyte of weights, where plain cells are split by units and panels are outside.
    @pytest.mark.parametrize("size", [(3, 9, 67, 197), (3, 17, 130, 305), (2, 41, 515, 129)], ids=str)
    @kernel_cells
    def test_large_layers(self, cell, size, standard):
        standard(problem(cell, *size, **EVERYTHING), 1, 2, 3)

    @pytest.mark.quick
    @kernel_cells
    def test_threads_have_whole_rows(self, cell, cpu):
        """A norm takes all units of a row: split by units, threads would have to meet twice a step more."""
        from fusedrnn import _core
        from fusedrnn.backends.cpu import compiled

        plain, normed = (compiled(cell.with_options(layer_norm=norm)) for norm in (False, True))
        size = (20, 4, 1500, 1500, 8)
        assert not _core.testing.split(plain, *size)[1]
        assert _core.testing.split(normed, *size)[:2] == (4, True)

    @pytest.mark.parametrize("size", [(0, 3, 2, 7), (4, 0, 2, 7), (0, 0, 1, 17)], ids=str)
    @kernel_cells
    def test_empty(self, cell, size, standard):
        standard(problem(cell, *size, return_states=True))

    @pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
    @pytest.mark.parametrize(
        ("size", "gain"),
        [*(((4, 5, H % 3 + 2, H), 0.1) for H in range(1, 7)), ((6, 4, 1, 19), 0.1), ((9, 5, 4, 18), 1.0)],
        ids=str,
    )
    @kernel_cells
    def test_badly_conditioned(self, cell, size, gain, dtype, cpu):
        """Few units, one input, gains about 1: within the yardsticks, and no worse than plain NumPy."""
        import accuracy

        def draw(seed):
            return problem(cell, *size, seed, **EVERYTHING, reverse=size[-1] % 2 == 0, gain=gain)

        accuracy.assert_hard(draw(0), dtype)
        accuracy.assert_no_worse_than_numpy(draw, dtype)

    @kernel_cells
    def test_a_large_mean_costs_no_digits_of_the_variance(self, cell, cpu):
        """Two passes: sum of squares less square of the sum would leave none."""
        p = problem(cell, 3, 4, 5, 19)
        shifted = p.weights | {"weight_ih": p.weights["weight_ih"] + 300}
        p = replace(p, x=np.ones_like(p.x), weights=shifted)
        p = p.astype(np.float32)
        want = run(REFERENCE, p.astype(np.longdouble))
        plain, got = errors(run(REFERENCE, p), want), errors(run(cpu, p), want)
        assert got["y"] <= 4 * plain["y"]
        assert got["y"] < 1e-3

    @pytest.mark.mutation
    @kernel_cells
    def test_only_what_is_needed_comes_back(self, cell, cpu):
        p = problem(cell, 6, 5, 4, 18, **EVERYTHING, biases="both", dtype=np.float32)
        whole = run(cpu, p)
        gradients = {key for key in whole if key.startswith("d")}
        forward = {key: a for key, a in whole.items() if key not in gradients}
        possible = ("x", *p.weights, "state0")
        for need in (*itertools.combinations(possible, 1), *itertools.combinations(possible, 2), ()):
            wanted = {f"d{s}0" for s in cell.states} if "state0" in need else set()
            wanted |= {f"d{key}" for key in need if key != "state0"}
            got = run(cpu, p, need=need)
            assert_bitwise_equal(got, forward | {key: whole[key] for key in wanted})

    @kernel_cells
    def test_a_row_of_nan_stays_alone(self, cell, cpu):
        p = problem(cell, 5, 4, 3, 19)
        spoiled = p.x.copy()
        spoiled[2, 1] = np.nan
        for x, before in ((spoiled, 2), (np.where(np.isnan(spoiled), np.inf, spoiled), 2)):
            got, want = run(cpu, replace(p, x=x)), run(cpu, p)
            others = [0, 2, 3]
            for key in ("y", "dx"):
                assert_bitwise_equal({key: got[key][:, others]}, {key: want[key][:, others]})
            assert_bitwise_equal({"y": got["y"][:before, 1]}, {"y": want["y"][:before, 1]})
            assert np.isnan(got["y"][before:, 1]).all()

    @kernel_cells
    def test_a_tape_in_an_array(self, cell, cpu):
        for options in ({}, EVERYTHING):
            p = problem(cell, 6, 5, 4, 18, dtype=np.float32, **options)
            call = Arrays(p, False)
            out, want = call.forward(), run(cpu, p)
            assert np.array_equal(out["y"], want["y"])
            for key, value in call.backward(out["y"], out["tape"]).items():
                assert np.array_equal(value, want[key]), key

    def test_the_compiled_module_wants_the_gains(self, cpu):
        from fusedrnn import _core
        from fusedrnn.backends.cpu import core_of, names

        p = problem(lstm.with_options(layer_norm=True), 3, 2, 3, 5)
        order = names(p.cell)
        with pytest.raises(ValueError, match="weights: expected 4 entries, got 8"):
            _core.pack(core_of(lstm), tuple(map(p.weights.get, order)))
        for key in p.cell.vectors:
            others = p.weights | {key: None}
            with pytest.raises(TypeError, match=key):
                _core.pack(core_of(p.cell), tuple(map(others.get, order)))


# --- arguments ---------------------------------------------------------------------------------------------


@normed
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_weights_that_a_cell_needs_or_lacks(cell, backend):
    if (reason := get(backend).unavailable()) is not None:
        pytest.skip(reason)
    p = problem(cell, 3, 2, 3, 5)
    plain = cell.with_options(layer_norm=False)
    for key in cell.vectors:
        w = p.weights[key]
        with pytest.raises(
            ValueError, match=rf"^weights: expected {key} of shape .*layer_norm=True.*got none"
        ):
            kernels.forward(cell, p.x, p.weights | {key: None}, backend=backend)
        one = {n: v for n, v in p.weights.items() if n in plain.blocks or n == key}
        with pytest.raises(ValueError, match=rf"^weights: expected names .*layer_norm=False.*got {key}"):
            kernels.forward(plain, p.x, one, backend=backend)
        with pytest.raises(ValueError, match=rf"^{key}: expected shape"):
            kernels.forward(cell, p.x, p.weights | {key: w[1:]}, backend=backend)
        with pytest.raises(TypeError, match=rf"^{key}: expected dtype float64"):
            kernels.forward(cell, p.x, p.weights | {key: w.astype("f")}, backend=backend)
        with pytest.raises(TypeError, match=rf"^{key}: expected a NumPy array"):
            kernels.forward(cell, p.x, p.weights | {key: w.tolist()}, backend=backend)
    for key in set(lstm.with_options(layer_norm=True).vectors) - set(cell.vectors):
        with pytest.raises(ValueError, match=f"^weights: expected names .*got {key}"):
            kernels.forward(cell, p.x, p.weights | {key: np.ones(5)}, backend=backend)


# --- layers ------------------------------------------------------------------------------------------------

LAYERS = {
    "lstm": L.LSTM,
    "gru": L.GRU,
    "gru before": lambda *args, **kw: L.GRU(*args, reset_after=False, backend="reference", **kw),
    "rnn": L.RNN,
    "rnn relu": lambda *args, **kw: L.RNN(*args, relu=True, **kw),
}
layers = pytest.mark.parametrize("kind", LAYERS)


def trained(kind, *args, **options):
    """A layer whose parameters all have moved, always the same."""
    np.random.seed(0)
    layer = LAYERS[kind](*args, layer_norm=True, dtype="float64", **options)
    rng = np.random.default_rng(3)
    for p in layer.params():
        p.assign(p._data + 0.2 * rng.standard_normal(p.shape))
    return layer


@layers
@pytest.mark.parametrize("deep", [{}, {"num_layers": 2, "bidirectional": True}], ids=["one", "deep"])
def test_parameters_of_a_layer(kind, deep):
    layer = LAYERS[kind](5, 3, layer_norm=True, **deep)
    found = {key: p._data for key, p in layer.named_params()}
    for suffix in layer.suffixes:
        names = ("gain_ih", "gain_hh", *(("gain_c", "bias_c") if kind == "lstm" else ()))
        for key in names:
            value = found.pop(key + suffix)
            assert value.shape == (5 if key.endswith("_c") else 5 * layer.cell.blocks["weight_ih"],)
            assert (value == (0 if key == "bias_c" else 1)).all()
            assert value.dtype == np.float32
    plain = LAYERS[kind](5, 3, **deep)
    assert found.keys() == {key for key, _ in plain.named_params()}


@layers
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_fused_is_unfused(kind, options):
    fused, unfused = trained(kind, 6, 4, **options), trained(kind, 6, 4, **options)
    unfused.fused = False
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 3, 4))
    call = {"lengths": np.array([5, 2, 4]), "reset": rng.random((5, 3)) < 0.3}
    ys = []
    for layer in (fused, unfused):
        y = layer.sequence(x, **call)
        (y * y).sum().backward()
        ys.append(y)
    np.testing.assert_allclose(ys[0].data, ys[1].data, rtol=0, atol=1e-12)
    for p, q in zip(fused.params(), unfused.params(), strict=True):
        np.testing.assert_allclose(p.grad.data, q.grad.data, rtol=1e-8, atol=1e-10, err_msg=p.name)


@layers
def test_steps_are_the_sequence(kind):
    layer = trained(kind, 19, 4)
    x = np.random.default_rng(1).standard_normal((4, 3, 4))
    whole = layer(x).data
    layer.reset_state()
    np.testing.assert_array_equal(np.stack([layer(x[t]).data for t in range(4)]), whole)


@pytest.mark.quick
@layers
def test_gradcheck_of_a_layer(kind):
    layer = trained(kind, 7, 4)
    x = np.random.default_rng(2).standard_normal((4, 3, 4))
    assert gradcheck(layer, x)
    assert gradcheck(layer, x, method="central", fast_mode=True)
    assert gradcheck(trained(kind, 5, 4, num_layers=2, bidirectional=True), x)


@layers
def test_weights_and_checkpoint_come_back(kind, tmp_path):
    layer = trained(kind, 7, 4)
    x = np.random.default_rng(2).standard_normal((4, 3, 4))
    want = layer(x).data
    layer.reset_state()
    layer.save_weights(tmp_path / "weights.npz")
    other = LAYERS[kind](7, layer_norm=True, dtype="float64")
    other.load_weights(tmp_path / "weights.npz")
    np.testing.assert_array_equal(other(x).data, want)
    plain = LAYERS[kind](7, 4, dtype="float64")
    with pytest.raises(ValueError, match=r"extra entries.*'gain_"):
        plain.load_weights(tmp_path / "weights.npz")
    checkpoint.save(tmp_path / "all.npz", model=layer)
    again = LAYERS[kind](7, 4, layer_norm=True, dtype="float64")
    checkpoint.load(tmp_path / "all.npz", model=again)
    np.testing.assert_array_equal(again(x).data, want)


def test_recompute_of_a_layer_gives_the_same_bits():
    x = np.random.default_rng(2).standard_normal((40, 3, 4))
    grads = []
    for recompute in (False, True):
        layer = trained("lstm", 7, 4, recompute=recompute)
        y = layer(x)
        (y * y).sum().backward()
        grads.append({p.name: p.grad.data for p in layer.params()})
    assert_bitwise_equal(grads[1], grads[0])
