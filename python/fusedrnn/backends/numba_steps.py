"""The source of a step of a cell for Numba, written from what is derived of the cell.

``step(a, operands, states, lo, hh, vectors, scalars, work, norms)``: ``a`` holds input part and biases, in
the columns of its accumulators, and becomes what is saved. ``back(da, operands, q, now, prev, a, states, lo,
hh, vectors, scalars, dscalars, work, norms)``: gradients ``now`` of the states after, ``prev`` of those
before. ``operands[s]`` are the states before, then what else weight_hh multiplies, from row q on;
``states[s][lo:]`` those after; ``scalars[s, lo:]`` numbers of each row. What is carried from one round to the
next lies in ``work``, and of each norm two numbers of each row in ``norms``.
"""

from __future__ import annotations

from collections.abc import Iterable

from fusedrnn.backends.numba_layout import Layout, Line
from fusedrnn.cells.graph import Node, number
from fusedrnn.cells.rounds import WAITS

EXPRESSIONS = {
    "add": "{} + {}",
    "sub": "{} - {}",
    "mul": "{} * {}",
    "div": "{} / {}",
    "neg": "-{}",
    "fma": "fma({}, {}, {})",
    "fnma": "fma(-{}, {}, {})",
    "greater": "{} > {}",
    "greater_equal": "{} >= {}",
    "where": "{1} if {0} else {2}",
}


def source(layout: Layout) -> str:
    """The functions ``step`` and ``back``, and how many arrays the time loops keep for them."""
    step, back = _Step(layout), _Back(layout)
    counts = [
        f"OPERANDS = {len(layout.operands)}",
        f"WORK = {max(step.carried, back.carried)}",
        f"NORMS = {2 * max(len(step.norms), len(back.norms))}",
    ]
    return "\n".join([*counts, "", "", *step.lines(), "", "", *back.lines(), ""])


class _Function:
    """One function: where its values lie, each as the text of row k, and its lines.

    Every row is a slice, of which LLVM checks in fewer steps whether it overlaps with others.
    """

    def __init__(self, layout: Layout, line: Line, places: dict[Node, str]) -> None:
        self.layout, self.line, self.places = layout, line, dict(places)
        self.places |= {n: f"vectors[{k} * H : {k + 1} * H]" for k, n in enumerate(layout.vectors)}
        self.results: list[tuple[Node, str]] = []
        self.scalars = {n: f"scalars[{s}, lo + k]" for s, n in enumerate(layout.cell.trace.scalars.values())}
        self.norms = [n for n, op, _ in line.operations if op.startswith("normalise")]
        self.carried = 0
        self.places |= {n: self.work() for n, op, _ in line.operations if op == "transposed"}

    def work(self) -> str:
        """A new place in ``work``."""
        self.carried += 1
        return f"work[{self.carried - 1}, k, :H]"

    def result(self, n: Node, place: str) -> None:
        """A value that has a place of its own, where later rounds find it."""
        self.results.append((n, place))
        self.places.setdefault(n, place)

    def carry(self) -> None:
        """Give a place to what a later round reads, if it has none."""
        for n, _, _ in self.line.operations:
            if self.line.last[n] > self.line.rounds[n] and n not in (*self.places, *self.norms):
                self.result(n, self.work())

    def body(self) -> list[str]:
        """The lines of all rounds."""
        count = 1 + max(self.line.rounds.values(), default=0)
        return [line for round in range(count) for line in (*self.products(round), *self.loop(round))]

    def products(self, round: int) -> Iterable[str]:
        """The products that a round begins with."""
        raise NotImplementedError

    def loop(self, round: int) -> list[str]:
        """What a round makes of all rows and units, first norms of each row."""
        norms, statements = list[str](), list[str]()
        rows, names = dict[str, str](), dict[Node, str]()

        def word(n: Node) -> str:
            if n.op == "constant":
                return f"number({number(n)!r})"
            if n in self.scalars:
                return rows.setdefault(self.scalars[n], f"p{len(rows)}")
            return names.get(n) or f"{rows.setdefault(self.places[n], f'p{len(rows)}')}[j]"

        def item(norm: Node, value: Node, *belongs_to: Node) -> str:
            first, second = (rows.setdefault(p, f"p{len(rows)}") for p in self.numbers(norm))
            if not belongs_to:
                return f"({word(value)} - {first}) * {second}"
            normed = item(*belongs_to)
            _, inverse = self.numbers(belongs_to[0])
            return f"{rows[inverse]} * ({word(value)} - {first} - {normed} * {second})"

        for n, op, args in self.line.operations:
            if self.line.rounds[n] != round:
                continue
            if n in self.norms:
                norms += self.norm(n)
            if op in WAITS:
                continue
            pattern = EXPRESSIONS.get(op, f"{op}({', '.join('{}' for _ in args)})")
            expression = item(*args) if op == "item" else pattern.format(*map(word, args))
            names[n] = f"v{len(names)}"
            statements.append(f"{names[n]} = {expression}")
        made = [(n, place) for n, place in self.results if self.line.rounds.get(n, 0) == round]
        values = [word(n) for n, _ in made]
        targets = [f"{rows.setdefault(place, f'p{len(rows)}')}[j]" for _, place in made]
        if made:
            statements.append(f"{', '.join(targets)} = {', '.join(values)}")
        if not norms and not statements:
            return []
        return [
            "    for k in range(m):",
            *_indented(8, norms),
            *_indented(8, (f"{row} = {place}" for place, row in rows.items())),
            "        for j in range(H):",
            *_indented(12, statements or ["pass"]),
        ]

    def norm(self, n: Node) -> list[str]:
        """The two numbers of a row that a norm needs: mean and 1 / deviation, or the means of the gradient.

        The gradient is less its mean, and less its part along what was normalised: ``evaluation.py``.
        """
        gradient = n.op == "normalise_gradient"
        normed, given = (n.args[0], n.args[1:]) if gradient else (n, n.args)
        kind, eps = n.attribute
        # Of what has no gradient that is the constant 0.
        pairs = [(d, v) for d, v in zip(given, normed.args, strict=True) if d.op != "constant"]
        if not pairs:
            call = "number(0.0), number(0.0)"
        else:
            ds, values = (f"({', '.join(self.places[v] for v in vs)},)" for vs in zip(*pairs, strict=True))
            centred = kind == "layer"
            call = f"norm_numbers({values}, {centred}, number({eps!r}))"
            if gradient:
                numbers = ", ".join(self.numbers(normed))
                call = f"norm_gradient_numbers({ds}, {values}, {len(given)} * H, {centred}, {numbers})"
        return [f"{', '.join(self.numbers(n))} = {call}"]

    def numbers(self, norm: Node) -> tuple[str, str]:
        """The two numbers of a norm."""
        k = 2 * self.norms.index(norm)
        return f"norms[k, {k}]", f"norms[k, {k + 1}]"


class _Step(_Function):
    """``step``"""

    def __init__(self, layout: Layout) -> None:
        t = layout.cell.trace
        places = {n: f"operands[{s}, k, :H]" for s, n in enumerate(t.states.values())}
        places |= {n: _columns("a", k) for k, n in enumerate(layout.products)}
        super().__init__(layout, layout.forward, places)
        for n, k in layout.saved.items():
            if n.op != "dense":
                self.result(n, _columns("a", k))
        for s, n in enumerate(t.after.values()):
            self.result(n, f"states[{s}][lo + k, :H]")
        for s, n in enumerate(layout.operands):
            if n.op != "state":
                self.result(n, f"operands[{s}, k, :H]")
        self.carry()

    def lines(self) -> list[str]:
        """The function."""
        return [
            "def step(a, operands, states, lo, hh, vectors, scalars, work, norms):",
            "    m, H = a.shape[0], states[0].shape[1]",
            *self.body(),
        ]

    def products(self, round: int) -> Iterable[str]:
        """Adds the products with operands of the round before to their accumulators."""
        for part in self.layout.parts:
            if self.line.rounds.get(self.layout.operands[part.operand], -1) + 1 == round:
                to, operand = f"a, {part.first} * H, {len(part.blocks)} * H", f"operands[{part.operand}]"
                yield f"    product({to}, flat({operand}), 0, operands.shape[2], 1, hh, {part.column} * H)"


class _Back(_Function):
    """``back``"""

    def __init__(self, layout: Layout) -> None:
        t, gradient = layout.cell.trace, layout.cell.gradient
        places = {n: f"operands[{s}, q + k, :H]" for s, n in enumerate(t.states.values())}
        places |= {n: f"states[{s}][lo + k, :H]" for s, n in enumerate(t.after.values())}
        places |= {n: _columns("a", k) for n, k in layout.saved.items()}
        places |= {n: f"now[{s}, k, :H]" for s, n in enumerate(gradient.upstream.values())}
        super().__init__(layout, layout.backward, places)
        for k, n in enumerate(layout.gradients):
            self.result(n, _columns("da", k))
        for s, name in enumerate(t.states):
            if name in gradient.direct:
                self.result(gradient.direct[name], f"prev[{s}, k, :H]")
        for s, n in enumerate(layout.operands):
            if n.op != "state":
                self.result(n, f"operands[{s}, q + k, :H]")
        self.of_units: dict[int, str] = {}  # of each row scalar with a gradient, where that of each unit is
        for s, name in enumerate(t.scalars):
            if name in gradient.scalars:
                self.of_units[s] = self.work()
                self.result(gradient.scalars[name], self.of_units[s])
        self.carry()

    def lines(self) -> list[str]:
        """The function. What states receive through products is added last."""
        t, gradient = self.layout.cell.trace, self.layout.cell.gradient
        lines = [
            "def back(da, operands, q, now, prev, a, states, lo, hh, vectors, scalars, dscalars, work, "
            "norms):",
            "    m, H = da.shape[0], now.shape[2]",
            *self.body(),
        ]
        for s, place in self.of_units.items():
            lines += ["    for k in range(m):", f"        dscalars[{s}, lo + k] = total({place})"]
        for s, (name, n) in enumerate(t.states.items()):
            lines += self.transposed(f"prev[{s}, k, :H]", n, begin=name not in gradient.direct)
        return lines

    def products(self, round: int) -> Iterable[str]:
        """The gradients of operands, from those of their accumulators."""
        for n, op, _ in self.line.operations:
            if op == "transposed" and self.line.rounds[n] == round:
                yield from self.transposed(self.places[n], n.attribute[0], begin=True)

    def transposed(self, place: str, operand: Node, begin: bool) -> Iterable[str]:
        """Adds what an operand receives through its products, to 0 or to what is there."""
        to = place.replace("k, :H", ":m")
        if begin:
            yield f"    {to} = 0"
        for part in self.layout.parts:
            if self.layout.operands[part.operand] is operand:
                weights = f"hh[{part.column} * H : {part.column + len(part.blocks)} * H]"
                yield f"    product({to}, 0, H, flat(da), {part.first} * H, da.shape[1], 1, {weights}, 0)"


def _columns(array: str, block: int) -> str:
    """A block of H columns of row k."""
    return f"{array}[k, {block} * H : {block + 1} * H]"


def _indented(spaces: int, lines: Iterable[str]) -> list[str]:
    return [" " * spaces + line for line in lines]
