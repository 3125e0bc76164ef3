"""Published cells as a user writes them, and one that uses every operation."""

from __future__ import annotations

from fusedrnn.cells import builtin
from fusedrnn.cells.definition import cell
from fusedrnn.cells.symbols import (
    absolute,
    exp,
    log,
    maximum,
    minimum,
    relu,
    sigmoid,
    softplus,
    sqrt,
    tanh,
    where,
)


@cell
def peephole_lstm(p, x, h, c):
    """Gers and Schmidhuber 2000."""
    i, f, g, o = p.dense("i f g o", x, h)
    i, f = sigmoid(i + p.vector("pi") * c), sigmoid(f + p.vector("pf") * c)
    c = f * c + i * tanh(g)
    return sigmoid(o + p.vector("po") * c) * tanh(c), c


@cell
def lstmp(p, x, h, c):
    """Sak et al. 2014."""
    i, f, g, o = p.dense("i f g o", x, h)
    i, f = sigmoid(i + p.vector("pi") * c), sigmoid(f + p.vector("pf") * c)
    c = f * c + i * tanh(g)
    return p.project(sigmoid(o + p.vector("po") * c) * tanh(c)), c


@cell
def projected_rnn(p, x, h):
    """No state has H units, and no other gradient than weight_hr's needs what is projected."""
    a, b = p.dense("a b", x, h)
    return p.project(tanh(a) + b)


@cell
def ind_rnn(p, x, h):
    """Li et al. 2018."""
    return relu(p.dense("a", x) + p.vector("u", init=1) * h)


@cell
def mgu(p, x, h):
    """Zhou et al. 2016."""
    f = sigmoid(p.dense("f", x, h))
    n = tanh(p.dense("n", x, f * h))
    return h + f * (n - h)


@cell
def li_gru(p, x, h):
    """Ravanelli et al. 2018, without its batch norm."""
    z = sigmoid(p.dense("z", x, h))
    return z * h + (1 - z) * relu(p.dense("n", x, h))


@cell
def janet(p, x, h, c, *, beta=1.0):
    """van der Westhuizen and Lasenby 2018."""
    s, g = p.dense("f g", x, h)
    c = sigmoid(s) * c + (1 - sigmoid(s - beta)) * tanh(g)
    return c, c


@cell
def coupled_lstm(p, x, h, c):
    """The input gate is 1 less the forget gate: Greff et al. 2015."""
    f, g, o = p.dense("f g o", x, h)
    g = tanh(g)
    c = g + sigmoid(f) * (c - g)
    return sigmoid(o) * tanh(c), c


@cell
def slstm(p, x, h, c, n=1, m=0):
    """Beck et al. 2024, one head, exponential gates."""
    i, f, z, o = p.dense("i f z o", x, h)
    new = maximum(f + m, i)
    f, i = exp(f + m - new), exp(i - new)
    c, n = f * c + i * tanh(z), f * n + i
    return sigmoid(o) * (c / n), c, n, new


@cell
def gru_d(p, x, h, *, dt):
    """Che et al. 2018, of an x whose gaps are filled already."""
    h = exp(-relu(p.vector("w", init=1) * dt + p.vector("b"))) * h
    r, z = sigmoid(p.dense("r z", x, h))
    n = tanh(p.dense("n", x, r * h))
    return h + z * (n - h)


@cell
def cfc(p, x, h, *, dt):
    """Hasani et al. 2022, with one layer of H units as backbone."""
    b = 1.7159 * tanh(0.666 * p.dense("b", x, h))
    f, g, s, t = p.dense("f g s t", b)
    f, g = tanh([f, g])
    return f + sigmoid(s * dt + t) * (g - f)


@cell
def ltc(p, x, h, *, dt, steps=4):
    """Hasani et al. 2021, one gate, in sub-steps of the semi-implicit Euler method."""
    f, d = sigmoid(p.dense("f", x, h)), dt / steps
    for _ in range(steps):
        h = (h + d * f * p.vector("a", init=1)) / (1 + d * (p.vector("rate", init=1) + f))
    return h


@cell
def min_gru(p, x, h):
    """Feng et al. 2024."""
    z, n = p.dense("z n", x)
    return h + sigmoid(z) * (n - h)


@cell
def sru(p, x, h, c):
    """Lei et al. 2018: h is not read."""
    u, s = p.dense("u s", x, bias=False)
    f = sigmoid(p.dense("f", x) + p.vector("vf") * c)
    r = sigmoid(p.dense("r", x) + p.vector("vr") * c)
    c = u + f * (c - u)
    return s + r * (c - s), c


@cell
def co_rnn(p, x, y, z, *, step=0.3, gamma=1.0, epsilon=0.5):
    """Rusch and Mishra 2021: a gate with two operands beside x."""
    z = z + step * (tanh(p.dense("a", x, y, z)) - gamma * y - epsilon * z)
    return y + step * z, z


@cell
def dreamer_gru(p, x, h):
    """Hafner et al. 2023: one norm over the sums of all gates."""
    r, n, z = p.layer_norm("gates", *p.dense("r n z", x, h, bias=False))
    z = sigmoid(z - 1)
    return z * tanh(sigmoid(r) * n) + (1 - z) * h


@cell
def everything(p, x, h, c):
    """Every operation, and both norms."""
    a, b, e, d = p.rms_norm("all", *p.dense("a b e d", x, h))
    a = softplus(a) + absolute(b)
    b = minimum(log(a + 1), maximum(e, -d)) / (2 + exp(-e))
    c = where(d > 0, sqrt(a + 1) * b, c - relu(e)) + p.vector("v", init=0.5) * d
    return tanh(p.layer_norm("c", c)) * sigmoid(p.dense("q", b - c)), c


BUILTIN = [
    builtin.rnn,
    builtin.rnn.with_options(relu=True),
    builtin.lstm,
    builtin.gru,
    builtin.gru.with_options(reset_after=False),
    builtin.rnn.with_options(layer_norm=True),
    builtin.lstm.with_options(layer_norm=True),
    builtin.gru.with_options(layer_norm=True),
    builtin.gru.with_options(reset_after=False, layer_norm=True),
    builtin.lstm.with_options(project=True),
    builtin.lstm.with_options(project=True, layer_norm=True),
]
PUBLISHED = [
    peephole_lstm,
    ind_rnn,
    mgu,
    li_gru,
    janet,
    coupled_lstm,
    slstm,
    gru_d,
    cfc,
    ltc,
    min_gru,
    sru,
    co_rnn,
    dreamer_gru,
    lstmp,
    projected_rnn,
]
CELLS = [*BUILTIN, *PUBLISHED, everything]
