"""The C++ backend: fused kernels for float32, float64 and bfloat16 (csrc/), through ``fusedrnn._core``.

A single step takes microseconds, and so would the whole check of its arguments. The compiled module checks
what its kernels rely on, so a call goes straight there; only what it refuses goes through
``fusedrnn.backends.arguments``, which has the words for the error, or makes the copy that was missing.
Built-in cells are compiled; any other one is a program that the module runs (``fusedrnn.backends.machine``).
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import Any, TypeVar, cast

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
from fusedrnn.cells import Cell
from fusedrnn.cells.builtin import COMPILED

try:
    from fusedrnn import _core
    from fusedrnn.backends import machine as machine
    from fusedrnn.backends.machine import REFUSED as REFUSED
    from fusedrnn.backends.machine import Packed, Tape

    _missing = None
except ImportError as error:  # a source tree that was never built
    _missing = (
        f"the compiled module fusedrnn._core is missing ({error}): install fusedrnn with a C++ compiler"
    )


# The weights that _core takes, in its order.
WEIGHTS = (
    *("weight_ih", "weight_hh", "bias_ih", "bias_hh", "gain_ih", "gain_hh", "gain_c", "bias_c"),
    "weight_hr",
)
NEED = ("x", *WEIGHTS, "state0")


@functools.cache
def cell_id(cell: Cell, backend: str = "cpu") -> int:
    """The cell's number in csrc/cells/cells.def.

    Raises:
        ValueError: It has none; the message names the backend.
    """
    if (found := _compiled(cell)) is None:
        raise Unsupported(f"cell: {cell!r} is not supported by the {backend} backend; use the reference")
    return found


@functools.cache
def _compiled(cell: Cell) -> int | None:
    for name, compiled in COMPILED.items():
        if cell == compiled and name in _core.CELLS:
            return int(_core.CELLS.index(name))
    return None


_Two = tuple[Any, Any]
_Arrays = TypeVar("_Arrays", bound=tuple[Any, ...])


def _two(cell: Cell, state: Any, missing: bool) -> _Two | None:
    """h and c, whatever they are, None for what there is not; or None where this is no state.

    A state is None or a tuple with an entry per state of the cell; with ``missing`` entries may be None.
    """
    if state is None:
        return None, None
    if type(state) is not tuple or len(state) != len(cell.states):
        return None
    if not missing and (state[0] is None or state[-1] is None):
        return None
    return state if len(state) == 2 else (state[0], None)


def _ordered(weights: Weights) -> list[Array]:
    """The weights in the order of the compiled module, None for those that there are not."""
    return [cast(Array, weights.get(name)) for name in WEIGHTS]


def _as_bits(dtype: np.dtype[Any], arrays: _Arrays) -> _Arrays:
    """Arrays in bfloat16, which is the dtype, as the compiled module takes them."""
    if any(a is not None and getattr(a, "dtype", None) != dtype for a in arrays):
        raise _core.RefusedType("expected bfloat16")
    return cast(_Arrays, tuple([None if a is None else a.view(np.int16) for a in arrays]))


def _of_bits(dtype: np.dtype[Any], results: Sequence[Any]) -> Sequence[Any]:
    """What the compiled module returned, its arrays in bfloat16."""
    return [a.view(dtype) if type(a) is np.ndarray else a for a in results]


class CpuBackend:
    """Every cell in float32 and float64, any CPU; see ``protocol``. For bfloat16 see ``has_bfloat16``."""

    name = "cpu"

    def unavailable(self) -> str | None:
        """None, or why the compiled module is missing."""
        return _missing

    def pack(self, cell: Cell, weights: Weights) -> Packed:
        """Weights prepared for repeated calls, stale as soon as one of them changes."""
        if (number := _compiled(check_cell(cell))) is None:
            return machine.pack(cell, weights)
        if type(weights) is dict and {*map(type, weights.values())} == {np.ndarray}:
            known = {name: weights[name] for name in cell.blocks if name in weights}
            try:
                if len(known) == len(weights):
                    return Packed(cell, known, _core.pack(number, *_ordered(known)))
            except REFUSED:
                pass  # check_weights has the words
        low = bfloat16()
        dtypes = (*FLOATS, *low) if low and self.has_bfloat16() else FLOATS
        checked, *_ = check_weights(cell, weights, dtypes)
        dtype = checked["weight_ih"].dtype
        if dtype not in low:
            return Packed(cell, checked, _core.pack(number, *_ordered(checked)))
        bits = {name: w.view(np.int16) for name, w in checked.items()}
        return Packed(cell, checked, self.pack_bits(cell, bits).core, dtype)

    def pack_bits(self, cell: Cell, weights: Weights) -> Packed:
        """Weights in bfloat16, as int16 with their bits and contiguous, for ``run_forward``."""
        return Packed(cell, dict(weights), _core.pack(cell_id(cell), *_ordered(weights), bfloat16=True))

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
        if regularization is not None:
            regularization = check_regularization(packed.cell, regularization)
        if isinstance(packed.core, _core.PackedMachine):
            return machine.forward(
                packed,
                x,
                state0,
                lengths=lengths,
                reset=reset,
                reverse=reverse,
                return_states=return_states,
                detach_every=detach_every,
                regularization=regularization,
                scalars=scalars,
                save=save,
            )
        results, low = None, packed.bfloat16
        state = _two(cell, state0, False)
        if (  # the compiled module would not see what these are, or would convert them
            state is not None
            and type(reverse) is bool
            and type(return_states) is bool
            and (detach_every is None or (type(detach_every) is int and detach_every > 0))
            and (save is None or (type(save) is str and save in SAVE))
            and scalars is None
        ):
            h0, c0 = state
            try:
                given, h0, c0 = (x, h0, c0) if low is None else _as_bits(low, (x, h0, c0))
                results = _core.forward(
                    packed.core,
                    given,
                    h0,
                    c0,
                    lengths,
                    reset,
                    reverse,
                    return_states,
                    SAVE[save],
                    detach_every or 0,
                    regularization,
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
                scalars=scalars,
                save=save,
                dtypes=(*FLOATS, *bfloat16()),
            )
            state = cast(_Two, _two(cell, a.state0, False))
            results = _core.forward(
                packed.core,
                *((a.x, *state) if low is None else _as_bits(low, (a.x, *state))),
                a.lengths,
                a.reset,
                a.reverse,
                a.return_states,
                SAVE[a.save],
                a.detach_every or 0,
                a.regularization,
            )
        y, hT, cT, h_states, c_states, tape = results if low is None else _of_bits(low, results)
        two = "c" in cell.states
        return Forward(
            y,
            (hT, cT) if two else (hT,),
            None if h_states is None else (h_states, c_states) if two else (h_states,),
            None if tape is None else Tape(packed.cell, packed.weights, h_states is not None, tape, low),
        )

    def run_forward(self, cell: Cell, *arguments: Any) -> None:
        """Forward into arrays of the caller's, the tape among them; ``_core.run_forward`` has the arguments.

        Weights may be as they are, or packed. With ``run_backward`` for libraries that keep arrays, in which
        all is that backward needs, and nothing else.
        """
        _core.run_forward(cell_id(cell), *arguments)

    def run_backward(self, cell: Cell, *arguments: Any) -> None:
        """Backward of ``run_forward``, into arrays; ``_core.run_backward`` has the arguments."""
        _core.run_backward(cell_id(cell), *arguments)

    def tape_shape(
        self,
        cell: Cell,
        sizes: tuple[int, int, int, int, int],
        *,
        recompute: bool = False,
        regularized: bool = False,
        float64: bool = False,
        bfloat16: bool = False,
    ) -> tuple[int, int]:
        """Rows and elements per row of the array that ``run_forward`` takes for a tape, for T, B, I, H, P.

        Of ``lengths`` it needs as many rows as there are valid steps; more do no harm.
        """
        return _core.tape_shape(cell_id(cell), *sizes, recompute, regularized, float64, bfloat16)

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
        if isinstance(tape.core, _core.MachineTape):
            return machine.backward(tape, dy, dstateT, dstates, need=need)
        cell = tape.cell
        wanted = NEED if need is None else check_need(cell, need)
        flags = [name in wanted for name in NEED]
        results, low = None, tape.bfloat16
        final, every = _two(cell, dstateT, True), _two(cell, dstates, True)
        if final is not None and every is not None and (dstates is None or tape.return_states):
            try:
                given = dy, *final, *every
                results = _core.backward(tape.core, *(given if low is None else _as_bits(low, given)), flags)
            except REFUSED:
                results = None
        if results is None:
            b = check_backward(
                cell,
                tape.weights,
                Sizes(*tape.core.sizes),
                dy,
                dstateT,
                dstates,
                need=need,
                return_states=tape.return_states,
            )
            final, every = cast(_Two, _two(cell, b.dstateT, True)), cast(_Two, _two(cell, b.dstates, True))
            given = b.dy, *final, *every
            results = _core.backward(tape.core, *(given if low is None else _as_bits(low, given)), flags)
        dx, *dweights, dh0, dc0 = results if low is None else _of_bits(low, results)
        dstate0 = None if dh0 is None else (dh0, dc0) if "c" in cell.states else (dh0,)
        by_name = dict(zip(WEIGHTS, dweights, strict=True))
        return Gradients(dx, {name: by_name[name] for name in tape.weights}, dstate0, {})
