"""The built-in cells in C++, for csrc/cells/derived.h: what the loops over steps need of each cell.

A cell has the constants that csrc/cells/cell.h describes, and functions of vectors of units.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence

from cells_kernel import Function, Kernel, Part
from fusedrnn.cells.builtin import COMPILED
from fusedrnn.cells.definition import Cell
from fusedrnn.cells.fusion import lower
from fusedrnn.cells.graph import number

BEGIN = """\
// The cells, by generate_cells.py from python/fusedrnn/cells/builtin.py. SPDX-License-Identifier: Apache-2.0
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

PROJECTS = "  static constexpr bool projects = {};\n"

# The functions of a kernel by name, and with layer norm by "norm" before it.
SIGNATURES = {
    "forward": "void forward(const V* a, V h_prev, V c_prev, V* saved, V& h, V& c)",
    "new_c": "V new_c(const V* saved, V c_prev)",
    "new_h": "V new_h(const V* saved, V c_prev, V c)",
    "backward": "void backward(const V* saved, V h_prev, V h, V c_prev, V c, V dh, V dc, V* da, V& dc_prev, "
    "V& direct)",
    "forward2": "void forward2(V a, V h_prev, V* saved, V& h)",
    "backward2": "void backward2(const V* saved, V h_prev, V dmiddle, V& da_late, V& direct)",
    "norm forward": "void forward(const V* p, V h_prev, V& h)",
    "norm backward": "void backward(const V* p, V h_prev, V h, V dh, V* dp, V& direct)",
    "norm forward_state": "void forward_state(const V* p, V c_prev, V& c, V& o)",
    "norm forward_output": "V forward_output(V o, V m)",
    "norm backward_output": "void backward_output(const V* p, V m, V dh, V& da_o, V& dm)",
    "norm backward_state": "void backward_state(const V* p, V c_prev, V dc, V da_o, V* dp, V& dc_prev)",
}


def header() -> str:
    """The text of csrc/cells/derived.h."""
    return BEGIN + "".join(_struct(name, cell) for name, cell in COMPILED.items()) + END


def _struct(name: str, cell: Cell) -> str:
    """A cell. A cell with a projection is derived from the cell without it."""
    parts, base = body(Kernel(cell)), ""
    if cell.projects:
        plain = cell.with_options(project=False)
        inherited = body(Kernel(plain))
        assert [part for part in inherited if part not in parts] == [PROJECTS.format("false")]
        parts = [part for part in parts if part not in inherited]
        base = next(f" : {_type(name)}" for name, other in COMPILED.items() if other == plain)
    return f"\nstruct {_type(name)}{base} {{\n{''.join(parts)}}};\n"


def _type(name: str) -> str:
    """The type of a cell in csrc/cells/cells.def."""
    return "".join(part.capitalize() for part in name.split("_"))


def body(kernel: Kernel) -> list[str]:
    """The members of a cell's struct: constants, then functions."""
    read = {name: kernel.reads(n) for n, name in [*kernel.before.items(), *kernel.after.items()]}
    flags = {
        "has_c": "c" in read,
        "has_direct": "direct" in kernel.direct,
        "reads_h_prev": read.get("h_prev", False),
        "reads_h": read.get("h", False),
        "layer_norm": bool(kernel.normed),
    }
    counts = {
        "gates": len(kernel.cell.trace.blocks["weight_ih"]),
        "accumulators": len(kernel.products),
        "saved": len(kernel.saved),
        "phases": 2 if kernel.second else 1,
    }
    parts = {name: braces(getattr(kernel, name)) for name in ("input", "recurrent", "recurrent2")}
    lines = [f"static constexpr int {equal(counts)};"]
    lines.append(f"static constexpr bool {equal({k: str(v).lower() for k, v in flags.items()})};")
    lines.append(f"static constexpr Part {equal(parts)};")
    if kernel.normed:
        norms = kernel.norms()
        last = {n: k for k, n in enumerate(norms)}
        choice = "".join(f"s <= {k} ? {n} : " for n, k in [*last.items()][:-1]) + str(norms[-1])
        lines.append(f"FUSEDRNN_INLINE static constexpr int norm_of(int s) {{ return {choice}; }}")
    functions = ["".join(f"  {line}\n" for line in function(kernel, f)) for f in kernel.functions]
    projects = PROJECTS.format(str(kernel.cell.projects).lower())
    return ["".join(f"  {line}\n" for line in lines), projects, *functions]


def function(kernel: Kernel, f: Function) -> list[str]:
    """One function. The output with the name "" is its return value."""
    names, statements = dict(f.known), list[str]()
    for n, op, args in lower(f.outputs.values(), f.known, kernel.cell.fused):
        if op == "constant":
            value = number(n)
            names[n] = f"V::set({int(value)})" if value == int(value) else f"V::set(T({value!r}))"
            continue
        pattern = EXPRESSIONS.get(op, f"{op}({', '.join('{}' for _ in args)})")
        if op == "where" and args[1].op == "constant" and number(args[1]) == 0:
            pattern = "zero_where({0}, {2})"
        names[n] = f"v{len(statements) + 1}"
        kind = "const auto" if op.startswith("greater") else "const V"
        statements.append(f"{kind} {names[n]} = {pattern.format(*(names[a] for a in args))};")
    statements += [f"{to} = {names[n]};" if to else f"return {names[n]};" for to, n in f.outputs.items()]
    if f.name == "backward" and kernel.second:
        statements += [f"{name} = V::zero();" for name in kernel.da if name not in f.outputs]
    if any("T(" in line for line in statements):
        statements.insert(0, "using T = typename V::scalar;")
    signature = SIGNATURES[f"norm {f.name}" if kernel.normed else f.name]
    if f.name == "forward" and kernel.second:
        signature = signature.replace("V& h,", "V& middle,")
    return ["template <class V>", *declaration(signature, statements), *(f"  {s}" for s in statements), "}"]


def braces(part: Part) -> str:
    """A Part: the first accumulator, their number, and the gate of each."""
    return f"{{{part.first}, {len(part.blocks)}, {{{', '.join(map(str, part.blocks))}}}}}"


def equal(values: Mapping[str, object]) -> str:
    """The declarators of constants."""
    return ", ".join(f"{name} = {value}" for name, value in values.items())


def declaration(signature: str, statements: Sequence[str]) -> list[str]:
    """The beginning of a function, in lines of at most 120 columns; unused arguments have no name."""
    used = set(re.findall(r"\w+", " ".join(statements)))
    begin, _, arguments = signature.rstrip(")").partition("(")
    kept = [a if a.split()[-1] in used else a.rpartition(" ")[0] or a for a in arguments.split(", ")]
    begin = f"FUSEDRNN_INLINE static {begin}("
    lines = textwrap.wrap(", ".join(kept) + ") {", 116 - len(begin))
    return [begin + lines[0], *(" " * len(begin) + line for line in lines[1:])]
