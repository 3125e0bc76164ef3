"""Seeded mistakes: each is one change of a kernel that the fast selection of tests has to notice.

The classes are those of errors that were published or shipped: a lost carry, a gradient of the wrong
variable, a wrong slice, a mask that acts in one direction only, stale memory, strides ignored, tails
skipped, overflow, NaN swallowed. ``old`` occurs exactly once in its file, else the list is out of date and
the tests fail. ``old`` and ``new`` are whole, so that a switch can choose between them: statements where
``old`` ends with a semicolon (a declaration is one of ``const T name = ...;``), else expressions.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    name: str
    file: str  # below csrc
    old: str
    new: str
    constant: bool = False  # in an expression that the compiler evaluates: no switch can be there


def mutated(text, mutant):
    """The source with the mistake in it; the place has to be there exactly once."""
    assert text.count(mutant.old) == 1, (
        f"{mutant.name}: found {text.count(mutant.old)} times in {mutant.file}: {mutant.old}"
    )
    return text.replace(mutant.old, mutant.new)


CELLS, REGULARIZED = "cells/derived.h", "cells/regularized.h"
FORWARD, BACKWARD, PACK, TILE, MASKS = (
    f"cpu/{f}.h" for f in ("forward", "backward", "pack", "tile", "masks")
)
ONE_ROW = "cpu/one_row.h"
RUN, MATH, TRANSPOSE, PHILOX = "cpu/run.cpp", "simd/math.h", "simd/transpose.h", "simd/philox.h"
WEIGHTS, PACKED = "cpu/weight_gradients.h", "cpu/packed_weights.h"
STEPS, NORM, ROW_NORM = "steps.h", "cpu/layer_norm.h", "cells/row_norm.h"

MUTANTS = [
    # the cells
    Mutant(
        "lstm: input and forget gate exchanged",
        CELLS,
        "const V v5 = fma(v1, c_prev, v4);",
        "const V v5 = fma(v2, c_prev, v1 * v3);",
    ),
    Mutant(
        "lstm: derivative of tanh at the previous c",
        CELLS,
        "const V v4 = fnma(v1, v1, V::set(1));",
        "const V v4 = fnma(tanh(c_prev), tanh(c_prev), V::set(1));",
    ),
    Mutant("lstm: carried dc lost", CELLS, "const V v8 = fma(v3, v4, dc);", "const V v8 = v3 * v4;"),
    Mutant(
        "lstm: dc not through the forget gate", CELLS, "const V v17 = v8 * saved[0];", "const V v17 = v8;"
    ),
    Mutant("lstm: forget gate without c_prev", CELLS, "const V v16 = v8 * c_prev;", "const V v16 = v8;"),
    Mutant(
        "lstm: c again of i and o",
        CELLS,
        "const V v1 = saved[1] * saved[2];",
        "const V v1 = saved[1] * saved[3];",
    ),
    Mutant(
        "gru: r on the input part",
        CELLS,
        "const V v3 = fma(v1, a[3], a[0]);",
        "const V v3 = fma(v1, a[0], a[3]);",
    ),
    Mutant("gru: dq not through r", CELLS, "const V v9 = v7 * saved[0];", "const V v9 = v7;"),
    Mutant(
        "gru: sign of z",
        CELLS,
        "const V v1 = h_prev - saved[3];",
        "const V v1 = saved[3] - h_prev;",
    ),
    Mutant("gru before: r not applied before the product", CELLS, "middle = v3;", "middle = h_prev;"),
    Mutant(
        "gru before: direct part of r*h lost",
        CELLS,
        "const V v5 = fma(dmiddle, saved[0], direct);",
        "const V v5 = direct;",
    ),
    Mutant("gru before: r without h_prev", CELLS, "const V v1 = dmiddle * h_prev;", "const V v1 = dmiddle;"),
    # rows, cuts, ends
    Mutant(
        "steps: reset at the wrong step in reverse",
        STEPS,
        "return (steps.reverse ? t + 1 : t) * steps.B + b;",
        "return t * steps.B + b;",
    ),
    Mutant("steps: reset ignored in reverse", STEPS, "!(steps.reverse && first)", "!steps.reverse"),
    Mutant(
        "steps: reverse starts at T",
        STEPS,
        "return steps.reverse ? length_of(steps, b) - 1 : 0;",
        "return steps.reverse ? steps.T - 1 : 0;",
    ),
    Mutant(
        "steps: final state at T",
        STEPS,
        "return steps.reverse ? 0 : length_of(steps, b) - 1;",
        "return steps.reverse ? 0 : steps.T - 1;",
    ),
    Mutant(
        "steps: one step too many",
        STEPS,
        "return t < length_of(steps, b);",
        "return t <= length_of(steps, b);",
    ),
    # the loop forward
    Mutant(
        "forward: recurrence lost",
        FORWARD,
        "rows.h[i] = job.y + (before_t * B + b) * job.P;",
        "rows.h[i] = job.zeros;",
    ),
    Mutant(
        "forward: h0 ignored",
        FORWARD,
        "rows.h[i] = job.h0 ? job.h0 + b * job.P : job.zeros;",
        "rows.h[i] = job.zeros;",
    ),
    Mutant(
        "forward: c not cut",
        FORWARD,
        "rows.h[i] = rows.c[i] = job.zeros;",
        "rows.h[i] = job.zeros, rows.c[i] = job.c0 ? job.c0 + b * job.H : job.zeros;",
    ),
    Mutant(
        "forward: strides of x ignored",
        FORWARD,
        "rows.x[i] = job.x.at(t, b);",
        "rows.x[i] = job.x.data + (t * B + b) * job.I;",
    ),
    Mutant(
        "forward: x of another step ahead",
        FORWARD,
        "ahead.x[n] = job.x.at(t, b)",
        "ahead.x[n] = job.x.at(t ? t - 1 : t, b)",
    ),
    Mutant(
        "forward: one row's W x for all",
        FORWARD,
        "((s - ahead_begin) * job.steps.B + b) * job.blocks",
        "((s - ahead_begin) * job.steps.B + 0 * b) * job.blocks",
    ),
    Mutant(
        "forward: last lane of the tail skipped",
        FORWARD,
        "rounded<O>(h).store(h_outs[i] + u, in_row);",
        "rounded<O>(h).store(h_outs[i] + u, in_row - 1);",
    ),
    Mutant(
        "tape: more of the last block than there is",
        TILE,
        "H - block * cpu::kBlock < cpu::kBlock ? H - block * cpu::kBlock : cpu::kBlock",
        "cpu::kBlock",
    ),
    Mutant(
        "forward: y at padding not zeroed",
        FORWARD,
        "__builtin_memset(h_out(t, b), 0, size_t(P) * sizeof(T));",
        ";",
    ),
    Mutant(
        "forward: states of padding in reverse",
        FORWARD,
        "const T* held_h = steps.reverse ? (job.h0 ? job.h0 + b * P : job.zeros) : h;",
        "const T* held_h = h;",
    ),
    Mutant(
        "forward: final state of an empty row",
        FORWARD,
        "const T* h = length ? job.y + (last * B + b) * P : job.h0 ? job.h0 + b * P : job.zeros;",
        "const T* h = length ? job.y + (last * B + b) * P : job.zeros;",
    ),
    # the loop backward
    Mutant(
        "backward: carried dh lost",
        BACKWARD,
        "dh = V::load(acc + (w * m + i) * V::lanes);",
        "dh = V::zero();",
    ),
    Mutant(
        "backward: direct part lost",
        BACKWARD,
        "if (shape.has_direct) dh = dh + V::load(job.direct + b * units + u);",
        "",
    ),
    Mutant(
        "backward: dc of the later step lost",
        BACKWARD,
        "if (row.after == After::product) return V::load(job.dc + row.b * units + u);",
        "",
    ),
    Mutant(
        "backward: dhT lost",
        BACKWARD,
        "if (job.dhT) dh = V::load(job.dhT + b * job.P + u, job.P - u);",
        "",
    ),
    Mutant(
        "backward: dcT lost",
        BACKWARD,
        "row.after == After::final_state && job.dcT",
        "false",
    ),
    Mutant(
        "backward: dy replaces the chain",
        BACKWARD,
        "dh = dh + V::load(row.dy + u, in_row);",
        "dh = V::load(row.dy + u, in_row);",
    ),
    Mutant(
        "backward: dh of the states lost",
        BACKWARD,
        "if (row.dh_state) dh = dh + V::load(row.dh_state + u, in_row);",
        "",
    ),
    Mutant(
        "backward: dc of the states lost",
        BACKWARD,
        "if (Cell::has_c && row.dc_state) dc = dc + V::load(row.dc_state + u, job.H - u);",
        "",
    ),
    Mutant(
        "backward: strides of dy ignored",
        BACKWARD,
        "in(job.dy)",
        "in({job.dy.data, B * job.P, job.P + 1})",
    ),
    Mutant(
        "backward: cuts in forward only",
        BACKWARD,
        "cut || detached(job.steps, later(t))",
        "detached(job.steps, later(t))",
    ),
    Mutant(
        "backward: gradient not stopped",
        BACKWARD,
        "cut || detached(job.steps, later(t))",
        "cut",
    ),
    Mutant(
        "steps: gradient stopped one step early",
        STEPS,
        "time_of(steps, t) % steps.detach_every == 0",
        "(time_of(steps, t) + 1) % steps.detach_every == 0",
    ),
    Mutant(
        "backward: state0 not cut off", BACKWARD, "cut ? After::nothing : After::product", "After::product"
    ),
    Mutant(
        "backward: no gradient through an empty row",
        BACKWARD,
        "empty ? After::final_state : cut ? After::nothing : After::product",
        "empty ? After::nothing : cut ? After::nothing : After::product",
    ),
    Mutant(
        "backward: dh0 missing",
        BACKWARD,
        "if (job.dh0) dh.store(job.dh0 + row.b * job.P + u, job.P - u);",
        "",
    ),
    Mutant(
        "backward: dc0 missing",
        BACKWARD,
        "if (shape.has_c && !shape.projects && job.dc0) c(row, u, dc);",
        "",
    ),
    Mutant(
        "backward: accumulators not reset",
        BACKWARD,
        "for (int i = 0; i < m * wide; ++i) V::zero().store(acc + i * V::lanes);",
        "",
    ),
    Mutant("backward: bias counted twice", BACKWARD, "row[0] = T(1);", "row[0] = T(2);"),
    Mutant(
        "backward: h for h_prev",
        BACKWARD,
        "const T* h_prev = h_before(t, b);",
        "const T* h_prev = h_row(t, b);",
    ),
    Mutant(
        "backward: x of another step",
        BACKWARD,
        "__builtin_memcpy(row + 1, job.x.at(t, b), size_t(job.I) * sizeof(T));",
        "__builtin_memcpy(row + 1, job.x.at(t ? t - 1 : t, b), size_t(job.I) * sizeof(T));",
    ),
    Mutant(
        "backward: r lost in the gradient of weight_hn",
        BACKWARD,
        "saved[offset(u, shape.saved)] * h_prev[u]",
        "h_prev[u]",
    ),
    Mutant("backward: nothing carried between chunks", BACKWARD, "rows.latest[b] = boundary;", ""),
    Mutant(
        "weight gradients: a panel copied once a thread",
        WEIGHTS,
        "item == begin || at == 0",
        "item == begin",
    ),
    Mutant(
        "weight gradients: the last column not copied",
        WEIGHTS,
        "V::load(from + k, m - k).store(to + k, m - k);",
        "V::load(from + k, m - k).store(to + k, m - k - 1);",
    ),
    Mutant(
        "tile: every part the first",
        TILE,
        "tile<V, M, part, 1, First>(products, count, acc);",
        "tile<V, M, part, 1, 0>(products, count, acc);",
    ),
    Mutant(
        "backward: every chunk begins at zero",
        WEIGHTS,
        "const bool overwrite = first_chunk && row == 0;",
        "const bool overwrite = row == 0;",
    ),
    Mutant(
        "backward: sums begin with stale memory",
        WEIGHTS,
        "const bool overwrite = first_chunk && row == 0;",
        "const bool overwrite = false && first_chunk;",
    ),
    Mutant("backward: wrong slice of the gates", WEIGHTS, "d.accumulator - group.first", "d.accumulator"),
    Mutant(
        "backward: dx at padding not zeroed",
        BACKWARD,
        "if (job.dx && job.steps.lengths) this->zero_padding();",
        "",
    ),
    Mutant(
        "backward: last column of dx skipped",
        BACKWARD,
        "V::load(acc + (w * m + r) * V::lanes).store(row + column, job.I - column);",
        "V::load(acc + (w * m + r) * V::lanes).store(row + column, job.I - column - 1);",
    ),
    # projection
    Mutant(
        "projection: the weights of the first block for all",
        TILE,
        "weights.data + block * step + lane * K",
        "weights.data + 0 * block + lane * K",
    ),
    Mutant(
        "projection: h not zoned",
        FORWARD,
        "h = zoned(rows.keep_h, first + i, u, h, V::load(rows.h[first + i] + u, in_row));",
        ";",
    ),
    Mutant(
        "projection: a panel of weight_hr not packed",
        FORWARD,
        "take(job.weight_hr, job.P, job.H, cpu::kProjection, projection)",
        "take(job.weight_hr, job.P, job.H, cpu::kProjection, recurrent2)",
    ),
    Mutant(
        "projection: dh of another row",
        BACKWARD,
        "rows.da[i] = rows.at[i].da + this->weights.dh_operand_at;",
        "rows.da[i] = rows.at[0].da + this->weights.dh_operand_at;",
    ),
    Mutant("projection: dc0 missing", BACKWARD, "c(rows.at[i], u, dc_of(rows.at[i], u));", ";"),
    Mutant(
        "projection: dh of the state before lost",
        BACKWARD,
        "if constexpr (kRegularized<Cell>) dh_before.store(job.direct + row.b * units + u);",
        "if constexpr (kRegularized<Cell>) V::zero().store(job.direct + row.b * units + u);",
    ),
    Mutant(
        "projection: of the zoned c",
        REGULARIZED,
        "Cell::new_h(saved, c_prev, Cell::new_c(saved, c_prev))",
        "Cell::new_h(saved, c_prev, c_prev)",
    ),
    Mutant(
        "projection: dweight_hr of what is behind",
        WEIGHTS,
        "dh_at + blocks_of(job_.P) * kBlock",
        "dh_at",
    ),
    # recurrent dropout and zoneout
    Mutant(
        "zoneout: what is kept and what is new exchanged",
        REGULARIZED,
        "return fma(keep, candidate, (V::set(1) - keep) * before);",
        "return fma(keep, before, (V::set(1) - keep) * candidate);",
    ),
    Mutant("zoneout: all of the gradient to the candidate", REGULARIZED, "d = keep * d;", ""),
    Mutant("zoneout: the zoned c for the candidate", REGULARIZED, "c = Cell::new_c(saved, c_prev);", ";"),
    Mutant("zoneout: the candidate h lost", REGULARIZED, "h = saved[Cell::saved];", ";"),
    Mutant(
        "zoneout: dh of the state before lost",
        BACKWARD,
        "direct = direct + dh_before, dc_prev = dc_prev + dc_before;",
        "dc_prev = dc_prev + dc_before;",
    ),
    Mutant(
        "zoneout: dc of the state before lost",
        BACKWARD,
        "direct = direct + dh_before, dc_prev = dc_prev + dc_before;",
        "direct = direct + dh_before;",
    ),
    Mutant("zoneout: c and h by one mask", MASKS, "MaskKind::zoneout_c", "MaskKind::zoneout_h"),
    Mutant(
        "masks: the same at every step",
        MASKS,
        "uint32_t(t)",
        "0",
    ),
    Mutant("masks: by place in the step for row", MASKS, "uint32_t(rows ? rows[i] : i)", "uint32_t(i)"),
    Mutant(
        "masks: kept and dropped exchanged", "mask_rule.h", "word >= rule.threshold", "word < rule.threshold"
    ),
    Mutant("philox: one round too few", PHILOX, "round < 10", "round < 9"),
    Mutant("dropout: h not masked", FORWARD, "(kOperands ? rows.operand : rows.h)", "rows.h"),
    Mutant("dropout: r*h not masked", FORWARD, "h = masks().dropped(rows.b[first + i], u, h);", ";"),
    Mutant("dropout: chain not masked", BACKWARD, "dh = masks().dropped(b, u, dh);", ";"),
    Mutant(
        "dropout: mask on the direct part",
        BACKWARD,
        """if (regularized) dh = masks().dropped(b, u, dh);
            if (shape.has_direct) dh = dh + V::load(job.direct + b * units + u);""",
        """if (shape.has_direct) dh = dh + V::load(job.direct + b * units + u);
            if (regularized) dh = masks().dropped(b, u, dh);""",
    ),
    Mutant("dropout: d(r*h) not masked", BACKWARD, "dmiddle = masks().dropped(row.b, u, dmiddle);", ";"),
    Mutant(
        "dropout: weight gradient by the whole h",
        BACKWARD,
        "row[1 + job.I + part * job.P + u] *= dropout[u];",
        ";",
    ),
    Mutant("dropout: not scaled", RUN, "1 / (1 - r.recurrent_dropout)", "1"),
    Mutant(
        "zoneout: evaluation by the rate",
        RUN,
        "MaskRule{true, false, 0, 1 - rate}",
        "MaskRule{true, false, 0, rate}",
    ),
    # weights, products, sizes
    Mutant(
        "pack: gates in the wrong order",
        PACK,
        "(job.part.gate[s] * job.H + block * kBlock) * job.K",
        "(s * job.H + block * kBlock) * job.K",
    ),
    Mutant(
        "pack: second vector of a narrow block over the first",
        PACK,
        "(s * units + u) / n * gap + (s * units + u) % n",
        "(s * units + u) % n",
    ),
    Mutant(
        "narrow block: sums of the wrong accumulators",
        FORWARD,
        "((part.first + s + at / units) * m + i) * n",
        "((s + at / units) * m + i) * n",
    ),
    Mutant(
        "narrow block: gradients of gates where those of a whole one lie",
        BACKWARD,
        "units_of(job.H, u / kBlock) < kBlock ? this->last : kBlock",
        "kBlock",
    ),
    Mutant(
        "narrow block: the second phase over other gates",
        BACKWARD,
        "da_r.store(row.da + offset(u, A), job.H - u);",
        "da_r.store(row.da + offset(u, A));",
    ),
    Mutant(
        "narrow block: sums of gates unpacked as those of a whole one",
        WEIGHTS,
        "(d.accumulator - group.first) * layout.step",
        "(d.accumulator - group.first) * kBlock",
    ),
    Mutant(
        "last block: a vector with one unit left out",
        TILE,
        "wide - (n - (block + wide - 1) * cpu::kBlock <= lane)",
        "wide - (n - (block + wide - 1) * cpu::kBlock <= lane + 1)",
    ),
    Mutant(
        "pack: weight_hh for its transpose",
        PACK,
        "Vec<T>::load(row + column, job.K - column).store(out);",
        "for (Index j = 0; j < n; ++j) out[j] = column + j >= job.K ? T(0) : "
        "job.weight[(job.part.gate[s] * job.H + (column + j) % job.H) * job.K + u % job.K];",
    ),
    Mutant(
        "one row: columns of the last square again",
        ONE_ROW,
        "weight[(v * V::lanes + i) * K + k]",
        "weight[(v * V::lanes + i) * K + k - side]",
    ),
    Mutant("few rows: h without its dropout", FORWARD, "regularized ? rows.operand : rows.h", "rows.h"),
    Mutant(
        "one row: gates in the wrong order",
        FORWARD,
        "weight + (part.gate[s] * H + block * kBlock) * k",
        "weight + (s * H + block * kBlock) * k",
    ),
    Mutant(
        "few rows: packed gates in the wrong order",
        FORWARD,
        "Part{0, 1, {part.gate[s]}}",
        "Part{0, 1, {s}}",
    ),
    Mutant(
        "transpose: squares of halves exchanged",
        TRANSPOSE,
        "zipped[2 * i + 1] = zip<n, lanes, true>(rows[i], rows[i + n / 2], All());",
        "zipped[2 * i + 1] = zip<n, lanes, true>(rows[i + n / 2], rows[i], All());",
    ),
    Mutant(
        "transpose: one round too few",
        TRANSPOSE,
        "exchange_all<n, n / 2>(rows);",
        "exchange_all<n, n / 4>(rows);",
    ),
    Mutant(
        "panel: packed for the first blocks alone",
        FORWARD,
        "job.weight_hh && n == 0",
        "job.weight_hh && o + n == 0",
    ),
    Mutant(
        "panel: not where its blocks begin",
        FORWARD,
        "packed_from = block;",
        "packed_from = block ? block - 1 : 0;",
    ),
    Mutant(
        "panel: biases lost",
        RUN,
        "job.weight_hr = weights.weight_hr, job.bias = bias;",
        "job.weight_hr = weights.weight_hr, job.bias = bias; "
        "pack_vectors<T>(shape, n.H, nullptr, nullptr, bias);",
    ),
    Mutant(
        "tile: last k skipped",
        TILE,
        "begin + product.run * a_step",
        "begin + (product.run - 1) * a_step",
    ),
    Mutant(
        "tile: gaps in a row ignored",
        TILE,
        "product.a_begin + r * product.a_run",
        "product.a_begin + r * product.run * product.a_step",
    ),
    Mutant(
        "tile: rows left over when cut",
        TILE,
        "return i * small + (i < larger ? i : larger);",
        "return i * small;",
    ),
    Mutant(
        "run: bias_hh twice",
        PACKED,
        "add(hh, shape.recurrent2);",
        "add(hh, shape.recurrent); add(hh, shape.recurrent2);",
    ),
    Mutant("run: bias_ih forgotten", PACKED, "add(ih, shape.input);", ""),
    Mutant(
        "run: h0 forgotten in backward",
        RUN,
        "job.zeros = zeros, job.h0 = call.state0[0], job.c0 = call.state0[1]",
        "job.zeros = zeros, job.h0 = nullptr, job.c0 = call.state0[1]",
    ),
    Mutant(
        "run: c0 forgotten in backward",
        RUN,
        "job.zeros = zeros, job.h0 = call.state0[0], job.c0 = call.state0[1]",
        "job.zeros = zeros, job.h0 = call.state0[0], job.c0 = nullptr",
    ),
    # the activations
    Mutant("math: sigmoid overflows", MATH, "min(V::set(C::sigmoid_one), x)", "x"),
    Mutant(
        "math: min swallows NaN",
        MATH,
        "min(V::set(C::tanh_one), abs(x))",
        "min(abs(x), V::set(C::tanh_one))",
    ),
    Mutant("math: tanh without its sign", MATH, "return copysign(ratio, x);", "return ratio;"),
    Mutant(
        "math: one coefficient off in its last digits", MATH, "0x1.5554bp-3f", "0x1.5544bp-3f", constant=True
    ),
]
