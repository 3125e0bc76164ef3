"""Draws docs/gradient_norms.png: the size of dL/dh_t over t, Elman beside LSTM, for a loss on the last step.

    python docs/gradient_norms.py

Needs matplotlib. The gradient at step t is dstate0 of the sequence that begins there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fusedrnn import kernels
from fusedrnn.backends.protocol import Weights
from fusedrnn.cells import Cell, lstm, rnn

T, B, I, H = 100, 8, 4, 64


def orthogonal(draw: np.random.Generator) -> np.ndarray:
    return np.linalg.qr(draw.standard_normal((H, H)))[0]


def weights(cell: Cell, gain: float, forget_bias: float = 0.0) -> Weights:
    """Each gate's recurrent weights orthogonal times ``gain``, input weights small, bias zero but for f."""
    draw = np.random.default_rng(3)
    gates = cell.blocks["weight_ih"]
    bias = np.zeros((gates, H))
    if cell.name == "lstm":
        bias[1] = forget_bias
    return {
        "weight_ih": draw.standard_normal((gates * H, I)) * 0.1,
        "weight_hh": np.concatenate([gain * orthogonal(draw) for _ in range(gates)]),
        "bias_ih": bias.ravel(),
    }


def norms(cell: Cell, w: Weights) -> np.ndarray:
    """``|dL/dh_t|`` for t = 0 … T-1, where L is a random linear function of the last h."""
    draw = np.random.default_rng(7)
    x = draw.standard_normal((T, B, I))
    zero = tuple(np.zeros((B, H)) for _ in cell.states)
    dstateT = (draw.standard_normal((B, H)), *(None for _ in cell.states[1:]))
    whole = kernels.forward(cell, x, w, zero, return_states=True, save=None, backend="reference")
    found = [np.linalg.norm(dstateT[0])]
    for t in range(T - 2, -1, -1):
        state = tuple(each[t] for each in whole.states)
        rest = kernels.forward(cell, x[t + 1 :], w, state, backend="reference")
        gradients = kernels.backward(rest.tape, None, dstateT, need=("state0",))
        found.append(np.linalg.norm(gradients.dstate0[0]))
    return np.array(found[::-1])


def main() -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    curves = (  # colours that colour-blind readers tell apart
        ("Elman, gain 0.8", rnn, weights(rnn, 0.8), "#d55e00", "-"),
        ("Elman, gain 1.0", rnn, weights(rnn, 1.0), "#e69f00", "--"),
        ("Elman, gain 1.6", rnn, weights(rnn, 1.6), "#cc79a7", ":"),
        ("LSTM, forget bias 0", lstm, weights(lstm, 0.5), "#56b4e9", "--"),
        ("LSTM, forget bias 4", lstm, weights(lstm, 0.5, 4.0), "#0072b2", "-"),
    )
    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for label, cell, w, colour, style in curves:
        values = norms(cell, w)
        axes.semilogy(values / values[-1], style, color=colour, label=label, linewidth=1.8)
        print(f"{label}: |dL/dh_0| / |dL/dh_T| = {values[0] / values[-1]:.1e}")
    axes.set(xlabel="time step t", ylabel="|dL/dh_t|, relative to the last step")
    axes.set_title("How much of the gradient reaches step t (loss on the last step alone)", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
