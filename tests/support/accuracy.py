"""How exact the kernels have to be, and the checks of it.

Tolerances are the promise of the project, relative to each tensor's largest entry. Standard problems
(weights as PyTorch initialises them, inputs of order one, upstream gradients on every step, H >= 7, T <=
256): float64 forward 1e-14, gradients 2e-14; float32 forward 2e-6, gradients 5e-6. Elsewhere no fixed
figure can hold; there the error of a gradient stays within 40 yardsticks + 4 eps, the yardstick being how
far the long-double gradient moves at most, in up to 40 runs, when every activation is disturbed by one eps of
the tested dtype, and that of a forward result within 4 yardsticks + 4 eps, the input disturbed as well.
(Without that the yardstick is blind to the rounding of W x: on data in the thousands nobody, plain NumPy
included, stays within 40.)
"""

from __future__ import annotations

import contextlib
from unittest import mock

import numpy as np

import problems
from fusedrnn.backends.cpu import CpuBackend
from fusedrnn.backends.reference import ReferenceBackend
from fusedrnn.cells import evaluation
from problems import errors, expected_names, name, named, run

CPU, REFERENCE = CpuBackend(), ReferenceBackend()
DTYPES = (np.float32, np.float64)
EVERYTHING = {"lengths": True, "reset": True, "return_states": True}


def cell_name(cell):
    return name(cell)


def truth(p):
    """The reference in long double. A problem is drawn in float32, so this is the truth of every dtype."""
    return run(REFERENCE, p.astype(np.longdouble))


def split(results):
    """Results and gradients."""
    forward = {key: a for key, a in results.items() if not key.startswith("d")}
    return forward, {key: a for key, a in results.items() if key.startswith("d")}


def assert_standard(p, want, dtype):
    """The kernels' results for a standard problem are within the promised figures."""
    problems.assert_standard(CPU, p.astype(dtype), want)


# --- the yardstick -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def disturbed(eps, seed):
    """Every activation of the reference is off by +eps or -eps.

    So is the gradient through relu: it does not depend on the value of relu, as that through tanh and
    sigmoid does. So is what layer norm normalises, and the gradient that goes back through it.
    """
    rng = np.random.default_rng(seed)

    def off(f):
        def disturbed(*args):
            y = f(*args)
            return y * (1 + eps * rng.choice([-1, 1], np.shape(y)).astype(y.dtype))

        return disturbed

    def all_off(f):
        return lambda *args: [off(np.copy)(y) for y in f(*args)]

    def normalise(norm, values):
        normed = right(norm, values)
        return normed._replace(x=all_off(list)(normed.x))

    def normalise_gradient(norm, normed, gradients):
        return all_off(right_gradient)(norm, normed, all_off(list)(gradients))

    right, right_gradient = evaluation.normalise, evaluation.normalise_gradient
    operations = {name: off(evaluation.OPERATIONS[name]) for name in ("tanh", "sigmoid", "relu", "where")}
    with (
        mock.patch.dict(evaluation.OPERATIONS, operations),
        mock.patch.multiple(evaluation, normalise=normalise, normalise_gradient=normalise_gradient),
    ):
        yield


def disturbed_input(p, eps, seed):
    rng = np.random.default_rng((seed, 1))
    return p.x * (1 + eps * rng.choice([-1, 1], p.x.shape).astype(p.x.dtype))


RUNS = 40  # at most; of 5 alone, the largest move scatters by a factor of 2 with the random numbers


def yardsticks(p, want, dtype):
    """Of each result the largest move in 1, 2, ... disturbed runs, relative to its largest entry."""
    eps = np.longdouble(np.finfo(dtype).eps)
    p = p.astype(np.longdouble)
    forward, gradients = split(want)
    worst = dict.fromkeys(want, 0.0)
    for seed in range(RUNS):
        with disturbed(eps, seed):
            same_input = split(run(REFERENCE, p))[1]
            x = disturbed_input(p, eps, seed)
            results = REFERENCE.forward(p.cell, x, p.weights, p.state0, **p.options)
            other_input = named(p.cell, results, None)
        moved = errors(other_input, forward) | errors(same_input, gradients)
        worst = {key: max(worst[key], moved[key]) for key in want}
        yield worst


def allowed(worst, p, want, dtype):
    """4 yardsticks of a result, 40 of a gradient, + 4 eps; of a float32 gradient also what sums may lose.

    That is, the products too small for float32.
    """
    eps = float(np.finfo(dtype).eps)
    limits = {key: (40 if key.startswith("d") else 4) * y + 4 * eps for key, y in worst.items()}
    if dtype is np.float32:
        T, _, H = want["y"].shape
        upstream = [a for a in (p.dy, *(p.dstateT or ()), *(p.dstates or ())) if a is not None]
        floor = (
            2.0**-126 * T * H * max((float(np.nanmax(np.abs(a))) for a in upstream if a.size), default=0.0)
        )
        for key in split(want)[1]:
            limits[key] += floor / float(np.abs(want[key]).max()) if np.any(want[key]) else 0
    return limits


def assert_hard(p, dtype):
    """Within the yardsticks."""
    p = p.astype(dtype)
    want, got = truth(p), run(CPU, p)
    assert got.keys() == want.keys() == expected_names(p)
    found = errors(got, want)
    for worst in yardsticks(p, want, dtype):
        limits = allowed(worst, p, want, dtype)
        beyond = {key: (e, limits[key]) for key, e in found.items() if not e <= limits[key]}
        if not beyond:  # more runs allow no less
            return
    raise AssertionError(f"error, allowed: {beyond}")


def assert_no_worse_than_numpy(draw, dtype):
    """At most 4 times the error of plain NumPy in the same dtype, where that is above 4 eps.

    What counts is the middle one of 7 draws: where errors grow exponentially, the ratio of two of them is a
    lottery. Four that are small enough decide it.
    """
    eps = float(np.finfo(dtype).eps)
    ratios = {}
    for seed in range(7):
        p = draw(seed).astype(dtype)
        want = truth(p)
        plain = errors(run(REFERENCE, p), want)
        for key, e in errors(run(CPU, p), want).items():
            ratios.setdefault(key, []).append(e / max(plain[key], 4 * eps))
        worse = {key: r for key, r in ratios.items() if np.count_nonzero(np.array(r) <= 4) < 4}
        if not worse:
            return
    raise AssertionError(f"ratios to the error of plain NumPy: {worse}")
