"""The short way of an ordinary call past the whole check of its arguments, and what times it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from problems import CELLS, assert_bitwise_equal, name, named, problem, run

pytest.importorskip("fusedrnn._core", reason="the compiled module is not built")
from fusedrnn import _core, layers
from fusedrnn.backends import cpu
from fusedrnn.backends.cpu import CpuBackend
from fusedrnn.cells import gru, lstm

pytestmark = [pytest.mark.kernel, pytest.mark.alone]

CPU = CpuBackend()
SCRIPT = Path(__file__).parents[2] / "bench" / "call_overhead.py"


@pytest.fixture
def checks(monkeypatch):
    """The names of the whole checks that were made, in order."""
    made = []
    for which in ("check_weights", "check_forward", "check_backward"):
        right = getattr(cpu, which)

        def noted(*args, which=which, right=right, **options):
            made.append(which)
            return right(*args, **options)

        monkeypatch.setattr(cpu, which, noted)
    return made


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_an_ordinary_call_goes_straight_to_the_compiled_module(cell, dtype, checks):
    run(CPU, problem(cell, 5, 3, 7, 9, dtype=dtype, lengths=True, reset=True, return_states=True))
    run(CPU, problem(cell, 1, 3, 7, 9, dtype=dtype, state0=False))
    assert checks == []


ODD = {
    "not contiguous": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "Fortran order": np.asfortranarray,
    "a subclass": lambda a: a.view(type("Sub", (np.ndarray,), {})),
}


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize("cell", [lstm, gru], ids=name)
def test_what_is_not_ordinary_is_checked_once_and_gives_the_same_bits(cell, case, checks):
    p = problem(cell, 5, 3, 7, 9, dtype=np.float32, return_states=True)
    odd = ODD[case]
    forward = CPU.forward(cell, odd(p.x), p.weights, tuple(map(odd, p.state0)), return_states=True)
    assert checks == ["check_forward"]
    gradients = CPU.backward(forward.tape, odd(p.dy), tuple(map(odd, p.dstateT)), tuple(map(odd, p.dstates)))
    assert checks == ["check_forward", "check_backward"]
    assert_bitwise_equal(named(cell, forward, gradients), run(CPU, p))


def test_what_the_compiled_module_cannot_see_is_refused_before_it():
    """None for a state means zeros there, and numbers would pass for flags."""
    p = problem(lstm, 2, 3, 7, 9, dtype=np.float32)
    h, c = p.state0
    for state0 in ((None, c), (h, None), (None, None)):
        with pytest.raises(TypeError, match=r"state0 [hc]: expected a NumPy array, got NoneType"):
            CPU.forward(p.cell, p.x, p.weights, state0)
    for flag in ("reverse", "return_states"):
        with pytest.raises(TypeError, match=f"{flag}: expected True or False, got int"):
            CPU.forward(p.cell, p.x, p.weights, p.state0, **{flag: 1})
    with pytest.raises(ValueError, match="dstates: expected None"):
        CPU.backward(CPU.forward(p.cell, p.x, p.weights).tape, None, None, (None, p.dy))


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="needs SIGALRM")
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_an_error_of_a_signal_handler_is_no_refusal(direction, checks):
    """A ValueError raised in the kernel's poll comes out; the call is not made a second time."""

    def handler(*_):
        raise ValueError("from the handler")

    p = problem(lstm, 2, 1, 3, 512, dtype=np.float32)
    x = np.broadcast_to(p.x[:1], (20_000, 1, 3))
    tape = CPU.forward(p.cell, x[:8000], p.weights).tape
    call = {
        "forward": lambda: CPU.forward(p.cell, x, p.weights, save=None),
        "backward": lambda: CPU.backward(tape, None, p.dstateT),
    }[direction]
    old = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(ValueError, match="from the handler"):
            call()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert checks == []


def test_refusals_are_the_errors_they_stand_for():
    assert issubclass(_core.RefusedType, TypeError)
    assert issubclass(_core.RefusedValue, ValueError)
    p = problem(lstm, 2, 3, 7, 9, dtype=np.float32)
    core = CPU.pack(p.cell, p.weights).core
    arguments = [core, None, p.x, p.state0, (), None, None, False, 0, None, False, 1]
    for place, value, error in (
        (2, p.x.astype(np.float64), _core.RefusedType),
        (3, (p.dy, p.dy), _core.RefusedValue),
    ):
        with pytest.raises(error):
            _core.forward(*(value if k == place else a for k, a in enumerate(arguments)))


def test_a_step_never_uses_the_packed_weights_of_another_parameter():
    """A parameter that takes another's place may have the same version."""
    np.random.seed(0)
    layer, other = layers.LSTM(5, 3), layers.LSTM(5, 3)
    x = np.ones((2, 3), np.float32)
    state = (np.ones((2, 5), np.float32),) * 2
    before = layer(x, state).data
    layer.weight_hh = other.weight_hh
    assert layer.weight_hh.version == other.weight_ih.version
    stepped = layer(x, state).data
    np.testing.assert_array_equal(stepped, layer(x[np.newaxis], state).data[0])
    assert np.abs(stepped - before).max() > 1e-3


def test_a_step_follows_a_change_of_the_backend():
    layer = layers.LSTM(5, 3)
    x = np.ones((2, 3), np.float32)
    state = (np.ones((2, 5), np.float32),) * 2
    layer(x, state)
    assert isinstance(layer.h.creator.backend, CpuBackend)
    layer.backend = "reference"
    layer(x, state)
    assert layer.h.creator.backend.name == "reference"


def python_calls(call):
    """How many Python functions a call runs."""
    found = 0

    def count(frame, event, argument):
        nonlocal found
        found += event == "call"

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize("shape", [(1, 3), (4, 1, 3)], ids=["step", "sequence"])
@pytest.mark.parametrize("kind", [layers.LSTM, layers.GRU, layers.RNN])
def test_a_call_of_a_layer_runs_few_python_functions(kind, shape):
    """What it takes beyond the kernels is all Python, which is slower still where a class has __getattr__."""
    layer, x = kind(8), np.ones(shape, np.float32)
    for _ in range(2):  # a step of an RNN draws weight_hh in the second
        layer(x)
    assert python_calls(lambda: layer(x)) <= 45
    layer.weight_hh.data[:] = 0  # so that the weights are packed again
    assert python_calls(lambda: layer(x)) <= 85
    for used in (layer, layer.h, layer.weight_hh, layer.h.creator):
        assert not hasattr(type(used), "__getattr__")


# --- the instrument ----------------------------------------------------------------------------------------


def buffers(call):
    """How many of the kernels' buffers a call allocates: with as many granted, it does not fail."""
    for granted in range(100):
        _core.testing.fail_allocation_after(granted)
        try:
            call()
        except MemoryError:
            continue
        finally:
            _core.testing.fail_allocation_after(-1)
        return granted
    raise AssertionError("more than a hundred")


@pytest.mark.parametrize("cell", [lstm, gru], ids=name)
def test_the_repeated_call_runs_so_often_and_leaves_nothing(cell):
    p = problem(cell, 1, 4, 3, 8, dtype=np.float32)
    packed = CPU.pack(cell, p.weights)
    tape = CPU.forward(cell, p.x, packed, p.state0).tape
    live = _core.testing.arena()[0]
    for once, repeat in (
        (
            lambda: CPU.forward(cell, p.x, packed, p.state0),
            lambda n: _core.testing.repeat_forward(n, packed.core, p.x, p.state0, True),
        ),
        (
            lambda: CPU.forward(cell, p.x, packed, p.state0, save=None),
            lambda n: _core.testing.repeat_forward(n, packed.core, p.x, p.state0, False),
        ),
        (lambda: CPU.backward(tape, p.dy), lambda n: _core.testing.repeat_backward(n, tape.core, p.dy)),
    ):
        assert buffers(once) > 0
        for times in (0, 1, 5):
            assert buffers(lambda repeat=repeat, times=times: repeat(times)) == times * buffers(once)
    assert _core.testing.arena()[0] == live


@pytest.mark.slow
def test_the_table_and_its_file(tmp_path):
    file = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, SCRIPT, "--seconds", "0.05", "--json", file],
        capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 24
    for row in rows:
        assert all(time > 0 for time in row["times"].values())
        assert ("layer" in row["times"]) == row["call"].startswith("forward")
