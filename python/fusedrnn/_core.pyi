from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy.typing as npt

_Array = npt.NDArray[Any]
_Regularization = tuple[float, float, float, int | None, int]  # fusedrnn.backends.protocol.Regularization

CELLS: tuple[str, ...]
MACHINE_OPERATIONS: tuple[str, ...]
MACHINE_LIMITS: dict[str, int]

class RefusedType(TypeError): ...
class RefusedValue(ValueError): ...

class Cell:  # compiled, or a program
    def __init__(self, id: int) -> None: ...

class Packed: ...

class Tape:
    @property
    def bytes(self) -> int: ...
    @property
    def sizes(self) -> tuple[int, int, int, int, int]: ...  # T, B, I, H, P

def machine_plan(numbers: _Array, start: list[float], constants: list[float]) -> Cell: ...

# Weights are in this order: weight_ih, weight_hh, bias_ih, bias_hh, the cell's vectors, weight_hr of a cell
# that projects; None where there is none. With ``bfloat16``, all arrays of this and of calls with it are
# int16, the bits of bfloat16.
def pack(cell: Cell, weights: tuple[_Array | None, ...], bfloat16: bool = False) -> Packed: ...
def forward(
    packed: Packed,
    cell: Cell | None,  # None: that of ``packed``; of a program whose call is regularized, another one
    x: _Array,
    state0: tuple[_Array, ...],
    scalars: tuple[_Array, ...],
    lengths: Any,  # None, or int64, else refused
    reset: Any,  # None, or bool, else refused
    reverse: bool,
    detach_every: int,
    regularization: _Regularization | None,
    return_states: bool,
    save: int,
) -> tuple[_Array, tuple[_Array, ...], tuple[_Array, ...] | None, Tape | None]: ...
def backward(
    tape: Tape,
    dy: _Array | None,
    dstateT: tuple[_Array | None, ...],
    dstates: tuple[_Array | None, ...],
    need: Sequence[bool],  # of x, each weight, state0, each row scalar
) -> tuple[_Array | None, list[_Array | None], tuple[_Array, ...] | None, list[_Array | None]]: ...

# Arrays here are NumPy's, or tensors once take_tensors knows their types. Those from ``y`` to ``tape``, and
# those from ``dx`` on, are written to; None for what is not wanted.
def run_forward(
    cell: Cell,
    weights: Packed | tuple[Any, ...],
    x: Any,  # (T, B, I), or one step, (B, I)
    state0: tuple[Any, ...],
    scalars: tuple[Any, ...],
    lengths: Any,
    reset: Any,
    reverse: bool,
    detach_every: int,
    regularization: _Regularization | None,
    recompute: bool,
    y: Any,  # of one step None: it is the first of stateT
    stateT: Sequence[Any],
    states: Sequence[Any],
    tape: Any,  # of tape_shape, or None: nothing is saved
    bfloat16: bool = False,  # then all arrays but the tape are int16, the bits of bfloat16
) -> None: ...
def run_backward(
    cell: Cell,
    weights: tuple[Any, ...],
    x: Any,
    state0: tuple[Any, ...],
    scalars: tuple[Any, ...],
    lengths: Any,
    reset: Any,
    reverse: bool,
    detach_every: int,
    regularization: _Regularization | None,
    recompute: bool,
    y: Any,
    tape: Any,
    dy: Any,
    dstateT: tuple[Any, ...],
    dstates: tuple[Any, ...],
    dx: Any,
    dweights: Sequence[Any],
    dstate0: Sequence[Any],
    dscalars: Sequence[Any],
    bfloat16: bool = False,
) -> None: ...
def tape_shape(
    cell: Cell,
    T: int,
    B: int,
    I: int,
    H: int,
    P: int,
    recompute: bool,
    regularized: bool,
    float64: bool,
    bfloat16: bool = False,
) -> tuple[int, int]: ...
def empty(rows: int, width: int, float64: bool) -> _Array: ...
def take_tensors(tensor: type, parameter: type, api: Any) -> None: ...
def has_bfloat16() -> bool: ...
def cell_layout(
    cell: Cell, regularized: bool
) -> tuple[str, int, int, bool, list[tuple[int, list[int]]], bool]: ...
def info() -> dict[str, Any]: ...
def num_threads() -> int: ...
def set_num_threads(threads: int) -> None: ...
def thread_pool() -> str: ...
def set_thread_pool(openmp: bool) -> None: ...
def set_flush_subnormals(on: bool) -> None: ...

testing: ModuleType  # hooks of the test suite and of benchmarks: src/module.cpp
