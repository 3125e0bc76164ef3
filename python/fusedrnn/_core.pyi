from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy.typing as npt

_Array = npt.NDArray[Any]
_Regularization = tuple[float, float, float, int | None, int]  # fusedrnn.backends.protocol.Regularization

CELLS: tuple[str, ...]

class RefusedType(TypeError): ...
class RefusedValue(ValueError): ...
class Packed: ...

class Tape:
    @property
    def bytes(self) -> int: ...
    @property
    def sizes(self) -> tuple[int, int, int, int, int]: ...  # T, B, I, H, P

def pack(
    cell: int,
    weight_ih: _Array,
    weight_hh: _Array,
    bias_ih: _Array | None,
    bias_hh: _Array | None,
    gain_ih: _Array | None = None,
    gain_hh: _Array | None = None,
    gain_c: _Array | None = None,
    bias_c: _Array | None = None,
    weight_hr: _Array | None = None,
    *,
    bfloat16: bool = False,  # then all arrays of this and of calls with it are int16, the bits of bfloat16
) -> Packed: ...
def forward(
    packed: Packed,
    x: _Array,
    h0: _Array | None,
    c0: _Array | None,
    lengths: Any,  # None, or int64, else refused
    reset: Any,  # None, or bool, else refused
    reverse: bool,
    return_states: bool,
    save: int,
    detach_every: int = 0,
    regularization: _Regularization | None = None,
) -> tuple[Any, ...]: ...  # y, hT, cT, h_states, c_states, tape; None for what there is not

# Arrays here are NumPy's, or tensors once take_tensors knows their types. Those from ``y`` to ``tape``, and
# ``out`` of run_backward, are written to; None for what is not wanted.
def run_forward(
    cell: int,
    weights: Packed | tuple[Any, ...],  # packed, or in the order of pack
    x: Any,  # (T, B, I), or one step, (B, I)
    h0: Any,
    c0: Any,
    lengths: Any,
    reset: Any,
    reverse: bool,
    recompute: bool,
    detach_every: int,
    regularization: _Regularization | None,
    y: Any,  # of one step None: it is hT
    hT: Any,
    cT: Any,
    h_states: Any,
    c_states: Any,
    tape: Any,  # of tape_shape, or None: nothing is saved
    bfloat16: bool = False,  # then all arrays but the tape are int16, the bits of bfloat16
) -> None: ...
def run_backward(
    cell: int,
    weights: tuple[Any, ...],
    x: Any,
    h0: Any,
    c0: Any,
    lengths: Any,
    reset: Any,
    reverse: bool,
    recompute: bool,
    detach_every: int,
    regularization: _Regularization | None,
    y: Any,
    tape: Any,
    dy: Any,
    dhT: Any,
    dcT: Any,
    dh_states: Any,
    dc_states: Any,
    out: Sequence[Any],  # dx, the dweights, dh0, dc0
    bfloat16: bool = False,
) -> None: ...
def has_bfloat16() -> bool: ...
def cell_layout(
    cell: int, regularized: bool
) -> tuple[str, int, int, bool, list[tuple[int, list[int]]], bool]: ...
def tape_shape(
    cell: int,
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
def backward(
    tape: Tape,
    dy: _Array | None,
    dhT: _Array | None,
    dcT: _Array | None,
    dh_states: _Array | None,
    dc_states: _Array | None,
    need: Sequence[bool],
) -> tuple[Any, ...]: ...  # dx, the dweights, dh0, dc0; None for what was not needed

class MachinePlan:
    def tape_width(self, H: int) -> int: ...

class PackedMachine: ...

class MachineTape:
    @property
    def bytes(self) -> int: ...
    @property
    def sizes(self) -> tuple[int, int, int, int, int]: ...  # T, B, I, H, P

MACHINE_OPERATIONS: tuple[str, ...]
MACHINE_LIMITS: dict[str, int]

def machine_plan(numbers: _Array, start: list[float], constants: list[float]) -> MachinePlan: ...
def machine_pack(plan: MachinePlan, weights: list[_Array | None]) -> PackedMachine: ...
def machine_forward(
    packed: PackedMachine,
    plan: MachinePlan,
    x: _Array,
    state0: Sequence[_Array],
    lengths: Any,  # None, or int64, else refused
    reset: Any,  # None, or bool, else refused
    reverse: bool,
    detach_every: int,
    regularization: _Regularization | None,
    return_states: bool,
    save: int,
    scalars: list[Any],
) -> tuple[_Array, tuple[_Array, ...], tuple[_Array, ...] | None, MachineTape | None]: ...
def machine_backward(
    tape: MachineTape,
    dy: _Array | None,
    dstateT: Sequence[_Array | None],
    dstates: Sequence[_Array | None],
    need: list[bool],
) -> tuple[_Array | None, list[_Array | None], tuple[_Array, ...] | None, list[_Array | None]]: ...
def machine_run_forward(
    packed: PackedMachine,
    plan: MachinePlan,
    x: _Array,
    state0: Sequence[_Array],
    scalars: Sequence[_Array],
    lengths: Any,
    reset: Any,
    reverse: bool,
    detach_every: int,
    regularization: Any,
    y: _Array,
    stateT: Sequence[_Array],
    states: Sequence[_Array],
    tape: _Array | None,
) -> None: ...
def machine_run_backward(
    plan: MachinePlan,
    weights: Sequence[_Array | None],
    x: _Array,
    state0: Sequence[_Array],
    scalars: Sequence[_Array],
    lengths: Any,
    reset: Any,
    reverse: bool,
    detach_every: int,
    regularization: Any,
    y: _Array,
    tape: _Array,
    dy: _Array | None,
    dstateT: Sequence[_Array | None],
    dstates: Sequence[_Array | None],
    dx: _Array | None,
    dweights: Sequence[_Array | None],
    dstate0: Sequence[_Array],
    dscalars: Sequence[_Array | None],
) -> None: ...
def info() -> dict[str, Any]: ...
def num_threads() -> int: ...
def set_num_threads(threads: int) -> None: ...
def thread_pool() -> str: ...
def set_thread_pool(openmp: bool) -> None: ...
def set_flush_subnormals(on: bool) -> None: ...

testing: ModuleType  # hooks of the test suite and of benchmarks: src/module.cpp
