"""Which values forward saves for backward, and which backward computes again: a minimum cut.

Every value that backward reads is saved, or computed again from available values; states are always
available. Each saved value costs ``SAVE``, and each value that is computed again the cost of its operation.
The costs are approximate times of a processor core for a vector. They determine what a tape holds, so they
must not change.
"""

from __future__ import annotations

from collections.abc import Container, Hashable
from itertools import pairwise

from fusedrnn.cells.gradient import Gradient
from fusedrnn.cells.graph import UNIT, Node, reach
from fusedrnn.cells.trace import Trace

SAVE = 14  # a store in forward and a load in backward
COST = dict.fromkeys(("tanh", "sigmoid", "exp", "log", "softplus"), 10) | {"div": 4, "sqrt": 4}  # others: 1
IMPOSSIBLE = 10**6


def choose(t: Trace, gradient: Gradient, fused: Container[Node], zoned: Container[str] = ()) -> list[Node]:
    """The values to save, in the order in which forward computes them.

    Args:
        t: the cell.
        gradient: what backward computes.
        fused: the products that are part of an FMA; they cost nothing and are never saved.
        zoned: the states with zoneout, whose kept value is not what the cell computes.
    """
    forward = reach(t.after.values())
    there = {n for n in forward if n.op in ("state", "input", "constant")}
    there |= {n for name, n in t.after.items() if name not in zoned}
    wanted = _read_by_backward(gradient, set(forward))
    # For the gradients of the weights.
    wanted |= {a for n in forward if n.op in ("dense", "project") for a in n.args}
    cut = Cut()
    for n in forward:
        if n in there:
            continue
        # Parameters, row scalars and norms do not have a value for each unit and are not saved.
        save = SAVE if n.shape == UNIT and n.op != "item" and n not in fused else IMPOSSIBLE
        make = IMPOSSIBLE if n.op == "dense" else COST.get(n.op, 1) if save == SAVE else 0
        has, again = (n, "has"), (n, "made again")
        cut.pay(save, has)
        cut.pay(make - save, again)
        cut.implies(again, has)
        for a in n.args:
            if a not in there:
                cut.implies(again, (a, "has"))
        if n in wanted:
            cut.require(has)
    chosen = cut.smallest()
    return [n for n in forward if (n, "has") in chosen and (n, "made again") not in chosen]


def _read_by_backward(gradient: Gradient, forward: set[Node]) -> set[Node]:
    """The values of forward that backward reads."""
    found: set[Node] = set()
    left, seen = list(gradient.outputs), set[Node]()
    while left:
        n = left.pop()
        if n in forward:
            found.add(n)
        elif n not in seen:
            seen.add(n)
            left += n.args
    return found


class Cut:
    """Choose from a set at the lowest cost, as a minimum cut between SOURCE (chosen) and SINK (not)."""

    SOURCE, SINK = "source", "sink"
    MUST = 10**12

    def __init__(self) -> None:
        self._left: dict[Hashable, dict[Hashable, int]] = {self.SOURCE: {}, self.SINK: {}}

    def pay(self, price: int, element: Hashable) -> None:
        """Add the cost of an element, which may be negative."""
        if price < 0:
            self._edge(self.SOURCE, element, -price)
        else:
            self._edge(element, self.SINK, price)

    def require(self, element: Hashable) -> None:
        """The element must be chosen."""
        self._edge(self.SOURCE, element, self.MUST)

    def implies(self, a: Hashable, b: Hashable) -> None:
        """If a is chosen, b must be chosen too."""
        self._edge(a, b, self.MUST)

    def _edge(self, a: Hashable, b: Hashable, capacity: int) -> None:
        for u, v, c in ((a, b, capacity), (b, a, 0)):
            edges = self._left.setdefault(u, {})
            edges[v] = edges.get(v, 0) + c

    def smallest(self) -> set[Hashable]:
        """The chosen elements: what SOURCE can reach when the flow is maximal (Dinic 1970)."""
        while True:
            level: dict[Hashable, int] = {self.SOURCE: 0}
            queue: list[Hashable] = [self.SOURCE]
            for a in queue:
                for b, capacity in self._left[a].items():
                    if capacity > 0 and b not in level:
                        level[b] = level[a] + 1
                        queue.append(b)
            if self.SINK not in level:
                return set(level)
            # Flow through shortest paths: for each element the next ones that have capacity left.
            after = {a: [b for b in self._left[a] if level.get(b) == level[a] + 1] for a in level}
            path: list[Hashable] = [self.SOURCE]
            while path:
                a = path[-1]
                if a == self.SINK:
                    edges = list(pairwise(path))
                    flow = min(self._left[a][b] for a, b in edges)
                    for a, b in edges:
                        self._left[a][b] -= flow
                        self._left[b][a] += flow
                    path = [self.SOURCE]
                elif not after[a]:
                    path.pop()
                elif self._left[a][after[a][-1]] > 0 and (after[after[a][-1]] or after[a][-1] == self.SINK):
                    path.append(after[a][-1])
                else:
                    after[a].pop()
