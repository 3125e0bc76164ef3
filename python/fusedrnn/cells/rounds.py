"""In which round a value is known: a product or a norm needs all units of a row.

A value that depends on no product is in round 0. A product or a norm is one round after the last of its
arguments. A step runs round by round. GRU with r before its product has two rounds, and so have layer norm
and a projection.
"""

from __future__ import annotations

from collections.abc import Iterable

from fusedrnn.cells.graph import Node

WAITS = {"dense", "normalise", "transposed", "normalise_gradient", "project", "project_transposed"}


def rounds(nodes: Iterable[Node], known: Iterable[Node] = ()) -> dict[Node, int]:
    """The round of each node. Nodes come after their arguments, and ``known`` ones are in round 0."""
    found = dict.fromkeys(known, 0)
    for n in nodes:
        if n not in found:
            found[n] = max((found[a] for a in n.args), default=0) + (n.op in WAITS)
    return found
