"""A cell of the user's own, and what may become of its function after weights were saved."""

from __future__ import annotations

from fusedrnn.cells import Cell, cell, sigmoid, tanh


def mgu_of(change: str = "") -> Cell:
    """Zhou et al. 2016: as it was, or with one change."""

    def mgu(p, x, h):
        if change == "order":
            n = p.dense("n", x)
            f = sigmoid(p.dense("f", x, h))
            n = tanh(n + p.dense("n", f * h))
        else:
            f = sigmoid(p.dense("f", x, h))
            n = tanh(p.dense("n", x) + p.dense("n", f * h))
        return n + f * (h - n) if change == "arithmetic" else h + f * (n - h)

    def renamed(p, x, s):
        return mgu(p, x, s)

    return cell(renamed if change == "state" else mgu)


REFUSED = {  # with what the message says of both
    "order": r"mgu has other .*: weight_ih: expected n f, got f n; .*bias_ih: expected n f, got f n",
    "state": r"renamed has other .*: the states: expected s, got h$",
}
WARNED = "the cell mgu computes something else than when the weights were saved"
