"""Seeded mistakes in the CUDA kernels, and which check notices each.

"values": wrong results; "emulation": threads that wait for ever, diverge or write where they must not;
"races": ThreadSanitizer, where an order of memory is missing. ``old`` occurs exactly once in its file.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    name: str
    file: str  # below csrc/cuda
    old: str
    new: str
    by: tuple[str, ...]
    cell: str = "Lstm"  # that is compiled


GRID, CLUSTER, STEP, UNIT, TILE = ("grid.h", "cluster.h", "step.h", "unit.h", "tile.h")

MUTANTS = [
    # barriers
    Mutant(
        "grid: what is staged overwrites what is read",
        GRID,
        "sync_block();  // what was staged before has been read",
        "",
        ("values", "races"),
    ),
    Mutant(
        "grid: staged factors read before they are there",
        GRID,
        "stage(k0, row);\n      sync_block();",
        "stage(k0, row);",
        ("values",),
    ),
    Mutant(
        "grid: sums read before they are there",
        GRID,
        "layout.columns());\n    sync_block();",
        "layout.columns());",
        ("values",),
    ),
    Mutant(
        "grid: counted in before all threads are there",
        GRID,
        "void arrive() const {\n    sync_block();",
        "void arrive() const {",
        ("values", "races"),
    ),
    Mutant(
        "grid: going back, groups start before the state is there",
        GRID,
        "      } else {\n        sync_block();\n      }",
        "      }",
        ("values", "races"),
    ),
    Mutant(
        "grid: a barrier that only half of the threads reach",
        GRID,
        "stage(k0, row);\n      sync_block();",
        "stage(k0, row);\n      if (threadIdx.x < kThreads / 2) sync_block();",
        ("emulation",),
    ),
    Mutant(
        "cluster: the first step before the others have begun",
        CLUSTER,
        "start_c();\n  });\n  sync_cluster();",
        "start_c();\n  });",
        ("values",),
    ),
    Mutant(
        "cluster: going back, the first step before the others have begun",
        CLUSTER,
        "start(job.dcT);\n  });\n  sync_cluster();",
        "start(job.dcT);\n  });",
        ("emulation",),
    ),
    Mutant(
        "cluster: no barrier after a step",
        CLUSTER,
        "prefetch_step<ForwardUnit<Cell, S>>(s + 1);\n    sync_cluster();",
        "prefetch_step<ForwardUnit<Cell, S>>(s + 1);",
        ("emulation", "races"),
    ),
    Mutant(
        "cluster: going back, no barrier after a step",
        CLUSTER,
        "prefetch_step<BackwardUnit<Cell, S>>(s - 1);\n    sync_cluster();",
        "prefetch_step<BackwardUnit<Cell, S>>(s - 1);",
        ("emulation",),
    ),
    Mutant(
        "cluster: a barrier of the block for one of the cluster",
        CLUSTER,
        "prefetch_step<ForwardUnit<Cell, S>>(s + 1);\n    sync_cluster();",
        "prefetch_step<ForwardUnit<Cell, S>>(s + 1);\n    sync_block();",
        ("emulation",),
    ),
    Mutant(
        "cluster: sums read before they are there",
        CLUSTER,
        "shared.columns);\n    }\n    sync_block();",
        "shared.columns);\n    }",
        ("values",),
    ),
    Mutant(
        "cluster: one buffer for both steps",
        CLUSTER,
        "operands + steps % 2 * rows * pitch",
        "operands",
        ("values", "races"),
    ),
    # counts
    Mutant(
        "grid: counted in without release", GRID, "add_release(arrived)", "add_relaxed(arrived)", ("races",)
    ),
    Mutant("grid: counted in by a plain addition", GRID, "add_release(arrived)", "*arrived += 1", ("races",)),
    Mutant(
        "grid: waiting without acquire", GRID, "load_acquire(arrived)", "load_relaxed(arrived)", ("races",)
    ),
    Mutant("grid: forward does not wait", GRID, "if (s > 0) grid.wait(s);", "", ("values",)),
    Mutant(
        "grid: backward does not wait", GRID, "if (follows) grid.wait(job.steps.T - 1 - s);", "", ("values",)
    ),
    Mutant(
        "grid: waiting for one step fewer",
        GRID,
        "unsigned(steps * gridDim.x)",
        "unsigned((steps - 1) * gridDim.x)",
        ("values",),
    ),
    Mutant(
        "grid: waiting for one block fewer",
        GRID,
        "unsigned(steps * gridDim.x)",
        "unsigned(steps * gridDim.x - 1)",
        ("values",),
    ),
    Mutant(
        "grid: waiting for one block too many",
        GRID,
        "unsigned(steps * gridDim.x)",
        "unsigned(steps * gridDim.x + 1)",
        ("emulation",),
    ),
    Mutant(
        "grid: forward does not count itself in",
        GRID,
        "      });\n    }\n    grid.arrive();",
        "      });\n    }",
        ("emulation",),
    ),
    Mutant("grid: backward does not count itself in", GRID, "if (s >= 0) grid.arrive();", "", ("emulation",)),
    Mutant(
        "grid: one count for all tiles of the batch",
        GRID,
        "arrived(job.arrived + blockIdx.y)",
        "arrived(job.arrived)",
        ("values",),
    ),
    # the product
    Mutant("grid: one split of k alone", GRID, "split < layout.splits", "split < 1", ("values",)),
    Mutant("grid: beyond the last k", GRID, "p && k + j < K ?", "p ?", ("values",)),
    Mutant(
        "grid: chunks of k from the first",
        GRID,
        "load_shared_by_blocks(p + k + j)",
        "load_shared_by_blocks(p + k - k0 + j)",
        ("values",),
    ),
    Mutant("grid: 16 bytes beyond the last k", GRID, "p && k + n <= K &&", "p &&", ("values",)),
    Mutant(
        "grid: 16 bytes of the chunk before",
        GRID,
        "load_sixteen_shared_by_blocks(p + k)",
        "load_sixteen_shared_by_blocks(p + k - k0)",
        ("values",),
    ),
    Mutant(
        "grid: weights of the wrong gate",
        GRID,
        "(gate * job.H + u) * job.H + k",
        "(gate * job.units + u) * job.H + k",
        ("values",),
    ),
    Mutant(
        "tile: a lane takes the wrong half",
        TILE,
        "upper ? sums[i + n] : sums[i], given = upper ? sums[i] : sums[i + n]",
        "upper ? sums[i] : sums[i + n], given = upper ? sums[i + n] : sums[i]",
        ("values",),
    ),
    Mutant(
        "tile: the last exchange left out",
        TILE,
        "if constexpr (n > 2) reduce",
        "if constexpr (n > 4) reduce",
        ("values",),
    ),
    Mutant(
        "tile: exchange with the wrong lane",
        TILE,
        "from_lane(given, mask)",
        "from_lane(given, mask ^ 1)",
        ("values",),
    ),
    Mutant(
        "tile: rows and columns of the sums exchanged",
        TILE,
        "out[sum / columns * pitch + sum % columns]",
        "out[sum % columns * pitch + sum / columns]",
        ("values",),
    ),
    Mutant(
        "cluster: one split of k alone",
        CLUSTER,
        "split < shared.splits; ++split) all",
        "split < 1; ++split) all",
        ("values",),
    ),
    Mutant(
        "cluster: rows that are cut off are not zero",
        CLUSTER,
        "rows >> r & 1 ? factors.one(r, k) : F(0)",
        "factors.one(r, k)",
        ("values",),
    ),
    Mutant("cluster: only the first block gets h", CLUSTER, "rank < gridDim.x", "rank < 1", ("values",)),
    Mutant(
        "cluster: no zeros where k is rounded up",
        CLUSTER,
        "shared.operand(1)[i] = Tile::factor(T(0));",
        "",
        ("values",),
    ),
    # rows, units, states
    Mutant(
        "grid: rows beyond the batch",
        GRID,
        "rows = job.steps.B - first_row < job.rows ? job.steps.B - first_row : job.rows;",
        "rows = job.rows;",
        ("emulation",),
    ),
    Mutant(
        "grid: units beyond the last",
        GRID,
        "if (r < rows && first_unit + j < job.H) f(r, j);",
        "if (r < rows) f(r, j);",
        ("emulation",),
    ),
    Mutant(
        "grid: the initial state lost",
        GRID,
        "return job.h0 ? job.h0 + b * job.H : nullptr;",
        "return nullptr;",
        ("values",),
    ),
    Mutant(
        "grid: reverse reads the step after",
        GRID,
        "(job.steps.reverse ? t + 1 : t - 1) * job.steps.B",
        "(t - 1) * job.steps.B",
        ("values",),
    ),
    Mutant(
        "grid: c of the step before is kept",
        GRID,
        "if (Cell::has_c) shared.c[r * job.units + j] = c;\n      });\n    }",
        "});\n    }",
        ("values",),
    ),
    Mutant(
        "grid: dc of the step after is kept", GRID, "if (Cell::has_c) dc[i] = dc_carried;", "", ("values",)
    ),
    Mutant(
        "grid: da of the input part goes back",
        GRID,
        "Cell::accumulators + Cell::recurrent.first) * job.H",
        "Cell::accumulators) * job.H",
        ("values",),
        "GruResetAfter",
    ),
    Mutant(
        "step: a reset lost in the product",
        STEP,
        "!valid(job.steps, t, b) || before(job.steps, t, b) == Before::nothing",
        "!valid(job.steps, t, b)",
        ("values",),
    ),
    Mutant(
        "step: the operand of the step that has run",
        STEP,
        "prepare(s + 1, b, u, h);\n  }\n\n  FUSEDRNN_INLINE void step2",
        "prepare(s, b, u, h);\n  }\n\n  FUSEDRNN_INLINE void step2",
        ("values",),
    ),
    Mutant(
        "step: c is not carried on",
        STEP,
        "    if (Cell::has_c) job.state_c[i] = c;\n",
        "",
        ("values",),
    ),
    Mutant(
        "step: a product that was never made",
        STEP,
        "unit.chained(s + 1) ? unit.rules().dropped(job.chain[i]) : T(0), direct",
        "job.chain[i], direct",
        ("values",),
    ),
    Mutant(
        "step: the initial state's gradient passes a cut",
        STEP,
        "unit.chained(0) ? unit.rules().dropped(job.chain[i]) : T(0)",
        "job.chain[i]",
        ("values",),
    ),
    Mutant("step: units twice", STEP, "Index(gridDim.x) * blockDim.x", "blockDim.x", ("values",)),
    Mutant(
        "step: gru before without r",
        STEP,
        "rules.dropped(saved[0].v * value) : T(0)",
        "value : T(0)",
        ("values",),
        "GruResetBefore",
    ),
    Mutant(
        "step: gru before, r*h of the step before",
        STEP,
        "      job.operand[i] = S(h);\n      return;",
        "      return;",
        ("values",),
        "GruResetBefore",
    ),
    Mutant("unit: a reset lost in the state", UNIT, "cut ? T(0) : c,", "c,", ("values",)),
    Mutant(
        "unit: y at padding",
        UNIT,
        "job.y[at(t)] = S(valid(job.steps, t, b) ? h : T(0));",
        "job.y[at(t)] = S(h);",
        ("values",),
    ),
    Mutant(
        "unit: da at padding left as it was",
        UNIT,
        "for (int s = 0; s < Cell::accumulators; ++s) out[s * stride] = S(T(0));\n",
        "",
        ("values",),
    ),
    Mutant(
        "unit: a gradient passes a detached step",
        UNIT,
        "from == Before::previous && !detached(job.steps, t)",
        "from == Before::previous",
        ("values",),
    ),
    Mutant("unit: dc passes a cut", UNIT, "dc = Cell::has_c && goes_on ?", "dc = Cell::has_c ?", ("values",)),
    Mutant(
        "unit: the direct part passes a cut",
        UNIT,
        "direct = Cell::has_direct && goes_on ?",
        "direct = Cell::has_direct ?",
        ("values",),
        "GruResetAfter",
    ),
    Mutant(
        "unit: gradient of the c of every step lost",
        UNIT,
        "if (Cell::has_c && job.dc_states) dc += T(job.dc_states[at(t)]);",
        "",
        ("values",),
    ),
    Mutant(
        "unit: upstream gradients read at padding",
        UNIT,
        "T dh = direct + chain;\n",
        "T dh = direct + chain + (job.dy ? T(0) * job.dy[at(t)] : T(0));\n",
        ("values",),
    ),
    Mutant(
        "step: c at the end is not the last",
        STEP,
        "if (Cell::has_c && s + 1 == job.steps.T) job.cT[i] = S(c);",
        "",
        ("values",),
    ),
    Mutant(
        "unit: bias of another gate",
        UNIT,
        "a[s] = job.bias[s * job.H + u]",
        "a[s] = job.bias[u]",
        ("values",),
    ),
    Mutant(
        "unit: c before the step from c0",
        UNIT,
        "previous(t, job.c, job.c0)",
        "previous(t, job.c, job.h0)",
        ("values",),
    ),
]
