"""Random cells: values are those of the function itself, derived gradients those by a complex step."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import sequences
import test_values
from fusedrnn.cells import symbols
from fusedrnn.cells.definition import cell

# Values stay between about -3 and 3, so that derivatives are neither huge nor lost in rounding: what grows
# goes through tanh, and arguments of log, sqrt and / keep away from 0.
ONE_ARGUMENT = [
    "tanh({})",
    "sigmoid({})",
    "softplus({})",
    "relu({})",
    "absolute({})",
    "exp(tanh({}))",
    "log(1.5 + sigmoid({}))",
    "sqrt(1.5 + tanh({}))",
    "-{}",
    "(1 - {}) * 0.5",
    "{} / 2",
]
TWO_ARGUMENTS = [
    "tanh({} + {})",
    "({} - {}) * 0.5",
    "tanh({} * {})",
    "{} / (2 + sigmoid({}))",
    "maximum({}, {})",
    "minimum({}, {})",
    "where({0} > {1}, {1} * 0.5, {0})",
    "where({0} <= 0.25, {1}, {0} * {1} / 3)",
]
VALUES = ["p.vector({!r}, init=1)", "p.vector({!r})"]
ROUNDS = 3  # of products, each of which needs results of the one before


class Draw:
    """Lines of Python that define a cell."""

    def __init__(self, draw):
        self.draw = draw
        self.states = ["h", "c", "m", "n"][: draw(st.integers(1, 4))]
        self.scalars = ["dt"] * draw(st.booleans())
        self.lines = []
        self.rounds = dict.fromkeys(self.states, 0)  # of each value of each row and unit, the round
        self.others = [*self.scalars]  # vectors and row scalars
        self.unused = set()
        self.count = 0

    def choose(self, values):
        return self.draw(st.sampled_from(values))

    def name(self, letter="v"):
        self.count += 1
        return f"{letter}{self.count}"

    def take(self, most=ROUNDS):
        """A value, the latest ones more often."""
        able = [v for v in self.rounds if self.rounds[v] <= most]
        value = self.choose([*able, *able[-3:]])
        self.unused.discard(value)
        return value

    def add(self, names, expression, round):
        self.lines.append(f"{', '.join(names)} = {expression}")
        for name in names:
            self.rounds[name] = round
            self.unused.add(name)

    def dense(self, first=False):
        operands = [self.take(ROUNDS - 1) for _ in range(self.draw(st.integers(0, 2)))]
        operands = list(dict.fromkeys(operands))
        round = 1 + max((self.rounds[v] for v in operands), default=0)
        if first or not operands or self.draw(st.booleans()):
            operands.insert(self.draw(st.integers(0, len(operands))), "x")
        gates = [self.name("g") for _ in range(self.draw(st.integers(1, 3)))]
        options = ", bias=False" if self.draw(st.booleans()) else ""
        self.add(gates, f'p.dense("{" ".join(gates)}", {", ".join(operands)}{options})', round)

    def norm(self):
        # With a large eps, since values that are alike in a row have hardly any variance to divide by.
        values = list(dict.fromkeys(self.take(ROUNDS - 1) for _ in range(self.draw(st.integers(1, 2)))))
        kind, bias = self.choose(["layer", "rms"]), self.draw(st.booleans())
        call = f'p.{kind}_norm("{self.name("n")}", {", ".join(values)}, bias={bias}, eps=0.5)'
        names = [self.name() for _ in values]
        self.add(names, call, 1 + max(self.rounds[v] for v in values))

    def operation(self):
        kind = self.choose(["dense", "norm", "vector", *["one"] * 5, *["two"] * 8])
        if kind in ("dense", "norm"):
            getattr(self, kind)()
        elif kind == "vector":
            vector = self.name("u")
            self.others.append(vector)
            self.lines.append(f"{vector} = {self.choose(VALUES).format(vector)}")
            self.product_with(vector)
        elif kind == "one":
            a = self.take()
            self.add([self.name()], self.choose(ONE_ARGUMENT).format(a), self.rounds[a])
        elif self.others and self.draw(st.booleans()):
            self.product_with(self.choose(self.others))
        else:
            a, b = self.take(), self.take()
            round = max(self.rounds[a], self.rounds[b])
            self.add([self.name()], self.choose(TWO_ARGUMENTS).format(a, b), round)

    def product_with(self, other):
        a = self.take()
        self.add([self.name()], self.choose(TWO_ARGUMENTS[:6]).format(a, other), self.rounds[a])

    def source(self):
        self.dense(first=True)
        for _ in range(self.draw(st.integers(1, 14))):
            self.operation()
        # Whatever nothing uses goes into a new state.
        parts = [[self.take()] for _ in self.states]
        for k, value in enumerate(sorted(self.unused)):
            parts[k % len(parts)].append(value)
        used = {word for line in self.lines for word in re.findall(r"\w+", line)}
        parts[0] += [scalar for scalar in self.scalars if scalar not in used]
        new = [f"tanh({' + '.join(p)})" for p in parts]
        arguments = ", ".join(["p", "x", *self.states, *(["*", *self.scalars] if self.scalars else [])])
        body = "\n    ".join([*self.lines, f"return {', '.join(new)}"])
        return f"def drawn({arguments}):\n    {body}\n"


@st.composite
def sources(draw):
    source = Draw(draw).source()
    try:
        made(source).trace  # noqa: B018
    except symbols.CellError as error:  # of two names for one value
        assume("got one twice" not in str(error))
        raise
    return source


def made(source):
    names = vars(symbols).copy()
    exec(compile(source, "drawn.py", "exec"), names)
    return cell(names["drawn"])


def check_gradients(source):
    assert sequences.worst_error(made(source), np.float64) < 1e-12


def check_values(source):
    one, other = made(source), made(source)
    assert test_values.worst_difference(one) < 1e-12
    assert str(one) == str(other)


@pytest.mark.quick
@settings(max_examples=30)
@given(sources())
def test_gradients_of_random_cells_are_those_by_a_complex_step(source):
    check_gradients(source)


@pytest.mark.quick
@settings(max_examples=30)
@given(sources())
def test_random_cells_compute_what_the_function_says(source):
    """And what is derived twice is the same."""
    check_values(source)


@pytest.mark.slow
@settings(max_examples=1000)
@given(sources())
def test_many_random_cells(source):
    check_gradients(source)
    check_values(source)
