"""The built-in cells in C++, for csrc/cells/derived.h: what the loops over steps need of each.

A cell is a set of accumulators of each unit, one for each product (csrc/cells/cell.h), and functions of
vectors: forward and backward, in two parts where one product or norm needs all units of another value.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence

from fusedrnn.cells.builtin import gru, lstm, rnn
from fusedrnn.cells.definition import Definition
from fusedrnn.cells.fusion import lower
from fusedrnn.cells.graph import Node, number, reach
from fusedrnn.cells.rounds import rounds

# The types of csrc/cells/cells.def.
BUILTIN: dict[str, Definition] = {
    "RnnTanh": rnn,
    "RnnRelu": rnn.with_options(relu=True),
    "Lstm": lstm,
    "GruResetAfter": gru,
    "GruResetBefore": gru.with_options(reset_after=False),
    "RnnTanhLayerNorm": rnn.with_options(layer_norm=True),
    "RnnReluLayerNorm": rnn.with_options(relu=True, layer_norm=True),
    "LstmLayerNorm": lstm.with_options(layer_norm=True),
    "GruResetAfterLayerNorm": gru.with_options(layer_norm=True),
}

BEGIN = """\
// The cells, by generate.py from python/fusedrnn/cells/builtin.py. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "cells/cell.h"
#include "simd/vec.h"

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {
"""
END = """
}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
"""
EXPRESSIONS = {
    "add": "{} + {}",
    "sub": "{} - {}",
    "mul": "{} * {}",
    "div": "{} / {}",
    "neg": "-{}",
    "greater": "greater({}, {})",
    "greater_equal": "greater_equal({}, {})",
    "where": "select({}, {}, {})",
}


def header() -> str:
    """The text of csrc/cells/derived.h."""
    structs = (_Struct(name, cell).text() for name, cell in BUILTIN.items())
    return BEGIN + "".join(f"\n{text}" for text in structs) + END


class _Struct:
    """One cell as a struct."""

    def __init__(self, name: str, cell: Definition) -> None:
        self.name, self.cell = name, cell
        t, gradient = cell.trace, cell.gradient
        forward, backward = cell.forward_nodes, cell.backward_nodes
        self.rounds, self.rounds_back = rounds(forward), rounds(backward, known=forward)
        self.states = dict(zip(t.states.values(), ("h_prev", "c_prev"), strict=False))
        self.new = dict(zip(t.after.values(), ("h", "c"), strict=False))
        self.upstream = dict(zip(gradient.upstream.values(), ("dh", "dc"), strict=False))
        self.direct = dict(zip(("direct", "dc_prev"), map(gradient.direct.get, t.states), strict=False))
        # Each part's lie side by side: those of x alone, those of both, those of a state alone.
        dense = [n for n in forward if n.op == "dense"]
        self.products = sorted(dense, key=lambda n: (n.args[0].op != "input") + (n.args[-1].op != "input"))
        self.second = [n for n in self.products if self.rounds[n] == 2]
        self.saved = {n: f"saved[{k}]" for k, n in enumerate(cell.saved)}
        self.da = {f"da[{k}]": gradient.dense[n] for k, n in enumerate(self.products)}
        # With layer norm a product enters as what norm, gain and bias make of it.
        self.parts = {
            self.biased(n): f"p[{k}]" for k, n in enumerate(self.products) if not n.attribute.biases
        }
        self.dp = {f"dp[{k}]": gradient.vectors[part.args[1]] for k, part in enumerate(self.parts)}
        self.reads: set[Node] = set()

    def text(self) -> str:
        """The struct."""
        if not self.parts:
            functions = self.two_phases() if self.second else self.one_phase()
        else:
            functions = self.normed_state() if len(self.states) > 1 else self.normed()
        h, new_h = next(iter(self.states)), next(iter(self.new))
        flags = {
            "has_c": len(self.states) > 1,
            "has_direct": self.direct["direct"] is not None,
            "reads_h_prev": h in self.reads,
            "reads_h": new_h in self.reads,
            "layer_norm": bool(self.parts),
        }
        counts = {
            "gates": len(self.cell.trace.blocks["weight_ih"]),
            "accumulators": len(self.products),
            "saved": len(self.saved),
            "phases": 2 if self.second else 1,
        }
        parts = {
            "input": self.part([n for n in self.products if n.args[0].op == "input"], 0),
            "recurrent": self.part([n for n in self.products if hidden(n) and n not in self.second], -1),
            "recurrent2": self.part(self.second, -1),
        }
        body = [f"static constexpr int {equal(counts)};"]
        body.append(f"static constexpr bool {equal({k: str(v).lower() for k, v in flags.items()})};")
        body.append(f"static constexpr Part {equal(parts)};")
        if self.parts:
            body.append(f"FUSEDRNN_INLINE static constexpr int norm_of(int s) {{ return {self.norm_of()}; }}")
        body += functions
        return f"struct {self.name} {{\n" + "".join(f"  {line}\n" for line in body) + "};\n"

    def one_phase(self) -> list[str]:
        """forward, backward, and with c new_c: c again from what forward saved."""
        accumulators = {n: f"a[{k}]" for k, n in enumerate(self.products)}
        kept = {name: n for n, name in self.saved.items()}
        new = {name: n for n, name in self.new.items()}
        found = self.function(
            "void forward(const V* a, V h_prev, V c_prev, V* saved, V& h, V& c)",
            self.states | accumulators,
            kept | new,
        )
        if "c" in new:
            found += self.function(
                "V new_c(const V* saved, V c_prev)", self.states | self.saved, {"": new["c"]}
            )
        return found + self.function(
            "void backward(const V* saved, V h_prev, V h, V c_prev, V c, V dh, V dc, V* da, V& dc_prev, "
            "V& direct)",
            self.saved | self.states | self.new | self.upstream,
            self.da | self.direct,
        )

    def two_phases(self) -> list[str]:
        """One product of what the others make: it waits among the saved values, where its result goes."""
        (second,) = self.second
        slot = self.products.index(second)
        accumulators = {n: f"a[{k}]" for k, n in enumerate(self.products)}
        early = {n: name for n, name in self.saved.items() if self.rounds[n] < 2}
        late = {name: n for n, name in self.saved.items() if n not in early}
        assert list(late) == [f"saved[{slot}]"]
        middle = second.args[-1]
        back = next(n for n in self.cell.backward_nodes if n.op == "transposed" and n.attribute[0] is middle)
        known = self.saved | self.states | self.new | self.upstream
        first = {name: n for name, n in self.da.items() if self.rounds_back[n] == 0}
        ((_, da_late),) = self.da.items() - first.items()
        carried = self.carried(self.direct["direct"], back, known)
        zeros = [f"{name} = V::zero();" for name in self.da if name not in first]
        return [
            *self.function(
                "void forward(const V* a, V h_prev, V, V* saved, V& middle, V&)",
                self.states | accumulators,
                {name: n for n, name in early.items()} | {f"saved[{slot}]": second, "middle": middle},
            ),
            *self.function(
                "void forward2(V a, V h_prev, V* saved, V& h)",
                self.states | early | {second: "a"},
                late | {"h": next(iter(self.new))},
            ),
            *self.function(
                "void backward(const V* saved, V h_prev, V, V, V, V dh, V, V* da, V&, V& direct)",
                known,
                first | {"direct": carried},
                zeros,
            ),
            *self.function(
                "void backward2(const V* saved, V h_prev, V dmiddle, V& da_late, V& direct)",
                self.saved | self.states | {back: "dmiddle", carried: "direct"},
                {"da_late": da_late, "direct": self.direct["direct"]},
            ),
        ]

    def normed(self) -> list[str]:
        """From the normalised products p to h; back to their gradients."""
        return [
            *self.function(
                "void forward(const V* p, V h_prev, V& h)",
                self.parts | self.states,
                {"h": next(iter(self.new))},
            ),
            *self.function(
                "void backward(const V* p, V h_prev, V h, V dh, V* dp, V& direct)",
                self.parts | self.states | self.new | self.upstream,
                self.dp | self.direct,
            ),
        ]

    def normed_state(self) -> list[str]:
        """c is normalised on its way to h: its norm m comes between two parts of each direction."""
        m = self.biased(next(n for n in self.cell.trace.after.values() if self.new[n] == "c"))
        h, c = self.new
        o = self.carried(h, m, self.parts | self.states)
        gradient = self.cell.gradient
        normed = next(
            n for n in self.cell.backward_nodes if n.op == "normalise_gradient" and n.args[0].args == (c,)
        )
        dc = next(
            n
            for n in self.cell.backward_nodes
            if n.op == "add" and normed in [a.args[0] for a in n.args if a.args]
        )
        (da_o,) = {n for n in self.dp.values() if not depends(n, dc)}  # of both parts of one gate
        return [
            *self.function(
                "void forward_state(const V* p, V c_prev, V& c, V& o)",
                self.parts | self.states,
                {"c": c, "o": o},
            ),
            *self.function("V forward_output(V o, V m)", {o: "o", m: "m"}, {"": h}),
            *self.function(
                "void backward_output(const V* p, V m, V dh, V& da_o, V& dm)",
                self.parts | self.upstream | {m: "m"},
                {"da_o": da_o, "dm": gradient.vectors[m.args[1]]},
            ),
            *self.function(
                "void backward_state(const V* p, V c_prev, V dc, V da_o, V* dp, V& dc_prev)",
                self.parts | self.states | {dc: "dc", da_o: "da_o"},
                self.dp | {"dc_prev": self.direct["dc_prev"]},
            ),
        ]

    def carried(self, output: Node | None, late: Node, known: Mapping[Node, str]) -> Node:
        """The one value without ``late`` that the output needs beside it."""
        assert output is not None
        operations = lower([output], [*known, late], self.cell.fused)
        early = [n for n, _, _ in operations if not depends(n, late) and n.op != "constant"]
        used = {a for n, _, args in operations if n not in early for a in args}
        (found,) = [n for n in early if n in used and (n.upstream or n.args[0] not in used)]
        return found

    def biased(self, n: Node) -> Node:
        """What norm, gain and bias make of a value."""
        items = [m for m in self.cell.forward_nodes if m.op == "item" and m.args[0].args[m.attribute] is n]
        return next(m for m in self.cell.forward_nodes if m.op == "add" and items[0] in m.args[0].args)

    def part(self, products: Sequence[Node], operand: int) -> str:
        """A Part: the first accumulator, how many, and of each the gate."""
        first = self.products.index(products[0]) if products else 0
        gates = ", ".join(str(n.attribute.weights[operand]) for n in products)
        return f"{{{first}, {len(products)}, {{{gates}}}}}"

    def norm_of(self) -> str:
        """Of accumulator s the number of its norm."""
        norms = list(dict.fromkeys(self.norm(n) for n in self.products))
        numbers = [norms.index(self.norm(n)) for n in self.products]
        last = {number: k for k, number in enumerate(numbers)}
        return "".join(f"s <= {k} ? {n} : " for n, k in list(last.items())[:-1]) + str(numbers[-1])

    def norm(self, n: Node) -> Node:
        return next(m for m in self.cell.forward_nodes if m.op == "normalise" and n in m.args)

    def function(
        self,
        signature: str,
        known: Mapping[Node, str],
        outputs: Mapping[str, Node | None],
        more: Iterable[str] = (),
    ) -> list[str]:
        """A function that computes the outputs; the name "" stands for what it returns."""
        found = {to: n for to, n in outputs.items() if n is not None}
        names = dict(known)
        statements: list[str] = []
        for n, op, args in lower(found.values(), known, self.cell.fused):
            self.reads |= set(args)
            if op == "constant":
                value = number(n)
                names[n] = f"V::set({int(value)})" if value == int(value) else f"V::set(T({value!r}))"
                continue
            words = [names[a] for a in args]
            pattern = EXPRESSIONS.get(op, f"{op}({', '.join('{}' for _ in args)})")
            if op == "where" and args[1].op == "constant" and number(args[1]) == 0:
                pattern = "zero_where({0}, {2})"
            names[n] = f"v{len(statements) + 1}"
            kind = "const auto" if op.startswith("greater") else "const V"
            statements.append(f"{kind} {names[n]} = {pattern.format(*words)};")
        self.reads |= set(found.values()) & set(known)
        statements += [f"{to} = {names[n]};" if to else f"return {names[n]};" for to, n in found.items()]
        statements += more
        if any("T(" in line for line in statements):
            statements.insert(0, "using T = typename V::scalar;")
        return [
            "template <class V>",
            *declaration(signature, statements),
            *(f"  {s}" for s in statements),
            "}",
        ]


def hidden(n: Node) -> bool:
    """Whether a product has an operand beside x."""
    return n.args[-1].op != "input"


def depends(n: Node, on: Node) -> bool:
    """Whether a value is computed from another one."""
    return on in reach([n])


def equal(values: Mapping[str, object]) -> str:
    """The declarators of constants."""
    return ", ".join(f"{name} = {value}" for name, value in values.items())


def declaration(signature: str, statements: Sequence[str]) -> list[str]:
    """The beginning of a function, in lines of at most 120 columns; what it does not use has no name."""
    used = set(re.findall(r"\w+", " ".join(statements)))
    begin, _, arguments = signature.rstrip(")").partition("(")
    kept = [a if a.split()[-1] in used else a.rpartition(" ")[0] or a for a in arguments.split(", ")]
    begin = f"FUSEDRNN_INLINE static {begin}("
    lines = textwrap.wrap(", ".join(kept) + ") {", 116 - len(begin))
    return [begin + lines[0], *(" " * len(begin) + line for line in lines[1:])]
