"""Forward and backward of one layer in one direction, on arrays. No state is kept between calls.

::

    y, stateT, states, tape = forward(lstm, x, {"weight_ih": weight_ih, "weight_hh": weight_hh})
    dx, dweights, dstate0, dscalars = backward(tape, dy)

Sizes: ``T`` time steps, ``B`` batch, ``I`` input, ``H`` hidden, ``P`` projected (H for cells without a
projection), ``G`` gates. ``fusedrnn.backends.protocol`` describes padding, resets and directions in detail.
``fusedrnn.multilayer`` runs several layers. With CuPy arrays instead of NumPy arrays, a call runs on their
GPU (docs/cuda.md). All arrays of a call must be of one kind.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fusedrnn import backends, cuda
from fusedrnn.backends.arguments import check_batch_sizes, check_cell, check_scalar_names, listed
from fusedrnn.backends.protocol import (
    Array,
    Backend,
    Forward,
    Gradients,
    Regularization,
    Rows,
    Scalars,
    State,
    Weights,
)
from fusedrnn.cells import Cell, gru, lstm, rnn

__all__ = [
    "Cell",
    "Forward",
    "Gradients",
    "Packed",
    "Ragged",
    "Regularization",
    "Scalars",
    "Tape",
    "Weights",
    "backward",
    "forward",
    "gru",
    "lstm",
    "pack",
    "rnn",
]


class Packed(NamedTuple):
    """What ``pack`` returns: weights prepared by one backend for repeated calls.

    ``backend`` is the backend that packed them, ``cell`` the cell, ``weights`` the weights in its order.
    """

    backend: Backend
    cell: Cell
    weights: Any


class Tape(NamedTuple):
    """What ``forward`` keeps for ``backward``.

    ``backend`` is the backend that ran, and ``tape`` its tape. ``ragged`` has the lengths of packed rows; it
    is None without ``batch_sizes``.
    """

    backend: Backend
    tape: Any
    ragged: Ragged | None


@dataclass(frozen=True)
class Ragged:
    """Sequences of different lengths as packed rows: step by step, each with the rows that have not ended.

    The first ``batch_sizes[0]`` rows are step 0 of every sequence, longest first, then ``batch_sizes[1]``
    rows of step 1, and so on, as in ``torch.nn.utils.rnn.PackedSequence``.
    """

    valid: Array  # (T, B) bool

    @classmethod
    def of(cls, batch_sizes: Any) -> Ragged:
        """The lengths that ``batch_sizes`` stands for: (T,) integers, at least 1 and never increasing.

        Raises:
            TypeError, ValueError: ``batch_sizes`` is something else.
        """
        sizes = check_batch_sizes(batch_sizes)
        B = sizes[0] if sizes else 0
        return cls(np.arange(B) < np.array(sizes, np.int64)[:, None])

    @property
    def lengths(self) -> Array:
        """(B,) the length of each sequence."""
        return self.valid.sum(axis=0)

    def pad(self, name: str, rows: Any, rank: int = 2) -> Array:
        """Packed rows (sum, ...) as a padded sequence (T, B, ...).

        Raises:
            TypeError, ValueError: ``rows`` is not an array of ``rank`` axes with one row for each valid step.
        """
        if not cuda.is_array(rows):
            raise TypeError(f"{name}: expected a NumPy or CuPy array, got {type(rows).__name__}")
        total = int(self.valid.sum())
        if rows.ndim != rank or len(rows) != total:
            shape = f"({total},{' ·' if rank == 2 else ''})"
            raise ValueError(f"{name}: expected packed rows of shape {shape}, got {rows.shape}")
        xp = cuda.get_array_module(rows)
        padded: Array = xp.zeros((*self.valid.shape, *rows.shape[1:]), rows.dtype)
        padded[xp.asarray(self.valid)] = rows
        return padded

    def rows(self, padded: Array) -> Array:
        """A padded sequence (T, B, ...) as packed rows (sum, ...)."""
        return padded[cuda.get_array_module(padded).asarray(self.valid)]


def _chosen(backend: str | None, array: Any) -> Backend:
    """The backend of this name, else the one for the array."""
    return backends.usable("cuda" if backend is None and cuda.on_gpu(array) else backend)


def pack(cell: Cell, weights: Weights, backend: str | None = None) -> Packed:
    """Prepare weights for repeated calls, especially single steps.

    The result is a copy: pack again after a weight has changed.

    Args:
        cell: ``lstm``, ``gru`` or ``rnn``, also with options, ``gru.with_options(reset_after=False)``; or any
            other cell, on the backends that support it.
        weights: As in ``forward``.
        backend: As in ``forward``.

    Returns:
        What ``forward`` takes instead of the weights. It then runs on the same backend.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
        RuntimeError: The backend cannot run here.
    """
    chosen = _chosen(backend, weights.get("weight_ih") if isinstance(weights, Mapping) else None)
    return Packed(chosen, cell, chosen.pack(cell, weights))


def forward(
    cell: Cell,
    x: Array,
    weights: Weights | Packed,
    state0: State | None = None,
    *,
    lengths: Rows | None = None,
    reset: Rows | None = None,
    batch_sizes: Rows | None = None,
    reverse: bool = False,
    return_states: bool = False,
    detach_every: int | None = None,
    regularization: Regularization | None = None,
    scalars: Scalars | None = None,
    save: str | None = "all",
    backend: str | None = None,
) -> Forward:
    """Run one layer in one direction over a whole sequence.

    Formulas and their sources are in ``fusedrnn.cells.builtin``: Elman 1990 for ``rnn``, Hochreiter and
    Schmidhuber 1997 with the forget gate of Gers et al. 2000 for ``lstm``, PyTorch's and cuDNN's form for
    ``gru``, Cho et al. 2014 for ``gru`` with ``reset_after=False``; Ba, Kiros and Hinton 2016 for
    ``layer_norm=True``.

    Args:
        cell: ``lstm``, ``gru`` or ``rnn``, also with options, ``gru.with_options(reset_after=False)``; or any
            other cell, on the backends that support it.
        x: (T, B, I), any strides over T and B; float32 or float64 (also long double and complex in the
            reference, and bfloat16 of the package ml_dtypes on processors with AVX512-BF16: docs/apis.md).
        weights: A dictionary by name, in PyTorch's layout and of x's dtype: weight_ih (G*H, I), weight_hh
            (G*H, P), bias_ih and bias_hh (G*H,), which may be missing. With ``layer_norm`` also gain_ih and
            gain_hh (G*H,), and for an LSTM gain_c and bias_c (H,). With a projection also weight_hr (P, H).
            ``cell.shapes`` has the names and shapes. Or the result of ``pack``.
        state0: (h,) or (h, c), each (B, ·), of x's dtype. None: the initial values of the cell, which are 0
            in the built-in cells.
        lengths: (B,) integers from 0 to T, a list or an array. From this step on the state of the row does
            not change and y is 0.
        reset: (T, B) booleans, or 0 and 1, lists or an array, true if step t is the first of a new segment:
            the state is cut between t-1 and t.
        batch_sizes: (T,) integers, never increasing, a list or a NumPy array. Then x, y, states, scalars and
            reset are packed rows (sum, ·), as in ``torch.nn.utils.rnn.PackedSequence``. Not together with
            ``lengths``.
        reverse: Run from the last step of each row to step 0.
        return_states: Also return the states of every step. Past the end of a row the last state is repeated.
        detach_every: Truncate backpropagation: after every ``detach_every`` steps, counted in the direction
            of the run, the state is passed on and the gradient stops. Initial and final states are not cut
            off.
        regularization: ``Regularization(recurrent_dropout, zoneout_h, zoneout_c, seed)``: recurrent dropout
            (Gal and Ghahramani 2016) and zoneout (Krueger et al. 2016). The same seed gives the same masks.
            Seed None is for evaluation.
        scalars: For a cell with row scalars (``def gru_d(p, x, h, *, dt)``), the row scalars by name,
            ``{"dt": dt}``, each (T, B), of x's dtype. ``dt[t]`` belongs to step t in both directions.
        save: What the tape keeps: "all"; "boundary_states" for only the states at chunk boundaries, so that
            backward runs forward again (recompute); or None for no tape.
        backend: "cpu", "numba", "reference", "cuda", or None: "cuda" for CuPy arrays, for others see
            ``fusedrnn.backends.get``.

    Returns:
        y (T, B, P); stateT like state0; states, each (T, B, ·), or None; tape for ``backward``, or None. The
        tape does not copy x, the weights and y: do not change them before ``backward``.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it, what it got and what was expected.
        RuntimeError: The backend cannot run here.
    """
    if isinstance(weights, Packed):
        chosen = weights.backend
        if backend is not None and backend != chosen.name:
            raise ValueError(f"backend: expected {chosen.name!r}, which packed the weights, got {backend!r}")
        if cell is not weights.cell and cell != weights.cell:
            raise ValueError(
                f"cell: expected {weights.cell!r}, for which the weights were packed, got {cell!r}"
            )
        weights = weights.weights
    else:
        chosen = _chosen(backend, x)
    ragged = None
    if batch_sizes is not None:
        if lengths is not None:
            raise ValueError("lengths: expected None together with batch_sizes, got both")
        ragged = Ragged.of(batch_sizes)
        x = ragged.pad("x", x)
        reset = None if reset is None else ragged.pad("reset", listed("reset", reset), rank=1)
        scalars = {
            n: ragged.pad(n, s, rank=1) for n, s in check_scalar_names(check_cell(cell), scalars).items()
        }
        lengths = cuda.get_array_module(x).asarray(ragged.lengths)
    out = chosen.forward(
        cell,
        x,
        weights,
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
    y, stateT, states, tape = out
    if ragged:
        y = ragged.rows(y)
        states = None if states is None else tuple(ragged.rows(s) for s in states)
    elif tape is None:
        return out  # unchanged
    return Forward(y, stateT, states, None if tape is None else Tape(chosen, tape, ragged))


def backward(
    tape: Tape,
    dy: Array | None = None,
    dstateT: tuple[Array | None, ...] | None = None,
    dstates: tuple[Array | None, ...] | None = None,
    *,
    need: Collection[str] | None = None,
) -> Gradients:
    """Gradients of ``sum(y*dy) + sum(stateT*dstateT) + sum(states*dstates)`` by backpropagation.

    You may call it twice with one tape. Both calls return the same bits.

    Args:
        tape: From ``forward``.
        dy: Like y, or None. It is not read at padding.
        dstateT: One entry per state, like stateT or None each, or None.
        dstates: One entry per state, like states or None each, or None; only after ``return_states=True``.
        need: The gradients to compute: "x", "state0", names of weights and scalars. None: all.

    Returns:
        dx like x, +0 at padding; dweights, by name, like the weights that were passed; dstate0 like state0;
        dscalars, by name, like scalars, +0 at padding. Gradients that are not in ``need`` are None.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it, what it got and what was expected.
    """
    if not isinstance(tape, Tape):
        hint = " (forward with save=None keeps none)" if tape is None else ""
        raise TypeError(f"tape: expected the tape that forward returned, got {type(tape).__name__}{hint}")
    ragged = tape.ragged
    if ragged:
        dy = None if dy is None else ragged.pad("dy", dy)
        if dstates is not None:
            dstates = tuple(None if d is None else ragged.pad("dstates", d) for d in dstates)
    found = tape.backend.backward(tape.tape, dy, dstateT, dstates, need=need)
    if not ragged:
        return found
    dx, dweights, dstate0, dscalars = found
    rows = {name: None if d is None else ragged.rows(d) for name, d in dscalars.items()}
    return Gradients(None if dx is None else ragged.rows(dx), dweights, dstate0, rows)
