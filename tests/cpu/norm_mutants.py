"""Seeded mistakes of layer norm, as mutants.py has those of the other kernels."""

from __future__ import annotations

from mutants import CELLS, NORM, ROW_NORM, RUN, Mutant

MUTANTS = [
    Mutant(
        "norm: units that do not exist count for the variance",
        ROW_NORM,
        "mean[Cell::norm_of(s)].in(in_row)",
        "mean[Cell::norm_of(s)].all()",
    ),
    Mutant(
        "norm: no epsilon",
        ROW_NORM,
        "totals[n] / count[n] + T(kEpsilon)",
        "totals[n] / count[n]",
    ),
    Mutant("norm: gradient keeps its mean", ROW_NORM, "dx - mean", "dx"),
    Mutant(
        "norm: gradient keeps its part along x",
        ROW_NORM,
        "fnma(x, along, dx - mean)",
        "dx - mean",
    ),
    Mutant("norm: gradient not scaled", ROW_NORM, "V::set(norm.inverse[n])", "V::set(1)"),
    Mutant(
        "norm: gradient not through the gain",
        NORM,
        "dp[s] * V::load(weights.gain + norm.at(u, s))",
        "dp[s]",
    ),
    Mutant(
        "norm: gain's gradient without x",
        NORM,
        "add_to(sum_at(u, s), dp[s] * x)",
        "add_to(sum_at(u, s), dp[s])",
    ),
    Mutant(
        "norm: gain_c's gradient of c",
        NORM,
        "add_to(sum_at(u, 2 * A), dm * x)",
        "add_to(sum_at(u, 2 * A), dm)",
    ),
    Mutant(
        "norm: carried dc lost",
        NORM,
        "V::load(dc) + back.da(u, 0, V::load(da + norm.at(u, 0)))",
        "back.da(u, 0, V::load(da + norm.at(u, 0)))",
    ),
    Mutant(
        "norm: h by c without its norm",
        NORM,
        "Cell::forward_output(V::load(h_out + u, in_row), m)",
        "Cell::forward_output(V::load(h_out + u, in_row), V::load(c_out + u))",
    ),
    Mutant(
        "norm: sums of the first row alone",
        NORM,
        "b < job.steps.B",
        "b < 1",
    ),
    Mutant(
        "norm: gru's gates all in one",
        CELLS,
        "return s <= 1 ? 0 : s <= 2 ? 1 : s <= 4 ? 2 : 3;",
        "return s <= 2 ? 0 : 1;",
        constant=True,
    ),
    Mutant("norm: dm without tanh'", CELLS, "dm = v7;", "dm = v5;"),
    Mutant(
        "norm: bias of the forward pass lost in backward",
        RUN,
        "job.norm = norm.fill(shape, n.H, weights, bias);",
        "pack_vectors<T>(shape, n.H, nullptr, nullptr, bias); "
        "job.norm = norm.fill(shape, n.H, weights, bias);",
    ),
]
