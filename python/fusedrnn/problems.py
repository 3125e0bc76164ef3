"""The list of problems: the cases that benchmarks time, in suites, and synthetic data for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np

from fusedrnn.backends.protocol import Array
from fusedrnn.cells import CELLS, Cell, gru, lstm, rnn


class Shape(NamedTuple):
    """``T`` time steps, ``B`` batch, ``I`` input size, ``H`` hidden size."""

    T: int
    B: int
    I: int
    H: int

    def __str__(self) -> str:
        return f"({self.T},{self.B},{self.I},{self.H})"


@dataclass(frozen=True)
class Case:
    """What is timed: a cell, a shape, and what is done with them.

    Kinds: ``training``: forward and backward, every gradient. ``forward``: no gradient, with weights that are
    prepared before if the library can do so. ``step``: the same for one step from a given state. ``update``:
    a whole training step in PyTorch: the layer, a linear head on every step, mean squared error, backward,
    Adam. There x is data without a gradient, unless it comes from an ``encoder``.

    APIs: none for our functions on arrays; ``layer`` and ``cell`` for the modules of ``fusedrnn.torch``.
    """

    cell: Cell
    shape: Shape
    kind: str = "training"
    name: str = ""
    layers: int = 1
    bidirectional: bool = False
    ragged: bool = False  # lengths uniform in T/10..T
    resets: float = 0.0  # the probability that a step begins a new segment
    api: str = ""
    proj_size: int = 0  # for an update, and P of a cell that projects, where 0 is half of H
    state: bool = False  # it starts from a given state, like a step
    encoder: bool = False  # layers before this one need the gradient of x
    way: str = ""  # the peer that runs it as the library of that name does

    @property
    def directions(self) -> int:
        """1 or 2."""
        return 2 if self.bidirectional else 1

    @property
    def P(self) -> int:
        """Units of the output: those of a projection, else H."""
        return self.proj_size or (max(1, self.shape.H // 2) if self.cell.projects else self.shape.H)

    @property
    def widths(self) -> tuple[int, ...]:
        """Units of each state."""
        return self.cell.widths(self.shape.H, self.P)

    def __str__(self) -> str:
        parts = {
            self.kind: self.kind != "training",
            f"{self.layers} layers": self.layers > 1,
            "both directions": self.bidirectional,
            "ragged": self.ragged,
            "resets": self.resets,
            f"proj_size {self.P}": self.P != self.shape.H,
            "from a state": self.state,
            "after an encoder": self.encoder,
            f"PyTorch {self.api}": self.api,
        }
        said = (part for part, there in parts.items() if there)
        return " ".join([self.cell.name, ",".join(map(str, self.shape)), *said, self.name]).rstrip()


# Forecasting, hydrology, audio, control and, at the end, sizes where the matrix product is everything.
SPEED = (
    Shape(30, 30, 1, 100),
    Shape(50, 32, 1, 32),
    Shape(30, 128, 7, 100),
    Shape(100, 1, 1, 64),
    Shape(64, 16, 128, 128),
    Shape(100, 64, 64, 256),
    Shape(50, 64, 512, 512),
    Shape(25, 128, 1024, 1024),
    Shape(25, 16, 1024, 1024),
    Shape(256, 256, 3, 64),
    Shape(365, 256, 32, 128),
)

# Training lists of DeepBench (code/kernels/rnn_problems.h), there as (hidden, batch, steps); I = H.
_DEEPBENCH: tuple[tuple[Cell, int, int, int], ...] = (
    *((rnn, 50, B, H) for H in (1760, 2048, 2560) for B in (16, 32, 64, 128)),
    *((lstm, 25, B, H) for H in (512, 1024, 2048, 4096) for B in (16, 32, 64, 128)),
    *((lstm, 50, B, 1536) for B in (8, 16, 32)),
    *((lstm, 150, B, 256) for B in (16, 32, 64)),
    *((gru, T, 32, 2816) for T in (750, 375, 187)),
    *((gru, T, 32, H) for H in (2048, 1536, 2560) for T in (1500, 750, 375, 187)),
    (gru, 1, 32, 512),
    (gru, 1500, 32, 1024),
    (gru, 1500, 64, 1024),
)


def training(cell: Cell, shape: Shape, name: str, way: str = "torch", **more: Any) -> Case:
    """A training step of a library in PyTorch."""
    return Case(cell, shape, "update", name, api="layer", way=way, **more)


def inference(cell: Cell, shape: Shape, name: str, way: str = "torch", **more: Any) -> Case:
    """A forward pass of a library in PyTorch."""
    return Case(cell, shape, "forward", name, api="layer", way=way, **more)


# What libraries run, in the way they run it, with their default sizes. Sizes without a default are from their
# examples. The T of RNNoise is 1996, which would take minutes.
PROGRAMS = (
    *(training(c, Shape(128, 256, 32, 512), "TorchRL", "torch-split", resets=0.03) for c in (lstm, gru)),
    training(lstm, Shape(128, 8, 64, 256), "sb3-contrib", "torch-masked", resets=0.03),
    training(lstm, Shape(32, 16, 4, 64), "skrl", "torch-segments", resets=0.03),
    training(lstm, Shape(24, 1024, 48, 256), "rsl_rl", "torch-split", resets=0.01),
    training(lstm, Shape(16, 32, 128, 128), "PufferLib", encoder=True),
    training(gru, Shape(200, 192, 256, 256), "RNNoise", layers=3, state=True, encoder=True),
    training(gru, Shape(500, 2, 320, 32), "SpeechBrain VAD", layers=2, bidirectional=True, encoder=True),
    training(lstm, Shape(589, 32, 60, 128), "pyannote", layers=2, bidirectional=True, encoder=True),
    training(
        lstm, Shape(50, 32, 4196, 256), "flair", "torch-packed", bidirectional=True, ragged=True, encoder=True
    ),
    training(lstm, Shape(365, 256, 15, 20), "NeuralHydrology"),
    training(lstm, Shape(365, 256, 31, 128), "NeuralHydrology"),
    training(lstm, Shape(36, 128, 1, 128), "neuralforecast", layers=2, proj_size=1),
    training(lstm, Shape(48, 32, 20, 40), "DeepAR", layers=2),
    training(lstm, Shape(26, 256, 10, 8), "darts"),
    *(training(lstm, Shape(1000, 50, 1, H), "amp modelling") for H in (16, 40)),
    training(gru, Shape(300, 16, 256, 256), "DeepFilterNet3", layers=3, encoder=True),
    inference(gru, Shape(300, 1, 256, 256), "DeepFilterNet3", layers=3),
    *(
        inference(lstm, Shape(510, 1, I, 256), "Kokoro", "torch-packed", bidirectional=True, ragged=True)
        for I in (640, 512)
    ),
    Case(lstm, Shape(1, 1, 128, 128), "step", "silero-vad", api="cell", way="torch-cell"),
)

SUITES: dict[str, tuple[Case, ...]] = {
    "core": tuple(Case(lstm, shape) for shape in SPEED),
    "programs": PROGRAMS,
    "rl": (  # sequences of different lengths, resets and single steps, as in reinforcement learning
        Case(lstm, Shape(100, 64, 64, 256), ragged=True),
        Case(lstm, Shape(200, 32, 32, 128), ragged=True),
        *(Case(cell, Shape(128, B, 64, 256), resets=0.03) for cell in (lstm, gru) for B in (8, 128)),
        *(Case(cell, Shape(1, B, 64, 256), "step") for cell in (lstm, gru) for B in (1, 8, 64)),
    ),
    # Our PyTorch modules instead of PyTorch's: single steps, and training steps with Adam. All weights change
    # between two of these, as in training: a library that keeps them in another order has to copy them again.
    "pytorch": (
        *(
            Case(cell, Shape(1, 1, 64, 256), "step", api=api)
            for cell in (lstm, gru)
            for api in ("layer", "cell")
        ),
        Case(lstm, Shape(100, 1, 64, 64), "update", api="layer"),
        *(Case(lstm, shape, "update", api="layer") for shape in SPEED),
        *(
            Case(lstm, shape, "update", api="layer", **more)
            for more in ({"layers": 2}, {"bidirectional": True})
            for shape in (Shape(64, 16, 128, 128), Shape(100, 64, 64, 256))
        ),
        Case(lstm, Shape(200, 32, 32, 128), "update", ragged=True, api="layer"),
        Case(lstm, Shape(128, 8, 64, 256), "update", resets=0.03, api="layer"),
    ),
    "wide": (  # from the benchmarks of other projects
        Case(lstm, Shape(100, 64, 512, 512), name="PyTorch fastrnns"),
        Case(gru, Shape(100, 64, 512, 512), name="FlagGems"),
        Case(gru, Shape(32, 64, 512, 512), name="Sample Factory"),
        Case(lstm, Shape(50, 64, 500, 500), name="benchdnn pytorch_testcase"),
        Case(lstm, Shape(629, 128, 128, 128), name="benchdnn paddlepaddle"),
        Case(lstm, Shape(2000, 8, 256, 256), name="PyTorch issue 81634", layers=2),
    ),
    "gpu": (
        # The published comparison on an H100: NX-AI/flashrnn, speed_experiments/kernel_speed_benchmark.py.
        *(Case(cell, Shape(1024, 16, 768, 768), name="FlashRNN") for cell in (lstm, gru)),
        # Larger than cuDNN's kernels of all steps support, and multiples of 128, which its fp16 LSTM needs.
        *(
            Case(cell, Shape(256, B, H, H))
            for H, B in ((256, 64), (512, 16), (1024, 16), (256, 1), (1024, 64), (256, 16), (1024, 1))
            for cell in (lstm, gru)
        ),
        *(Case(lstm, Shape(1, 8, 64, 256), "step", api=api) for api in ("cell", "layer")),
        *(Case(cell, Shape(128, B, 64, 256), resets=0.03) for cell in (lstm, gru) for B in (8, 128)),
        *(Case(cell, Shape(100, 64, 64, 256), ragged=True) for cell in (lstm, gru)),
        *(Case(cell, Shape(256, 32, 100, 300)) for cell in (lstm, gru)),  # sizes that are not multiples
        Case(lstm, Shape(30, 128, 7, 100), name="pollution"),
        *(Case(lstm, Shape(256, B, 128, 128)) for B in (1, 64)),  # cuDNN's kernel for small H
        Case(rnn, Shape(256, 16, 512, 512)),
    ),
    "deepbench": tuple(Case(cell, Shape(T, B, H, H)) for cell, T, B, H in _DEEPBENCH),
}

SUITES["gpu"] = tuple(  # each training case forward only, too
    part
    for case in SUITES["gpu"]
    for part in dict.fromkeys([replace(case, kind=case.kind.replace("training", "forward")), case])
)

# The sizes at which a user's cell is timed.
OWN_CELL = (Shape(100, 32, 16, 64), Shape(50, 32, 1, 32), Shape(100, 64, 64, 256), Shape(100, 1, 1, 64))


def select(cases: tuple[Case, ...], cell: Cell | None = None, forward: bool = False) -> tuple[Case, ...]:
    """The cases of one cell, or, if there are none, all cases with that cell; each once.

    Args:
        cases: One of ``SUITES``.
        cell: None: the cells that are listed.
        forward: Run only forward instead of training, without projections.
    """
    if cell is not None:
        own = tuple(case for case in cases if case.cell == cell)
        cases = own or tuple(replace(case, cell=cell) for case in cases)
    if forward:
        cases = tuple(
            case if case.kind == "step" else replace(case, kind="forward", proj_size=0) for case in cases
        )
    return tuple(dict.fromkeys(cases))


def quick(cases: tuple[Case, ...]) -> tuple[Case, ...]:
    """A few small cases, the smallest of every kind, in their order."""
    by_size = sorted(cases, key=flops)
    firsts = {(case.kind, case.ragged, bool(case.resets), case.api): case for case in reversed(by_size)}
    chosen = list(dict.fromkeys([*firsts.values(), *by_size]))[: max(3, len(firsts))]
    return tuple(case for case in cases if case in chosen)


OPTIONS = tuple(field.name for field in fields(Case) if field.name not in ("cell", "shape"))


def describe(case: Case) -> dict[str, Any]:
    """A case as a dictionary for JSON."""
    return {
        "case": str(case),
        "cell": case.cell.name,
        "shape": list(case.shape),
        **{name: getattr(case, name) for name in OPTIONS},
    }


def described(row: dict[str, Any]) -> Case:
    """The case from the dictionary that ``describe`` returned."""
    return Case(CELLS[row["cell"]], Shape(*row["shape"]), **{name: row[name] for name in OPTIONS})


@dataclass(frozen=True)
class Data:
    """One problem: the arguments of forward and backward. Without ``state0`` the initial state is zero."""

    case: Case
    x: Array  # (T, B, I)
    weights: tuple[dict[str, Array], ...]  # layer by layer, forward before reverse
    state0: tuple[Array, ...] | None  # as dstateT, or zeros
    lengths: Array | None  # (B,)
    reset: Array | None  # (T, B) bool
    dy: Array  # (T, B, D*H), with a projection (T, B, D*P): the upstream gradient of every step
    dstateT: tuple[Array, ...]  # (L*D, B, H) for each state, (L*D, B, P) for a projected one
    scalars: dict[str, Array]  # (T, B) for each row scalar of the cell


def make(case: Case, dtype: str | type, seed: int = 0) -> Data:
    """Draw a standard problem.

    Weights are uniform in ±1/sqrt(H). Row scalars are positive, like time gaps, and at least a quarter.
    Everything else is normal, of order one. Values are drawn in float64 and then rounded, so that one seed
    gives the same problem in every dtype. NumPy has no bfloat16: its numbers are in float32.
    """
    if dtype == "bfloat16":
        return astype(make(case, "float32", seed), dtype)
    T, B, I, H = case.shape
    D, P = case.directions, case.P
    draw = np.random.default_rng(seed)

    def normal(*size: int) -> Array:
        return draw.standard_normal(size).astype(dtype)

    def uniform(*size: int) -> Array:
        return draw.uniform(-(H**-0.5), H**-0.5, size).astype(dtype)

    def states() -> tuple[Array, ...]:
        return tuple(normal(case.layers * D, B, width) for width in case.widths)

    # An update trains both; else the second one is zero if one is enough.
    two_biases = case.kind == "update" or case.cell.two_biases
    weights: tuple[dict[str, Array], ...] = ()
    for n in range(case.layers * D):
        shapes = case.cell.shapes(I if n < D else D * P, H, P)
        found = {name: uniform(*shapes[name]) for name in shapes if two_biases or name != "bias_hh"}
        for name in case.cell.vectors:
            if name in found and not name.startswith("gain_"):
                found[name] = near(case.cell.trace.begin.get(name, 0.0), found[name], draw).astype(dtype)
        if case.proj_size and not case.cell.projects:  # PyTorch's LSTM
            found["weight_hr"] = uniform(P, H)
        weights += (found,)
    return Data(
        case=case,
        x=normal(T, B, I),
        weights=weights,
        state0=states() if case.kind == "step" or case.state else None,
        lengths=lengths(case),
        reset=np.random.default_rng(1).random((T, B)) < case.resets if case.resets else None,
        dy=normal(T, B, D * P),
        dstateT=states(),
        scalars={name: (1 + abs(normal(T, B))) / 4 for name in case.cell.scalars},
    )


def near(begin: Any, drawn: Array, draw: np.random.Generator) -> Array:
    """Values of a vector near its initial values: near 0 a time constant is badly conditioned.

    Args:
        begin: ``init`` of ``p.vector``.
        drawn: The values for an initial value of 0, small compared with 1.
        draw: The generator for those that start from a range.
    """
    if isinstance(begin, tuple):
        low, high = begin
        return draw.uniform(low, high, drawn.shape)
    start = np.asarray(begin(drawn.shape) if callable(begin) else begin)
    return np.where(start == 0, drawn, start * np.exp(-abs(drawn)))


def lengths(case: Case) -> Array | None:
    """(B,) the lengths of a case with different lengths, always the same ones; else None.

    A single row is not padded.
    """
    if not case.ragged:
        return None
    T, B = case.shape[:2]
    return np.random.default_rng(2).integers(max(1, T // 10) if B > 1 else T, T, B, endpoint=True)


def astype(data: Data, dtype: str | type) -> Data:
    """The same numbers in another dtype, of bfloat16 in float32."""

    def cast(array: Array) -> Array:
        if dtype != "bfloat16":
            return array.astype(dtype)
        bits = array.astype(np.float32).view(np.uint32)
        return (bits + 0x7FFF + (bits >> 16 & 1) & np.uint32(0xFFFF0000)).view(np.float32)

    return map_floats(data, cast)


def map_floats(problem: Any, function: Callable[[Array], Array]) -> Any:
    """The dataclass with a function applied to every floating-point array in it."""

    def mapped(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return function(value) if value.dtype.kind not in "biu" else value  # bfloat16 is of kind V
        if isinstance(value, dict):
            return {name: mapped(array) for name, array in value.items()}
        return tuple(map(mapped, value)) if type(value) is tuple else value

    return replace(problem, **{f.name: mapped(getattr(problem, f.name)) for f in fields(problem)})


def valid(case: Case) -> float:
    """The fraction of all steps that are before the end of their row."""
    found = lengths(case)
    return 1.0 if found is None else float(found.sum()) / (case.shape.T * case.shape.B)


def flops(case: Case) -> float:
    """Operations: ``2*T*B*H*(G*I + G*H)`` forward per layer and direction, twice that for the backward.

    ``G`` are the gates with x and those with a state. A projection to P adds P*H, and P replaces the H of a
    state. Steps past the end of a row do not count.
    """
    T, B, I, H = case.shape
    D, P = case.directions, case.P
    inputs = I + (case.layers - 1) * D * P
    ih, hh = (case.cell.blocks.get(name, 0) for name in ("weight_ih", "weight_hh"))
    projection = P if case.proj_size or case.cell.projects else 0
    forward = 2.0 * T * B * valid(case) * H * D * (ih * inputs + (hh * P + projection) * case.layers)
    return 3 * forward if case.kind in ("training", "update") else forward
