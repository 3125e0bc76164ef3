"""How the Numba backend lays out what a step of a cell keeps, and in which round it makes each value.

Each product is an accumulator, a block of H columns of ``gates`` and of ``da``. What x multiplies comes
first, and what another operand multiplies lies side by side where it can, so that each operand costs one
product of matrices. What forward saves takes the place of accumulators that are not read again.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from fusedrnn.cells.definition import Cell
from fusedrnn.cells.fusion import Operation, lower
from fusedrnn.cells.graph import Node
from fusedrnn.cells.rounds import WAITS
from fusedrnn.cells.trace import side


class Part(NamedTuple):
    """Accumulators side by side that one operand feeds."""

    operand: int
    first: int  # accumulator
    blocks: list[int]  # of each, the block of rows of weight_hh
    column: int  # of the kernels' copy of weight_hh: the block where these begin


class Line(NamedTuple):
    """The operations of forward or of backward in their order, and in which rounds values are made and read.

    A round begins with what waits for all units of a row: products and norms of values of earlier rounds.
    Everything else is made in the last round that its uses allow, so that little is carried from one round
    to the next.
    """

    operations: list[Operation]
    rounds: dict[Node, int]  # in which a value is made
    last: dict[Node, int]  # in which it is read last


class Layout:
    """Where the values of a cell lie, and the rounds of its steps."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        t, gradient = cell.trace, cell.gradient
        dense = [n for n in cell.forward_nodes if n.op == "dense"]
        # Those of x alone, those of x and others, those of others.
        self.products = sorted(
            dense,
            key=lambda n: (
                (n.args[0].op != "input") + (n.args[-1].op != "input"),
                [a.id for a in n.args if a.op != "input"],
            ),
        )
        self.input = [n.attribute.weights[0] for n in self.products if n.args[0].op == "input"]
        computed = dict.fromkeys(a for n in dense for a in n.args if a.op not in ("input", "state"))
        self.operands = [*t.states.values(), *computed]  # what weight_hh may multiply
        self.parts = list(self._parts())
        self.vectors = [n for n in cell.forward_nodes if n.op == "vector"]

        given = [t.x, *t.states.values(), *t.scalars.values()]
        self.forward = _line([*t.after.values(), *cell.saved, *computed], given, cell)
        kept = [*given, *t.after.values(), *cell.saved, *gradient.upstream.values()]
        found = [*gradient.dense.values(), *gradient.direct.values(), *gradient.vectors.values()]
        found += [*gradient.scalars.values(), *computed]
        self.backward = _line(found, kept, cell)

        self.saved = self._columns_of_saved()  # of ``gates``
        self.columns = max([len(self.products), *(k + 1 for k in self.saved.values())])
        # Columns of ``da``: the gradients of accumulators, then those of vectors that are not among these.
        self.gradients = [gradient.dense[n] for n in self.products]
        self.gradients += dict.fromkeys(d for d in gradient.vectors.values() if d not in self.gradients)

    @property
    def hidden(self) -> list[int]:
        """The blocks of rows of weight_hh in the order of the parts."""
        return [block for part in self.parts for block in part.blocks]

    @property
    def biases(self) -> Iterator[tuple[str, int, int]]:
        """Each block of a bias and the accumulator that it is added to: parameter, accumulator, block."""
        for k, n in enumerate(self.products):
            for operand, block in zip(n.args, n.attribute.biases, strict=False):  # no block without biases
                yield f"bias_{side(operand)}", k, block

    def _parts(self) -> Iterator[Part]:
        column = 0
        for number, operand in enumerate(self.operands):
            fed = [k for k, n in enumerate(self.products) if operand in n.args]
            for _, run in itertools.groupby(enumerate(fed), key=lambda pair: pair[1] - pair[0]):
                accumulators = [k for _, k in run]
                products = [self.products[k] for k in accumulators]
                blocks = [n.attribute.weights[n.args.index(operand)] for n in products]
                yield Part(number, accumulators[0], blocks, column)
                column += len(blocks)

    def _columns_of_saved(self) -> dict[Node, int]:
        """Of each saved value its column: of an accumulator its own, else the first one that is free."""
        saved = self.cell.saved
        found = {n: k for k, n in enumerate(self.products) if n in saved}
        free_in = {k: self.forward.last[n] for k, n in enumerate(self.products) if n not in saved}
        columns = itertools.count(len(self.products))
        for n in saved:
            if n not in found:
                free = (k for k, round in free_in.items() if round <= self.forward.rounds[n])
                k = next(free, None)
                found[n] = next(columns) if k is None else k
                free_in.pop(found[n], None)
        return found


@functools.cache
def layout(cell: Cell) -> Layout:
    """The layout of a cell, derived once."""
    return Layout(cell)


def _line(outputs: Iterable[Node], known: Iterable[Node], cell: Cell) -> Line:
    """What computes the outputs from what is known.

    An item of a norm also reads what it normalises, and an item of its gradient what it belongs to.
    """
    outputs, operations = list(outputs), list[Operation]()
    for n, op, args in lower(outputs, known, cell.fused):
        if op == "item":
            (norm,) = args
            args = (norm, norm.args[n.attribute])
            if norm.op == "normalise_gradient":
                normed = norm.args[0]
                args = (norm, norm.args[n.attribute + 1], normed, normed.args[n.attribute])
        if op not in ("constant", "vector"):
            operations.append(Operation(n, op, args))
    early: dict[Node, int] = {}
    for n, op, args in operations:
        # A state's gradient is copied in round 0 if it is a product's, too: products begin after that.
        given = 0 if op == "transposed" else -1
        early[n] = max(0, max(early.get(a, given) for a in args) + (op in WAITS))
    rounds = {n: early[n] for n in outputs if n in early}
    last = dict[Node, int]()
    for n, op, args in reversed(operations):
        last.setdefault(n, rounds[n])
        for a in args:
            last[a] = max(last.get(a, 0), rounds[n])
            if a in early:
                rounds[a] = min(rounds.get(a, rounds[n]), rounds[n] - (op in WAITS))
    return Line(operations, rounds, last)
