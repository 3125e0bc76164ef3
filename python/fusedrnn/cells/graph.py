"""One step of a cell as a graph of operations, without duplicates.

It uses the standard library only, like all modules that derive something from a cell: the build runs them to
write the C++ cells.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

# The shape of a value: one number, one for each row (B, 1), one for each unit (H,), or one for each row and
# unit (B, H). A norm returns several values, a tuple; a projection P numbers for each row (B, P).
CONSTANT, ROW, VECTOR, UNIT, TUPLE, PROJECTED = "constant", "row", "vector", "unit", "tuple", "projected"

COMMUTATIVE = {"add", "mul"}  # the order of their arguments does not change the result


@dataclass(frozen=True, eq=False, repr=False)
class Node:
    """One operation: its name, its arguments, and other settings (``attribute``)."""

    id: int
    op: str
    args: tuple[Node, ...]
    attribute: Any
    shape: str
    upstream: bool  # depends on an upstream gradient

    def __repr__(self) -> str:
        return f"{self.op} {self.id}"


class Graph:
    """Makes nodes. The same operation of the same arguments is the same node.

    The id of a node is larger than the ids of its arguments. Only ``x * 1``, ``-(-x)`` and exact arithmetic
    on constants are simplified. This changes no bit in any dtype, not even of NaN and -0.
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._made: dict[tuple[Any, ...], Node] = {}

    def node(self, op: str, *args: Node, attribute: Any = None, shape: str | None = None) -> Node:
        """Return the node of this operation. By default its shape is the broadcast shape of its arguments."""
        ids = tuple(a.id for a in args)
        key = (op, tuple(sorted(ids)) if op in COMMUTATIVE else ids, attribute)
        if key not in self._made:
            if shape is None:
                shapes = {a.shape for a in args} - {CONSTANT}
                shape = CONSTANT if not shapes else shapes.pop() if len(shapes) == 1 else UNIT
            upstream = op == "upstream" or any(a.upstream for a in args)
            self._made[key] = Node(len(self.nodes), op, args, attribute, shape, upstream)
            self.nodes.append(self._made[key])
        return self._made[key]

    def constant(self, value: float) -> Node:
        """A finite number. 0.0 and -0.0 are different."""
        value = float(value)
        if not math.isfinite(value):
            raise ValueError(f"expected a finite number, got {value}")
        return self.node("constant", attribute=value.hex())

    def add(self, a: Node, b: Node) -> Node:
        """a + b"""
        return self._exact(a, b, operator.add) or self.node("add", a, b)

    def sub(self, a: Node, b: Node) -> Node:
        """a - b"""
        return self._exact(a, b, operator.sub) or self.node("sub", a, b)

    def mul(self, a: Node, b: Node) -> Node:
        """a * b"""
        for one, other in ((a, b), (b, a)):
            if one.op == "constant" and number(one) == 1:
                return other
        return self._exact(a, b, operator.mul) or self.node("mul", a, b)

    def div(self, a: Node, b: Node) -> Node:
        """a / b"""
        if b.op == "constant" and number(b) == 0:
            raise ValueError("expected a divisor other than 0")
        return self.node("div", a, b)

    def _exact(self, a: Node, b: Node, operation: Callable[[Any, Any], Any]) -> Node | None:
        """The result of two constants, if it is a double."""
        if not a.op == b.op == "constant":
            return None
        found = operation(number(a), number(b))
        exact = operation(Fraction(number(a)), Fraction(number(b)))
        return self.constant(found) if math.isfinite(found) and found and Fraction(found) == exact else None

    def neg(self, a: Node) -> Node:
        """-a"""
        if a.op == "constant":
            return self.constant(-number(a))
        return a.args[0] if a.op == "neg" else self.node("neg", a)


def number(node: Node) -> float:
    """The number of a constant."""
    return float.fromhex(node.attribute)


def reach(outputs: Iterable[Node]) -> list[Node]:
    """The outputs and the nodes that they are computed from, each after its arguments."""
    found: dict[int, Node] = {}
    left = list(outputs)
    while left:
        node = left.pop()
        if node.id not in found:
            found[node.id] = node
            left += node.args
    return [found[k] for k in sorted(found)]
