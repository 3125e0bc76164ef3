"""The C++ backend: fused kernels for float32, float64 and bfloat16 (csrc/), through ``fusedrnn._core``.

A single step takes microseconds, and so would the whole check of its arguments. The compiled module checks
what its kernels rely on, so a call goes straight there; only what it refuses goes through
``fusedrnn.backends.arguments``, which has the words for the error, or makes the copy that was missing.
Built-in cells are compiled; any other one is a program that the module runs (``fusedrnn.backends.machine``).
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np

from fusedrnn.backends.arguments import (
    FLOATS,
    Sizes,
    bfloat16,
    check_backward,
    check_cell,
    check_forward,
    check_need,
    check_regularization,
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
    Weights,
)
from fusedrnn.cells import Cell
from fusedrnn.cells.builtin import COMPILED
from fusedrnn.cells.definition import PLAIN

try:
    from fusedrnn import _core
    from fusedrnn.backends import machine as machine

    REFUSED = (_core.RefusedType, _core.RefusedValue)
    _missing = None
except ImportError as error:  # a source tree that was never built
    _missing = (
        f"the compiled module fusedrnn._core is missing ({error}): install fusedrnn with a C++ compiler"
    )


class Packed(NamedTuple):
    """Weights in the kernels' own order, and the arrays they were made of, which backward reads."""

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
def names(cell: Cell) -> tuple[str, ...]:
    """The weights in the order of the compiled module."""
    return (*PLAIN, *cell.vectors, *(["weight_hr"] if cell.projects else []))


@functools.cache
def compiled(cell: Cell) -> _core.Cell | None:
    """The cell of csrc/cells/cells.def, or None: a program runs it."""
    for name, each in COMPILED.items():
        if cell == each and name in _core.CELLS:
            return _core.Cell(_core.CELLS.index(name))
    return None


def core_of(cell: Cell, regularization: Regularization | None = None) -> _core.Cell:
    """What the compiled module runs in such a call.

    Raises:
        Unsupported: The cell is too large.
    """
    return compiled(cell) or machine.plan_of(cell, regularization)


def _ordered(cell: Cell, weights: Weights) -> tuple[Any, ...]:
    """The weights in the order of the compiled module, None for those that there are not."""
    return tuple([weights.get(name) for name in names(cell)])


def _as_bits(low: np.dtype[Any], array: Any, first: Any, second: Any) -> tuple[Any, Any, Any]:
    """An array and two tuples of arrays, of the dtype bfloat16, as the compiled module takes them."""
    arrays = array, *first, *second
    if any(a is not None and getattr(a, "dtype", None) != low for a in arrays):
        raise _core.RefusedType("expected bfloat16")
    bits = [None if a is None else a.view(np.int16) for a in arrays]
    return bits[0], tuple(bits[1 : 1 + len(first)]), tuple(bits[1 + len(first) :])


def _of_bits(dtype: np.dtype[Any], results: Any) -> Any:
    """What the compiled module returned, its arrays in bfloat16."""
    if type(results) is np.ndarray:
        return results.view(dtype)
    return tuple([_of_bits(dtype, a) for a in results]) if type(results) in (tuple, list) else results


class CpuBackend:
    """Every cell in float32 and float64, any CPU; see ``protocol``. For bfloat16 see ``has_bfloat16``."""

    name = "cpu"

    def unavailable(self) -> str | None:
        """None, or why the compiled module is missing."""
        return _missing

    def pack(self, cell: Cell, weights: Weights) -> Packed:
        """Weights prepared for repeated calls, stale as soon as one of them changes."""
        core = core_of(check_cell(cell))
        if type(weights) is dict and {*map(type, weights.values())} == {np.ndarray}:
            known = {name: weights[name] for name in cell.blocks if name in weights}
            try:
                if len(known) == len(weights):
                    return Packed(cell, known, _core.pack(core, _ordered(cell, known)))
            except REFUSED:
                pass  # check_weights has the words
        low = bfloat16()
        dtypes = (*FLOATS, *low) if low and compiled(cell) and self.has_bfloat16() else FLOATS
        checked, *_ = check_weights(cell, weights, dtypes)
        dtype = checked["weight_ih"].dtype
        if dtype not in low:
            return Packed(cell, checked, _core.pack(core, _ordered(cell, checked)))
        bits = {name: w.view(np.int16) for name, w in checked.items()}
        return Packed(cell, checked, self.pack_bits(cell, bits).core, dtype)

    def pack_bits(self, cell: Cell, weights: Weights) -> Packed:
        """Weights in bfloat16, as int16 with their bits and contiguous, for ``run_forward``."""
        return Packed(cell, dict(weights), _core.pack(core_of(cell), _ordered(cell, weights), bfloat16=True))

    def forward(
        self,
        cell: Cell,
        x: Array,
        weights: Weights | Packed,
        state0: State | None = None,
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
        """One layer, one direction, the whole sequence."""
        packed = weights if isinstance(weights, Packed) else self.pack(cell, weights)
        if cell is not packed.cell and check_cell(cell) != packed.cell:
            raise ValueError(f"weights: packed for {packed.cell!r}, expected {cell!r}")
        core, low = None, packed.bfloat16
        if regularization is not None:
            regularization = check_regularization(cell, regularization)
            core = core_of(cell, regularization)
        rows: Any = ()
        if scalars is not None or cell.scalars:
            scalars = check_scalar_names(cell, scalars)
            rows = tuple([scalars[name] for name in cell.scalars])
        plain = (  # else the compiled module would not see what these are, or would convert them
            type(reverse) is bool
            and type(return_states) is bool
            and (detach_every is None or (type(detach_every) is int and detach_every > 0))
            and (save is None or (type(save) is str and save in SAVE))
            and (state0 is None or (type(state0) is tuple and state0))
        )
        for checked in (not plain, True):
            if checked:
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
                    scalars=scalars,
                    save=save,
                    dtypes=(*FLOATS, *bfloat16()),
                )
                x, state0, rows, lengths, reset = a.x, a.state0, tuple(a.scalars.values()), a.lengths, a.reset
                reverse, return_states, save = a.reverse, a.return_states, a.save
                detach_every = a.detach_every
            try:
                arrays = x, state0 or (), rows
                x_, state0_, rows_ = arrays if low is None else _as_bits(low, *arrays)
                results = _core.forward(
                    packed.core,
                    core,
                    x_,
                    state0_,
                    rows_,
                    lengths,
                    reset,
                    reverse,
                    detach_every or 0,
                    regularization,
                    return_states,
                    SAVE[save],
                )
                break
            except REFUSED:
                if checked:
                    raise
        y, stateT, states, tape = results if low is None else _of_bits(low, results)
        kept = None if tape is None else Tape(packed.cell, packed.weights, states is not None, tape, low)
        return Forward(y, stateT, states, kept)

    def run_forward(self, cell: Cell, *arguments: Any) -> None:
        """Forward into arrays of the caller's, the tape among them; ``_core.run_forward`` has the arguments,
        of which the 9th is a regularization.

        Weights may be as they are, or packed. With ``run_backward`` for libraries that keep arrays, in which
        all is that backward needs, and nothing else.
        """
        _core.run_forward(core_of(cell, arguments[8]), *arguments)

    def run_backward(self, cell: Cell, *arguments: Any) -> None:
        """Backward of ``run_forward``, into arrays; ``_core.run_backward`` has the arguments."""
        _core.run_backward(core_of(cell, arguments[8]), *arguments)

    def tape_shape(
        self,
        cell: Cell,
        sizes: tuple[int, int, int, int, int],
        *,
        recompute: bool = False,
        regularization: Regularization | None = None,
        float64: bool = False,
        bfloat16: bool = False,
    ) -> tuple[int, int]:
        """Rows and elements per row of the array that ``run_forward`` takes for a tape, for T, B, I, H, P.

        A compiled cell needs with ``lengths`` as many rows as there are valid steps; more do no harm.
        """
        core, acts = core_of(cell, regularization), regularization is not None
        return _core.tape_shape(core, *sizes, recompute, acts, float64, bfloat16)

    def has_bfloat16(self) -> bool:
        """Whether this processor has kernels with products in bfloat16, of the cells of ``COMPILED``.

        Products are in bfloat16 then, and h is rounded in every step; in backward the gradients of the gates
        are rounded too. All else is in float32. ``forward`` and ``backward`` take arrays of the package
        ml_dtypes. With ``bfloat16=True``, ``run_forward``, ``run_backward`` and ``tape_shape`` take arrays of
        int16 with their bits, but for the tape, which is float32.
        """
        return _missing is None and _core.has_bfloat16()

    def empty(self, rows: int, width: int, float64: bool) -> Array:
        """An array whose memory, where it is large, is used again once it is released."""
        return _core.empty(rows, width, float64)

    def backward(
        self,
        tape: Tape,
        dy: Array | None = None,
        dstateT: tuple[Array | None, ...] | None = None,
        dstates: tuple[Array | None, ...] | None = None,
        *,
        need: Collection[str] | None = None,
    ) -> Gradients:
        """Gradients of everything in ``need``."""
        if not isinstance(tape, Tape):
            raise TypeError(
                f"tape: expected what forward of the cpu backend returned, got {type(tape).__name__}"
            )
        cell, low, order = tape.cell, tape.bfloat16, names(tape.cell)
        wanted = None if need is None else check_need(cell, need)
        flags = [wanted is None or name in wanted for name in ("x", *order, "state0", *cell.scalars)]
        plain = all(d is None or (type(d) is tuple and d) for d in (dstateT, dstates))
        for checked in (not plain or (dstates is not None and not tape.return_states), True):
            if checked:
                sizes, every = Sizes(*tape.core.sizes), tape.return_states
                dy, dstateT, dstates, _ = check_backward(
                    cell, tape.weights, sizes, dy, dstateT, dstates, need=need, return_states=every
                )
            try:
                arrays = dy, dstateT or (), dstates or ()
                dy_, dstateT_, dstates_ = arrays if low is None else _as_bits(low, *arrays)
                results = _core.backward(tape.core, dy_, dstateT_, dstates_, flags)
                break
            except REFUSED:
                if checked:
                    raise
        dx, dweights, dstate0, drows = results if low is None else _of_bits(low, results)
        by_name = dict(zip(order, dweights, strict=True))
        dscalars = dict(zip(cell.scalars, drows, strict=True))
        return Gradients(dx, {name: by_name[name] for name in tape.weights}, dstate0, dscalars)
