"""Cells that most tests take: built-in ones, published ones, and one that uses every operation."""

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
from fusedrnn.cells.zoo import (
    cfc,
    co_rnn,
    coupled_lstm,
    dreamer_gru,
    gru_d,
    ind_rnn,
    janet,
    li_gru,
    lstmp,
    ltc,
    mgu,
    min_gru,
    peephole_lstm,
    slstm,
    sru,
)


@cell
def projected_rnn(p, x, h):
    """No state has H units, and no other gradient than weight_hr's needs what is projected."""
    a, b = p.dense("a b", x, h)
    return p.project(tanh(a) + b)


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
