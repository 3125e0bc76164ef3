"""The memory layout of the kernels of a built-in cell, and the functions of units that they call.

Each product is an accumulator. Those with the input are adjacent, and so are those with the state before and
those that wait for another product, so that each group is one product of matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fusedrnn.cells.definition import Cell
from fusedrnn.cells.fusion import lower
from fusedrnn.cells.graph import Node, reach
from fusedrnn.cells.rounds import rounds


class Part(NamedTuple):
    """Adjacent accumulators with the same operand, and for each its block of rows of the weights."""

    first: int
    blocks: list[int]


@dataclass
class Function:
    """Some values of a unit, computed from others. Both have the names that the kernels use."""

    name: str
    known: dict[Node, str]
    outputs: dict[str, Node]


class Kernel:
    """A cell with the states h, or h and c, and one product for each gate and operand.

    With a projection, h is the value before it and dh its gradient; the loops compute the projection.

    The names of values: ``h_prev c_prev`` are the states before, ``h c`` after, ``dh dc`` their gradients,
    ``a[k]`` the accumulators, ``saved[k]``, ``da[k]``, ``direct`` the gradient of h_prev that does not go
    through products, ``dc_prev``; with layer norm ``p[k]`` is an accumulator after norm, gain and bias, and
    ``dp[k]`` its gradient.
    """

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        t, gradient = cell.trace, cell.gradient
        forward, backward = cell.forward_nodes, cell.backward_nodes
        self.rounds, self.rounds_back = rounds(forward), rounds(backward, known=forward)
        self.before = dict(zip(t.states.values(), ("h_prev", "c_prev"), strict=False))
        self.after = dict(zip(t.after.values(), ("h", "c"), strict=False))
        self.upstream = dict(zip(gradient.upstream.values(), ("dh", "dc"), strict=False))
        self.new = dict(self.after)  # what forward computes; backward gets ``after``
        if cell.projects:
            h = next(iter(self.after))
            back = next(n for n in backward if n.op == "project_transposed")
            self.new = {(h.args[0] if n is h else n): name for n, name in self.after.items()}
            self.upstream = {(back if name == "dh" else n): name for n, name in self.upstream.items()}
            del self.after[h], self.before[t.states[next(iter(t.states))]]
        direct = zip(("direct", "dc_prev"), map(gradient.direct.get, t.states), strict=False)
        self.direct = {name: n for name, n in direct if n is not None}
        dense = [n for n in forward if n.op == "dense"]
        # Those of only x, those of both, those of only a state.
        self.products = sorted(dense, key=lambda n: (n.args[0].op != "input") + (n.args[-1].op != "input"))
        self.second = [n for n in self.products if self.rounds[n] == 2]
        self.normed = [n for n in self.products if not n.attribute.biases]
        self.saved = {n: f"saved[{k}]" for k, n in enumerate(cell.saved)}
        self.da = {f"da[{k}]": gradient.dense[n] for k, n in enumerate(self.products)}
        self.input = self._part([n for n in self.products if n.args[0].op == "input"], 0)
        recurrent = [n for n in self.products if n.args[-1].op != "input" and n not in self.second]
        self.recurrent, self.recurrent2 = self._part(recurrent, -1), self._part(self.second, -1)
        if self.normed:
            self.parts = {self._biased(n): f"p[{k}]" for k, n in enumerate(self.products)}
            self.dp = {f"dp[{k}]": gradient.vectors[part.args[1]] for k, part in enumerate(self.parts)}
        self.functions = (
            self._normed() if self.normed else self._two_phases() if self.second else self._plain()
        )

    def reads(self, node: Node) -> bool:
        """Whether a function uses this value directly."""
        return any(
            node in operation.args or (node in f.known and node in f.outputs.values())
            for f in self.functions
            for operation in lower(f.outputs.values(), f.known, self.cell.fused)
        )

    def norms(self) -> list[int]:
        """For each accumulator the index of its norm."""
        all_norms = [n for n in self.cell.forward_nodes if n.op == "normalise"]
        found = [next(m for m in all_norms if n in m.args) for n in self.products]
        return [list(dict.fromkeys(found)).index(m) for m in found]

    def _plain(self) -> list[Function]:
        """One round. ``new_c`` and ``new_h``: c and the value before the projection, from saved values."""
        accumulators = {n: f"a[{k}]" for k, n in enumerate(self.products)}
        kept = {name: n for n, name in self.saved.items()}
        new = {name: n for n, name in self.new.items()}
        found = [Function("forward", self.before | accumulators, kept | new)]
        if "c" in new:
            found.append(Function("new_c", self.before | self.saved, {"": new["c"]}))
        if self.cell.projects:
            found.append(Function("new_h", self.before | self.saved | self.after, {"": new["h"]}))
        known = self.saved | self.before | self.after | self.upstream
        return [*found, Function("backward", known, self.da | self.direct)]

    def _two_phases(self) -> list[Function]:
        """One product whose operand, ``middle``, is computed from the others.

        Its accumulator is stored in the saved value that its result replaces. ``dmiddle`` is the gradient of
        middle; between the phases ``direct`` holds its first part.
        """
        (second,) = self.second
        slot = f"saved[{self.products.index(second)}]"
        accumulators = {n: f"a[{k}]" for k, n in enumerate(self.products)}
        early = {n: name for n, name in self.saved.items() if self.rounds[n] < 2}
        late = {name: n for n, name in self.saved.items() if n not in early}
        assert list(late) == [slot]
        middle = second.args[-1]
        back = next(n for n in self.cell.backward_nodes if n.op == "transposed" and n.attribute[0] is middle)
        known = self.saved | self.before | self.after | self.upstream
        first = {name: n for name, n in self.da.items() if self.rounds_back[n] == 0}
        ((_, da_late),) = self.da.items() - first.items()
        carried = self._carried(self.direct["direct"], back, known)
        now = {name: n for n, name in early.items()} | {slot: second, "middle": middle}
        return [
            Function("forward", self.before | accumulators, now),
            Function("forward2", self.before | early | {second: "a"}, late | {"h": next(iter(self.after))}),
            Function("backward", known, first | {"direct": carried}),
            Function(
                "backward2",
                self.saved | self.before | {back: "dmiddle", carried: "direct"},
                {"da_late": da_late} | self.direct,
            ),
        ]

    def _normed(self) -> list[Function]:
        """The functions of a cell with layer norm, on the normalised products.

        If h is computed from a normalised c, its norm ``m`` is computed between two functions in each
        direction; ``o`` and ``da_o`` are passed to the second one, whose ``dc`` is the whole gradient of c.
        """
        if "c" not in self.after.values():
            known = self.parts | self.before
            return [
                Function("forward", known, {"h": next(iter(self.after))}),
                Function("backward", known | self.after | self.upstream, self.dp | self.direct),
            ]
        h, c = self.after
        m = self._biased(c)
        o = self._carried(h, m, self.parts | self.before)
        backward = self.cell.backward_nodes
        back = next(n for n in backward if n.op == "normalise_gradient" and n.args[0].args == (c,))
        dc = next(n for n in backward if n.op == "add" and back in [a.args[0] for a in n.args if a.args])
        (da_o,) = {n for n in self.dp.values() if not depends(n, dc)}  # of both parts of one gate
        dm = self.cell.gradient.vectors[m.args[1]]
        return [
            Function("forward_state", self.parts | self.before, {"c": c, "o": o}),
            Function("forward_output", {o: "o", m: "m"}, {"": h}),
            Function("backward_output", self.parts | self.upstream | {m: "m"}, {"da_o": da_o, "dm": dm}),
            Function(
                "backward_state", self.parts | self.before | {dc: "dc", da_o: "da_o"}, self.dp | self.direct
            ),
        ]

    def _carried(self, output: Node, late: Node, known: dict[Node, str]) -> Node:
        """The one value that does not depend on ``late`` and that the output needs besides ``known``."""
        operations = lower([output], [*known, late], self.cell.fused)
        early = {n for n, _, _ in operations if not depends(n, late) and n.op != "constant"}
        (found,) = {a for n, _, args in operations if n not in early for a in args if a in early}
        return found

    def _biased(self, n: Node) -> Node:
        """A value after norm, gain and bias."""
        forward = self.cell.forward_nodes
        item = next(m for m in forward if m.op == "item" and m.args[0].args[m.attribute] is n)
        return next(m for m in forward if m.op == "add" and item in m.args[0].args)

    def _part(self, products: Sequence[Node], operand: int) -> Part:
        first = self.products.index(products[0]) if products else 0
        assert list(products) == self.products[first : first + len(products)]
        return Part(first, [n.attribute.weights[operand] for n in products])


def depends(n: Node, on: Node) -> bool:
    """Whether a value depends on another one."""
    return on in reach([n])
