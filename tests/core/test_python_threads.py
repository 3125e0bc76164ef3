"""First calls of cells and training in several Python threads at the same moment: the bits of one thread.

With the GIL threads take turns; on free-threaded Python they run in parallel. The kernels alone in many
threads are in ``tests/cpu/test_robustness.py``.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import sysconfig
import threading
from dataclasses import replace
from functools import partial
from types import FunctionType

import numpy as np
import pytest

import fusedrnn.functions as F
import fusedrnn.layers as L
from at_once import at_once
from fusedrnn import optimizers
from fusedrnn.backends import get
from fusedrnn.backends.protocol import Regularization
from fusedrnn.cells import tanh
from fusedrnn.cells.definition import Cell
from fusedrnn.models import Sequential
from problems import assert_bitwise_equal, problem, run
from published import everything, gru_d, lstmp, mgu, slstm

OWN = [mgu, everything, gru_d, slstm, lstmp]
ACTS = Regularization(0.3, 0.2, 0.0, 7, 0)
often = pytest.mark.parametrize(
    "rounds", [pytest.param(2, marks=pytest.mark.quick), pytest.param(30, marks=pytest.mark.slow)]
)


def unused(cell):
    """The same cell from a function of its own: nothing that is kept of other cells is found for it."""
    f = cell.function
    function = FunctionType(f.__code__, f.__globals__, f.__name__, f.__defaults__, f.__closure__)
    function.__kwdefaults__ = f.__kwdefaults__
    return Cell(function, cell.options)


@often
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_first_calls_of_cells(name, rounds):
    """Three threads for each cell: two want the same program, one another."""
    backend = get(name)
    if (reason := backend.unavailable()) is not None:
        pytest.skip(reason)
    ps = [problem(c, 4, 3, 5, 17, lengths=True, return_states=True) for c in OWN]
    ps = [p if r is None else replace(p, regularization=r) for p in ps for r in (None, None, ACTS)]
    want = [run(backend, p) for p in ps]
    for _ in range(rounds):
        new = [unused(c) for c in OWN]
        calls = [partial(run, backend, replace(p, cell=new[k // 3])) for k, p in enumerate(ps)]
        for got, w in zip(at_once(calls), want, strict=True):
            assert_bitwise_equal(got, w)


@pytest.mark.quick
def test_threads_get_one_trace_of_a_new_cell():
    both = threading.Barrier(2)

    def slow(p, x, h):
        with contextlib.suppress(threading.BrokenBarrierError):  # Python 3.11 lets one in at a time
            both.wait(0.5)
        return tanh(p.dense("a", x, h))

    new = Cell(slow)
    first, second = at_once([lambda: new.trace, lambda: new.trace])
    assert first is second is new.trace


def model(k):
    """One of several models, and what it learns."""
    np.random.seed(k)
    layers = [
        lambda: L.LSTM(17, in_size=3),
        lambda: L.GRU(9, in_size=3, num_layers=2, bidirectional=True),
        lambda: L.RNN(33, in_size=3, layer_norm=True, recompute=True),
        lambda: L.LSTM(8, in_size=3, fused=False),
        lambda: L.Recurrent(unused(mgu), 16, in_size=3),
    ]
    layer = layers[k % len(layers)]()
    rng = np.random.default_rng(k)
    x, t = (rng.standard_normal((5 + k, 4 + k, n)).astype(np.float32) for n in (3, 2))
    optimizer = [optimizers.Adam(lr=0.01), optimizers.SGD(lr=0.1, max_norm=1.0)][k % 2]
    net = Sequential(layer, L.Linear(2, in_size=layer.out_size * (1 + layer.bidirectional)))
    return net, optimizer.setup(net), x, t


def train(net, optimizer, x, t, steps=4):
    """Train; return all parameters and the losses."""
    losses = []
    for _ in range(steps):
        net.reset_state()
        loss = F.mean_squared_error(net(x), t)
        net.cleargrads()
        loss.backward()
        optimizer.update()
        losses.append(loss.data)
    return {name: p.data for name, p in net.named_params()} | {"losses": np.array(losses)}


@often
def test_each_thread_trains_a_model(rounds):
    want = [train(*model(k)) for k in range(10)]
    for _ in range(rounds):
        calls = [partial(train, *model(k)) for k in range(10)]
        for got, w in zip(at_once(calls), want, strict=True):
            assert_bitwise_equal(got, w)


GIL = """
import sys
assert not sys._is_gil_enabled()
import fusedrnn.layers as L
L.LSTM(3)([[[1.0]]])
assert not sys._is_gil_enabled()
"""


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="needs free-threaded Python")
@pytest.mark.quick
def test_an_import_leaves_the_gil_off():
    done = subprocess.run([sys.executable, "-W", "error", "-c", GIL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
