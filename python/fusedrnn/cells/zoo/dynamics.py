"""Steps of differential equations: time gaps, time constants, oscillators."""

import math

from fusedrnn.cells import cell, exp, log, relu, sigmoid, tanh


@cell
def gru_d(p, x, h, *, dt):
    """Che, Purushotham, Cho, Sontag and Liu 2018, "Recurrent neural networks for multivariate time series
    with missing values", Scientific Reports.

    x includes the mask, and its missing values are already filled in. One time gap per row, not per feature.
    """
    h = exp(-relu(p.vector("w", init=1) * dt + p.vector("b"))) * h
    r, z = sigmoid(p.dense("r z", x, h))
    n = tanh(p.dense("n", x, r * h))
    return h + z * (n - h)


@cell
def time_aware_lstm(p, x, h, c, *, dt):
    """Baytas et al. 2017, "Patient subtyping via time-aware LSTM networks", KDD.

    The short-term part of c is scaled by 1 / log(e + dt), the paper's choice for long gaps.
    """
    short = tanh(p.dense("s", c))
    c = c - short + short / log(math.e + dt)
    i, f, g, o = p.dense("i f g o", x, h)
    c = sigmoid(f) * c + sigmoid(i) * tanh(g)
    return sigmoid(o) * tanh(c), c


@cell
def cfc(p, x, h, *, dt):
    """Hasani et al. 2022, "Closed-form continuous-time neural networks", Nature Machine Intelligence.

    The backbone is one layer of H units.
    """
    b = 1.7159 * tanh(0.666 * p.dense("b", x, h))
    f, g, s, t = p.dense("f g s t", b)
    f, g = tanh([f, g])
    return f + sigmoid(s * dt + t) * (g - f)


@cell
def ltc(p, x, h, *, dt, steps=4):
    """Hasani, Lechner, Amini, Rus and Grosu 2021, "Liquid time-constant networks", AAAI.

    One gate, in sub-steps of the semi-implicit Euler method. The gate is computed once, from the state before
    the step; the paper's algorithm computes it again in each sub-step. Both agree for ``steps=1``.
    """
    f, d = sigmoid(p.dense("f", x, h)), dt / steps
    for _ in range(steps):
        h = (h + d * f * p.vector("a", init=1)) / (1 + d * (p.vector("rate", init=1) + f))
    return h


@cell
def leaky_rnn(p, x, h, *, alpha=0.3):
    """Lukoševičius 2012, "A practical guide to applying echo state networks", in Neural Networks: Tricks of
    the Trade.

    Leaky integration, with trained weights.
    """
    return (1 - alpha) * h + alpha * tanh(p.dense("a", x, h))


@cell
def pl_rnn(p, x, h):
    """Koppe, Toutounji, Kirsch, Lis and Durstewitz 2019, "Identifying nonlinear dynamical systems via
    generative recurrent neural networks with applications to fMRI", PLOS Computational Biology.

    The mean of the state. The paper's matrix has a zero diagonal; the cell does not enforce it.
    """
    return p.vector("a", init=(0, 1)) * h + p.dense("w", x, relu(h))


@cell
def antisymmetric_rnn(p, x, h, *, step=0.1, gamma=0.01):
    """Chang, Chen, Haber and Chi 2019, "AntisymmetricRNN: a dynamical system view on recurrent neural
    networks", ICLR.

    The paper's weight_hh is antisymmetric, W - W^T. That is a parametrization outside the cell.
    """
    return h + step * tanh(p.dense("a", x, h) - gamma * h)


@cell
def gated_antisymmetric_rnn(p, x, h, *, step=0.1, gamma=0.01):
    """Chang, Chen, Haber and Chi 2019, "AntisymmetricRNN: a dynamical system view on recurrent neural
    networks", ICLR.

    The gate and the candidate share the product with h. The paper's weight_hh is antisymmetric, W - W^T. That
    is a parametrization outside the cell.
    """
    q = p.dense("q", h, bias=False) - gamma * h
    z, n = p.dense("z n", x)
    return h + step * sigmoid(q + z) * tanh(q + n)


@cell
def lipschitz_rnn(p, x, h, *, step=0.1):
    """Erichson, Azencot, Queiruga, Hodgkinson and Mahoney 2021, "Lipschitz recurrent neural networks", ICLR.

    One step of Euler's method. The paper builds A and W from symmetric and antisymmetric parts. That is a
    parametrization outside the cell.
    """
    return h + step * (p.dense("a", h, bias=False) + tanh(p.dense("w", x, h)))


@cell
def co_rnn(p, x, y, z, *, step=0.3, gamma=1.0, epsilon=0.5):
    """Rusch and Mishra 2021, "Coupled oscillatory recurrent neural network (coRNN): an accurate and
    (gradient) stable architecture for learning long time dependencies", ICLR.

    The damping term uses the previous z.
    """
    z = z + step * (tanh(p.dense("a", x, y, z)) - gamma * y - epsilon * z)
    return y + step * z, z


@cell
def unicornn(p, x, y, z, *, step=0.1, alpha=1.0):
    """Rusch and Mishra 2021, "UnICORNN: a recurrent model for learning very long time dependencies", ICML."""
    d = step * sigmoid(p.vector("c", init=(-0.1, 0.1)))
    z = z - d * (tanh(p.dense("a", x) + p.vector("w", init=(0, 1)) * y) + alpha * y)
    return y + d * z, z


@cell
def lem(p, x, y, z, *, step=1.0):
    """Rusch, Mishra, Erichson and Mahoney 2022, "Long expressive memory for sequence modeling", ICLR."""
    t, s, g = p.dense("t s g", x, y)
    z = z + step * sigmoid(t) * (tanh(g) - z)
    y = y + step * sigmoid(s) * (tanh(p.dense("n", x, z)) - y)
    return y, z
