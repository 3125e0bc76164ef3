"""What a backend is: the types of its arguments and results, and the rules that every backend follows.

``T`` is the number of time steps, ``B`` the batch size, ``I`` the input size, ``H`` the hidden size, ``P``
the projected size (``H`` for cells without a projection), ``G`` the number of gates. Sequences are ``(T, B,
...)``. The order of the gates is ``i f g o`` for the LSTM and ``r z n`` for the GRU.

A backend runs one layer in one direction. ``fusedrnn.multilayer`` runs several.

Rules (``t`` is a step, ``b`` a row of the batch):

- ``t >= lengths[b]``: the state of row b does not change, ``y`` is 0, ``dx`` is +0, upstream gradients are
  not read, and the states of every step repeat the last one. A row of length 0 returns its initial state, and
  the gradient of its final state is that of its initial state.
- ``reset[t, b]``: the cut is between t-1 and t in both directions: forward clears the state before t, reverse
  clears it after t and before t-1. Resets past the length of a row do nothing. No gradient passes a cut.
- ``detach_every``: after every n steps, counted in the order in which they run, the state is passed on and
  the gradient stops. The initial and the final state are not cut off.
- ``regularization``: recurrent dropout and zoneout; see ``Regularization``. Past the length of a row there is
  no zoneout. After a cut, the previous state is zero, for zoneout too.
- ``scalars``: number (t, b) belongs to step t of row b in both directions.
- ``reverse``: from step ``lengths[b] - 1`` to step 0; ``stateT`` is the state after step 0.
- Padding and resets select values; they do not multiply by a mask.
- ``T = 0`` and ``B = 0`` are allowed.
- Inputs are never written to. ``backward`` may run twice with one tape and gives the same bits.
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
    """The backend or kernel does not support the call; another one does."""


class Regularization(NamedTuple):
    """Recurrent dropout and zoneout of one layer and direction. Rates are probabilities, from 0 to 1.

    Recurrent dropout (Gal and Ghahramani 2016): what weight_hh multiplies is first multiplied by a mask
    (B, P), the same at every step: 0 with this rate, else 1 / (1 - rate). Zoneout (Krueger et al. 2016): a
    unit keeps its previous h or c with this rate, drawn for each step, row and unit. In evaluation nothing is
    dropped, and zoneout uses the expectation, rate * previous + (1 - rate) * new. ``fusedrnn.masks`` computes
    the masks from the seed.

    ``zoneout_c`` must be 0 for cells without c, and ``recurrent_dropout`` for cells without ``weight_hh``.
    ``seed`` is an integer from 0 to 2**63 - 1, or None in evaluation. ``stream`` is layer * D + direction,
    below 2**30: their masks differ.
    """

    recurrent_dropout: float = 0.0
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    seed: int | None = None
    stream: int = 0


class Forward(NamedTuple):
    """Result of ``forward``.

    ``y`` is (T, B, P). ``stateT`` is a tuple of the states after the last step, like ``state0``. ``states``
    has those of every step, each (T, B, ·), or is None without ``return_states``. ``tape`` is what
    ``backward`` takes, or None with ``save=None``.
    """

    y: Array
    stateT: State
    states: State | None
    tape: Any


class Gradients(NamedTuple):
    """Result of ``backward``; what ``need`` left out is None.

    ``dx`` is (T, B, I). ``dweights`` has by name the gradient of each weight that was given. ``dstate0`` is
    like ``state0``. ``dscalars`` has by name the gradient of each row scalar, (T, B).
    """

    dx: Array | None
    dweights: dict[str, Any]
    dstate0: State | None
    dscalars: dict[str, Any]


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
