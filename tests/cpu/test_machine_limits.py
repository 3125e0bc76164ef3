"""Cells as large as the vector machine takes them run; what is larger is refused in the words of a cell."""

from __future__ import annotations

import pytest

pytest.importorskip("fusedrnn._core", reason="the compiled module is not built")
from fusedrnn.backends import machine
from fusedrnn.backends.protocol import Unsupported
from fusedrnn.cells import cell, tanh
from problems import assert_close, problem, run
from test_machine import MACHINE, REFERENCE
from test_random_cells import made

pytestmark = pytest.mark.kernel


def steps(of):
    """A cell that does ``of(p, a, h, k)`` so many times, from the gate a on."""

    def with_steps(count):
        @cell
        def drawn(p, x, h):
            a = p.dense("a", x, h)
            for k in range(count):
                a = of(p, a, h, k)
            return tanh(a)

        return drawn

    return with_steps


def arguments(states=1, scalars=0):
    """A cell with so many states and numbers of each row."""
    h, d = [f"h{k}" for k in range(states)], [f"d{k}" for k in range(scalars)]
    first = " + ".join(['p.dense("a", x, h0)', *d])
    named = ", ".join(["p", "x", *h, *(["*", *d] if d else [])])
    return made(f"def drawn({named}):\n    return {', '.join([first, *h[:-1]])}")


def gates(count):
    @cell
    def drawn(p, x, h):
        return tanh(sum(p.dense(" ".join(f"g{k}" for k in range(count)), x, h)))

    return drawn


def operands(count):
    @cell
    def drawn(p, x, h):
        a = p.dense("a", x)
        return tanh(sum(p.dense(f"b{k % 8}", tanh(a + 0.1 * k * h)) for k in range(count)))

    return drawn


def scattered(count):
    """Gates that h and c feed in turn, so that none has a neighbour with the same operands."""

    @cell
    def drawn(p, x, h, c):
        each = [p.dense(f"g{k}", x, c if k % 2 else h) for k in range(count)]
        return tanh(sum(each[::2])), tanh(sum(each[1::2]))

    return drawn


def carried(count):
    """Values of the first round that the second one needs."""

    @cell
    def drawn(p, x, h):
        a = p.dense("a", x, h)
        values = []
        for _ in range(count):
            a = tanh(a)
            values.append(a)
        b = p.dense("b", a)
        for value in values:
            b = b * value
        return b

    return drawn


# How a cell is made of a number, one with which it runs, one that is too large, and what is said then.
LIMITS = {
    "operations": (steps(lambda p, a, h, k: a + h), 996, 997, "operations: expected at most 1000, got 1001"),
    "states": (lambda n: arguments(states=n), 16, 17, "states: expected at most 16, got 17"),
    "scalars": (lambda n: arguments(scalars=n), 16, 17, "numbers of each row: expected at most 16, got 17"),
    "gates": (gates, 64, 65, "gates: expected at most 64, got 65"),
    "vectors": (
        *(steps(lambda p, a, h, k: a * p.vector(f"v{k}", init=1)), 64, 65),
        "vectors, gains and biases of norms: expected at most 64, got 65",
    ),
    "norms": (
        *(steps(lambda p, a, h, k: a + p.rms_norm(f"n{k}", h)), 64, 65),
        "vectors, gains and biases of norms: expected at most 64, got 65",
    ),
    "rounds": (
        *(steps(lambda p, a, h, k: p.rms_norm(f"n{k}", a)), 63, 64),
        "rounds, products and norms that wait for one another: expected at most 64, got 65",
    ),
    "operands": (operands, 47, 48, "different operands of p.dense beside x: expected at most 47, got 48"),
    "scattered": (scattered, 64, 65, "gates: expected at most 64, got 65"),
    "constants": (
        *(steps(lambda p, a, h, k: a + 0.1 * (k + 1)), 240, 300),
        "different constants: expected at most 255, got 300",
    ),
    "values": (steps(lambda p, a, h, k: tanh(a) + 1), 240, 300, "values at a time: expected at most 255"),
    "saved": (
        *(steps(lambda p, a, h, k: tanh(a / 3 / 3)), 120, 260),
        "values that backward needs again: expected at most 255, got 260",
    ),
    "carried": (carried, 120, 300, "values that a later round needs again: expected at most 255, got 299"),
}


@pytest.mark.parametrize(("build", "fits", "large", "words"), LIMITS.values(), ids=LIMITS)
def test_cells_up_to_the_limit_run_and_larger_ones_say_what_is_too_many(build, fits, large, words):
    p = problem(build(fits), 2, 2, 3, 5)
    assert_close(run(MACHINE, p), run(REFERENCE, p), 1e-12)
    with pytest.raises(Unsupported) as error:
        machine.plan(build(large))
    assert str(error.value) == f"cell: drawn() is too large for the cpu backend ({words}); use the reference"
