"""The source of a step of a cell for Numba, written from what is derived of the cell.

``step(a, h_prev, c_prev, h, c, hh, rh)``: ``a`` holds input part and biases, in the columns of its
accumulators, and becomes what is saved. ``back(da, dh, dc, a, h, c, h_prev, c_prev, dh_prev, dc_prev, hh,
rh)``: dh_prev is also the direct part. Of a cell with two phases, rh is what the second product multiplies
(its columns are those of h_prev); dh is overwritten.
"""

from __future__ import annotations

from collections.abc import Iterable

from fusedrnn.cells.fusion import lower
from fusedrnn.cells.graph import Node, number
from fusedrnn.cells.kernel import Function, Kernel, Part

EXPRESSIONS = {
    "add": "{} + {}",
    "sub": "{} - {}",
    "mul": "{} * {}",
    "div": "{} / {}",
    "neg": "-{}",
    "fma": "{} * {} + {}",
    "fnma": "{2} - {0} * {1}",
    "greater": "{} > {}",
    "greater_equal": "{} >= {}",
    "where": "{1} if {0} else {2}",
}
# Where the kernels' names of values lie: an array, in its columns of an accumulator or all of them.
ARRAYS = {"a": "a", "saved": "a", "da": "da", "direct": "dh_prev", "middle": "rh", "dmiddle": "dh"}


def source(kernel: Kernel) -> str:
    """The functions ``step`` and ``back``."""
    functions = {f.name: f for f in kernel.functions}
    step = [
        "def step(a, h_prev, c_prev, h, c, hh, rh):",
        "    H = h.shape[1]",
        *_product("a", kernel.recurrent.first, kernel.recurrent, "h_prev", 0),
        *_loop(kernel, functions["forward"]),
    ]
    if kernel.second:
        columns = len(kernel.recurrent.blocks)
        step += _product("a", kernel.recurrent2.first, kernel.recurrent2, "rh", columns)
        step += _loop(kernel, functions["forward2"], {"a": f"a[{kernel.recurrent2.first}]"})
    back = [
        "def back(da, dh, dc, a, h, c, h_prev, c_prev, dh_prev, dc_prev, hh, rh):",
        "    H = h.shape[1]",
        *_loop(kernel, functions["backward"]),
    ]
    if "direct" not in kernel.direct:
        back.append("    dh_prev[:] = 0")
    if kernel.second:
        columns = len(kernel.recurrent.blocks)
        (second,) = kernel.second
        middle = Function("middle", kernel.saved | kernel.before, {"middle": second.args[-1]})
        late = next(name for name in kernel.da if name not in functions["backward"].outputs)
        back += [
            *_loop(kernel, middle),
            "    dh[:] = 0",
            *_chain("dh", kernel.recurrent2, f"hh[{columns} * H :]"),
            *_loop(kernel, functions["backward2"], {"da_late": late}),
            *_chain("dh_prev", kernel.recurrent, f"hh[: {columns} * H]"),
        ]
    else:
        back += _chain("dh_prev", kernel.recurrent, "hh")
    return "\n".join([*step, "", "", *back, ""])


def _product(to: str, column: int, part: Part, operand: str, row: int) -> list[str]:
    """Adds the product of an operand to its accumulators."""
    width = f"{len(part.blocks)} * H"
    return [
        f"    product({to}, {column} * H, {width}, flat({operand}), 0, {operand}.shape[1], 1, hh, {row} * H)"
    ]


def _chain(to: str, part: Part, weights: str) -> list[str]:
    """Adds the gradient of what a part multiplied."""
    return [f"    product({to}, 0, H, flat(da), {part.first} * H, da.shape[1], 1, {weights}, 0)"]


def _loop(kernel: Kernel, f: Function, renamed: dict[str, str] | None = None) -> list[str]:
    """A function over all rows and units; ``renamed``: what it calls otherwise than the arrays."""
    rows: dict[str, str] = {}

    def place(name: str) -> str:
        name = (renamed or {}).get(name, name)
        array, _, index = name.rstrip("]").partition("[")
        parts = len(kernel.products) > 1
        columns = f"{index} * H : {int(index) + 1} * H" if index and parts else ":"
        row = f"{ARRAYS.get(array, array)}{index}_k"
        rows[row] = f"{ARRAYS.get(array, array)}[k, {columns}]"
        return f"{row}[j]"

    names, statements = dict[Node, str](f.known), list[str]()
    for n, op, args in lower(f.outputs.values(), f.known, kernel.cell.fused):
        if op == "constant":
            names[n] = f"number({number(n)!r})"
            continue
        words = [place(names[a]) if a in f.known else names[a] for a in args]
        names[n] = f"v{len(statements)}"
        pattern = EXPRESSIONS.get(op, f"{op}({', '.join('{}' for _ in args)})")
        statements.append(f"{names[n]} = {pattern.format(*words)}")
    found = [place(names[n]) if n in f.known else names[n] for n in f.outputs.values()]
    statements.append(f"{', '.join(map(place, f.outputs))} = {', '.join(found)}")
    return [
        "    for k in range(h.shape[0]):",
        *_indented(8, (f"{row} = {part}" for row, part in rows.items())),
        "        for j in range(H):",
        *_indented(12, statements),
    ]


def _indented(spaces: int, lines: Iterable[str]) -> list[str]:
    return [" " * spaces + line for line in lines]
