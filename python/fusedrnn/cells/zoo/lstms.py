"""LSTMs: cells with a cell state c."""

from fusedrnn.cells import cell, exp, maximum, relu, sigmoid, tanh


@cell
def lstm_1997(p, x, h, c):
    """Hochreiter and Schmidhuber 1997, "Long short-term memory", Neural Computation.

    Without a forget gate. The cell input is squashed to (-2, 2), the output to (-1, 1).
    """
    i, g, o = p.dense("i g o", x, h)
    c = c + sigmoid(i) * (4 * sigmoid(g) - 2)
    return sigmoid(o) * (2 * sigmoid(c) - 1), c


@cell
def peephole_lstm(p, x, h, c):
    """Gers and Schmidhuber 2000, "Recurrent nets that time and count", IJCNN.

    With tanh for both squashing functions, as in Greff et al. 2017.
    """
    i, f, g, o = p.dense("i f g o", x, h)
    i, f = sigmoid(i + p.vector("pi") * c), sigmoid(f + p.vector("pf") * c)
    c = f * c + i * tanh(g)
    return sigmoid(o + p.vector("po") * c) * tanh(c), c


@cell
def lstmp(p, x, h, c):
    """Sak, Senior and Beaufays 2014, "Long short-term memory recurrent neural network architectures for
    large scale acoustic modeling", Interspeech.

    With peepholes and an output projected to fewer units. Only the recurrent projection of the paper.
    """
    i, f, g, o = p.dense("i f g o", x, h)
    i, f = sigmoid(i + p.vector("pi") * c), sigmoid(f + p.vector("pf") * c)
    c = f * c + i * tanh(g)
    return p.project(sigmoid(o + p.vector("po") * c) * tanh(c)), c


@cell
def coupled_lstm(p, x, h, c):
    """Greff et al. 2017, "LSTM: a search space odyssey", IEEE Transactions on Neural Networks and Learning
    Systems.

    The variant CIFG: the input gate is 1 minus the forget gate. Without peepholes.
    """
    f, g, o = p.dense("f g o", x, h)
    g = tanh(g)
    c = g + sigmoid(f) * (c - g)
    return sigmoid(o) * tanh(c), c


@cell
def janet(p, x, h, c, *, beta=1.0):
    """van der Westhuizen and Lasenby 2018, "The unreasonable effectiveness of the forget gate",
    arXiv:1804.04849.
    """
    s, g = p.dense("f g", x, h)
    c = sigmoid(s) * c + (1 - sigmoid(s - beta)) * tanh(g)
    return c, c


@cell
def slstm(p, x, h, c, n=1, m=0):
    """Beck et al. 2024, "xLSTM: extended long short-term memory", NeurIPS.

    sLSTM with one head, an exponential forget gate and the stabiliser m. The normaliser n starts at 1, so
    that c / n is 0 before the first step.
    """
    i, f, z, o = p.dense("i f z o", x, h)
    new = maximum(f + m, i)
    f, i = exp(f + m - new), exp(i - new)
    c, n = f * c + i * tanh(z), f * n + i
    return sigmoid(o) * (c / n), c, n, new


@cell
def multiplicative_lstm(p, x, h, c):
    """Krause, Lu, Murray and Renals 2016, "Multiplicative LSTM for sequence modelling", arXiv:1609.07959."""
    m = p.dense("m", x, bias=False) * p.dense("m", h, bias=False)
    i, f, g, o = p.dense("i f g o", x, m)
    c = sigmoid(f) * c + sigmoid(i) * tanh(g)
    return sigmoid(o) * tanh(c), c


@cell
def wmc_lstm(p, x, h, c):
    """Landi, Baraldi, Cornia and Cucchiara 2021, "Working memory connections for LSTM", Neural Networks."""
    i, f, g, o = p.dense("i f g o", x, h)
    mi, mf = tanh(p.dense("i f", c, bias=False))
    c = sigmoid(f + mf) * c + sigmoid(i + mi) * tanh(g)
    return sigmoid(o + tanh(p.dense("o", c, bias=False))) * tanh(c), c


@cell
def residual_lstm(p, x, h, c):
    """Kim, El-Khamy and Lee 2017, "Residual LSTM: design of a deep recurrent architecture for distant speech
    recognition", Interspeech.

    m is W_p tanh(c) + W_h x. In the paper, W_h is the identity if x has H units.
    """
    i, f, g, o = p.dense("i f g o", x, h)
    i, f = sigmoid(i + p.vector("pi") * c), sigmoid(f + p.vector("pf") * c)
    c = f * c + i * tanh(g)
    m = p.dense("m", x, tanh(c), bias=False)
    return sigmoid(o + p.vector("po") * c) * m, c


def _lstm(p, name, c, *operands):
    """One of the cells of fs_lstm."""
    i, f, g, o = p.dense(" ".join(gate + name for gate in "ifgo"), *operands)
    c = sigmoid(f) * c + sigmoid(i) * tanh(g)
    return sigmoid(o) * tanh(c), c


@cell
def fs_lstm(p, x, h, c, slow_h, slow_c, *, fast=2):
    """Mujika, Meier and Steger 2017, "Fast-slow recurrent neural networks", NIPS.

    The fast cells pass h and c to each other within the step. The slow cell is called once and has as many
    units as each fast one. Without the layer norm of the paper's experiments.
    """
    h, c = _lstm(p, "1", c, x, h)
    slow_h, slow_c = _lstm(p, "s", slow_c, h, slow_h)
    h, c = _lstm(p, "2", c, slow_h, h)
    for k in range(3, fast + 1):
        h, c = _lstm(p, str(k), c, h)
    return h, c, slow_h, slow_c


@cell
def nas(p, x, h, c):
    """Zoph and Le 2017, "Neural architecture search with reinforcement learning", ICLR.

    The cell found for the Penn treebank, as implemented in TensorFlow's NASCell.
    """
    a, b, d, e, f, g, i = p.dense("a b d e f g i", x, h, bias=False)
    product = p.dense("k", x, bias=False) * p.dense("k", h, bias=False)
    c = tanh(tanh(sigmoid(a) * relu(b)) + c) * tanh(sigmoid(d) + relu(product))
    right = tanh(tanh(tanh(e) * sigmoid(f)) + sigmoid(tanh(g) + sigmoid(i)))
    return tanh(c * right), c


@cell
def ran(p, x, h, c, *, linear=False):
    """Lee, Levy and Zettlemoyer 2017, "Recurrent additive networks", arXiv:1705.07393.

    With ``linear`` the output is c itself, not its tanh.
    """
    i, f = sigmoid(p.dense("i f", x, h))
    c = i * p.dense("n", x, bias=False) + f * c
    return (c if linear else tanh(c)), c
