"""A step of each published cell in NumPy, from the equations of its paper: nothing of the package is used.

``a.W[k]`` are the matrices that multiply x, ``a.U[k]`` those that multiply other values, ``a.b[k]`` and
``a.d[k]`` their biases, each in the order in which the cell names its gates.
"""

from __future__ import annotations

import numpy as np
from numpy import exp, log, maximum, sqrt, tanh


class Blocks:
    """Parameters in blocks of H rows, matrices transposed; vectors by their names."""

    def __init__(self, weights, H):
        for short, name in (("W", "weight_ih"), ("U", "weight_hh"), ("b", "bias_ih"), ("d", "bias_hh")):
            rows = weights.get(name, np.empty((0, 0)))
            setattr(self, short, [rows[k : k + H].T for k in range(0, len(rows), H)])
        self.weights, self.H = weights, H

    def __getitem__(self, name):
        return self.weights[name]


def s(v):
    return 1 / (1 + exp(-v))


def relu(v):
    return maximum(v, 0)


def all_gates(a, x, h):
    """Of cells whose gates all have x and the same other operand, all with biases."""
    return [x @ W + h @ U + b + d for W, U, b, d in zip(a.W, a.U, a.b, a.d, strict=True)]


# --- LSTMs --------------------------------------------------------------------------------------------------


def lstm(a, x, h, c):
    i, f, g, o = all_gates(a, x, h)
    c = s(f) * c + s(i) * tanh(g)
    return s(o) * tanh(c), c


def lstm_1997(a, x, h, c):
    i, g, o = all_gates(a, x, h)
    c = c + s(i) * (4 / (1 + exp(-g)) - 2)
    return s(o) * (2 / (1 + exp(-c)) - 1), c


def peephole_lstm(a, x, h, c):
    i, f, g, o = all_gates(a, x, h)
    new = s(f + a["pf"] * c) * c + s(i + a["pi"] * c) * tanh(g)
    return s(o + a["po"] * new) * tanh(new), new


def lstmp(a, x, h, c):
    m, c = peephole_lstm(a, x, h, c)
    return m @ a["weight_hr"].T, c


def coupled_lstm(a, x, h, c):
    f, g, o = all_gates(a, x, h)
    c = s(f) * c + (1 - s(f)) * tanh(g)
    return s(o) * tanh(c), c


def janet(a, x, h, c, *, beta):
    f, g = all_gates(a, x, h)
    c = s(f) * c + (1 - s(f - beta)) * tanh(g)
    return c, c


def slstm(a, x, h, c, n, m):
    i, f, z, o = all_gates(a, x, h)
    # without the stabiliser: c and n are those of the paper times exp(-m)
    big_c = exp(f) * (exp(m) * c) + exp(i) * tanh(z)
    big_n = exp(f) * (exp(m) * n) + exp(i)
    new = maximum(f + m, i)
    return s(o) * big_c / big_n, big_c * exp(-new), big_n * exp(-new), new


def multiplicative_lstm(a, x, h, c):
    m = (x @ a.W[0]) * (h @ a.U[0])
    i, f, g, o = (x @ a.W[k + 1] + a.b[k] + m @ a.U[k + 1] + a.d[k] for k in range(4))
    c = s(f) * c + s(i) * tanh(g)
    return s(o) * tanh(c), c


def wmc_lstm(a, x, h, c):
    i, f, g, o = (x @ a.W[k] + a.b[k] + h @ a.U[k] + a.d[k] for k in range(4))
    new = s(f + tanh(c @ a.U[5])) * c + s(i + tanh(c @ a.U[4])) * tanh(g)
    return s(o + tanh(new @ a.U[6])) * tanh(new), new


def residual_lstm(a, x, h, c):
    i, f, g, o = (x @ a.W[k] + a.b[k] + h @ a.U[k] + a.d[k] for k in range(4))
    new = s(f + a["pf"] * c) * c + s(i + a["pi"] * c) * tanh(g)
    projected = tanh(new) @ a.U[4]
    return s(o + a["po"] * new) * (projected + x @ a.W[4]), new


def fs_lstm(a, x, h, c, slow_h, slow_c, *, fast):
    def product(v, first):
        return np.stack(
            [v @ U + d for U, d in zip(a.U[first : first + 4], a.d[first : first + 4], strict=True)]
        )

    def cell(gates, c):
        i, f, g, o = gates
        c = s(f) * c + s(i) * tanh(g)
        return s(o) * tanh(c), c

    of_x = np.stack([x @ W + b for W, b in zip(a.W, a.b, strict=True)])
    h, c = cell(of_x + product(h, 0), c)
    slow_h, slow_c = cell(product(h, 4) + product(slow_h, 8), slow_c)
    h, c = cell(product(slow_h, 12) + product(h, 16), c)
    for k in range(3, fast + 1):
        h, c = cell(product(h, 4 * k + 8), c)
    return h, c, slow_h, slow_c


def nas(a, x, h, c):
    p = [x @ W for W in a.W]
    q = [h @ U for U in a.U]
    # the cell names the gate with a product of both last
    first = [s(p[0] + q[0]), relu(p[1] + q[1]), s(p[2] + q[2]), relu(p[7] * q[7])]
    first += [tanh(p[3] + q[3]), s(p[4] + q[4]), tanh(p[5] + q[5]), s(p[6] + q[6])]
    second = [tanh(first[0] * first[1]), tanh(first[2] + first[3])]
    second += [tanh(first[4] * first[5]), s(first[6] + first[7])]
    c = tanh(second[0] + c) * second[1]
    return tanh(c * tanh(second[2] + second[3])), c


def ran(a, x, h, c, *, linear):
    content = x @ a.W[2]
    i = s(h @ a.U[0] + a.d[0] + x @ a.W[0] + a.b[0])
    f = s(h @ a.U[1] + a.d[1] + x @ a.W[1] + a.b[1])
    c = i * content + f * c
    return (c if linear else tanh(c)), c


# --- gated cells --------------------------------------------------------------------------------------------


def mgu_of(a, x, h, f, last):
    n = tanh(x @ a.W[-1] + a.b[-1] + (f * h) @ a.U[last] + a.d[-1])
    return ((1 - f) * h + f * n,)


def mgu(a, x, h):
    return mgu_of(a, x, h, s(x @ a.W[0] + a.b[0] + h @ a.U[0] + a.d[0]), 1)


def mgu1(a, x, h):
    return mgu_of(a, x, h, s(h @ a.U[0] + a.d[0]), 1)


def mgu2(a, x, h):
    return mgu_of(a, x, h, s(h @ a.U[0]), 1)


def mgu3(a, x, h):
    return mgu_of(a, x, h, s(a["f"]), 0)


def li_gru(a, x, h):
    z, n = all_gates(a, x, h)
    return (s(z) * h + (1 - s(z)) * relu(n),)


def dreamer_gru(a, x, h):
    parts = np.concatenate([x @ W + h @ U for W, U in zip(a.W, a.U, strict=True)], axis=1)
    mean = parts.mean(1, keepdims=True)
    parts = (parts - mean) / sqrt(((parts - mean) ** 2).mean(1, keepdims=True) + 1e-5)
    reset, cand, update = np.split(a["gain_gates"] * parts + a["bias_gates"], 3, axis=1)
    cand, update = tanh(s(reset) * cand), s(update - 1)
    return (update * cand + (1 - update) * h,)


def augru(a, x, h, *, attention):
    r = s(x @ a.W[0] + a.b[0] + h @ a.U[0] + a.d[0])
    u = s(x @ a.W[1] + a.b[1] + h @ a.U[1] + a.d[1])
    n = tanh(x @ a.W[2] + r * (h @ a.U[2]) + a.b[2])
    u = attention * u
    return ((1 - u) * h + u * n,)


def mut1(a, x, h):
    z = s(x @ a.W[0] + a.b[0])
    r = s(x @ a.W[1] + a.b[1] + h @ a.U[0] + a.d[0])
    return (tanh((r * h) @ a.U[1] + tanh(x @ a.W[2]) + a.d[1]) * z + h * (1 - z),)


def mut3(a, x, h):
    z = s(x @ a.W[0] + a.b[0] + tanh(h) @ a.U[0] + a.d[0])
    r = s(x @ a.W[1] + a.b[1] + h @ a.U[1] + a.d[1])
    return (tanh((r * h) @ a.U[2] + x @ a.W[2] + a.b[2] + a.d[2]) * z + h * (1 - z),)


def ugrnn(a, x, h, *, forget):
    g, n = all_gates(a, x, h)
    return (s(g + forget) * h + (1 - s(g + forget)) * tanh(n),)


def rhn(a, x, h, *, depth):
    for k in range(depth):
        n, t = (h @ a.U[2 * k + j] + a.d[2 * k + j] for j in range(2))
        if k == 0:
            n, t = n + x @ a.W[0] + a.b[0], t + x @ a.W[1] + a.b[1]
        h = tanh(n) * s(t) + h * (1 - s(t))
    return (h,)


def cfn(a, x, h):
    theta = s(h @ a.U[0] + a.d[0] + x @ a.W[0] + a.b[0])
    eta = s(h @ a.U[1] + a.d[1] + x @ a.W[1] + a.b[1])
    return (theta * tanh(h) + eta * tanh(x @ a.W[2]),)


def nbrc(a, x, h):
    m = 1 + tanh(x @ a.W[0] + a.b[0] + h @ a.U[0] + a.d[0])
    c = s(x @ a.W[1] + a.b[1] + h @ a.U[1] + a.d[1])
    return (c * h + (1 - c) * tanh(x @ a.W[2] + m * h),)


def atr(a, x, h):
    p, q = x @ a.W[0], h @ a.U[0]
    return (s(p + q) * p + s(p - q) * h,)


def star(a, x, h):
    k = s(x @ a.W[0] + a.b[0] + h @ a.U[0] + a.d[0])
    z = tanh(x @ a.W[1] + a.b[1])
    return (tanh((1 - k) * h + k * z),)


def minimal_rnn(a, x, h):
    z = tanh(x @ a.W[0] + a.b[0])
    u = s(h @ a.U[0] + z @ a.U[1] + a.d[0] + a.d[1])
    return (u * h + (1 - u) * z,)


def fast_rnn(a, x, h):
    (n,) = all_gates(a, x, h)
    return (s(a["alpha"]) * tanh(n) + s(a["beta"]) * h,)


def fast_grnn(a, x, h):
    z = s(x @ a.W[0] + h @ a.U[0] + a["bz"])
    n = tanh(x @ a.W[0] + h @ a.U[0] + a["bn"])
    return ((s(a["zeta"]) * (1 - z) + s(a["nu"])) * n + z * h,)


def scrn(a, x, y, h, slow, *, alpha):
    slow = (1 - alpha) * (x @ a.W[0]) + alpha * slow
    h = s(slow @ a.U[1] + x @ a.W[1] + h @ a.U[0])
    return h @ a.U[2] + slow @ a.U[3], h, slow


# --- light cells --------------------------------------------------------------------------------------------


def ind_rnn(a, x, h):
    return (relu(x @ a.W[0] + a.b[0] + a["u"] * h),)


def indy_lstm(a, x, h, c):
    i, f, g, o = (x @ a.W[k] + a.b[k] + a["u" + gate] * h for k, gate in enumerate("ifgo"))
    c = s(f) * c + s(i) * tanh(g)
    return s(o) * tanh(c), c


def e_lstm(a, x, h, c):
    f = s(x @ a.W[0] + a.b[0] + a["wf"] * c)
    z = tanh(x @ a.W[1] + a.b[1] + a["wz"] * c)
    c = f * c + (1 - f) * z
    o = s(x @ a.W[2] + a.b[2] + c @ a.U[0] + a.d[0])
    return o * c, c


def min_gru(a, x, h):
    z = s(x @ a.W[0] + a.b[0])
    return ((1 - z) * h + z * (x @ a.W[1] + a.b[1]),)


def min_lstm(a, x, h):
    f, i, n = s(x @ a.W[0] + a.b[0]), s(x @ a.W[1] + a.b[1]), x @ a.W[2] + a.b[2]
    f, i = f / (f + i), i / (f + i)
    return (f * h + i * n,)


def sru(a, x, h, c):
    f = s(x @ a.W[2] + a["vf"] * c + a.b[0])
    r = s(x @ a.W[3] + a["vr"] * c + a.b[1])
    c = f * c + (1 - f) * (x @ a.W[0])
    return r * c + (1 - r) * (x @ a.W[1]), c


def qrnn(a, x, h, c):
    z, f, o = (x @ W + b for W, b in zip(a.W, a.b, strict=True))
    c = s(f) * c + (1 - s(f)) * tanh(z)
    return s(o) * c, c


def with_the_step_before(a, x, before):
    """W x + b + V of the x before, of three gates; V x."""
    now = [x @ W + b + v for W, b, v in zip(a.W[:3], a.b, before, strict=True)]
    return now, [x @ V for V in a.W[3:]]


def qrnn_2(a, x, h, c, *before):
    (z, f, o), after = with_the_step_before(a, x, before)
    c = s(f) * c + (1 - s(f)) * tanh(z)
    return s(o) * c, c, *after


def t_rnn(a, x, h):
    z, f = x @ a.W[0], s(x @ a.W[1] + a.b[0])
    return (f * h + (1 - f) * z,)


def t_gru(a, x, h, *before):
    (z, f, o), after = with_the_step_before(a, x, before)
    return s(f) * h + z * tanh(o), *after


def t_lstm(a, x, h, c, *before):
    (z, f, o), after = with_the_step_before(a, x, before)
    c = s(f) * c + (1 - s(f)) * z
    return c * tanh(o), c, *after


def brc(a, x, h):
    m = 1 + tanh(x @ a.W[0] + a.b[0] + a["wa"] * h)
    c = s(x @ a.W[1] + a.b[1] + a["wc"] * h)
    return (c * h + (1 - c) * tanh(x @ a.W[2] + m * h),)


# --- differential equations ---------------------------------------------------------------------------------


def gru_d(a, x, h, *, dt):
    h = exp(-maximum(0, a["w"] * dt + a["b"])) * h
    r = s(x @ a.W[0] + a.b[0] + h @ a.U[0] + a.d[0])
    z = s(x @ a.W[1] + a.b[1] + h @ a.U[1] + a.d[1])
    n = tanh(x @ a.W[2] + a.b[2] + (r * h) @ a.U[2] + a.d[2])
    return ((1 - z) * h + z * n,)


def time_aware_lstm(a, x, h, c, *, dt):
    short = tanh(c @ a.U[0] + a.d[0])
    c = (c - short) + short * (1 / log(np.e + dt))
    i, f, g, o = (x @ a.W[k] + a.b[k] + h @ a.U[k + 1] + a.d[k + 1] for k in range(4))
    c = s(f) * c + s(i) * tanh(g)
    return s(o) * tanh(c), c


def cfc(a, x, h, *, dt):
    b = 1.7159 * tanh(0.666 * (x @ a.W[0] + a.b[0] + h @ a.U[0] + a.d[0]))
    g, k, time_a, time_b = (b @ a.U[j] + a.d[j] for j in range(1, 5))
    f = -(time_a * dt + time_b)
    return (s(f) * tanh(g) + (1 - s(f)) * tanh(k),)


def ltc(a, x, h, *, dt, steps):
    (f,) = map(s, all_gates(a, x, h))
    for _ in range(steps):
        h = (h + dt / steps * f * a["a"]) / (1 + dt / steps * (a["rate"] + f))
    return (h,)


def leaky_rnn(a, x, h, *, alpha):
    (n,) = map(tanh, all_gates(a, x, h))
    return ((1 - alpha) * h + alpha * n,)


def pl_rnn(a, x, h):
    return (a["a"] * h + relu(h) @ a.U[0] + a.d[0] + x @ a.W[0] + a.b[0],)


def antisymmetric_rnn(a, x, h, *, step, gamma):
    M = a.U[0] - gamma * np.eye(a.H)
    return (h + step * tanh(h @ M + a.d[0] + x @ a.W[0] + a.b[0]),)


def gated_antisymmetric_rnn(a, x, h, *, step, gamma):
    M = a.U[0] - gamma * np.eye(a.H)
    z = s(h @ M + x @ a.W[0] + a.b[0])
    return (h + step * z * tanh(h @ M + x @ a.W[1] + a.b[1]),)


def lipschitz_rnn(a, x, h, *, step):
    return (h + step * h @ a.U[0] + step * tanh(h @ a.U[1] + a.d[0] + x @ a.W[0] + a.b[0]),)


def co_rnn(a, x, y, z, *, step, gamma, epsilon):
    n = tanh(y @ a.U[0] + a.d[0] + z @ a.U[1] + a.d[1] + x @ a.W[0] + a.b[0])
    z = z + step * (n - gamma * y - epsilon * z)
    return y + step * z, z


def unicornn(a, x, y, z, *, step, alpha):
    d = step * (0.5 + 0.5 * tanh(a["c"] / 2))
    z = z - d * (tanh(a["w"] * y + x @ a.W[0] + a.b[0]) + alpha * y)
    return y + d * z, z


def lem(a, x, y, z, *, step):
    t, t_bar, g = (x @ a.W[k] + a.b[k] + y @ a.U[k] + a.d[k] for k in range(3))
    t, t_bar = step * s(t), step * s(t_bar)
    z = (1 - t) * z + t * tanh(g)
    y = (1 - t_bar) * y + t_bar * tanh(z @ a.U[3] + a.d[3] + x @ a.W[3] + a.b[3])
    return y, z
