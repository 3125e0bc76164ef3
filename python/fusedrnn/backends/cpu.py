"""The C++ backend: fused kernels for float32 and float64 (csrc/), called through ``fusedrnn._core``."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from fusedrnn.backends.arguments import (
    BackwardArguments,
    ForwardArguments,
    check_backward,
    check_forward,
    check_weights,
)
from fusedrnn.backends.protocol import NEED, Array, Forward, Gradients, State, Weights
from fusedrnn.cells import GRU, LSTM, RNN, Cell

try:
    from fusedrnn import _core

    _missing = None
except ImportError as error:  # a source tree that was never built
    _missing = (
        f"the compiled module fusedrnn._core is missing ({error}): install fusedrnn with a C++ compiler"
    )


SAVE = {None: 0, "all": 1, "borders": 2}  # the ids that _core takes


class Packed(NamedTuple):
    """Weights in the kernels' order, and the arrays they were made of, which backward still reads."""

    cell: Cell
    weights: Weights
    core: Any


class Tape(NamedTuple):
    """What backward needs: the checked call and the kernels' own tape. x, y and the weights are borrowed."""

    arguments: ForwardArguments
    core: Any

    @property
    def bytes(self) -> int:
        """Bytes saved for backward beside x, y and the weights."""
        return int(self.core.bytes)


def _cell_id(cell: Cell) -> int:
    match cell:
        case RNN():
            name = "rnn_relu" if cell.relu else "rnn_tanh"
        case LSTM():
            name = "lstm"
        case GRU():
            name = "gru_reset_after" if cell.reset_after else "gru_reset_before"
    return int(_core.CELLS.index(name))


class CpuBackend:
    """Every cell in float32 and float64, any CPU; see ``protocol`` for the methods."""

    name = "cpu"

    def unavailable(self) -> str | None:
        """None, or why the compiled module is missing."""
        return _missing

    def pack(self, cell: Cell, weights: Weights) -> Packed:
        """Weights prepared for repeated calls, stale as soon as one of them changes."""
        checked, _, _ = check_weights(cell, weights)
        return Packed(cell, checked, _core.pack(_cell_id(cell), *checked))

    def forward(
        self,
        cell: Cell,
        x: Array,
        weights: Weights | Packed,
        state0: State | None = None,
        *,
        lengths: Array | None = None,
        reset: Array | None = None,
        reverse: bool = False,
        return_states: bool = False,
        save: str | None = "all",
    ) -> Forward:
        """One layer, one direction, the whole sequence."""
        plain = weights.weights if isinstance(weights, Packed) else weights
        a = check_forward(
            cell,
            x,
            plain,
            state0,
            lengths=lengths,
            reset=reset,
            reverse=reverse,
            return_states=return_states,
            save=save,
        )
        if isinstance(weights, Packed):
            if weights.cell != cell:
                raise ValueError(f"weights: packed for {weights.cell}, expected {cell}")
            core = weights.core
        else:
            core = _core.pack(_cell_id(cell), *a.weights)
        state = (*(a.state0 or ()), None, None)
        y, hT, cT, h_states, c_states, tape = _core.forward(
            core, a.x, state[0], state[1], a.lengths, a.reset, a.reverse, a.return_states, SAVE[a.save]
        )
        two = "c" in cell.states
        return Forward(
            y,
            (hT, cT) if two else (hT,),
            ((h_states, c_states) if two else (h_states,)) if return_states else None,
            None if tape is None else Tape(a, tape),
        )

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
        a = tape.arguments
        b: BackwardArguments = check_backward(
            a.cell, a.weights, a.sizes, dy, dstateT, dstates, need=need, return_states=a.return_states
        )
        final = (*(b.dstateT or ()), None, None)
        every = (*(b.dstates or ()), None, None)
        dx, dweight_ih, dweight_hh, dbias_ih, dbias_hh, dh0, dc0 = _core.backward(
            tape.core, b.dy, final[0], final[1], every[0], every[1], [name in b.need for name in NEED]
        )
        dstate0 = None if dh0 is None else (dh0, dc0) if "c" in a.cell.states else (dh0,)
        return Gradients(dx, Weights(dweight_ih, dweight_hh, dbias_ih, dbias_hh), dstate0)
