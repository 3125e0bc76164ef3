"""Any cell compiled, as a second form of it beside the vector machine's: the same bits are expected.

What a cell computes for each unit is compiled from the C++ that tools/cells_cpp.py writes of it, a function
for each round. Around these functions is a loop over steps in NumPy, as plain as possible, in which sums over
units, over rows and of products are in the order that the kernels have; each product is added by an FMA.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import cells_cpp
from cells_kernel import Function
from fusedrnn.backends import reference
from fusedrnn.backends.arguments import check_forward
from fusedrnn.cells.fusion import lower
from fusedrnn.cells.graph import reach
from fusedrnn.cells.rounds import rounds
from fusedrnn.cells.trace import side

ROOT = Path(__file__).parents[2]
BLOCK = 16
C_TYPES = {np.dtype("f"): "float", np.dtype("d"): "double"}


class Round:
    """What a round computes for each unit, and of what."""

    def __init__(self, cell, name, known, outputs):
        known, self.outputs = list(dict.fromkeys(known)), list(dict.fromkeys(outputs))
        line = lower(self.outputs, known, cell.fused)
        used = {*self.outputs, *(a for o in line for a in o.args)}
        self.name, self.known = name, [n for n in known if n in used]
        inputs = {n: f"a[{k}]" for k, n in enumerate(self.known)}
        # A condition is kept as 1 or 0.
        inputs |= {n: f"greater({a}, V::set(0))" for n, a in inputs.items() if n.op.startswith("greater")}
        results = {f"saved[{k}]": n for k, n in enumerate(self.outputs)}
        kernel = SimpleNamespace(cell=cell, normed=(), second=())
        self.lines = cells_cpp.function(kernel, Function("forward", inputs, results))
        for k, n in enumerate(self.outputs):
            if n.op.startswith("greater"):
                begin = f"  saved[{k}] = "
                at = next(i for i, line in enumerate(self.lines) if line.startswith(begin))
                condition = self.lines[at].removeprefix(begin).removesuffix(";")
                self.lines[at] = f"{begin}select({condition}, V::set(1), V::set(0));"

    def text(self, dtype):
        T = C_TYPES[dtype]
        lines = ["namespace fusedrnn {", "namespace FUSEDRNN_LEVEL {", f"struct {self.name} {{", *self.lines]
        lines += ["};", "}", "}"]
        call = f"each_vector<{self.name}>(in, {len(self.known)}, out, {len(self.outputs)}, n);"
        lines.append(
            f'extern "C" void run_{self.name}(const {T}* const* in, {T}* const* out, long n) {{ {call} }}'
        )
        return "\n".join(lines)


class Compiled:
    """The rounds of a cell, forward and backward."""

    def __init__(self, cell, name):
        self.cell = cell
        t, gradient, forward = cell.trace, cell.gradient, cell.forward_nodes
        own = rounds(forward)
        self.given = {}  # forward, of each round what is not made unit by unit
        for n in forward:
            if n.op in ("dense", "normalise"):
                self.given.setdefault(own[n], []).append(n)
        # The order of products: those of x alone, those of both, those of a state alone.
        dense = [n for n in forward if n.op == "dense"]
        self.dense = sorted(
            dense, key=lambda n: (own[n], (n.args[0].op != "input") + (n.args[-1].op != "input"))
        )
        self.operands = [t.x, *dict.fromkeys(a for n in self.dense for a in n.args if a is not t.x)]
        vectors = [n for n in forward if n.op == "vector"]
        start = [*t.states.values(), *t.scalars.values(), *vectors]
        loads = ("dense", "item")
        last = max(self.given, default=0)
        self.forward = []
        for r in range(last + 1):
            known = [*start, *(n for n in forward if n.op in loads and own[n] <= r)]
            waiting = [a for n in self.given.get(r + 1, []) for a in n.args if a.op not in ("input", "state")]
            outputs = waiting if r < last else [*t.after.values(), *cell.saved]
            self.forward.append(Round(cell, f"{name}_forward{r}", known, outputs))

        items = [n for n in forward if n.op == "item"]
        base = [*start, *t.after.values(), *cell.saved, *items, *gradient.upstream.values()]
        groups = (gradient.dense, gradient.direct, gradient.vectors, gradient.scalars)
        results = [n for group in groups for n in group.values()]
        made = set(forward)
        nodes = [n for n in reach(results) if n not in made]
        own = rounds(nodes, known=forward)
        self.given_back = {}
        for n in nodes:
            if n.op in ("transposed", "normalise_gradient"):
                self.given_back.setdefault(own[n], []).append(n)
        # Of each state whose direct gradient is a sum of values of two rounds, the operation and its
        # arguments, the early one last: with zoneout what goes past the cell is added to that one.
        self.sums = {}
        for state, n in gradient.direct.items():
            _, op, args = lower([n], [], cell.fused)[-1]
            able = args if op == "add" else args[2:] if op in ("fma", "fnma") else ()
            early = min(able, key=lambda a: own.get(a, 0), default=n)
            if own.get(early, 0) < own.get(n, 0):
                self.sums[state] = op, [*(a for a in args if a is not early), early]
        last = max(self.given_back, default=0)
        self.backward = []
        for r in range(last + 1):
            late = [n for n in nodes if n.op in ("transposed", "item") and own[n] <= r]
            waiting = [a for n in self.given_back.get(r + 1, []) for a in n.args if a.op != "normalise"]
            computed = [a for a in self.operands if a.op not in ("input", "state")]  # made again
            ends = [a for _, args in self.sums.values() for a in args]
            outputs = waiting if r < last else [*results, *computed, *ends]
            self.backward.append(Round(cell, f"{name}_backward{r}", [*base, *late], outputs))

    def text(self, dtype):
        return "\n".join(r.text(dtype) for r in [*self.forward, *self.backward])


class Library:
    """The functions of some cells, compiled together."""

    def __init__(self, cells, folder, compiler, level, flags):
        """``cells``: of each the dtype."""
        self.of = {cell: Compiled(cell, f"cell{k}") for k, cell in enumerate(cells)}
        source = folder / "cells.cpp"
        text = "\n".join(self.of[cell].text(np.dtype(dtype)) for cell, dtype in cells.items())
        source.write_text(f'#include "compiled_cells.h"\n{text}\n')
        command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno"]
        command += [*flags, f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/cpu/cpp'}"]
        command += [f"-DFUSEDRNN_LEVEL={level}", f"-DFUSEDRNN_LEVEL_{level.upper()}"]
        made = subprocess.run([*command, source, "-o", folder / "cells.so"], capture_output=True, text=True)
        assert made.returncode == 0, made.stderr[:3000]
        self.library = ctypes.CDLL(str(folder / "cells.so"))

    def compute(self, r, values, shape, dtype):
        """Add to the values those of a round."""
        if not r.outputs:
            return
        rows, H = shape
        padded = (rows, -(-H // BLOCK) * BLOCK)
        inputs = np.zeros((len(r.known), *padded), dtype)
        for k, n in enumerate(r.known):
            inputs[k, :, :H] = values[n]
        outputs = np.empty((len(r.outputs), *padded), dtype)
        pointers = [
            (ctypes.c_void_p * max(1, len(a)))(*(a[k].ctypes.data for k in range(len(a))))
            for a in (inputs, outputs)
        ]
        getattr(self.library, f"run_{r.name}")(*pointers, ctypes.c_long(outputs[0].size))
        for k, n in enumerate(r.outputs):
            values[n] = outputs[k, :, :H]

    def multiply(self, sums, a, b):
        """Add the product of two matrices to the sums, in place."""
        assert (*a.shape, b.shape[1]) == (len(sums), *b.shape)
        self._call("multiply", sums, a, b, len(sums), *b.shape)

    def fma(self, a, b, c):
        """a * b + c"""
        shape = np.broadcast_shapes(a.shape, b.shape, c.shape)
        a, b, c = (np.broadcast_to(v, shape) for v in (a, b, c))
        found = np.array(c, order="C")
        self._call("add_products", found, a, b, found.size)
        return found

    def _call(self, name, sums, a, b, *sizes):
        a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
        assert sums.flags.c_contiguous
        assert sums.dtype == a.dtype == b.dtype
        pointers = [ctypes.c_void_p(v.ctypes.data) for v in (sums, a, b)]
        getattr(self.library, f"{name}_{C_TYPES[sums.dtype]}")(*pointers, *map(ctypes.c_long, sizes))


def halves(parts):
    """The sum over the last axis of 16."""
    while parts.shape[-1] > 1:
        half = parts.shape[-1] // 2
        parts = parts[..., :half] + parts[..., half:]
    return parts[..., 0]


def blocks_of(a):
    """(rows, blocks, 16), zeros behind the last unit."""
    rows, H = a.shape
    padded = np.zeros((rows, -(-H // BLOCK) * BLOCK), a.dtype)
    padded[:, :H] = a
    return padded.reshape(rows, -1, BLOCK)


class Steps:
    """Forward and backward over a sequence."""

    def __init__(self, library, p):
        self.library, self.p, self.form = library, p, library.of[p.cell]
        self.cell, self.dtype = p.cell, p.x.dtype
        self.a = check_forward(p.cell, p.x, p.weights, p.state0, **p.options, save="all")
        self.H = self.a.sizes.H
        self.steps = reference._steps(self.a)

    def block(self, name, k, of=None):
        a = (self.a.weights if of is None else of).get(name)
        return None if a is None else a[k * self.H : (k + 1) * self.H]

    def of(self, n, values):
        """A value of each row and unit."""
        return np.broadcast_to(np.asarray(values[n], self.dtype), (values["rows"], self.H))

    def sum_of_units(self, pairs):
        """In the order of a norm, the products of each pair; of a single array itself."""
        first = pairs[0][0]
        total = np.zeros((len(first), BLOCK), self.dtype)
        for block in range(-(-self.H // BLOCK)):
            for pair in pairs:
                a, *b = (blocks_of(v)[:, block] for v in pair)
                total = self.library.fma(a, b[0], total) if b else total + a
        return halves(total)[:, None]

    def mean(self, norm, values, count):
        if norm.attribute.kind == "layer" and values:
            return self.sum_of_units([(v,) for v in values]) / count
        return np.zeros((1, 1), self.dtype)

    def normalise(self, n, values):
        count = self.dtype.type(self.H * len(n.args))
        args = [self.of(a, values) for a in n.args]
        mean = self.mean(n, args, count)
        squares = self.sum_of_units([(a - mean, a - mean) for a in args])
        inverse = self.dtype.type(1) / np.sqrt(squares / count + self.dtype.type(n.attribute.eps))
        values[n] = inverse
        for item in (m for m in self.cell.forward_nodes if m.op == "item" and m.args[0] is n):
            values[item] = (args[item.attribute] - mean) * inverse

    def normalise_gradient(self, n, values):
        norm, *gradients = n.args
        items = {m.attribute: m for m in self.cell.forward_nodes if m.op == "item" and m.args[0] is norm}
        count = self.dtype.type(self.H * len(gradients))
        for d in gradients:
            if d.op == "constant":
                values[d] = float.fromhex(d.attribute)
        pairs = [
            (self.of(d, values), self.of(items[k], values))
            for k, d in enumerate(gradients)
            if d.op != "constant"
        ]
        mean = self.mean(norm, [d for d, _ in pairs], count)
        along = self.sum_of_units(pairs) / count
        for m in (m for m in self.cell.backward_nodes if m.op == "item" and m.args[0] is n):
            d, x = (self.of(v, values) for v in (gradients[m.attribute], items[m.attribute]))
            values[m] = values[norm] * self.library.fma(-x, along, d - mean)

    def operand(self, n, values):
        if n.op == "input":
            return values["x"]
        value = self.of(n, values)
        return value if values["dropout"] is None else value * values["dropout"]

    def product(self, n, values):
        dense = n.attribute
        bias = np.zeros(self.H, self.dtype)
        for operand, k in zip(n.args, dense.biases, strict=bool(dense.biases)):
            if (b := self.block(f"bias_{side(operand)}", k)) is not None:
                bias = bias + b
        sums = np.tile(bias, (values["rows"], 1))
        for operand in self.form.operands:
            if operand in n.args:
                weight = self.block(f"weight_{side(operand)}", dense.weights[n.args.index(operand)])
                self.library.multiply(sums, self.operand(operand, values), weight.T)
        values[n] = sums

    def transposed(self, operand, values):
        """The gradient of an operand: of neighbouring accumulators, at most four, block by block of units."""
        width = self.a.sizes.I if operand.op == "input" else self.H
        parts = []
        for k, n in enumerate(self.form.dense):
            if operand in n.args:
                if not parts or parts[-1][-1] != k - 1 or len(parts[-1]) == 4:
                    parts.append([])
                parts[-1].append(k)
        sums = np.zeros((values["rows"], width), self.dtype)
        for part in parts:
            for begin in range(0, self.H, BLOCK):
                for k in part:
                    n, units = self.form.dense[k], slice(begin, begin + BLOCK)
                    weight = self.block(f"weight_{side(operand)}", n.attribute.weights[n.args.index(operand)])
                    self.library.multiply(sums, self.gradient_of(n, values)[:, units], weight[units])
        return sums

    def gradient_of(self, n, values):
        return self.of(self.cell.gradient.dense[n], values)

    def compute(self, rounds, given, values):
        shape = values["rows"], self.H
        for r, functions in enumerate(rounds):
            for n in given.get(r, []):
                if n.op == "dense":
                    self.product(n, values)
                elif n.op == "transposed":
                    d = self.transposed(n.attribute[0], values)
                    values[n] = d if values["dropout"] is None else d * values["dropout"]
                else:
                    getattr(self, n.op)(n, values)
            self.library.compute(functions, values, shape, self.dtype)

    def forward(self):
        a, t = self.a, self.cell.trace
        T, B, _, H, _ = a.sizes
        state = reference._start(a) if a.state0 is None else a.state0
        y = np.zeros((T, B, H), self.dtype)
        states = [np.empty((T, B, H), self.dtype) for _ in t.states]
        self.kept = []
        for step in self.steps:
            before = reference._cleared(a, step, state)
            values = dict(zip(t.states.values(), before, strict=True))
            values |= {n: a.scalars[name][step.t, step.rows, None] for name, n in t.scalars.items()}
            for n in self.cell.forward_nodes:
                if n.op == "vector":
                    values[n] = self.block(*n.attribute) if self.block(*n.attribute) is not None else 0
            values |= {"x": a.x[step.t, step.rows], "rows": len(before[0])}
            values["dropout"] = reference._dropout(a, step)
            self.compute(self.form.forward, self.form.given, values)
            after = [values[n] for n in t.after.values()]
            keeps = reference._keeps(a, step)
            for k, keep in enumerate(keeps):
                if keep is not None:
                    after[k] = self.library.fma(keep, after[k], (1 - keep) * before[k])
            state = tuple(reference._put(s, step.rows, n) for s, n in zip(state, after, strict=True))
            y[step.t, step.rows] = state[0][step.rows]
            for sequence, s in zip(states, state, strict=True):
                sequence[step.t] = s
            self.kept.append((values, keeps))
        found = {"y": y} | {f"{s}T": v for s, v in zip(self.cell.states, state, strict=True)}
        return found | (dict(zip(self.cell.states, states, strict=True)) if a.return_states else {})

    def backward(self):
        a, p, cell, gradient = self.a, self.p, self.cell, self.cell.gradient
        T, B, _, H, _ = a.sizes
        dweights = {n: np.zeros_like(w) for n, w in a.weights.items()}
        dvectors = {n: np.zeros((B, H), self.dtype) for n in gradient.vectors}
        dscalars = {n: np.zeros((T, B), self.dtype) for n in a.scalars}
        dx = np.zeros_like(a.x)
        chain = reference._gradient(a, p.dstateT)
        numbers = np.arange(B)
        for step, (values, keeps) in zip(reversed(self.steps), reversed(self.kept), strict=True):
            t, rows = step.t, step.rows
            d = [c[rows] for c in chain]
            if p.dy is not None:
                d[0] = d[0] + p.dy[t, rows]
            if p.dstates is not None:
                d = [v + s[t, rows] for v, s in zip(d, p.dstates, strict=True)]
            into = [v if keep is None else keep * v for v, keep in zip(d, keeps, strict=True)]
            values |= dict(zip(gradient.upstream.values(), into, strict=True))
            self.compute(self.form.backward, self.form.given_back, values)
            before = []
            for (name, node), keep, v in zip(cell.trace.states.items(), keeps, d, strict=True):
                parts = []
                if name in gradient.chain:
                    part = self.transposed(node, values)
                    parts.append(part if values["dropout"] is None else part * values["dropout"])
                past = None if keep is None else (1 - keep) * v
                if name in gradient.direct or past is not None:
                    parts.append(self.direct(name, past, values))
                zeros = np.zeros_like(v)
                whole = zeros if not parts else sum(parts[1:], start=parts[0])
                before.append(whole + 0 * zeros if a.regularization else whole)
            before = reference._stopped(step, tuple(before))
            chain = tuple(reference._put(c, rows, v) for c, v in zip(chain, before, strict=True))
            for n in gradient.dense:
                self.add_weight_gradients(n, values, dweights)
            for n, dn in gradient.vectors.items():
                dvectors[n][rows] += self.of(dn, values)
            for name, dn in gradient.scalars.items():
                total = 0
                for block in blocks_of(self.of(dn, values)).transpose(1, 0, 2):
                    total = total + halves(block)
                dscalars[name][t, numbers[rows]] = total
            dx[t, rows] = self.transposed(cell.trace.x, values)
        for n, rows in dvectors.items():
            if (out := self.block(*n.attribute, dweights)) is not None:
                for row in rows:
                    out += row
        found = {"dx": dx} | {f"d{n}": v for n, v in {**dweights, **dscalars}.items()}
        return found | {f"d{s}0": v for s, v in zip(cell.states, chain, strict=True)}

    def direct(self, name, past, values):
        """The gradient of a state that goes through no product, with what goes past the cell."""
        if name not in self.cell.gradient.direct:
            return past
        whole = self.of(self.cell.gradient.direct[name], values)
        if past is None:
            return whole
        if name not in self.form.sums:
            return whole + past
        op, args = self.form.sums[name]
        *args, early = (self.of(a, values) for a in args)
        if op == "add":
            return args[0] + (early + past)
        return self.library.fma(args[0] if op == "fma" else -args[0], args[1], early + past)

    def add_weight_gradients(self, n, values, dweights):
        """Row by row."""
        d = self.gradient_of(n, values)
        biases = n.attribute.biases or [None] * len(n.args)
        for operand, weight, bias in zip(n.args, n.attribute.weights, biases, strict=True):
            out = self.block(f"weight_{side(operand)}", weight, dweights)
            self.library.multiply(out, d.T, self.operand(operand, values))
            if bias is not None and (out := self.block(f"bias_{side(operand)}", bias, dweights)) is not None:
                for row in d:
                    out += row


def run_compiled(library, p):
    """Forward and backward; every result by its name."""
    with np.errstate(all="ignore"):
        steps = Steps(library, p)
        return steps.forward() | steps.backward()
