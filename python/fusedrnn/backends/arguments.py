"""The one check of arguments, for every backend: what a kernel gets is what it may rely on.

Every wrong argument is a TypeError (wrong kind of thing, wrong dtype) or a ValueError (wrong shape or value)
that names the argument, what it got and what was expected. Arrays come out aligned and C-contiguous (``x``
only along its last axis: any strides over T and B, in whole elements), and are copied only where needed. They
are NumPy's, or of the kind that a backend says; ``lengths`` and ``reset`` may always be lists or NumPy's.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fusedrnn.backends.protocol import Array, Regularization, State
from fusedrnn.cells import Cell

# What compiled backends take.
FLOATS: tuple[np.dtype[Any], ...] = np.dtype(np.float32), np.dtype(np.float64)
NEEDS_BFLOAT16 = (
    "; bfloat16 needs the cpu backend, a processor with AVX512-BF16, and lstm, gru or rnn (with layer_norm "
    "neither project nor reset_after=False)"
)


def bfloat16() -> tuple[np.dtype[Any], ...]:
    """The dtype of the package ml_dtypes, if something has imported it; else nothing can have it."""
    found = getattr(sys.modules.get("ml_dtypes"), "bfloat16", None)
    return () if found is None else (np.dtype(found),)


def is_real(dtype: np.dtype[Any]) -> bool:
    """Whether its values are real numbers, or booleans; for NumPy, those of bfloat16 are bytes."""
    return dtype.kind in "fiub" or dtype in bfloat16()


class Kind(NamedTuple):
    """The arrays that a backend takes."""

    words: str
    is_array: Callable[[Any], bool]
    plain: Callable[[Any], Array]  # the array without a subclass
    copy: Callable[[Any], Array]  # a C-contiguous one
    put: Callable[[Any], Array]  # one of these from a NumPy array


NUMPY = Kind(
    "a NumPy array",
    lambda a: isinstance(a, np.ndarray) and not isinstance(a, np.ma.MaskedArray),
    np.asarray,
    lambda a: np.array(a, order="C", subok=False),
    np.asarray,
)


class Sizes(NamedTuple):
    """The sizes of one call; see the legend in ``protocol``."""

    T: int
    B: int
    I: int
    H: int
    P: int


class ForwardArguments(NamedTuple):
    """Checked arguments of ``forward``."""

    cell: Cell
    x: Array  # (T, B, I)
    weights: dict[str, Array]  # C-contiguous, dtype of x; those that there are, in the cell's order
    state0: State | None
    lengths: Array | None  # (B,) int64, a copy
    reset: Array | None  # (T, B) bool, a copy
    reverse: bool
    return_states: bool
    detach_every: int | None
    regularization: Regularization | None  # None: there is nothing to do
    save: str | None
    sizes: Sizes
    scalars: dict[str, Array]  # (T, B) each


class BackwardArguments(NamedTuple):
    """Checked arguments of ``backward``; tuples have an entry per state, or are None if all are."""

    dy: Array | None
    dstateT: tuple[Array | None, ...] | None
    dstates: tuple[Array | None, ...] | None
    need: frozenset[str]  # without what the weights lack


def check_cell(cell: Any) -> Cell:
    """The cell itself, or a TypeError."""
    if not isinstance(cell, Cell):
        raise TypeError(
            "cell: expected a cell, such as fusedrnn.cells.lstm or a function under @fusedrnn.cells.cell, "
            f"got {_kind(cell)}"
        )
    return cell


def check_scalar_names(cell: Cell, value: Any) -> Mapping[str, Any]:
    """The row scalars by name, exactly those of the cell; None for none."""
    value = {} if value is None else value
    if not isinstance(value, Mapping):
        raise TypeError(f"scalars: expected a mapping of names to arrays, got {_kind(value)}")
    for name in value:
        if name not in cell.scalars:
            names = "names out of " + ", ".join(cell.scalars) if cell.scalars else "none"
            raise ValueError(f"scalars: expected {names} for {cell!r}, got {name}")
    for name in cell.scalars:
        if value.get(name) is None:
            raise ValueError(f"scalars: expected {name} of shape (T, B) for {cell!r}, got none")
    return value


def check_scalars(
    cell: Cell, value: Any, dtype: np.dtype[Any], T: int, B: int, kind: Kind = NUMPY
) -> dict[str, Array]:
    """The row scalars by name in the cell's order, each (T, B), C-contiguous."""
    given = check_scalar_names(cell, value)
    return {name: _checked(name, given[name], dtype, (T, B), kind) for name in cell.scalars}


def check_weights(
    cell: Cell, weights: Any, dtypes: Collection[np.dtype[Any]] = FLOATS, kind: Kind = NUMPY
) -> tuple[dict[str, Array], int, int, int]:
    """The checked weights that there are, in the cell's order, with their I, H and P."""
    blocks = check_cell(cell).blocks
    if not isinstance(weights, Mapping):
        raise TypeError(
            "weights: expected a mapping of names to arrays (or what pack of this backend returned), got "
            f"{_kind(weights)}"
        )
    for name, value in weights.items():
        if value is not None and name not in blocks:
            raise ValueError(f"weights: expected names out of {', '.join(blocks)} for {cell!r}, got {name}")
    gates = blocks["weight_ih"]
    first = weights.get("weight_ih")
    if first is None:
        raise ValueError(f"weights: expected weight_ih of shape ({gates}*H, I) for {cell!r}, got none")
    _array("weight_ih", first, kind)
    dtype = first.dtype
    if dtype not in dtypes:
        hint = NEEDS_BFLOAT16 if kind is NUMPY and dtype in bfloat16() else ""
        raise TypeError(f"weight_ih: expected dtype {' or '.join(map(str, dtypes))}, got {dtype}{hint}")
    hidden = getattr(weights.get("weight_hh"), "shape", None)
    if first.ndim == 2 and hidden == (first.shape[1], first.shape[1] // gates) and len(first) != hidden[0]:
        check_shape("weight_ih", first.shape, first.shape[::-1])
    if first.ndim != 2 or not first.size or len(first) % gates:
        raise ValueError(
            f"weight_ih: expected shape ({gates}*H, I) for the cell {cell.name}, H and I at least 1, got "
            f"{first.shape}"
        )
    H, I = len(first) // gates, first.shape[1]
    P = _projected_size(weights.get("weight_hr"), H, kind) if cell.projects else H
    checked: dict[str, Array] = {}
    for name, shape in cell.shapes(I, H, P).items():
        value = weights.get(name)
        if value is not None:
            checked[name] = _checked(name, value, dtype, shape, kind)
        elif name not in ("bias_ih", "bias_hh"):
            raise ValueError(f"weights: expected {name} of shape {shape} for {cell!r}, got none")
    return checked, I, H, P


def _projected_size(weight_hr: Any, H: int, kind: Kind) -> int:
    """P, by the rows of weight_hr."""
    if weight_hr is None:
        raise ValueError(f"weights: expected weight_hr of shape (P, {H}), P from 1 to {H}, got none")
    _array("weight_hr", weight_hr, kind)
    if weight_hr.ndim != 2 or not 1 <= len(weight_hr) <= H:
        raise ValueError(f"weight_hr: expected shape (P, {H}), P from 1 to {H}, got {weight_hr.shape}")
    return len(weight_hr)


def check_regularization(cell: Cell, value: Any) -> Regularization | None:
    """The regularization in plain numbers, or None where it does nothing."""
    if value is None:
        return None
    if not isinstance(value, Regularization):
        raise TypeError(f"regularization: expected a Regularization or None, got {_kind(value)}")
    dropout, zoneout_h, zoneout_c = (
        check_rate(name, getattr(value, name)) for name in ("recurrent_dropout", "zoneout_h", "zoneout_c")
    )
    for state, rate in (("h", zoneout_h), ("c", zoneout_c)):
        if rate and state not in cell.states:
            raise ValueError(
                f"zoneout_{state}: expected 0 for the cell {cell.name}, which has no {state}, got {rate}"
            )
    if dropout and "weight_hh" not in cell.blocks:
        raise ValueError(
            f"recurrent_dropout: expected 0 for the cell {cell.name}, whose p.dense multiplies x alone, got "
            f"{dropout}"
        )
    seed = None if value.seed is None else check_whole("seed", value.seed, 0, 2**63 - 1)
    stream = check_whole("stream", value.stream, 0, 2**30 - 1)
    if not (zoneout_h or zoneout_c or (dropout and seed is not None)):
        return None
    return Regularization(dropout, zoneout_h, zoneout_c, seed, stream)


def check_number(name: str, value: Any, hint: str = "") -> float:
    """A real number, of Python or NumPy."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{name}: expected a number, got {_kind(value)}{hint}")
    return float(value)


def check_rate(name: str, value: Any, below_one: bool = False) -> float:
    """A number from 0 to 1."""
    rate = check_number(name, value)
    if not 0 <= rate <= 1 or (below_one and rate == 1):
        limits = "at least 0 and below 1" if below_one else "a number from 0 to 1"
        raise ValueError(f"{name}: expected {limits}, got {value}")
    return rate


def check_dropout(value: Any, num_layers: int, stacklevel: int, below_one: bool = False) -> float:
    """A rate of dropout between layers; with one layer it warns, with the level of ``warnings.warn``."""
    rate = check_rate("dropout", value, below_one)
    if rate and num_layers == 1:
        warnings.warn(
            f"dropout: expected 0 with num_layers=1, got {value}; it acts only between layers",
            stacklevel=stacklevel,
        )
    return rate


def check_whole(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """A whole number of at least ``least``: sizes and counts."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}: expected a whole number, got {_kind(value)}")
    if value < least or (most is not None and value > most):
        limits = f"at least {least}" if most is None else f"{least} to {most}"
        raise ValueError(f"{name}: expected {limits}, got {value}")
    return int(value)


def check_bool(name: str, value: Any, hint: str = "") -> bool:
    """True or False, of Python or NumPy."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: expected True or False, got {_kind(value)}{hint}")
    return bool(value)


def check_bools(**values: Any) -> dict[str, bool]:
    """The same of several, by name."""
    return {name: check_bool(name, value) for name, value in values.items()}


def check_sized(name: str, value: Any) -> int:
    """Its length, if it has one."""
    try:
        return len(value)
    except TypeError as error:
        raise TypeError(f"{name}: expected something with a length, got {_kind(value)}") from error


def check_proj_size(cell: Cell, value: Any, H: int) -> int:
    """P, 1 to H, of a cell that projects; else 0."""
    size = check_whole("proj_size", value, 0)
    if cell.projects and not 1 <= size <= H:
        raise ValueError(f"proj_size: expected 1 to {H}, as {cell!r} projects (p.project), got {size}")
    if size and not cell.projects:
        raise ValueError(f"proj_size: expected 0, as {cell!r} does not project (p.project), got {size}")
    return size


def check_shape(name: str, got: Any, expected: tuple[int, ...], hint: str = "") -> None:
    """A ValueError unless the shape, of an array or a tensor, is the expected one."""
    if tuple(got) != expected:
        if not hint and len(expected) == 2 and tuple(got) == expected[::-1]:
            hint = "transpose it"
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(got)}{f'; {hint}' if hint else ''}")


def listed(name: str, value: Any) -> Any:
    """A list or tuple of numbers as a NumPy array; anything else as it is."""
    if not isinstance(value, list | tuple):
        return value
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{name}: expected numbers in rows of the same length, got others") from error
    return array if array.size else array.astype(np.int64)  # an empty list has no dtype of its own


def check_lengths(value: Any, T: int, B: int, kind: Kind = NUMPY) -> Array:
    """``lengths`` as (B,) int64, a copy: of a list, or of an array of any integer dtype."""
    value = listed("lengths", value)
    _array("lengths", value, NUMPY if isinstance(value, np.ndarray) else kind, "a list or ")
    if value.dtype.kind not in "iu":
        raise TypeError(f"lengths: expected whole numbers, got {value.dtype}; convert them to integers")
    check_shape("lengths", value.shape, (B,))
    if B and (int(value.min()) < 0 or int(value.max()) > T):
        raise ValueError(
            f"lengths: expected 0 to T = {T}, got {value.min()} to {value.max()}; a length is the "
            "number of a row's steps that are not padding"
        )
    return value.astype(np.int64)


def check_reset(value: Any, T: int, B: int, kind: Kind = NUMPY) -> Array:
    """``reset`` as (T, B) bool of the kind, a copy: of lists, or of an array of booleans or 0 and 1."""
    value = listed("reset", value)
    _array("reset", value, NUMPY if NUMPY.is_array(value) else kind, "lists or ")
    check_shape("reset", value.shape, (T, B))
    if value.dtype != np.bool_:
        if value.dtype.kind not in "iuf":
            raise TypeError(f"reset: expected booleans, or 0 and 1, got {value.dtype}")
        value = booleans("reset", value)
    return kind.copy(value if kind.is_array(value) else kind.put(value))


def booleans(name: str, value: Any) -> Any:
    """An array or tensor of numbers, 0 and 1 alone, as booleans."""
    wrong = (value != 0) & (value != 1)
    if bool(wrong.any()):
        first = value[wrong].reshape(-1)[0].item()
        raise ValueError(
            f"{name}: expected booleans, or 0 and 1, got {first} among them; convert it, for example "
            f"with np.asarray({name}) != 0"
        )
    return value == 1


def check_batch_sizes(value: Any, rows: int | None = None) -> list[int]:
    """``batch_sizes``: how many sequences run at each step, never more than before; ``rows`` is their sum."""
    value = listed("batch_sizes", value)
    _array("batch_sizes", value, NUMPY, "a list or ")
    if value.dtype.kind not in "iu":
        raise TypeError(f"batch_sizes: expected whole numbers, got {value.dtype}")
    if value.ndim != 1:
        raise ValueError(f"batch_sizes: expected shape (T,), got {value.shape}")
    sizes: list[int] = value.tolist()
    if sizes and (min(sizes) < 1 or sizes != sorted(sizes, reverse=True)):
        raise ValueError(f"batch_sizes: expected numbers of at least 1 that never increase, got {sizes}")
    if rows is not None and sum(sizes) != rows:
        raise ValueError(f"batch_sizes: expected numbers with the sum {rows}, one for each row, got {sizes}")
    return sizes


def check_forward(
    cell: Cell,
    x: Any,
    weights: Any,
    state0: Any = None,
    *,
    lengths: Any = None,
    reset: Any = None,
    reverse: Any = False,
    return_states: Any = False,
    detach_every: Any = None,
    regularization: Any = None,
    scalars: Any = None,
    save: Any = "all",
    dtypes: Collection[np.dtype[Any]] = FLOATS,
    kind: Kind = NUMPY,
) -> ForwardArguments:
    """Check and normalise the arguments of ``forward``; ``dtypes`` and ``kind``: what the backend takes."""
    weights, I, H, P = check_weights(cell, weights, dtypes, kind)
    dtype = weights["weight_ih"].dtype
    x = _sequence(x, dtype, I, kind)
    T, B, _ = x.shape
    state0 = _states("state0", cell, state0, dtype, [(B, width) for width in cell.widths(H, P)], kind)
    lengths = None if lengths is None else check_lengths(lengths, T, B, kind)
    reset = None if reset is None else check_reset(reset, T, B, kind)
    reverse, return_states = check_bool("reverse", reverse), check_bool("return_states", return_states)
    detach_every = None if detach_every is None else check_whole("detach_every", detach_every)
    if save is not None and not isinstance(save, str):
        raise TypeError(f'save: expected "all", "boundary_states" or None, got {_kind(save)}')
    if save not in ("all", "boundary_states", None):
        raise ValueError(f'save: expected "all", "boundary_states" or None, got {save!r}')
    return ForwardArguments(
        cell,
        x,
        weights,
        state0,
        lengths,
        reset,
        reverse,
        return_states,
        detach_every,
        check_regularization(cell, regularization),
        save,
        Sizes(T, B, I, H, P),
        check_scalars(cell, scalars, dtype, T, B, kind),
    )


def check_backward(
    cell: Cell,
    weights: Mapping[str, Array],
    sizes: Sizes,
    dy: Any = None,
    dstateT: Any = None,
    dstates: Any = None,
    *,
    need: Any = None,
    return_states: bool,
    kind: Kind = NUMPY,
) -> BackwardArguments:
    """Check and normalise the arguments of ``backward`` against what ``forward`` saw.

    Args:
        cell: The cell of the forward call.
        weights: Its checked weights; the upstream gradients must have their dtype.
        sizes: Its sizes.
        dy: (T, B, P) or None.
        dstateT: One entry per state, (B, ·) or None each, or None.
        dstates: One entry per state, (T, B, ·) or None each, or None; only after return_states.
        need: "x", names of weights and row scalars, "state0"; or None for all.
        return_states: What the forward call was given.
        kind: The arrays that the backend takes.
    """
    T, B, _, H, P = sizes
    dtype = weights["weight_ih"].dtype
    if dy is not None:
        dy = _checked("dy", dy, dtype, (T, B, P), kind)
    widths = cell.widths(H, P)
    dstateT = _states("dstateT", cell, dstateT, dtype, [(B, width) for width in widths], kind)
    dstates = _states("dstates", cell, dstates, dtype, [(T, B, width) for width in widths], kind)
    dstateT, dstates = (None if d is None or all(e is None for e in d) else d for d in (dstateT, dstates))
    if dstates is not None and not return_states:
        raise ValueError(
            "dstates: expected None, because forward ran without return_states=True; got gradients"
        )
    return BackwardArguments(dy, dstateT, dstates, check_need(cell, need, weights))


def check_need(cell: Cell, need: Any, weights: Collection[str] | None = None) -> frozenset[str]:
    """The names wanted, None means all; without those of weights that there are not."""
    known = ("x", *cell.blocks, *cell.scalars, "state0")
    if need is None:
        need = known
    if isinstance(need, str) or not isinstance(need, Collection):
        raise TypeError(
            f"need: expected None or a collection of names out of {', '.join(known)}, got {_kind(need)}"
        )
    for name in need:
        if name not in known:
            raise ValueError(f"need: expected names out of {', '.join(known)}, got {name!r}")
    return frozenset(need) - ((cell.blocks.keys() - weights) if weights is not None else set())


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _array(name: str, value: Any, kind: Kind, more: str = "") -> None:
    if not kind.is_array(value):
        raise TypeError(f"{name}: expected {more}{kind.words}, got {_kind(value)}")
    if not value.dtype.isnative:
        raise TypeError(f"{name}: expected native byte order, got dtype {value.dtype.str}")


def _aligned(value: Array) -> bool:
    return getattr(value.flags, "aligned", True)  # CuPy's always are


def _checked(name: str, value: Any, dtype: np.dtype[Any], shape: tuple[int, ...], kind: Kind) -> Array:
    """The array, C-contiguous and aligned."""
    _array(name, value, kind)
    if value.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype} (that of weight_ih), got {value.dtype}")
    check_shape(name, value.shape, shape)
    return (kind.plain if value.flags.c_contiguous and _aligned(value) else kind.copy)(value)


def _states(
    name: str, cell: Cell, value: Any, dtype: np.dtype[Any], shapes: Sequence[tuple[int, ...]], kind: Kind
) -> Any:
    """The checked entries of a state, or of gradients of states, of which each may be None; or None."""
    if value is None:
        return None
    given = zip(cell.states, entries(name, cell, value), shapes, strict=True)
    return tuple(
        None if a is None and name != "state0" else _checked(f"{name} {state}", a, dtype, shape, kind)
        for state, a, shape in given
    )


def _sequence(x: Any, dtype: np.dtype[Any], I: int, kind: Kind) -> Array:
    """x with any strides over T and B, in whole elements."""
    _array("x", x, kind)
    if x.dtype != dtype:
        raise TypeError(f"x: expected dtype {dtype} (that of weight_ih), got {x.dtype}")
    if x.ndim != 3 or x.shape[2] != I:
        raise ValueError(f"x: expected shape (T, B, {I}), got {x.shape}")
    size = x.itemsize
    whole = _aligned(x) and all(stride % size == 0 for stride in x.strides)
    return (kind.plain if whole and (x.strides[2] == size or I == 1) else kind.copy)(x)


def entries(name: str, cell: Cell, value: Any) -> Sequence[Any]:
    """The entries of a state-like tuple, one per state of the cell."""
    expected = f"a tuple ({', '.join(cell.states)}{',' if len(cell.states) == 1 else ''})"
    if not isinstance(value, tuple | list):
        raise TypeError(f"{name}: expected {expected} for {cell.name}, got {_kind(value)}")
    if len(value) != len(cell.states):
        raise ValueError(
            f"{name}: expected {expected} for the cell {cell.name}, got one of length {len(value)}"
        )
    return value
