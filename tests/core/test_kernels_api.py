"""The stateless API: packed rows, packed weights, and the choice of the backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import problems
from fusedrnn import backends, kernels
from fusedrnn.backends.reference import ReferenceBackend
from fusedrnn.cells import gru, lstm
from problems import assert_bitwise_equal, name, named, problem, run

pytestmark = pytest.mark.quick

cells = pytest.mark.parametrize("cell", problems.CELLS, ids=name)


class TestRagged:
    batch_sizes = np.array([4, 4, 3, 1, 1])
    lengths = np.array([5, 3, 3, 2])

    @cells
    @pytest.mark.parametrize("reverse", [False, True])
    def test_packed_rows_are_padded_sequences(self, cell: Any, reverse: bool) -> None:
        p = problem(cell, 5, 4, 2, 7, reset=True, return_states=True, reverse=reverse)
        valid = np.arange(5)[:, None] < self.lengths
        f = kernels.forward(
            cell, p.x, p.weights, p.state0, **{**p.options, "lengths": self.lengths}, backend="reference"
        )
        g = kernels.backward(f.tape, p.dy, p.dstateT, p.dstates)
        want = named(cell, f, g)
        want = {key: a[valid] if key in ("y", "dx", *cell.states) else a for key, a in want.items()}
        options = {**p.options, "reset": p.reset[valid], "batch_sizes": self.batch_sizes}
        f = kernels.forward(cell, p.x[valid], p.weights, p.state0, **options, backend="reference")
        g = kernels.backward(f.tape, p.dy[valid], p.dstateT, tuple(d[valid] for d in p.dstates))
        assert f.y.shape == (13, p.dy.shape[2])
        assert_bitwise_equal(named(cell, f, g), want)

    def test_against_torch(self) -> None:
        torch = pytest.importorskip("torch")
        p = problem(gru, 5, 4, 2, 7, biases="both")
        module = torch.nn.GRU(2, 7, dtype=torch.float64)
        with torch.no_grad():
            for parameter, w in zip(module.parameters(), p.weights.values(), strict=True):
                parameter.copy_(torch.tensor(w))
        packed = torch.nn.utils.rnn.pack_padded_sequence(torch.tensor(p.x), torch.tensor(self.lengths))
        out, hT = module(packed, torch.tensor(p.state0[0][None]))
        f = kernels.forward(
            gru,
            packed.data.numpy(),
            p.weights,
            p.state0,
            batch_sizes=packed.batch_sizes.numpy(),
            backend="reference",
        )
        np.testing.assert_allclose(f.y, out.data.detach().numpy(), rtol=0, atol=1e-15)
        np.testing.assert_allclose(f.stateT[0], hT[0].detach().numpy(), rtol=0, atol=1e-15)

    @pytest.mark.parametrize(
        ("batch_sizes", "exception"),
        [
            (3, TypeError),
            (np.array([2.0, 1.0]), TypeError),
            (np.array([[2, 1]]), ValueError),
            (np.array([1, 2]), ValueError),
            (np.array([3, 0]), ValueError),
            (np.array([4, -1]), ValueError),
        ],
    )
    def test_wrong_batch_sizes(self, batch_sizes: Any, exception: type[Exception]) -> None:
        p = problem(lstm, 3, 1, 2, 5)
        with pytest.raises(exception, match=r"^batch_sizes: expected"):
            kernels.forward(lstm, p.x[:, 0], p.weights, batch_sizes=batch_sizes, backend="reference")

    def test_wrong_rows(self) -> None:
        p = problem(lstm, 3, 1, 2, 5)
        sizes = np.array([2, 1])
        x = p.x[:, 0]
        for bad in (x[:2], p.x):
            with pytest.raises(ValueError, match=r"^x: expected packed rows of shape \(3, ·\)"):
                kernels.forward(lstm, bad, p.weights, batch_sizes=sizes, backend="reference")
        with pytest.raises(ValueError, match=r"^reset: expected packed rows of shape \(3,\)"):
            kernels.forward(
                lstm, x, p.weights, batch_sizes=sizes, reset=np.ones(2, bool), backend="reference"
            )
        tape = kernels.forward(lstm, x, p.weights, batch_sizes=sizes, backend="reference").tape
        with pytest.raises(ValueError, match=r"^dy: expected packed rows"):
            kernels.backward(tape, p.dy)

    def test_no_steps(self) -> None:
        p = problem(lstm, 3, 1, 2, 5)
        f = kernels.forward(lstm, p.x[:0, 0], p.weights, batch_sizes=np.zeros(0, int), backend="reference")
        assert f.y.shape == (0, 5)
        assert f.stateT[0].shape == (0, 5)


class TestPack:
    @cells
    def test_same_bits_as_the_weights(self, cell: Any) -> None:
        p = problem(cell, 3, 2, 3, 7)
        packed = kernels.pack(cell, p.weights, "reference")
        f = kernels.forward(cell, p.x, packed, p.state0)
        g = kernels.backward(f.tape, p.dy, p.dstateT)
        assert_bitwise_equal(named(cell, f, g), run(ReferenceBackend(), p))

    def test_for_another_backend_or_cell(self) -> None:
        p = problem(gru, 3, 2, 3, 7)
        packed = kernels.pack(gru, p.weights, "reference")
        with pytest.raises(ValueError, match=r"^backend: expected 'reference'"):
            kernels.forward(gru, p.x, packed, backend="cpu")
        with pytest.raises(ValueError, match=r"^cell: expected gru\(reset_after=True, layer_norm=False\)"):
            kernels.forward(gru.with_options(reset_after=False), p.x, packed)


class TestChoice:
    def test_names(self) -> None:
        assert backends.NAMES == ("cpu", "numba", "reference", "cuda")
        assert backends.get("reference").unavailable() is None
        assert backends.get("reference").name == "reference"

    def test_argument_before_environment_before_order(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("FUSEDRNN_BACKEND", raising=False)
        first = next(n for n in backends.NAMES if backends.get(n).unavailable() is None)
        assert backends.get().name == first
        monkeypatch.setenv("FUSEDRNN_BACKEND", "reference")
        assert backends.get().name == "reference"
        assert backends.get(first).name == first
        monkeypatch.setenv("FUSEDRNN_BACKEND", "")
        assert backends.get().name == first

    def test_wrong_names(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ValueError, match=r"^backend: expected one of .*got 'fast'"):
            backends.get("fast")
        monkeypatch.setenv("FUSEDRNN_BACKEND", "quick")
        with pytest.raises(ValueError, match=r"^environment variable FUSEDRNN_BACKEND: .*got 'quick'"):
            backends.get()

    def test_a_named_backend_that_cannot_run_says_why(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ReferenceBackend, "unavailable", lambda self: "the moon is full")
        with pytest.raises(RuntimeError, match=r"'reference' cannot run here: the moon is full"):
            kernels.pack(lstm, problem(lstm, 2, 1, 2, 3).weights, "reference")
