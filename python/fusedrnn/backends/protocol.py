"""What a backend is: the words, the argument and result types, and the rules every backend keeps.

Legend: ``T`` time steps, ``B`` batch, ``I`` input size, ``H`` hidden size, ``P`` projected size (``H`` for
cells that project nothing), ``G`` gates. Sequences are ``(T, B, ...)``. Gates in memory order: LSTM
``i f g o``, GRU ``r z n``.

A backend serves one layer in one direction. Layers, directions and dropout between them are composed above.

Rules (``t`` is time, ``b`` a row of the batch):

- ``t >= lengths[b]``: the state of row b stands still, ``y`` is 0, ``dx`` is +0, upstream gradients there are
  never read, all-step states are held. Length 0 returns the initial state and passes its gradient through.
- ``reset[t, b]``: the cut is between t-1 and t in time, in both directions: forward clears the state before
  t, reverse clears it after t and before t-1. Resets beyond a row's length do nothing. No gradient passes a
  cut.
- ``detach_every``: n: the state goes from step k*n - 1 to step k*n, counted in the order of the run, and no
  gradient comes back; the initial and the final state are not cut off.
- ``regularization``: recurrent dropout and zoneout; see ``Regularization``. Steps beyond a row's length and
  cuts come first: a state that stands still is not zoned, and after a cut the state before is zero.
- ``scalars``: number (t, b) belongs to step t of row b in both directions.
- ``reverse``: from ``lengths[b] - 1`` down to 0; ``stateT`` is then the state after step 0.
- Padding and resets act by selection, never by multiplication.
- ``T = 0`` and ``B = 0`` are legal.
- Inputs are never written to. ``backward`` may run twice on one tape and gives the same bits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, TypedDict, Unpack

import numpy.typing as npt

from fusedrnn.cells import Cell

Array = npt.NDArray[Any]
Rows = Array | Sequence[Any]  # lengths (B,) and resets (T, B), as lists too
State = tuple[Array, ...]  # (h,) for RNN and GRU, (h, c) for LSTM; the first is (B, P), others (B, H)
# Of one layer and direction by name, laid out as in PyTorch: weight_ih (G*H, I), weight_hh (G*H, P), bias_ih
# and bias_hh (G*H,), which may be missing; of a cell that projects weight_hr (P, H), 1 <= P <= H; the cell's
# other parameters (n*H,). Gradients have the same names.
Weights: TypeAlias = Mapping[str, Any]
# Of a cell with row scalars (``cell.scalars``) by name, each (T, B): one number for each row and step.
Scalars: TypeAlias = Mapping[str, Any]


SAVE = {None: 0, "all": 1, "boundary_states": 2}  # what forward keeps: the ids that the compiled module takes


class Unsupported(ValueError):
    """The backend or the kernel does not support this; another one does."""


class Regularization(NamedTuple):
    """Recurrent dropout and zoneout of one layer and direction. Rates are probabilities, from 0 to 1.

    Recurrent dropout (Gal and Ghahramani 2016): what weight_hh multiplies is first multiplied with a mask
    (B, P), the same at every step: 0 with this rate, else 1 / (1 - rate). Zoneout (Krueger et al. 2016): the
    cell's new h and c are candidates; a unit keeps its state of before the step with this rate, drawn anew
    for each step, row and unit. In evaluation nothing is dropped, and zoneout is its expectation, rate *
    before + (1 - rate) * candidate. How masks follow from the seed: ``fusedrnn.masks``.

    ``zoneout_c`` is 0 for cells without c, ``recurrent_dropout`` for cells without ``weight_hh``. ``seed`` is
    a whole number from 0 to 2**63 - 1, or None in evaluation. ``stream`` is layer * D + direction.
    """

    recurrent_dropout: float = 0.0  # 0 for cells without weight_hh
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0  # 0 for cells without c
    seed: int | None = None  # of the masks, 0 <= seed < 2**63; None: evaluation
    stream: int = 0  # layer * D + direction, 0 <= stream < 2**30: their masks differ


class Forward(NamedTuple):
    """Result of ``forward``.

    ``y`` is (T, B, P). ``stateT`` is a tuple of the states after the last step, like ``state0``. ``states``
    has those of every step, each (T, B, ·), or is None without ``return_states``. ``tape`` is what
    ``backward`` takes, or None with ``save=None``.
    """

    y: Array  # (T, B, P)
    stateT: State
    states: State | None  # every step's (h,) or (h, c), each (T, B, ·), with return_states
    tape: Any  # what backward takes; None with save=None


class Gradients(NamedTuple):
    """Result of ``backward``; what ``need`` left out is None.

    ``dx`` is (T, B, I). ``dweights`` has by name the gradient of each weight that was given. ``dstate0`` is
    like ``state0``. ``dscalars`` has by name the gradient of each row scalar, (T, B).
    """

    dx: Array | None  # (T, B, I)
    dweights: dict[str, Any]  # of each weight that was given
    dstate0: State | None
    dscalars: dict[str, Any]  # of each row scalar (T, B), {} for cells without


class Options(TypedDict, total=False):
    """The keyword arguments of ``forward``. Those that are missing are None or False; ``save`` is "all"."""

    lengths: Rows | None
    reset: Rows | None
    reverse: bool
    return_states: bool
    detach_every: int | None
    regularization: Regularization | None
    scalars: Scalars | None
    save: str | None  # "all" | "boundary_states" | None


class Backend(Protocol):
    """One backend: ``reference``, ``cpu``, ``numba``, ``cuda``."""

    name: str

    def unavailable(self) -> str | None:
        """None where the backend can run here, else one line that says why not and what to install."""

    def pack(self, cell: Cell, weights: Weights) -> Any:
        """Weights prepared for repeated calls, stale as soon as one changes; the caller decides that."""

    def forward(
        self,
        cell: Cell,
        x: Array,
        weights: Any,  # Weights, or what pack returned
        state0: State | None = None,
        **options: Unpack[Options],
    ) -> Forward:
        """Run one layer in one direction over the whole sequence."""

    def backward(
        self,
        tape: Any,
        dy: Array | None = None,
        dstateT: tuple[Array | None, ...] | None = None,
        dstates: tuple[Array | None, ...] | None = None,
        *,
        need: Collection[str] | None = None,  # "x", names of weights and scalars, "state0"; None: all
    ) -> Gradients:
        """Gradients of ``sum(y*dy) + sum(stateT*dstateT) + sum(states*dstates)``; any may be missing."""
