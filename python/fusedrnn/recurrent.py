"""The recurrent layer of any cell.

It is stateful: it keeps ``h`` (and ``c``) from call to call until ``reset_state()``. A call with ``(B,
I)`` is one time step. A call with ``(T, B, I)`` is a whole sequence, which is one node of the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Never

import numpy as np
import numpy.typing as npt

from fusedrnn import backends, cells, cuda, kernels, npz, unfused
from fusedrnn import functions as F
from fusedrnn.autograd import Array, Parameter, Variable, as_variable
from fusedrnn.backends.arguments import (
    check_bool,
    check_cell,
    check_dropout,
    check_proj_size,
    check_regularization,
    check_shape,
    check_whole,
    is_real,
)
from fusedrnn.backends.protocol import Regularization
from fusedrnn.config import config
from fusedrnn.layer import Layer, checked_dtype, drawn

State = tuple[Variable, ...]
CALL = ("state", "lengths", "reset", "return_states", "detach_every")  # the arguments of a call besides x


class Recurrent(Layer):
    """Recurrent layers of any cell; the base class of LSTM, GRU and RNN.

    Args:
        cell: What a step computes, such as ``fusedrnn.cells.lstm`` or a cell of your own.
        hidden_size: The number of units, H.
        in_size: The size of the input, I. None: it is taken from the first call.
        num_layers: The number of stacked layers. The input of each is the h of the layer below.
        bidirectional: True: a second set of weights runs backward in time, and y is ``(T, B, 2*P)``. Such a
            layer takes only whole sequences. It keeps no state between calls, because the reverse direction
            starts at the end of a sequence.
        dropout: The probability of zeros between layers, in training. With one layer, a warning says that it
            has no effect.
        recurrent_dropout: In training, the probability that a unit of what weight_hh multiplies is zeroed.
            There is one mask per call, layer, direction and row, the same at every step (Gal and Ghahramani
            2016). Fused layers only.
        zoneout_h: In training, the probability that a unit of h keeps its value at a step, drawn for each
            step. In evaluation, the weighted mean of the old and the new value is used, with this weight for
            the old one (Krueger et al. 2016). Fused layers only.
        zoneout_c: The same for c, for cells that have it.
        bias: False: no biases. True: one bias per gate, ``bias_ih``; a GRU with ``reset_after`` also has
            ``bias_hh``.
        dtype: float32, float64, or in a fused layer bfloat16 of ml_dtypes. Inputs are cast to it.
        fused: True: a call is one node, run by a kernel. False: each operation is a node, to read and to
            compare with.
        backend: The name of a backend. None: the first that is available. Fused layers only.
        recompute: Keep few states for backward and run forward again there, to save memory. Fused layers
            only.
        proj_size: P, from 1 to H, for a cell that projects its first state (``p.project``); else 0.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.

    Parameters: those of the cell, ``cell.blocks``: ``weight_ih`` (G*H, I), ``weight_hh`` (G*H, P), where P is
    H without a projection, ``bias_ih`` and ``bias_hh`` (G*H,), ``weight_hr`` (P, H), all others (H,) or a
    multiple of H. With several layers or directions their names end in ``_l0``, ``_l1_reverse`` and so on, as
    in PyTorch.

    The initial matrix of each gate is ``randn(I, H) * sqrt(1 / I)``, stored transposed. Biases start at zero,
    gains at one, and other vectors at the initial values that the cell defines. Values are drawn from NumPy's
    global generator, layer by layer: first the input matrices, then the hidden ones. Matrices whose size is
    not known are drawn at the first call.
    """

    draws: ClassVar[tuple[int, ...] | None] = None  # the gates in drawing order; None: in their own
    dezero_names: ClassVar[tuple[str, ...]] = ()  # its names of the gates, in memory order
    draws_hidden_late = False

    h: Variable | None = None
    c: Variable | None = None

    def __init__(
        self,
        cell: cells.Cell,
        hidden_size: int,
        in_size: int | None = None,
        *,
        num_layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        zoneout_h: float = 0.0,
        zoneout_c: float = 0.0,
        bias: bool = True,
        dtype: npt.DTypeLike = np.float32,
        fused: bool = True,
        backend: str | None = None,
        recompute: bool = False,
        proj_size: int = 0,
        **unknown: Never,
    ) -> None:
        super().__init__(**unknown)
        self.cell = check_cell(cell)
        self.hidden_size = check_whole("hidden_size", hidden_size)
        self.proj_size = check_proj_size(cell, proj_size, self.hidden_size)
        self.in_size = None if in_size is None else check_whole("in_size", in_size)
        self.num_layers = check_whole("num_layers", num_layers)
        self.bidirectional = check_bool("bidirectional", bidirectional)
        level = 3 + (type(self) is not Recurrent)  # of the line that makes the layer
        self.dropout = check_dropout(dropout, self.num_layers, level, below_one=True)
        self.fused = check_bool("fused", fused)
        self.dtype = checked_dtype(dtype, low=self.fused)
        rates = Regularization(recurrent_dropout, zoneout_h, zoneout_c, seed=0)
        if check_regularization(cell, rates) is not None and not self.fused:
            raise ValueError(
                "recurrent_dropout, zoneout_h, zoneout_c: expected 0 in a layer with fused=False, "
                f"got {recurrent_dropout}, {zoneout_h}, {zoneout_c}"
            )
        self.recurrent_dropout, self.zoneout_h, self.zoneout_c = map(float, rates[:3])
        self.backend = None if backend is None else backends.get(backend).name
        self.recompute = check_bool("recompute", recompute)
        for name, value in (("backend", self.backend), ("recompute", self.recompute)):
            if value and not self.fused:
                raise ValueError(f"{name}: expected none in a layer with fused=False, got {value}")
        self.suffixes = [""]  # of the parameters' names, one per layer and direction
        if num_layers > 1 or bidirectional:
            ends = ("", "_reverse") if bidirectional else ("",)
            self.suffixes = [f"_l{k}{end}" for k in range(num_layers) for end in ends]
        biases = ("bias_ih", "bias_hh") if cell.two_biases else ("bias_ih",)
        vectors = (*(biases if check_bool("bias", bias) else ()), *cell.vectors)
        for name in (*cell.states, *(name + suffix for name in cell.blocks for suffix in self.suffixes)):
            if name not in ("h", "c") and (hasattr(type(self), name) or name in vars(self)):
                raise ValueError(
                    "cell: expected states and parameters whose names are not attributes of a layer, got "
                    f"{name}"
                )
        if taken := [name for name in cell.scalars if name in CALL]:
            raise ValueError(f"cell: expected row scalars not named like a call's arguments, got {taken[0]}")
        for suffix in self.suffixes:
            for name, blocks in cell.blocks.items():
                parameter = None
                if name.startswith("weight_") or name in vectors:
                    parameter = Parameter(None, name=name + suffix)
                if parameter is not None and name in vectors:
                    parameter.assign(_first_values(cell, name, blocks * hidden_size, self.dtype))
                setattr(self, name + suffix, parameter)
        self._widths = dict(zip(cell.states, cell.widths(self.hidden_size, self.out_size), strict=True))
        self._parameters = [name + suffix for suffix in self.suffixes for name in cell.blocks]
        self._packed: tuple[str | None, list[Any], Any] | None = None
        self._draw(hidden=self.in_size is not None or not self.draws_hidden_late)
        self.reset_state()

    @property
    def out_size(self) -> int:
        """P"""
        return self.proj_size or self.hidden_size

    # State

    def reset_state(self) -> None:
        """Forget the state: the next call starts from zero, or from the initial values of the cell."""
        self._carry([None] * len(self.cell.states))

    def _carry(self, state: Sequence[Variable | None]) -> None:
        """Keep the state for the next call, in attributes of its names."""
        own = vars(self)
        for k, name in enumerate(self.cell.states):
            own[name] = state[k]

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copies: the state without its graph, and no packed weights."""
        own = {name: vars(self)[name] for name in self.cell.states}
        carried = {name: None if s is None else Variable(as_variable(s)._data) for name, s in own.items()}
        return vars(self) | carried | {"_packed": None}

    @property
    def state(self) -> State | None:
        """``(h,)`` or ``(h, c)``, or None after ``reset_state``.

        Each is ``(B, H)``; with a projection h is ``(B, P)``. With several layers or directions they are
        stacked. It can be set to arrays or variables.
        """
        own = vars(self)
        given = [own[name] for name in self.cell.states]
        there = [s for s in given if s is not None]
        if not there:
            return None
        if len(there) < len(given):
            data = as_variable(there[0], "state")._data
            starts = zip(self._widths.values(), self.cell.trace.start.values(), strict=True)
            missing = [self.xp.full((*data.shape[:-1], width), n, data.dtype) for width, n in starts]
            given = [m if s is None else s for s, m in zip(given, missing, strict=True)]
        return self._as_state(given)

    @state.setter
    def state(self, value: tuple[Any, ...] | None) -> None:
        if value is not None and self.bidirectional:
            raise ValueError("state: a bidirectional layer keeps none between calls; pass it to the call")
        self._carry([None] * len(self.cell.states) if value is None else self._as_state(value))

    def _as_state(self, value: Any) -> State:
        names = self.cell.states
        if not isinstance(value, tuple | list) or len(value) != len(names):
            expected = f"({', '.join(names)}{',' if len(names) == 1 else ''})"
            raise TypeError(f"state: expected a tuple {expected}, got {type(value).__name__}")
        return tuple([as_variable(s, "state") for s in value])

    def _begin(self, state: Any, batch: int) -> State | None:
        """The initial state of a call, checked."""
        if state is None and self.bidirectional:
            return None
        given = self.state if state is None else self._as_state(state)
        if given is None:
            return None
        layers = len(self.suffixes)
        what = "the layer's state" if state is None else "state"
        for k, (name, width) in enumerate(self._widths.items()):
            s = given[k]
            expected = (batch, width) if layers == 1 else (layers, batch, width)
            self._check_array(what, s)
            if s._data.shape != expected:
                hint = "call reset_state() before a batch of a different size" if state is None else ""
                check_shape(f"{what} {name}", s._data.shape, expected, hint)
        return given

    # Calls

    def forward(
        self, x: Any, state: Any = None, *, lengths: Any = None, reset: Any = None, **scalars: Any
    ) -> Variable:
        """One step for x ``(B, I)``, a whole sequence for x ``(T, B, I)``: calls ``step`` or ``sequence``.

        Raises:
            TypeError, ValueError: An argument is wrong; the message names it. A step takes no ``lengths`` and
                ``reset``.
        """
        x = as_variable(x)
        ndim = x._data.ndim
        if ndim == 2:
            if lengths is not None or reset is not None:
                raise ValueError(
                    f"{'reset' if lengths is None else 'lengths'}: expected None for one step, x of shape "
                    f"{x.shape}; a sequence is (T, B, I), also where T is 1"
                )
            return self.step(x, state, **scalars)
        if ndim == 3:
            return self.sequence(x, state, lengths=lengths, reset=reset, **scalars)
        raise ValueError(f"x: expected shape (B, I), one step, or (T, B, I), a sequence, got {x.shape}")

    def step(self, x: Any, state: Any = None, **scalars: Any) -> Variable:
        """One time step: x ``(B, I)`` to h ``(B, P)``, which the layer keeps as ``.h`` (and c as ``.c``).

        Every call draws its own masks. For recurrent dropout with one mask for all steps, pass the sequence
        in one call.

        Args:
            x: The input.
            state: Replaces the layer's state.
            scalars: The cell's row scalars, such as ``dt``, each ``(B,)``.

        Raises:
            TypeError, ValueError: An argument is wrong, or the layer is bidirectional.
        """
        x = as_variable(x)
        if self.bidirectional:
            raise ValueError("step: a bidirectional layer needs the whole sequence (T, B, I) at once")
        self._check_input(x, 2)
        B, I = x._data.shape
        begin = self._begin(state, B)
        rows = self._scalars(scalars, (B,))
        self._settle(I, begin is not None)
        if self.fused and len(self.suffixes) == 1:
            after = self._fused(x, rows, begin, {}, step=True)
            y = after[0]
        else:
            rows = [F.reshape(s, (1, B)) for s in rows]
            ys, after, _ = self._forward_sequence(F.reshape(x, (1, *x.shape)), rows, begin, None, None, False)
            y = ys[0]
        self._carry(after)
        return y

    def sequence(
        self,
        x: Any,
        state: Any = None,
        *,
        lengths: Any = None,
        reset: Any = None,
        return_states: bool = False,
        detach_every: int | None = None,
        **scalars: Any,
    ) -> Any:
        """A whole sequence: x ``(T, B, I)`` to y ``(T, B, D*P)``, the h of the last layer at every step.

        Args:
            x: The inputs.
            state: Replaces the layer's state.
            lengths: ``(B,)`` integers from 0 to T, a list or an array. From this step on, the state of the
                row does not change and y is 0.
            reset: ``(T, B)`` booleans, or 0 and 1, lists or an array. Where it is true, the state is cleared
                before that step.
            return_states: Also return the states of every step: ``y, (h,)`` or ``y, (h, c)``, each ``(T, B,
                H)``; with several layers or directions ``(L*D, T, B, H)``.
            detach_every: Truncate backpropagation: after every ``detach_every`` steps, the state is passed on
                and the gradient stops. Fused layers only.
            scalars: The cell's row scalars, such as ``dt`` of ``def gru_d(p, x, h, *, dt)``: each ``(T, B)``.
                ``dt[t]`` belongs to step t. All layers and directions get the same values.

        Raises:
            TypeError, ValueError: An argument is wrong; the message names it.
        """
        x = as_variable(x)
        self._check_input(x, 3)
        T, B, I = x.shape
        begin = self._begin(state, B)
        rows = self._scalars(scalars, (T, B))
        check_bool("return_states", return_states)
        self._settle(I, needs_hidden=begin is not None or T > 1)
        if detach_every is not None and not self.fused:
            raise ValueError("detach_every: expected None in a layer with fused=False")
        y, after, states = self._forward_sequence(x, rows, begin, lengths, reset, return_states, detach_every)
        self._carry(after)
        return (y, states) if return_states else y

    def _forward_sequence(
        self,
        x: Variable,
        scalars: list[Variable],
        begin: State | None,
        lengths: Any,
        reset: Any,
        return_states: bool,
        detach_every: int | None = None,
    ) -> tuple[Variable, State, State]:
        """Run a sequence, fused or not. Dropout between layers uses NumPy's global generator."""
        masks = None
        if config.train and self.dropout:
            shape = (*x.shape[:2], self.out_size * (2 if self.bidirectional else 1))
            scale = 1 / (1 - self.dropout)
            keeps = [np.random.rand(*shape) >= self.dropout for _ in range(self.num_layers - 1)]
            masks = [self.to_device(np.where(keep, scale, 0).astype(self.dtype)) for keep in keeps]
        if not self.fused:
            return unfused.run(self, x, begin, lengths, reset, masks, scalars)
        options = {"lengths": lengths, "reset": reset, "return_states": return_states}
        options |= {"detach_every": detach_every, "save": "boundary_states" if self.recompute else "all"}
        if len(self.suffixes) > 1:
            options |= {"bidirectional": self.bidirectional, "masks": masks}
        y, *rest = self._fused(x, scalars, begin, options, step=False)
        n = len(self.cell.states)
        return y, tuple(rest[:n]), tuple(rest[n:])

    def _scalars(self, given: Mapping[str, Any], shape: tuple[int, ...]) -> list[Variable]:
        """The row scalars of a call, checked, in the order of the cell and the dtype of the layer."""
        names = self.cell.scalars
        found: list[Variable] = []
        for name in given:
            if name not in names:
                expected = ", ".join((*CALL, *names))
                raise TypeError(f"{name}: expected one of the arguments {expected}")
        for name in names:
            if given.get(name) is None:
                raise TypeError(
                    f"{name}: expected the row scalars of {self.cell.name}, one number for each row, got none"
                )
            s = as_variable(given[name], name)
            check_shape(name, s._data.shape, shape)
            self._check_array(name, s)
            found.append(s if s.dtype == self.dtype else F.cast(s, self.dtype))
        return found

    def _check_input(self, x: Variable, ndim: int) -> None:
        shape = x._data.shape
        if len(shape) != ndim or (self.in_size is not None and shape[-1] != self.in_size):
            I = "I" if self.in_size is None else str(self.in_size)
            expected = f"(B, {I})" if ndim == 2 else f"(T, B, {I})"
            hint = "; hidden_size comes before in_size" if shape[-1:] == (self.hidden_size,) else ""
            raise ValueError(f"x: expected shape {expected}, got {x.shape}{hint}")
        self._check_array("x", x)

    def _check_array(self, what: str, x: Variable) -> None:
        data = x._data
        if type(data) is np.ndarray and data.dtype is self.dtype and not self.gpu:
            return  # the usual case
        if not is_real(data.dtype):
            raise TypeError(f"{what}: expected real numbers, got {data.dtype}")
        if cuda.on_gpu(data) != self.gpu:
            module = "cupy" if self.gpu else "numpy"
            raise TypeError(
                f"{what}: expected an array of {module}, like the layer's parameters, got one of "
                f"{cuda.get_array_module(x).__name__} (to_gpu and to_cpu move the parameters)"
            )

    # Fused: one node

    def _fused(
        self, x: Variable, scalars: list[Variable], begin: State | None, options: dict[str, Any], step: bool
    ) -> State:
        """The outputs of one node for all layers and directions."""
        names, weights, packed = self._pack()
        if regularization := self._regularization():
            options["regularization"] = regularization
        node = F.Fused(self.cell, names, packed, options, step)
        found = node(x, *weights, *scalars, *(begin or ()))
        return found if isinstance(found, tuple) else (found,)

    def _regularization(self) -> Regularization | None:
        """The rates of one call; in training with a seed from NumPy's global generator, like dropout."""
        if not (self.recurrent_dropout or self.zoneout_h or self.zoneout_c):
            return None
        seed = int(np.random.randint(2**63 - 1, dtype=np.int64)) if config.train else None
        return Regularization(self.recurrent_dropout, self.zoneout_h, self.zoneout_c, seed)

    def _pack(self) -> tuple[list[list[str]], list[Variable], list[kernels.Packed]]:
        """The names of the weights of each layer and direction, the weights in this order, and packed.

        They are those of the call before, unless a weight may have changed since.
        """
        own, kept = vars(self), self._packed
        if kept is not None and kept[0] == self.backend:
            for name, p, version in kept[1]:  # another parameter may have the same version
                if own[name] is not p or not (p is None or (p.private and p.version == version)):
                    break
            else:
                return kept[2]
        self._packed = kept = None  # so that its memory is free
        slots = [self.weights_of(suffix) for suffix in self.suffixes]
        weights = [p for slot in slots for p in slot.values()]
        arrays = [{name: p._data for name, p in slot.items()} for slot in slots]
        found = list(map(list, slots)), weights, [kernels.pack(self.cell, a, self.backend) for a in arrays]
        if all(isinstance(p, Parameter) and p.private for p in weights):
            parameters = [(name, own[name], getattr(own[name], "version", None)) for name in self._parameters]
            self._packed = self.backend, parameters, found
        return found

    def weights_of(self, suffix: str) -> dict[str, Variable]:
        """The weights of one layer and direction that exist, by name."""
        own = vars(self)
        found = {name: p for name in self.cell.blocks if (p := own[name + suffix]) is not None}
        if "weight_hh" in found and found["weight_hh"]._data is None:  # drawn only when a state needs it
            rows = self.cell.blocks["weight_hh"] * self.hidden_size
            found["weight_hh"] = as_variable(self.xp.zeros((rows, self.out_size), self.dtype))
        return found

    # Sizes, start, files

    def _shapes(self, k: int) -> dict[str, tuple[Any, ...]]:
        """Shapes of the parameters of one layer and direction; the input size may be None."""
        D, P = 2 if self.bidirectional else 1, self.out_size
        return self.cell.shapes(self.in_size if k < D else P * D, self.hidden_size, P)

    def _draw(self, hidden: bool) -> None:
        """Draw every matrix whose sizes are known and that has no values yet."""
        self._draws_later = self.draws_hidden_late and not hidden
        D = 2 if self.bidirectional else 1
        for k, suffix in enumerate(self.suffixes):
            for name, shape in self._shapes(k).items():
                p = vars(self).get(name + suffix)
                late = name == "weight_hh" and not hidden and k < D
                if p is not None and p._data is None and shape[-1] is not None and not late:
                    matrix = np.empty(shape, self.dtype)
                    blocks = np.split(matrix, self.cell.blocks[name])
                    own_order = None if name == "weight_hr" else self.draws
                    for gate in own_order or range(len(blocks)):
                        blocks[gate][...] = drawn(shape[1], len(blocks[gate]), self.dtype).T
                    p.assign(self.to_device(matrix))

    def _settle(self, in_size: int, needs_hidden: bool) -> None:
        """At a call, draw the parameters whose size was not known."""
        if self.in_size is None:
            self.in_size = check_whole("the last axis of x", in_size)
            self._draw(hidden=needs_hidden or len(self.suffixes) > 1)
        elif needs_hidden and self._draws_later:
            self._draw(hidden=True)

    def weight_shapes(self) -> dict[str, tuple[int | None, ...] | None]:
        shapes = super().weight_shapes()
        for k, suffix in enumerate(self.suffixes):
            for name, shape in self._shapes(k).items():
                if vars(self)[name + suffix] is not None:
                    shapes[name + suffix] = shape
        return shapes

    def dtype_of(self, name: str, array: Array) -> np.dtype[Any]:
        return self.dtype

    def check_sizes(self, arrays: Mapping[str, Array], source: str) -> None:
        sizes = [arrays["weight_ih" + s].shape[1] for s in self.suffixes[: 2 if self.bidirectional else 1]]
        if min(sizes) != max(sizes) or min(sizes) == 0:
            raise ValueError(f"{source}: entries 'weight_ih{self.suffixes[0]}' have input sizes {sizes}")

    def take_sizes(self, arrays: Mapping[str, Array]) -> None:
        self.in_size = arrays["weight_ih" + self.suffixes[0]].shape[1]

    def from_dezero_layout(self, prefix: str, arrays: dict[str, Array], source: str) -> dict[str, Array]:
        """``x2f/W`` (I, H), ``x2f/b`` (H,), ``h2f/W`` (H, H), one set per gate."""
        gates = self.dezero_names
        if self.suffixes != [""] or not any(f"{prefix}{s}2{g}/W" in arrays for g in gates for s in "xh"):
            return {}
        H = self.hidden_size
        parts: dict[str, list[Array]] = {"weight_ih": [], "weight_hh": [], "bias_ih": []}
        I = self.in_size
        for gate in gates:
            for name, entry, shape in (
                ("weight_ih", f"x2{gate}/W", (I, H)),
                ("weight_hh", f"h2{gate}/W", (H, H)),
                ("bias_ih", f"x2{gate}/b", (H,)),
            ):
                if vars(self)[name] is None:
                    continue
                key = prefix + entry
                if key not in arrays:
                    raise ValueError(f"{source}: entry {key!r} is missing")
                array = npz.checked(arrays.pop(key), shape, key, source)
                parts[name].append(array.T)
                I = array.shape[0] if name == "weight_ih" else I  # all gates read the same input
        return {name: np.concatenate(arrays) for name, arrays in parts.items() if arrays}


def _first_values(cell: cells.Cell, name: str, size: int, dtype: np.dtype[Any]) -> Array:
    """The initial values of a bias, a gain or a vector."""
    begin = cell.trace.begin.get(name, 0.0)
    if isinstance(begin, tuple):
        return np.random.uniform(*begin, size).astype(dtype)
    if not callable(begin):
        return np.full(size, begin, dtype)
    drawn = np.asarray(begin((size,)))
    check_shape(f"init of {name}", drawn.shape, (size,))
    return drawn.astype(dtype)
