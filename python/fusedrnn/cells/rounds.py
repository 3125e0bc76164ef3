"""In which round a value is known: all units of a row must be there before a product or a norm of them.

What depends on no product is of round 0; a product or a norm is of one round more than the largest of its
arguments. A step runs round by round. GRU with r before its product has two rounds, as have layer norm and a
projection.
"""

from __future__ import annotations

from collections.abc import Iterable

from fusedrnn.cells.graph import Node

WAITS = {"dense", "normalise", "transposed", "normalise_gradient", "project", "project_transposed"}


def rounds(nodes: Iterable[Node], known: Iterable[Node] = ()) -> dict[Node, int]:
    """The round of each node; the nodes come after their arguments, and ``known`` are of round 0."""
    found = dict.fromkeys(known, 0)
    for n in nodes:
        if n not in found:
            found[n] = max((found[a] for a in n.args), default=0) + (n.op in WAITS)
    return found
