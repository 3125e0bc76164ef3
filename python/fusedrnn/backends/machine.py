"""Cells without compiled kernels on the cpu backend: programs for the vector machine (csrc/cpu/machine)."""

from __future__ import annotations

import functools
import re
from collections import Counter

import numpy as np

from fusedrnn import _core
from fusedrnn.backends.protocol import Regularization, Unsupported
from fusedrnn.cells import Cell, program

# What the compiled module says that a cell has too many of, as who wrote the cell would say it.
WORDS = {
    "accumulators": "gates",
    "vectors": "vectors, gains and biases of norms",
    "operands": "different operands of p.dense beside x",
    "row scalars": "numbers of each row",
    "constants": "different constants",
    "rounds": "rounds, products and norms that wait for one another",
    "register": "values at a time",
    "saved values": "values that backward needs again",
    "carried values": "values that a later round needs again",
}


@functools.cache
def plan(cell: Cell, dropout: bool = False, zoned: tuple[str, ...] = ()) -> _core.Cell:
    """The cell as programs, with recurrent dropout, and with zoneout on some states.

    Raises:
        Unsupported: It is too large.
    """
    count = Counter(n.op for n in cell.forward_nodes)
    counts = {"operations": count.total(), "accumulators": count["dense"], "vectors": count["vector"]}
    for what, n in (counts | {"states": len(cell.states)}).items():
        if n > (most := _core.MACHINE_LIMITS[what]):
            raise _too_large(cell, f"{WORDS.get(what, what)}: expected at most {most}, got {n}")
    made = program.plan(cell, dropout, zoned)
    try:
        return _core.machine_plan(np.array(made.numbers(), np.int32), made.start, made.constants)
    except _core.RefusedValue as error:
        raise _too_large(cell, _in_words(str(error))) from error


def plan_of(cell: Cell, regularization: Regularization | None) -> _core.Cell:
    """That of a call."""
    if (r := regularization) is None:
        return plan(cell)
    zoned = tuple(s for s, rate in (("h", r.zoneout_h), ("c", r.zoneout_c)) if rate)
    return plan(cell, r.seed is not None and r.recurrent_dropout > 0, zoned)


def _in_words(error: str) -> str:
    """What a cell has too many of, from the compiled module's error."""
    if (found := re.fullmatch(r"program: (.+): expected (\d+ to|less than) (\d+), got (\d+)", error)) is None:
        return error
    what, to, most, got = found.groups()
    if what == "register":  # counted from 0, and refused at the first that is too many
        return f"{WORDS[what]}: expected at most {int(most) + (to != 'less than')}"
    x = what == "operands"  # of which x is the first
    return f"{WORDS.get(what, what)}: expected at most {int(most) - x}, got {int(got) - x}"


def _too_large(cell: Cell, what: object) -> Unsupported:
    return Unsupported(f"cell: {cell!r} is too large for the cpu backend ({what}); use the reference")
