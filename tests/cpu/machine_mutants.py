"""Seeded mistakes of the vector machine, as mutants.py has them of the compiled cells.

The marked part of the test_machine*.py that test_mutants.py lists has to notice each one, for nothing else
runs.
"""

from __future__ import annotations

from mutants import Mutant

FORWARD, BACKWARD, INTERPRETER, ROWS, NORM, PARTS, JOB, RUN = (
    f"cpu/machine/{f}.h"
    for f in ("forward", "backward", "interpreter", "rows", "norm", "parts", "job", "run")
)
PLAN = "cpu/machine/plan.cpp"
OF_BOTH, GROUPS = "cpu/backward.h", "cpu/groups.h"  # of compiled cells too

MUTANTS = [
    # where the values of rows lie
    Mutant(
        "rows: a reset begins with state0",
        ROWS,
        "return call.start + s * call.H;",
        "if (call.state0[s]) return call.state0[s] + b * call.H;",
    ),
    Mutant(
        "rows: state0 ignored", ROWS, "return start_row(s, b);", "return call.start + (0 * b + s) * call.H;"
    ),
    Mutant(
        "rows: recurrence lost",
        ROWS,
        "return previous_row(s, call.steps.reverse ? t + 1 : t - 1, b);",
        "return call.start + (0 * b + s) * call.H;",
    ),
    Mutant(
        "rows: the step before in one direction only",
        ROWS,
        "call.steps.reverse ? t + 1 : t - 1",
        "t ? t - 1 : t",
    ),
    Mutant(
        "rows: saved values of one row for all",
        ROWS,
        "((t - call.first) & call.saved_kept) * call.steps.B + b",
        "((t - call.first) & call.saved_kept) * call.steps.B + 0 * b",
    ),
    Mutant(
        "rows: carried values of one row for all",
        ROWS,
        "b * (call.carried_count * call.blocks * kBlock)",
        "0 * b",
    ),
    Mutant(
        "rows: zoneout of c by the mask of h",
        ROWS,
        "put(cpu::kKeepC, i, const_cast<T*>(keep_c), i * masks.units);",
        "put(cpu::kKeepC, i, const_cast<T*>(keep_h), i * masks.units);",
    ),
    Mutant(
        "rows: state0 of a projection in rows of H",
        ROWS,
        "call.state0[s] + b * width(s)",
        "call.state0[s] + b * call.H",
    ),
    Mutant("rows: a projection's mask of h in the blocks of units", ROWS, "h ? p_begin : begin", "begin"),
    Mutant(
        "rows: zoneout of a projection by the mask of h",
        ROWS,
        "places[call.projected_mask].rows",
        "places[cpu::kKeepH].rows",
    ),
    Mutant("rows: one row's mask of dropout for all", ROWS, "masks.dropout(b[i])", "masks.dropout(b[0])"),
    Mutant("rows: all dropped operands in one place", JOB, "operand == 1 ? 0 : operand + 1", "0 * operand"),
    # instructions
    Mutant(
        "interpreter: the last vector of a register stays as it was",
        INTERPRETER,
        "at < n * step",
        "at < (n - 1) * step",
    ),
    Mutant("interpreter: last lane of the tail skipped", INTERPRETER, "units - f.lane", "units - f.lane - 1"),
    Mutant(
        "interpreter: the first of several loads for all",
        INTERPRETER,
        "value + k",
        "value + 0 * k",
    ),
    Mutant(
        "interpreter: sums forget what was there", INTERPRETER, "V::load(to) + V::load(from)", "V::load(from)"
    ),
    Mutant(
        "interpreter: a row scalar of another row",
        INTERPRETER,
        "f.scalars[in.a][f.at[f.first + i]]",
        "f.scalars[in.a][f.at[f.first]]",
    ),
    Mutant(
        "interpreter: the first block's vector for the tile",
        INTERPRETER,
        "(in.a * f.blocks + f.block + w) * kBlock",
        "(in.a * f.blocks + f.block) * kBlock",
    ),
    Mutant("interpreter: sign of fnma", INTERPRETER, "fnma(x, y, z)", "fma(x, y, z)"),
    Mutant(
        "interpreter: maximum swallows NaN", INTERPRETER, "select(second, b, a + b)", "select(second, b, b)"
    ),
    Mutant(
        "interpreter: where at a false condition",
        INTERPRETER,
        "select(greater(x, zero), y, z)",
        "select(greater_equal(x, zero), y, z)",
    ),
    Mutant("interpreter: sigmoid' without y", INTERPRETER, "x * (y * (one - y))", "x * (one - y)"),
    Mutant("interpreter: sign in tanh'", INTERPRETER, "x * fnma(y, y, one)", "x * fma(y, y, one)"),
    Mutant("interpreter: the first row's norm for all", INTERPRETER, "rows[i] + offset", "rows[0] + offset"),
    Mutant("interpreter: the first norm for all", INTERPRETER, "in.b * cpu::kNormNumbers", "0"),
    Mutant(
        "interpreter: gradients of the first norm for all",
        INTERPRETER,
        "in.c * cpu::kNormGradientNumbers",
        "0",
    ),
    # forward
    Mutant(
        "forward: bias of the first round",
        FORWARD,
        "round.first + s",
        "s",
    ),
    Mutant(
        "forward: products beyond four lost",
        FORWARD,
        "tile(products, n, acc + (sum->first - round.first) * m * V::lanes);",
        "if (part + 1 == job.parts + sum->part_end)"
        " tile(products, n, acc + (sum->first - round.first) * m * V::lanes);",
    ),
    Mutant(
        "forward: sums of one row in the first block's place",
        FORWARD,
        "frame.registers + w * frame.step",
        "frame.registers",
    ),
    Mutant(
        "forward: a state that is an operand not dropped",
        FORWARD,
        "state < 0 || call.regularization.dropout",
        "state < 0",
    ),
    Mutant(
        "forward: y at padding not zeroed",
        FORWARD,
        "__builtin_memset(rows.state_row(0, t, b), 0, size_t(call.P) * sizeof(T));",
        ";",
    ),
    Mutant(
        "forward: zoneout of a projection keeps nothing",
        FORWARD,
        "h = fma(kept, h, (V::set(1) - kept) * before);",
        "h = kept * h + V::zero() * before;",
    ),
    Mutant(
        "forward: a projection by the masks of the first rows", FORWARD, "keep[first + i] + u", "keep[i] + u"
    ),
    Mutant("forward: a projection into rows of the step", FORWARD, "batch[first + i]", "first + i"),
    Mutant("forward: states of padding in reverse", FORWARD, "steps.reverse ? start : last", "last"),
    Mutant("forward: final state at T", FORWARD, "last_time(steps, b)", "(steps.reverse ? 0 : steps.T - 1)"),
    Mutant("forward: every chunk's boundary in one place", FORWARD, "left / job.chunk_steps - 1", "0 * left"),
    # backward
    Mutant(
        "backward: products add to what was there",
        BACKWARD,
        "for (int i = 0; i < m * wide; ++i) V::zero().store(acc + i * V::lanes);",
        "",
    ),
    Mutant(
        "backward: the first part of an operand alone",
        BACKWARD,
        "p < job.part_begin[operand + 1]",
        "p < job.part_begin[operand] + 1",
    ),
    Mutant("backward: carried gradient lost", BACKWARD, "if (chain) v = V::load(d);", ""),
    Mutant(
        "backward: chain not dropped",
        BACKWARD,
        "if (chain && dropout) v = v * V::load(dropout + row.b * units + u);",
        "",
    ),
    Mutant(
        "backward: direct gradient lost",
        BACKWARD,
        "if (direct) v = chain ? v + V::load(direct + row.b * units + u)"
        " : V::load(direct + row.b * units + u);",
        "",
    ),
    Mutant(
        "backward: not through the projection",
        BACKWARD,
        "if (call.projects) through_projection(f);",
        ";",
    ),
    Mutant(
        "backward: what zoneout leaves of a projection lost",
        BACKWARD,
        "((V::set(1) - kept) * d).store(job.direct[0] + this->rows.at[r].b * units + u);",
        "V::zero().store(job.direct[0] + this->rows.at[r].b * units + u);",
    ),
    Mutant("backward: the gradient of a projection past its mask", BACKWARD, "d = kept * d;", ";"),
    Mutant("backward: dstateT lost", BACKWARD, "v = V::load(last + row.b * width + u, in_row);", ";"),
    Mutant("backward: dy for every state", BACKWARD, "outside && !s", "outside"),
    Mutant(
        "backward: dstates lost",
        BACKWARD,
        "if (every.data) v = v + V::load(every.at(time, row.b) + u, in_row);",
        "",
    ),
    Mutant(
        "backward: no gradient through an empty row",
        OF_BOTH,
        "empty ? After::final_state : cut ? After::nothing : After::product",
        "!empty && !cut ? After::product : After::nothing",
    ),
    Mutant(
        "backward: state0 not cut off", OF_BOTH, "cut ? After::nothing : After::product", "After::product"
    ),
    Mutant("backward: bias counted twice", BACKWARD, "row[0] = T(1);", "row[0] = T(2);"),
    Mutant(
        "backward: x of the first step",
        BACKWARD,
        "call.x.at(t, b)",
        "call.x.at(0 * t, b)",
    ),
    Mutant(
        "backward: the first state for every operand",
        BACKWARD,
        "places.state_before(call.state_of[o], t, b)",
        "places.state_before(0, t, b)",
    ),
    Mutant(
        "backward: weight gradient by the whole state",
        BACKWARD,
        "row[job.column_of[o] + u] *= dropout[b * units + u];",
        ";",
    ),
    Mutant(
        "backward: computed operands of another step",
        BACKWARD,
        "(begin + i) * Base::job.inputs_row + job.column_of[o]",
        "i * Base::job.inputs_row + job.column_of[o]",
    ),
    Mutant(
        "backward: a row scalar's units that do not exist",
        BACKWARD,
        "u < there ? from[u] : T(0)",
        "0 * there + from[u]",
    ),
    Mutant("backward: a row scalar's last block alone", BACKWARD, "all += unit[0];", "all = unit[0];"),
    Mutant(
        "backward: half of a row scalar's units twice",
        BACKWARD,
        "unit[u] += unit[u + half];",
        "unit[u] += unit[u];",
    ),
    Mutant(
        "backward: row scalars of another step",
        BACKWARD,
        "(begin + i) * units * call.scalar_count",
        "i * units * call.scalar_count",
    ),
    Mutant("backward: vectors of the first row alone", BACKWARD, "b < B", "b < 1"),
    Mutant(
        "backward: dx at padding not zeroed",
        BACKWARD,
        "if (Base::job.dx && call.steps.lengths) this->zero_padding();",
        "",
    ),
    Mutant(
        "recompute: nothing made again",
        BACKWARD,
        "if (!job.replay) return true;",
        "return true;",
    ),
    Mutant(
        "recompute: every chunk from the same states",
        BACKWARD,
        "(call.steps.T - s_end) / Base::job.chunk_steps",
        "0 * s_end",
    ),
    Mutant(
        "recompute: a chunk begins with its own last state",
        BACKWARD,
        "call.boundary_time = call.steps.reverse ? call.steps.T - s_begin : s_begin - 1;",
        "call.boundary_time = -1;",
    ),
    # norms
    Mutant("norm: units that do not exist count for the variance", NORM, "mean.in(in_row)", "mean.all()"),
    Mutant("norm: not centred", NORM, "total = sum.total();", ";"),
    Mutant("norm: of one value alone", NORM, "T(rows.call.H * n)", "T(rows.call.H)"),
    Mutant(
        "norm: no epsilon",
        NORM,
        "squares.total() / count + rows.call.constants[norm.epsilon]",
        "squares.total() / count",
    ),
    Mutant(
        "norm: an rms norm's gradient loses its mean",
        NORM,
        "if (norm.centred) sums[0].add(k, dx);",
        "sums[0].add(k, dx);",
    ),
    Mutant(
        "norm: gradient keeps its part along x",
        NORM,
        "sums[1].add_product(k, dx, values[v + 1].load(u, in_row));",
        "",
    ),
    Mutant(
        "norm: gradient over the values that have one",
        NORM,
        "T(rows.call.H * norm.size)",
        "T(rows.call.H * (norm.end - norm.begin) / 2)",
    ),
    Mutant("norm: deviation of another norm", NORM, "numbers(i, norm.of)[1]", "numbers(i, norm.number)[1]"),
    Mutant("norm: a last block as if it were whole", NORM, "(whole ? kBlock : units_of(H, b))", "kBlock"),
    # products
    Mutant(
        "parts: of any accumulators in one sum",
        PARTS,
        "sums.back().first == part.first && sums.back().count == part.count",
        "sums.back().first == part.first",
    ),
    Mutant(
        "groups: gradients of any accumulators together",
        GROUPS,
        "g.first == p.first && g.count == p.count",
        "true",
    ),
    # a call
    Mutant(
        "run: bias_hh for bias_ih",
        RUN,
        "bias[(u / kBlock * plan.accumulators + p.accumulator) * kBlock + u % kBlock] "
        "+= from[p.bias * H + u];",
        "bias[(u / kBlock * plan.accumulators + p.accumulator) * kBlock + u % kBlock] "
        "= from[p.bias * H + u];",
    ),
    Mutant("run: every state begins at 0", RUN, "T(plan.start[std::size_t(s)])", "T(0)"),
    Mutant(
        "run: a parameter's first block for all",
        RUN,
        "std::copy(from + v.block * H, from + (v.block + 1) * H, to)",
        "std::copy(from, from + H, to)",
    ),
    Mutant(
        "run: gradients of a parameter in its first block", RUN, "out ? out + v.block * n.H : nullptr", "out"
    ),
    Mutant("run: a row scalar's gradient at padding", RUN, "if (d) std::fill(d, d + n.T * n.B, T(0));", ";"),
    Mutant(
        "run: sums begin with stale memory",
        RUN,
        "std::fill(job.sums, job.sums + (need_sums ? n.B * sum_count * units : 0), T(0));",
        "",
    ),
    Mutant(
        "run: states alone are not made again",
        RUN,
        "plan.saved || plan.norms || S > 1",
        "plan.saved || plan.norms",
    ),
    Mutant("run: two steps of a state kept for all", RUN, "every ? -1 : 1", "1"),
    Mutant(
        "run: gradients of the second operand by the first",
        RUN,
        "parts.groups.of(column, p.accumulator)",
        "parts.groups.of(1, p.accumulator)",
    ),
    Mutant("run: norms of a given tape lost", RUN, "tape.norms = saved;", "tape.norms = tape.saved;"),
    Mutant(
        "run: the second state of a given tape for all",
        RUN,
        "saved += n.T * n.B * n.H",
        "saved += s > 2 ? n.T * n.B * n.H : 0",
    ),
    # wrong programs
    Mutant("plan: numbers below the least", PLAN, "n < low || n > high", "n > high"),
    Mutant("plan: numbers left over", PLAN, "numbers.finish();", ""),
    Mutant(
        "plan: backward may change what is saved",
        PLAN,
        "load || (store && !backward) ? plan.saved : 0",
        "plan.saved",
    ),
    Mutant(
        "plan: forward may store gradients",
        PLAN,
        "store && backward ? plan.accumulators : 0",
        "plan.accumulators",
    ),
    Mutant(
        "plan: forward may add to sums",
        PLAN,
        "backward ? int(plan.vectors.size()) : 0",
        "int(plan.vectors.size())",
    ),
    Mutant(
        "plan: backward may change a new state",
        PLAN,
        "return load || (store && !backward);",
        "return load || store;",
    ),
    Mutant(
        "plan: a direct gradient that is not there",
        PLAN,
        "store && backward && plan.direct[std::size_t(state - 2 * S)]",
        "store && backward",
    ),
    Mutant(
        "plan: a state's operand may be stored",
        PLAN,
        "store && plan.state_of[std::size_t(state - 3 * S + 1)] < 0",
        "store",
    ),
    Mutant("plan: constants unchecked", PLAN, 'below("constant", in.a, int(plan.constants.size()));', ""),
    Mutant("plan: vectors unchecked", PLAN, 'below("vector", in.a, int(plan.vectors.size()));', ""),
    Mutant("plan: row scalars unchecked", PLAN, 'below("row scalar", in.a, plan.scalars);', ""),
    Mutant(
        "plan: the first of several loads checked",
        PLAN,
        'below("value of a place", in.b + in.c, values_at(plan, in.a, in.op, backward));',
        'below("value of a place", in.b, values_at(plan, in.a, in.op, backward));',
    ),
    Mutant(
        "plan: the registers of several loads unchecked",
        PLAN,
        'below("register", in.d + in.c, Limits::registers);',
        "",
    ),
    Mutant("plan: norms unchecked", PLAN, 'below("norm", in.b, plan.norms);', ""),
    Mutant(
        "plan: values of norms among the masks",
        PLAN,
        "!side_by_side || (place >= kDropout && place < kStates)",
        "!side_by_side",
    ),
    Mutant(
        "plan: no accumulators", PLAN, 'if (!accumulators) refuse("accumulators", "at least 1, got 0");', ""
    ),
    Mutant(
        "plan: a product of no accumulator",
        PLAN,
        "p.accumulator >= accumulators",
        "p.accumulator > accumulators",
    ),
    Mutant(
        "plan: a norm of gradients in the first round",
        PLAN,
        "first && norm_gradients",
        "first && norm_gradients > 99",
    ),
    Mutant(
        "plan: masks that are read unknown",
        PLAN,
        "if (in.a >= kDropout && in.a < kStates) plan.reads_masks[in.a - kDropout] = true;",
        "",
    ),
    Mutant("plan: the mask of a projection unknown", PLAN, "reads_masks[mask] = true;", ";"),
    Mutant(
        "plan: weights of a projection for a cell without one",
        PLAN,
        "projects == other.projects",
        "states == other.states",
    ),
    Mutant("plan: weights of other products", PLAN, "products == other.products", "products.size() > 0"),
    Mutant("plan: weights of other operands", PLAN, "state_of == other.state_of", "state_of.size() > 0"),
    Mutant("plan: states that begin otherwise", PLAN, "start == other.start", "start.size() > 0"),
]
