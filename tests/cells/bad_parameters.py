"""Cells with a mistake in parameters, arguments or what they return, for test_bad_cells.py."""

from __future__ import annotations

import functools
import math

import numpy as np

from bad_values import bad
from fusedrnn.cells.symbols import sigmoid, tanh

# --- p.dense ------------------------------------------------------------------------------------------------


@bad("different operands", "twice")
def x_twice(p, x, h):
    return p.dense("a", x, x)  # here


@bad("different operands", "twice")
def a_state_twice(p, x, h):
    return p.dense("a", x, h, h)  # here


@bad("p.dense", "float")
def number_as_an_operand(p, x, h):
    return p.dense("a", x, 2.0)  # here


@bad("p.dense", "one number for each unit", "vector")
def vector_as_an_operand(p, x, h):
    return p.dense("a", x, p.vector("v"))  # here


@bad("p.dense", "one number for each row")
def row_scalar_as_an_operand(p, x, h, *, dt):
    return p.dense("a", x, h, dt)  # here


@bad("p.dense", "a condition")
def condition_as_an_operand(p, x, h):
    return p.dense("a", x, h > 0)  # here


@bad("p.dense", "one by one", "*values")
def list_as_an_operand(p, x, h):
    return p.dense("a", [x, h])  # here


@bad("expected 4, got 3", "one value for each gate")
def more_names_than_gates(p, x, h):
    i, f, g, o = p.dense("i f g", x, h)  # here
    return i * f * g * o


@bad("expected 2", "one value for each gate")
def more_gates_than_names(p, x, h):
    i, f = sigmoid(p.dense("i f g", x, h))  # here
    return i * f


@bad("i twice")
def gate_named_twice(p, x, h):
    i, f, g = p.dense("i f i", x, h)  # here
    return i * f * g


@bad("gate i", "already", "another name")
def gate_with_an_operand_twice(p, x, h):
    i, f = p.dense("i f", x, h)
    return i * f + p.dense("i", h)  # here


@bad("gate i", "x already")
def gate_with_x_twice(p, x, h):
    return p.dense("i", x) * p.dense("i", x, h)  # here


@bad("names of the gates", "''")
def no_gate(p, x, h):
    return p.dense("", x, h)  # here


@bad("names of the gates", "the input x")
def names_forgotten(p, x, h):
    return p.dense(x, h)  # here


@bad("names of the gates", "in one string", "['i', 'f']")
def names_as_a_list(p, x, h):
    i, f = p.dense(["i", "f"], x, h)  # here
    return i * f


@bad("p.dense", "got str")
def names_as_arguments(p, x, h):
    i, f = p.dense("i", "f", x, h)  # here
    return i * f


@bad("separated by spaces", "'i, f'")
def names_with_a_comma(p, x, h):
    i, f = p.dense("i, f", x, h)  # here
    return i * f


@bad("names of the gates", "'1st'")
def no_identifier(p, x, h):
    return p.dense("1st", x, h)  # here


@bad("what to multiply")
def no_operand(p, x, h):
    return p.dense("a")  # here


@bad("gate f", "not used", "leave it out")
def gate_not_used(p, x, h):
    i, _ = p.dense("i f", x, h)  # here
    return tanh(i)


@bad("gate f", "not used")
def normalised_gate_not_used(p, x, h):
    i, _ = p.dense("i f", x, h, layer_norm=True)  # here
    return tanh(i)


@bad("p.project", "one projection", "second")
def projected_twice(p, x, h, c):
    h = p.project(tanh(p.dense("a", x, h)))
    return h, p.project(c)  # here


@bad("p.project", "got x", "before the layer")
def input_projected(p, x, h):
    return p.project(x)  # here


@bad("p.project", "one number for each unit", "vector")
def vector_projected(p, x, h):
    return p.project(p.vector("v"))  # here


@bad("p.project", "return p.project(h)", "nothing else")
def projection_in_a_sum(p, x, h):
    a = p.project(tanh(p.dense("a", x, h)))
    return a + 1  # here


@bad("p.dense", "a projected value")
def projection_as_an_operand(p, x, h):
    a = p.project(tanh(p.dense("a", x, h)))
    return tanh(p.dense("b", a))  # here


@bad("new c", "a projected value")
def one_projection_as_two_states(p, x, h, c):
    a = p.project(tanh(p.dense("a", x, h)) + c)
    return a, a  # here


@bad("p.vector", "x is the name of the input", "another name")
def vector_with_the_name_of_the_input(p, u, h):
    return tanh(p.dense("a", u, h)) * p.vector("x")  # here


@bad("p.vector", "h0 is the name", "initial state", "another name")
def vector_with_the_name_of_an_initial_state(p, x, h):
    return tanh(p.dense("a", x, h)) * p.vector("h0")  # here


@bad("another name than x", "row scalar")
def row_scalar_with_the_name_of_the_input(p, u, h, *, x):
    return tanh(p.dense("a", u, h)) * x


@bad("new c", "a projected value")
def projection_as_the_second_state(p, x, h, c):
    a = tanh(p.dense("a", x, h))
    return a + c, p.project(a)  # here


@bad("the projection", "not used", "leave it out")
def projection_not_used(p, x, h):
    a = tanh(p.dense("a", x, h))
    p.project(a)  # here
    return a


@bad("state h", "size of its own", "p.dense")
def projected_state_in_a_sum(p, x, h, c):
    c = tanh(p.dense("a", x, h)) + h * c
    return p.project(c), c  # here


@bad("state h", "size of its own", "p.dense")
def projected_state_as_another(p, x, h, c):
    return p.project(tanh(p.dense("a", x, h) + c)), h  # here


@bad("gate b", "with a projection", "only x and the state h")
def operand_beside_a_projection(p, x, h, c):
    a = tanh(p.dense("a", x, h))
    c = tanh(p.dense("b", x, a * c))  # here
    return p.project(c), c


@bad("no linear", "p.dense", "p.vector", "p.layer_norm", "p.rms_norm", "p.project")
def unknown_method_of_p(p, x, h):
    return tanh(p.linear("a", x, h))  # here


# --- vectors and norms --------------------------------------------------------------------------------------


@bad("p.vector", "a name", "''")
def vector_without_a_name(p, x, h):
    return p.dense("a", x, h) * p.vector("")  # here


@bad("p.vector", "a name", "1")
def vector_named_by_a_number(p, x, h):
    return p.dense("a", x, h) * p.vector(1)  # here


@bad("p.vector", "a name", "'my vector'")
def vector_named_by_words(p, x, h):
    return p.dense("a", x, h) * p.vector("my vector")  # here


@bad("p.vector", "weight_hh", "another name")
def vector_named_like_a_weight(p, x, h):
    v = p.vector("weight_hh")  # here
    return p.dense("a", x, h) * v


@bad("p.vector", "gain_c", "another name")
def vector_named_like_a_gain(p, x, h):
    return p.layer_norm("c", p.dense("a", x, h)) * p.vector("gain_c")  # here


@bad("v started from 0.0", "now it starts from 1;", "another name")
def vector_with_two_starts(p, x, h):
    return p.dense("a", x, h) * p.vector("v") + p.vector("v", init=1)  # here


@bad("v started from a function before", "another one; define it once, before the cell")
def vector_with_two_functions(p, x, h):
    for _ in range(2):
        h = tanh(h * p.vector("v", init=lambda shape: np.ones(shape)))  # here
    return p.dense("a", x, h)


@bad("init", "finite number", "(low, high)")
def vector_that_starts_from_a_value(p, x, h):
    return p.dense("a", x, h) * p.vector("v", init=h)  # here


@bad("init", "finite number", "array")
def vector_that_starts_from_an_array(p, x, h):
    return p.dense("a", x, h) * p.vector("v", init=np.ones(3))  # here


@bad("the vector v", "not used", "leave it out")
def vector_not_used(p, x, h):
    v = p.vector("v")  # here
    v = p.vector("w")
    return p.dense("a", x, h) * v


@bad("another norm", "both", 'a, b = p.layer_norm("n", a, b)')
def norm_named_twice(p, x, h):
    a = p.layer_norm("n", p.dense("a", x))
    return a + p.layer_norm("n", p.dense("b", h))  # here


@bad("another norm", 'a, b = p.rms_norm("n", a, b)')
def norms_of_two_kinds_named_alike(p, x, h):
    a = p.layer_norm("n", p.dense("a", x))
    return a + p.rms_norm("n", p.dense("b", h))  # here


@bad("gain_ih", "another name")
def norm_named_like_that_of_products(p, x, h):
    return p.layer_norm("ih", p.dense("a", x, h))  # here


@bad("p.rms_norm", "a name")
def norm_without_a_name(p, x, h):
    return p.rms_norm(p.dense("a", x, h))  # here


@bad("what to normalise")
def norm_of_nothing(p, x, h):
    return p.dense("a", x, h) * p.layer_norm("n")  # here


@bad("p.layer_norm", "*values")
def norm_of_a_list(p, x, h):
    i, f = p.layer_norm("n", p.dense("i f", x, h))  # here
    return i * f


@bad("p.layer_norm", "one number for each unit")
def norm_of_a_vector(p, x, h):
    return p.dense("a", x, h) * p.layer_norm("n", p.vector("v"))  # here


@bad("eps", "-1")
def norm_with_a_negative_eps(p, x, h):
    return p.layer_norm("n", p.dense("a", x, h), eps=-1)  # here


@bad("value 2 of the norm n", "not used")
def normalised_value_not_used(p, x, h):
    i, _ = p.layer_norm("n", *p.dense("i f", x, h))  # here
    return tanh(i)


# --- what the function takes and returns --------------------------------------------------------------------


@bad("`return`", "new h, c", "1 value")
def state_not_returned(p, x, h, c):
    c = c * p.dense("a", x, h)
    return tanh(c)  # here


@bad("`return`", "new h", "nothing else", "2 values")
def too_many_returned(p, x, h):
    a = p.dense("a", x, h)
    return tanh(a), a  # here


@bad("new c", "the input x")
def x_returned(p, x, h, c):
    return p.dense("a", x, h) * c, x  # here


@bad("new c", "float")
def number_returned(p, x, h, c):
    return p.dense("a", x, h) * c, 0.0  # here


@bad("new h", "a condition")
def condition_returned(p, x, h):
    return p.dense("a", x, h) > 0  # here


@bad("new c", "one number for each unit, a vector")
def vector_returned(p, x, h, c):
    return p.dense("a", x, h) * c, p.vector("v")  # here


@bad("new c", "one number for each row")
def row_scalar_returned(p, x, h, c, *, dt):
    return p.dense("a", x, h) * c, dt  # here


@bad("`return`", "new h", "got nothing")
def nothing_returned(p, x, h):
    tanh(p.dense("a", x, h))  # here


@bad("`return`", "a list", "without brackets")
def list_returned(p, x, h, c):
    a = p.dense("a", x, h)
    return [a, c]  # here


@bad("new h, c", "1 value")
def one_of_two_returns(p, x, h, c, *, plain=True):
    if plain:
        return p.dense("a", x, h) * c
    return h, c


@bad("at least one state", "def no_state(p, x, h):")
def no_state(p, x):
    return tanh(p.dense("a", x))


@bad("at least one state")
def no_argument():
    return 0


@bad("by name", "*states")
def states_with_a_star(p, x, *states):
    return tanh(p.dense("a", x, *states))


@bad("by name", "**options")
def options_with_stars(p, x, h, **options):
    return tanh(p.dense("a", x, h))


@bad("default of a state", "finite number for c", "None", "after *")
def state_that_starts_from_none(p, x, h, c=None):
    return tanh(p.dense("a", x, h)), c


@bad("default of a state", "finite number for relu", "False", "after *")
def option_in_the_place_of_a_state(p, x, h, relu=False):
    return tanh(p.dense("a", x, h))


@bad("default of a state", "finite number for h", "inf")
def state_that_starts_from_infinity(p, x, h=math.inf):
    return tanh(p.dense("a", x, h))


@functools.lru_cache
def decorated(function):
    return function


@bad("at least one state")
@decorated
def behind_a_decorator(p, x):
    return tanh(p.dense("a", x))


@bad("dt is not used", "a row scalar")
def unused_row_scalar(p, x, h, *, dt):
    return tanh(p.dense("a", x, h))


@bad("second argument", "state of that name")
def input_and_state_swapped(p, h, x):
    return tanh(p.dense("a", x, h))
