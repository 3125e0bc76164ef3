"""The text of ``print(cell)``: what was derived from a cell, to compare with a paper."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from fusedrnn.cells.fusion import Operation
from fusedrnn.cells.graph import Node, number
from fusedrnn.cells.rounds import WAITS, rounds
from fusedrnn.cells.trace import side

if TYPE_CHECKING:
    from fusedrnn.cells.definition import Cell

DEEPEST = 10  # nested operations on a line; the next one starts a new line
INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "greater": ">", "greater_equal": ">="}


def describe(cell: Cell) -> str:
    """Parameters, forward, saved values and backward; one line for each value that is used twice or is kept.

    ``fma(a, b, c)`` is a * b + c and ``fnma(a, b, c)`` is c - a * b, rounded once. ``new h`` is the state
    after the step, ``dh`` its gradient; backward ends with the gradients of all that forward reads. A round
    begins with a product or a norm, which needs all units of a row. From the second round on, its number is
    at the end of the line.
    """
    t, gradient = cell.trace, cell.gradient
    names = _Names(cell)
    options = [f"{name}={value!r}" for name, value in cell.options.items()]
    states = [name if not start else f"{name}={start:g}" for name, start in t.start.items()]
    arguments = ["p", "x", *states, *(["*", *t.scalars] if t.scalars else [])]
    lines = [f"{cell.name}({', '.join(arguments)})" + (f" with {', '.join(options)}" if options else "")]
    lines += [f"  {parameter}: {' '.join(blocks)}" for parameter, blocks in t.blocks.items()]
    kept = {*cell.saved, *t.after.values()}
    nodes = cell.forward_nodes
    lines += ["forward", *names.lines(cell.forward, kept, rounds(nodes))]
    lines += ["saved", f"  {' '.join(names.of[n] for n in cell.saved) or 'nothing besides the states'}"]
    late = rounds(cell.backward_nodes, known=nodes)
    lines += ["backward", *names.lines(cell.backward, set(gradient.outputs), late)]
    for n, d in sorted(gradient.dense.items(), key=lambda item: item[0].id):
        lines.append(f"  gradient of {names.product(n)}: {names.use(d)}")
    for state in t.states:
        parts = [names.use(g[state]) for g in (gradient.direct, gradient.chain) if state in g]
        lines.append(f"  gradient of {state}: {' + '.join(parts) or '0'}")
    for n, d in sorted(gradient.vectors.items(), key=lambda item: item[0].id):
        lines.append(f"  gradient of {_vector(n)}: sum of {names.use(d)} over rows and steps")
    for scalar, d in gradient.scalars.items():
        lines.append(f"  gradient of {scalar}: sum of {names.use(d)} over units")
    return "\n".join(lines)


class _Names:
    """Names for values. A value that is used once has its expression as its name."""

    def __init__(self, cell: Cell) -> None:
        t = cell.trace
        self.of = {t.x: "x"} | {n: name for name, n in (t.states | t.scalars).items()}
        self.of |= {n: f"d{name}" for name, n in cell.gradient.upstream.items()}
        self.of |= {n: f"new {name}" for name, n in t.after.items() if n not in self.of}
        self._gates = Counter(n.attribute.gate for n in cell.forward_nodes if n.op == "dense")
        self._count = 0

    def lines(
        self, operations: list[Operation], kept: Iterable[Node], rounds: Mapping[Node, int]
    ) -> list[str]:
        """A line for each value that is kept or used more than once, or that would be too long."""
        kept = set(kept)
        uses = Counter(a for operation in operations for a in operation.args)
        found = []
        self._inlined: dict[Node, Operation] = {}
        depth: dict[Node, int] = {}  # how many operations are nested
        for operation in operations:
            n = operation.node
            depth[n] = 1 + max((depth[a] for a in operation.args if a in self._inlined), default=0)
            if n.op in ("constant", "vector"):
                self.of[n] = self._expression(operation)
            elif n in self.of or n in kept or uses[n] > 1 or n.op in WAITS or depth[n] == DEEPEST:
                words = self._expression(operation)
                if n.op == "dense":
                    self.product(n)
                if n not in self.of:
                    self._count += 1
                    self.of[n] = f"v{self._count}"
                late = f"    (round {rounds[n]})" if n.op in WAITS and rounds[n] > 1 else ""
                found.append(f"  {self.of[n]} = {words}{late}")
            else:
                self._inlined[n] = operation
        return found

    def use(self, n: Node, within: str = "") -> str:
        """A value as an argument of this operation."""
        if n in self.of:
            return self.of[n]
        words = self._expression(self._inlined[n])
        return f"({words})" if within in (*INFIX, "neg") and self._inlined[n].op in INFIX else words

    def product(self, n: Node) -> str:
        """The name of a product: its gate, and its operands if the gate has several products."""
        if n not in self.of:
            gate: str = n.attribute.gate
            several = f"({', '.join(self.use(a) for a in n.args)})" if self._gates[gate] > 1 else ""
            self.of[n] = gate + several
        return self.of[n]

    def _expression(self, operation: Operation) -> str:
        n, op = operation.node, operation.op
        if op == "constant":
            return repr(number(n)).removesuffix(".0")
        if op == "vector":
            return _vector(n)
        if op == "dense":
            return " + ".join(self._products(n))
        args = [self.use(a, op) for a in operation.args]
        if op == "transposed":
            operand, products = n.attribute
            return " + ".join(
                f"weight_hh[{p.attribute.weights[p.args.index(operand)]}]^T {d}"
                for p, d in zip(products, args, strict=True)
            )
        if op == "project":
            return f"weight_hr {self.use(operation.args[0], 'neg')}"
        if op == "project_transposed":
            return f"weight_hr^T {args[0]}"
        if op == "item":
            return f"{args[0]}[{n.attribute}]"
        if op in INFIX:
            return f"{args[0]} {INFIX[op]} {args[1]}"
        if op == "neg":
            return f"-{args[0]}"
        if "normalise" in op:
            op = op.replace("normalise", f"{n.attribute.kind}_norm")
            args.append(f"eps={n.attribute.eps}")
        return f"{op}({', '.join(args)})"

    def _products(self, n: Node) -> Iterable[str]:
        for k, (operand, weight) in enumerate(zip(n.args, n.attribute.weights, strict=True)):
            yield f"weight_{side(operand)}[{weight}] {self.use(operand, 'neg')}"
            if n.attribute.biases:
                yield f"bias_{side(operand)}[{n.attribute.biases[k]}]"


def _vector(n: Node) -> str:
    parameter, block = n.attribute
    return f"{parameter}[{block}]" if parameter.startswith(("gain_", "bias_")) else parameter
