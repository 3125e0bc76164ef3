"""Products and sums as one fused multiply-add (FMA), which rounds once. All targets use the same ones.

A product that is used once, in a sum or as the second operand of a difference, is fused with it; of two
products, the first. Both must be computed in the same round. In forward this depends only on the operations
from the states before to the states after and not on what is saved, so that inference, recompute and zoneout
compute the same bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from fusedrnn.cells.graph import Node


class Operation(NamedTuple):
    """How a node is computed; ``fma(a, b, c)`` is a * b + c, ``fnma(a, b, c)`` is c - a * b."""

    node: Node
    op: str
    args: tuple[Node, ...]


def fusions(nodes: Iterable[Node], outputs: Iterable[Node], rounds: Mapping[Node, int]) -> dict[Node, Node]:
    """For each sum that is fused with a product, the product."""
    nodes = list(nodes)
    uses = Counter(a for n in nodes for a in n.args)
    uses.update(outputs)
    found: dict[Node, Node] = {}
    for n in nodes:
        if n.op in ("add", "sub"):
            for a in n.args if n.op == "add" else n.args[1:]:
                if a.op == "mul" and uses[a] == 1 and rounds[a] == rounds[n]:
                    found[n] = a
                    break
    return found


def lower(outputs: Iterable[Node], known: Iterable[Node], fused: Mapping[Node, Node]) -> list[Operation]:
    """The operations that compute the outputs from what is known, in the order of the cell."""
    found: dict[Node, Operation] = {}
    done, left = set(known), list(outputs)
    while left:
        n = left.pop()
        if n in done:
            continue
        done.add(n)
        found[n] = Operation(n, n.op, n.args)
        if n in fused:
            product = fused[n]
            other = n.args[0] if n.op == "sub" or n.args[1] is product else n.args[1]
            found[n] = Operation(n, "fma" if n.op == "add" else "fnma", (*product.args, other))
        left += found[n].args
    return sorted(found.values(), key=lambda operation: operation.node.id)
