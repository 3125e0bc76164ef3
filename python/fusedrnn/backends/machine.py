"""Cells without compiled kernels on the cpu backend: programs for the vector machine (csrc/cpu/machine)."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from fusedrnn import _core
from fusedrnn.backends.arguments import (
    Sizes,
    check_backward,
    check_forward,
    check_need,
    check_scalar_names,
    check_weights,
)
from fusedrnn.backends.protocol import (
    SAVE,
    Array,
    Forward,
    Gradients,
    Regularization,
    Rows,
    Scalars,
    State,
    Unsupported,
    Weights,
)
from fusedrnn.cells import Cell, program
from fusedrnn.cells.definition import PLAIN

REFUSED = (_core.RefusedType, _core.RefusedValue)
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


class Packed(NamedTuple):
    """Weights in the order of kernels or machine, and the arrays they were made of, which backward reads."""

    cell: Cell
    weights: dict[str, Array]
    core: Any
    bfloat16: np.dtype[Any] | None = None  # that of the arrays, where it is this one


class Tape(NamedTuple):
    """What backward needs: the call, and the compiled module's tape. x, y and the weights are borrowed."""

    cell: Cell
    weights: dict[str, Array]
    return_states: bool
    core: Any
    bfloat16: np.dtype[Any] | None = None  # that of the arrays, where it is this one

    @property
    def bytes(self) -> int:
        """Bytes saved for backward beside x, y and the weights."""
        return int(self.core.bytes)


@functools.cache
def plan(cell: Cell, dropout: bool = False, zoned: tuple[str, ...] = ()) -> _core.MachinePlan:
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


def plan_of(cell: Cell, regularization: Regularization | None) -> _core.MachinePlan:
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


@functools.cache
def names(cell: Cell) -> tuple[str, ...]:
    """The weights in the machine's order."""
    return (*PLAIN, *cell.vectors, *(["weight_hr"] if cell.projects else []))


def pack(cell: Cell, weights: Weights) -> Packed:
    """Weights prepared for repeated calls."""
    checked, *_ = check_weights(cell, weights)
    return Packed(cell, checked, pack_given(cell, [checked.get(name) for name in names(cell)]))


def forward(
    packed: Packed,
    x: Array,
    state0: State | None,
    *,
    lengths: Rows | None = None,
    reset: Rows | None = None,
    reverse: bool = False,
    return_states: bool = False,
    detach_every: int | None = None,
    regularization: Regularization | None = None,
    scalars: Scalars | None = None,
    save: str | None = "all",
) -> Forward:
    """One layer, one direction, the whole sequence; ``regularization`` is checked."""
    cell = packed.cell
    programs = plan_of(cell, regularization)
    rows = check_scalar_names(cell, scalars)
    results = None
    if (  # the compiled module would not see what these are, or would convert them
        type(reverse) is bool
        and type(return_states) is bool
        and (detach_every is None or (type(detach_every) is int and detach_every > 0))
        and (save is None or (type(save) is str and save in SAVE))
        and (state0 is None or (type(state0) is tuple and state0 and not any(s is None for s in state0)))
    ):
        try:
            results = _core.machine_forward(
                packed.core,
                programs,
                x,
                state0 or (),
                lengths,
                reset,
                reverse,
                detach_every or 0,
                regularization,
                return_states,
                SAVE[save],
                [rows[name] for name in cell.scalars],
            )
        except REFUSED:
            results = None
    if results is None:
        a = check_forward(
            cell,
            x,
            packed.weights,
            state0,
            lengths=lengths,
            reset=reset,
            reverse=reverse,
            return_states=return_states,
            detach_every=detach_every,
            regularization=regularization,
            scalars=rows,
            save=save,
        )
        results = _core.machine_forward(
            packed.core,
            programs,
            a.x,
            a.state0 or (),
            a.lengths,
            a.reset,
            a.reverse,
            a.detach_every or 0,
            regularization,
            a.return_states,
            SAVE[a.save],
            list(a.scalars.values()),
        )
    y, stateT, states, tape = results
    kept = None if tape is None else Tape(cell, packed.weights, states is not None, tape)
    return Forward(y, stateT, states, kept)


def backward(
    tape: Tape,
    dy: Array | None = None,
    dstateT: tuple[Array | None, ...] | None = None,
    dstates: tuple[Array | None, ...] | None = None,
    *,
    need: Collection[str] | None = None,
) -> Gradients:
    """Gradients of everything in ``need``."""
    cell = tape.cell
    order = names(cell)
    wanted = None if need is None else check_need(cell, need)
    flags = [wanted is None or name in wanted for name in ("x", *order, "state0", *cell.scalars)]
    results = None
    if all(d is None or (type(d) is tuple and d) for d in (dstateT, dstates)) and (
        dstates is None or tape.return_states
    ):
        try:
            results = _core.machine_backward(tape.core, dy, dstateT or (), dstates or (), flags)
        except REFUSED:
            results = None
    if results is None:
        sizes = Sizes(*tape.core.sizes)
        b = check_backward(
            cell, tape.weights, sizes, dy, dstateT, dstates, need=need, return_states=tape.return_states
        )
        results = _core.machine_backward(tape.core, b.dy, b.dstateT or (), b.dstates or (), flags)
    dx, dweights, dstate0, drows = results
    by_name = dict(zip(order, dweights, strict=True))
    dscalars = dict(zip(cell.scalars, drows, strict=True))
    return Gradients(dx, {name: by_name[name] for name in tape.weights}, dstate0, dscalars)


def pack_given(cell: Cell, weights: Sequence[Any]) -> _core.PackedMachine:
    """Weights in the order of ``names``, unchecked but by the compiled module, which has to take them."""
    return _core.machine_pack(plan(cell), list(weights))


def run_forward(cell: Cell, packed: _core.PackedMachine, *arguments: Any) -> None:
    """Forward into arrays of the caller's, the tape (T*B, ``plan_of(…).tape_width(H)``) among them; what is
    None is not wanted. ``_core.machine_run_forward`` has the arguments, of which the 8th is a regularization.

    With ``run_backward`` for libraries that keep arrays, in which all is that backward needs.
    """
    _core.machine_run_forward(packed, plan_of(cell, arguments[7]), *arguments)


def run_backward(cell: Cell, weights: Sequence[Any], *arguments: Any) -> None:
    """Backward of ``run_forward``, into arrays; ``_core.machine_run_backward`` has the arguments."""
    _core.machine_run_backward(plan_of(cell, arguments[7]), weights, *arguments)
