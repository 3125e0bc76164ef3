"""Light cells: gates and candidate of a unit do not depend on other units of the previous step."""

from fusedrnn.cells import cell, relu, sigmoid, tanh


@cell
def ind_rnn(p, x, h):
    """Li, Li, Cook, Zhu and Gao 2018, "Independently recurrent neural network (IndRNN): building a longer and
    deeper RNN", CVPR.
    """
    return relu(p.dense("a", x) + p.vector("u", init=1) * h)


@cell
def indy_lstm(p, x, h, c):
    """Gonnet and Deselaers 2020, "IndyLSTMs: independently recurrent LSTMs", ICASSP."""
    i, f, g, o = p.dense("i f g o", x)
    i, f = sigmoid(i + p.vector("ui") * h), sigmoid(f + p.vector("uf") * h)
    c = f * c + i * tanh(g + p.vector("ug") * h)
    return sigmoid(o + p.vector("uo") * h) * tanh(c), c


@cell
def e_lstm(p, x, h, c):
    """Irie, Gopalakrishnan and Schmidhuber 2024, "Exploring the promise and limits of real-time recurrent
    learning", ICLR.

    Does not read h. The output gate depends on all units of the new c.
    """
    f, z = p.dense("f z", x)
    f, z = sigmoid(f + p.vector("wf") * c), tanh(z + p.vector("wz") * c)
    c = z + f * (c - z)
    return sigmoid(p.dense("o", x, c)) * c, c


@cell
def min_gru(p, x, h):
    """Feng et al. 2024, "Were RNNs all we needed?", arXiv:2410.01201."""
    z, n = p.dense("z n", x)
    return h + sigmoid(z) * (n - h)


@cell
def min_lstm(p, x, h):
    """Feng et al. 2024, "Were RNNs all we needed?", arXiv:2410.01201."""
    f, i, n = p.dense("f i n", x)
    f, i = sigmoid([f, i])
    return f / (f + i) * h + i / (f + i) * n


@cell
def sru(p, x, h, c):
    """Lei, Zhang, Wang, Dai and Artzi 2018, "Simple recurrent units for highly parallelizable recurrence",
    EMNLP.

    Does not read h. The highway connection uses a product with x; so does the paper if x does not have H
    units.
    """
    u, s = p.dense("u s", x, bias=False)
    f = sigmoid(p.dense("f", x) + p.vector("vf") * c)
    r = sigmoid(p.dense("r", x) + p.vector("vr") * c)
    c = u + f * (c - u)
    return s + r * (c - s), c


@cell
def qrnn(p, x, h, c):
    """Bradbury, Merity, Xiong and Socher 2017, "Quasi-recurrent neural networks", ICLR.

    With fo-pooling and a convolution of width 1. Does not read h.
    """
    z, f, o = p.dense("z f o", x)
    z = tanh(z)
    c = z + sigmoid(f) * (c - z)
    return sigmoid(o) * c, c


@cell
def qrnn_2(p, x, h, c, z, f, o):
    """Bradbury, Merity, Xiong and Socher 2017, "Quasi-recurrent neural networks", ICLR.

    With fo-pooling and a convolution of width 2: z, f and o are products with the previous x.
    """
    wz, wf, wo = p.dense("z f o", x)
    z = tanh(z + wz)
    c = z + sigmoid(f + wf) * (c - z)
    return sigmoid(o + wo) * c, c, *p.dense("vz vf vo", x, bias=False)


@cell
def t_rnn(p, x, h):
    """Balduzzi and Ghifary 2016, "Strongly-typed recurrent neural networks", ICML."""
    z, f = p.dense("z", x, bias=False), sigmoid(p.dense("f", x))
    return z + f * (h - z)


@cell
def t_gru(p, x, h, z, f, o):
    """Balduzzi and Ghifary 2016, "Strongly-typed recurrent neural networks", ICML.

    z, f and o are products with the previous x.
    """
    wz, wf, wo = p.dense("z f o", x)
    h = sigmoid(f + wf) * h + (z + wz) * tanh(o + wo)
    return h, *p.dense("vz vf vo", x, bias=False)


@cell
def t_lstm(p, x, h, c, z, f, o):
    """Balduzzi and Ghifary 2016, "Strongly-typed recurrent neural networks", ICML.

    z, f and o are products with the previous x. Does not read h.
    """
    wz, wf, wo = p.dense("z f o", x)
    z = z + wz
    c = z + sigmoid(f + wf) * (c - z)
    return c * tanh(o + wo), c, *p.dense("vz vf vo", x, bias=False)


@cell
def brc(p, x, h):
    """Vecoven, Ernst and Drion 2021, "A bio-inspired bistable recurrent cell allows for long-lasting memory",
    PLOS ONE.

    Biases as in the authors' code.
    """
    a, c = p.dense("a c", x)
    a, c = 1 + tanh(a + p.vector("wa", init=1) * h), sigmoid(c + p.vector("wc", init=1) * h)
    n = tanh(p.dense("n", x, bias=False) + a * h)
    return n + c * (h - n)
