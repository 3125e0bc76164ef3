"""Cells with full recurrent matrices: most have gates and one state."""

from fusedrnn.cells import cell, relu, sigmoid, tanh


@cell
def mgu(p, x, h):
    """Zhou, Wu, Zhang and Zhou 2016, "Minimal gated unit for recurrent neural networks", International
    Journal of Automation and Computing.
    """
    f = sigmoid(p.dense("f", x, h))
    n = tanh(p.dense("n", x, f * h))
    return h + f * (n - h)


@cell
def mgu1(p, x, h):
    """Heck and Salem 2017, "Simplified minimal gated unit variations for recurrent neural networks", MWSCAS.

    The gate does not read x.
    """
    f = sigmoid(p.dense("f", h))
    n = tanh(p.dense("n", x, f * h))
    return h + f * (n - h)


@cell
def mgu2(p, x, h):
    """Heck and Salem 2017, "Simplified minimal gated unit variations for recurrent neural networks", MWSCAS.

    The gate does not read x and has no bias.
    """
    f = sigmoid(p.dense("f", h, bias=False))
    n = tanh(p.dense("n", x, f * h))
    return h + f * (n - h)


@cell
def mgu3(p, x, h):
    """Heck and Salem 2017, "Simplified minimal gated unit variations for recurrent neural networks", MWSCAS.

    The gate is only a bias.
    """
    f = sigmoid(p.vector("f"))
    n = tanh(p.dense("n", x, f * h))
    return h + f * (n - h)


@cell
def li_gru(p, x, h):
    """Ravanelli, Brakel, Omologo and Bengio 2018, "Light gated recurrent units for speech recognition",
    IEEE Transactions on Emerging Topics in Computational Intelligence.

    Without the batch norm.
    """
    z = sigmoid(p.dense("z", x, h))
    return z * h + (1 - z) * relu(p.dense("n", x, h))


@cell
def dreamer_gru(p, x, h):
    """Hafner, Pasukonis, Ba and Lillicrap 2023, "Mastering diverse domains through world models",
    arXiv:2301.04104.

    One layer norm over the sums of all gates, and a bias of -1 for the update gate, as in the authors' code.
    """
    r, n, z = p.layer_norm("gates", *p.dense("r n z", x, h, bias=False))
    z = sigmoid(z - 1)
    return z * tanh(sigmoid(r) * n) + (1 - z) * h


@cell
def augru(p, x, h, *, attention):
    """Zhou et al. 2019, "Deep interest evolution network for click-through rate prediction", AAAI.

    An attention score for each row and step scales the update gate.
    """
    r, z = sigmoid(p.dense("r z", x, h))
    n = tanh(p.dense("n", x) + r * p.dense("n", h, bias=False))
    return h + attention * z * (n - h)


@cell
def mut1(p, x, h):
    """Jozefowicz, Zaremba and Sutskever 2015, "An empirical exploration of recurrent network architectures",
    ICML.

    The paper adds tanh(x) to the candidate. Here x is multiplied by a matrix, so it can have any size.
    """
    z = sigmoid(p.dense("z", x))
    r = sigmoid(p.dense("r", x, h))
    n = tanh(p.dense("n", r * h) + tanh(p.dense("n", x, bias=False)))
    return h + z * (n - h)


@cell
def mut3(p, x, h):
    """Jozefowicz, Zaremba and Sutskever 2015, "An empirical exploration of recurrent network architectures",
    ICML.
    """
    z = sigmoid(p.dense("z", x, tanh(h)))
    r = sigmoid(p.dense("r", x, h))
    n = tanh(p.dense("n", x, r * h))
    return h + z * (n - h)


@cell
def ugrnn(p, x, h, *, forget=1.0):
    """Collins, Sohl-Dickstein and Sussillo 2017, "Capacity and trainability in recurrent neural networks",
    ICLR.

    ``forget`` is the paper's b^fg, a constant.
    """
    g, n = p.dense("g n", x, h)
    n = tanh(n)
    return n + sigmoid(g + forget) * (h - n)


@cell
def rhn(p, x, h, *, depth=2):
    """Zilly, Srivastava, Koutník and Schmidhuber 2017, "Recurrent highway networks", ICML.

    The carry gate is 1 minus the transform gate, as in the paper's experiments.
    """
    for k in range(1, depth + 1):
        n, t = p.dense(f"n{k} t{k}", x, h) if k == 1 else p.dense(f"n{k} t{k}", h)
        h = h + sigmoid(t) * (tanh(n) - h)
    return h


@cell
def cfn(p, x, h):
    """Laurent and von Brecht 2017, "A recurrent neural network without chaos", ICLR."""
    t, e = sigmoid(p.dense("t e", x, h))
    return t * tanh(h) + e * tanh(p.dense("n", x, bias=False))


@cell
def nbrc(p, x, h):
    """Vecoven, Ernst and Drion 2021, "A bio-inspired bistable recurrent cell allows for long-lasting memory",
    PLOS ONE.

    The neuromodulated cell: a and c depend on all units. Biases as in the authors' code.
    """
    a, c = p.dense("a c", x, h)
    n = tanh(p.dense("n", x, bias=False) + (1 + tanh(a)) * h)
    return n + sigmoid(c) * (h - n)


@cell
def atr(p, x, h):
    """Zhang, Xiong, Su, Lin and Zhang 2018, "Simplifying neural machine translation with addition-subtraction
    twin-gated recurrent networks", EMNLP.
    """
    a, q = p.dense("a", x, bias=False), p.dense("q", h, bias=False)
    return sigmoid(a + q) * a + sigmoid(a - q) * h


@cell
def star(p, x, h):
    """Turkoglu, D'Aronco, Wegner and Schindler 2021, "Gating revisited: deep multi-layer RNNs that can be
    trained", IEEE Transactions on Pattern Analysis and Machine Intelligence.
    """
    k, z = sigmoid(p.dense("k", x, h)), tanh(p.dense("z", x))
    return tanh(h + k * (z - h))


@cell
def minimal_rnn(p, x, h):
    """Chen 2017, "MinimalRNN: toward more interpretable and trainable recurrent neural networks",
    arXiv:1711.06788.
    """
    z = tanh(p.dense("z", x))
    u = sigmoid(p.dense("u", h, z))
    return z + u * (h - z)


@cell
def fast_rnn(p, x, h):
    """Kusupati et al. 2018, "FastGRNN: a fast, accurate, stable and tiny kilobyte sized gated recurrent
    neural network", NeurIPS.

    The residual connection has its own weights for each unit. In the paper, all units share them.
    """
    n = tanh(p.dense("n", x, h))
    return sigmoid(p.vector("alpha", init=-3)) * n + sigmoid(p.vector("beta", init=3)) * h


@cell
def fast_grnn(p, x, h):
    """Kusupati et al. 2018, "FastGRNN: a fast, accurate, stable and tiny kilobyte sized gated recurrent
    neural network", NeurIPS.

    The gate and the candidate share both products. Each unit has its own zeta and nu; in the paper, all units
    share them. Without the low rank, which is a parametrization of the matrices.
    """
    a = p.dense("a", x, h, bias=False)
    z, n = sigmoid(a + p.vector("bz", init=1)), tanh(a + p.vector("bn", init=1))
    zeta, nu = sigmoid(p.vector("zeta", init=1)), sigmoid(p.vector("nu", init=-4))
    return (zeta * (1 - z) + nu) * n + z * h


@cell
def scrn(p, x, y, h, s, *, alpha=0.95):
    """Mikolov, Joulin, Chopra, Mathieu and Ranzato 2015, "Learning longer memory in recurrent neural
    networks", ICLR workshop.

    y is the input of the paper's softmax. There are as many slow units s as units of h.
    """
    s = (1 - alpha) * p.dense("s", x, bias=False) + alpha * s
    h = sigmoid(p.dense("h", x, h, s, bias=False))
    return p.dense("y", h, s, bias=False), h, s
