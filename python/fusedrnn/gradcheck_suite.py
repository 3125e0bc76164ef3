"""Gradient checks of every cell, backend, dtype and option against the oracle, and of the oracle itself.

The oracle is the NumPy reference in long double with the same inputs. It is compared with complex-step
derivatives of its forward pass. ``fusedrnn gradcheck`` prints the results; docs/accuracy.md shows them.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusedrnn import backends as registry
from fusedrnn import cuda, kernels, multilayer
from fusedrnn.backends.arguments import check_cell
from fusedrnn.backends.protocol import Array, Regularization, Unsupported
from fusedrnn.cells import CELLS, Cell
from fusedrnn.gradcheck.oracle import FLOOR, FORWARD, GRADIENT, TIMES_NUMPY, WIDE
from fusedrnn.gradcheck.tables import ORACLE, Row
from fusedrnn.problems import Shape, map_floats, near


@dataclass(frozen=True)
class Option:
    """The settings of one option of the suite."""

    biases: str = "own"  # "own": those of the native layer of the cell; "both", only "hh", "none"
    state0: bool = False
    lengths: bool = False  # with NaN in the padding of all inputs
    reset: bool = False
    reverse: bool = False
    return_states: bool = False
    layers: int = 1
    bidirectional: bool = False
    dropout: float = 0.0
    save: str = "all"
    recurrent_dropout: float = 0.0  # of cells with weight_hh
    zoneout: float = 0.0  # of h and c, if the cell has them
    layer_norm: bool = False


OPTIONS = {
    "plain": Option(),
    "both-biases": Option(biases="both"),
    "bias-hh-alone": Option(biases="hh"),
    "no-bias": Option(biases="none"),
    "state0": Option(state0=True),
    "lengths": Option(lengths=True),
    "reset": Option(reset=True),
    "reverse": Option(reverse=True),
    "return-states": Option(return_states=True),
    "all-together": Option("both", True, True, True, True, True),
    "recompute": Option(save="boundary_states"),
    "recurrent-dropout": Option(recurrent_dropout=0.25),
    "zoneout": Option(zoneout=0.25),
    "dropout-zoneout-all": Option("both", True, True, True, True, True, recurrent_dropout=0.25, zoneout=0.25),
    "2-layers": Option(layers=2, dropout=0.3),
    "2-layers-bidirectional-all": Option("both", True, True, True, False, True, 2, True, 0.3),
    "layer-norm": Option(layer_norm=True),
    "layer-norm-all": Option("both", True, True, True, True, True, layer_norm=True),
}
DTYPES = ("float32", "float64")
SIZES = (Shape(13, 5, 3, 7), Shape(37, 19, 5, 17), Shape(256, 2, 1, 31))
QUICK = SIZES[:1]
# Complex-step derivatives in long double compared with backward, relative to the 2-norm of the gradient; if
# long double is no wider than float64, the accuracy of complex steps in it.
PROOF = max(1e-16, min(1e-13, 1000 * float(np.finfo(WIDE).eps)))


def variants() -> dict[str, Cell]:
    """Every cell with every combination of its options, by name: rnn, rnn relu=True, lstm, ..."""
    found: dict[str, Cell] = {}
    for name, cell in CELLS.items():
        # layer norm is one of OPTIONS
        switches = {n: v for n, v in cell.options.items() if isinstance(v, bool) and n != "layer_norm"}
        for values in itertools.product(*([value, not value] for value in switches.values())):
            chosen = dict(zip(switches, values, strict=True))
            other = [f" {n}={value}" for n, value in chosen.items() if value != switches[n]]
            found[name + "".join(other)] = cell.with_options(**chosen)
    return found


def run_suite(
    cells: Sequence[str | Cell] | None = None,
    backends: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    options: Sequence[str] | None = None,
    seed: int = 0,
    progress: Callable[[int, int, Row], None] | None = None,
    *,
    sizes: Sequence[Shape] = SIZES,
    levels: Sequence[str] | None = None,
) -> list[Row]:
    """Compare every cell, backend, dtype and option with the oracle, and the oracle with complex steps.

    A row has passed if the error of each output and gradient is within the limits in ``FORWARD`` and
    ``GRADIENT``, and within 4 times plain NumPy's error, which counts as at least 4 machine epsilons.

    Args:
        cells: Names from ``CELLS`` ("rnn" means both of its forms) or ``variants()``, or cells of your own
            with their options. None: all built-in cells.
        backends: Names from ``fusedrnn.backends.NAMES``, or "oracle". None: all that are available. Each
            other backend has one row with the reason, neither passed nor failed.
        dtypes: "float32", "float64"; None: both.
        options: Names from ``OPTIONS``; None: all.
        seed: The seed of the problems.
        progress: Called after each row with the number of rows done, the number of all rows, and the row.
        sizes: The sizes of the problems, (T, B, I, H).
        levels: Instruction sets for the cpu backend. Each runs in a process of its own, because a process
            uses only one; ``available_levels()`` returns all. None: the one in use.

    Raises:
        ValueError: A name is unknown.
        RuntimeError: A backend in ``backends`` is not available, or a process of ``levels`` failed.
    """
    every = variants()
    own = [] if isinstance(cells, Cell) else [c for c in cells or () if isinstance(c, Cell)]
    _known("cells", cells, [*CELLS, *every, *own])
    _known("backends", backends, [ORACLE, *registry.NAMES])
    _known("dtypes", dtypes, DTYPES)
    _known("options", options, OPTIONS)
    _known("levels", levels, available_levels())
    chosen = {n: c for n, c in every.items() if cells is None or n in cells or c.name in cells}
    chosen |= {check_cell(c).name: c for c in own}
    asked = [ORACLE, *registry.NAMES] if backends is None else list(backends)
    dtypes = DTYPES if dtypes is None else dtypes
    options = tuple(OPTIONS) if options is None else options
    pairs = [
        (name, cell, option)
        for name, cell in chosen.items()
        for option in options
        if not OPTIONS[option].layer_norm or "layer_norm" in cell.options
    ]
    if not pairs:
        raise ValueError(f"options: none of {', '.join(options)} applies to {', '.join(chosen)}")

    rows: list[Row] = []
    running = []
    for name in asked:
        reason = None if name == ORACLE else registry.get(name).unavailable()
        if reason is None:
            running.append(name)
        elif backends is not None:
            raise RuntimeError(f"backends: {name!r} is not available: {reason}")
        else:
            rows.append(Row("", name, "", "", "", {}, {}, {}, None, 0.0, reason))
    here = [n for n in running if n not in (ORACLE, "cpu")]
    isolated = levels if levels is not None and "cpu" in running else ()
    if "cpu" in running and not isolated:
        here.insert(0, "cpu")
    total = len(pairs) * (len(dtypes) * (len(here) + len(isolated)) + (ORACLE in running)) + len(rows)

    def done(row: Row) -> None:
        rows.append(row)
        if progress is not None:
            progress(len(rows), total, row)

    for cell_name, cell, option in pairs:
        if ORACLE in running:
            done(_prove(cell_name, cell, option, sizes[0], seed))
        for dtype in dtypes if here else ():
            problems = [_draw(cell, OPTIONS[option], size, np.dtype(dtype), seed) for size in sizes]
            truths = [_results(p.cast(WIDE), "reference") for p in problems]
            plain = [_results(p, "reference") for p in problems]
            for backend in here:
                done(_row(cell_name, backend, dtype, option, problems, truths, plain))
    for level in isolated:
        for row in _isolated(level, [name for name in chosen if name in every], dtypes, options, seed, sizes):
            done(row)
    return rows


def available_levels() -> list[str]:
    """The instruction sets that were built and that this processor supports, lowest first."""
    try:
        from fusedrnn import _core
    except ImportError:
        return []
    info = _core.info()
    return [level for level in info["built"] if level in info["detected"]]


def _known(argument: str, names: Sequence[Any] | None, known: Any) -> None:
    if isinstance(names, str | Cell):
        raise TypeError(f"{argument}: expected a list, [{names!r}], got {names!r}")
    for name in names or ():
        if name not in known:
            expected = ", ".join(k for k in known if isinstance(k, str))
            raise ValueError(f"{argument}: expected names from {expected}, got {name!r}")


@dataclass(frozen=True)
class _Problem:
    """One standard problem: PyTorch's initialisation, everything else normal of order one."""

    cell: Cell
    option: Option
    x: Array
    weights: tuple[dict[str, Array], ...]  # layer by layer, forward before reverse
    state0: tuple[Array, ...] | None  # layers x directions first, as in all that follow
    lengths: Array | None
    reset: Array | None
    masks: tuple[Array, ...] | None
    scalars: dict[str, Array]
    dy: Array
    dstateT: tuple[Array, ...]
    dstates: tuple[Array, ...] | None

    def cast(self, dtype: Any) -> _Problem:
        """The same numbers in another dtype."""
        return map_floats(self, lambda a: a.astype(dtype))


def _draw(cell: Cell, option: Option, size: Shape, dtype: np.dtype[Any], seed: int) -> _Problem:
    T, B, I, H = size
    D = 2 if option.bidirectional else 1
    N = option.layers * D
    rng = np.random.default_rng([seed, T, B, I, H])
    cell = cell.with_options(layer_norm=True) if option.layer_norm else cell
    own = "both" if cell.two_biases else "ih"
    biases = own if option.biases == "own" else option.biases

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape)

    def uniform(*shape: int) -> Array:
        return rng.uniform(-(H**-0.5), H**-0.5, shape)

    absent = {"ih": ["bias_hh"], "hh": ["bias_ih"], "both": []}.get(biases, ["bias_ih", "bias_hh"])
    P = 2 * H // 3 if cell.projects else H
    widths = cell.widths(H, P)
    weights: tuple[dict[str, Array], ...] = ()
    for n in range(N):
        shapes = cell.shapes(I if n < D else P * D, H, P)
        weights += ({n: uniform(*s) for n, s in shapes.items() if n not in (*absent, *cell.vectors)},)
    weights = tuple(w | _vectors(cell, H, rng) for w in weights)
    lengths = rng.integers(1, T + 1, B) if option.lengths else None
    if lengths is not None:
        lengths[: min(2, B)] = (T, 0)[: min(2, B)]
    starts = cell.trace.start.values()
    keep = 1 - option.dropout
    problem = _Problem(
        cell,
        option,
        x=normal(T, B, I),
        weights=weights,
        state0=tuple(_state(start, normal(N, B, width)) for start, width in zip(starts, widths, strict=True))
        if option.state0
        else None,
        lengths=lengths,
        reset=rng.random((T, B)) < 0.1 if option.reset else None,
        masks=tuple(np.where(rng.random((T, B, P * D)) < keep, 1 / keep, 0) for _ in range(option.layers - 1))
        if option.dropout
        else None,
        scalars={name: (1 + abs(normal(T, B))) / 4 for name in cell.scalars},
        dy=normal(T, B, P * D),
        dstateT=tuple(normal(N, B, width) for width in widths),
        dstates=tuple(normal(N, T, B, width) for width in widths) if option.return_states else None,
    )
    return problem.cast(dtype)


def _state(start: float, normal: Array) -> Array:
    """A state. If its initial value is not 0, it may be a divisor or the argument of a logarithm."""
    return start * (1 + abs(normal)) if start else normal


def _vectors(cell: Cell, H: int, rng: np.random.Generator) -> dict[str, Array]:
    """Gains near 0.1, as in Cooijmans et al. 2016, since near 1 many problems are chaotic; other vectors near
    their initial values."""
    drawn = {name: rng.standard_normal(cell.blocks[name] * H) / 4 for name in cell.vectors}
    begin = cell.trace.begin
    return {
        name: 0.1 * (1 + d) if name.startswith("gain") else near(begin.get(name, 0.0), d, rng)
        for name, d in drawn.items()
    }


def _poisoned(problem: _Problem) -> _Problem:
    """The problem with NaN wherever nothing may be read."""
    if problem.lengths is None:
        return problem
    padding = np.arange(len(problem.x))[:, np.newaxis] >= problem.lengths

    def poison(a: Array) -> Array:
        where = padding if a.shape == padding.shape else padding[..., np.newaxis]
        return np.where(where, np.asarray(np.nan, a.dtype), a)

    dstates = problem.dstates
    return dataclasses.replace(
        problem,
        x=poison(problem.x),
        scalars={name: poison(s) for name, s in problem.scalars.items()},
        dy=poison(problem.dy),
        dstates=None if dstates is None else tuple(map(poison, dstates)),
    )


Results = dict[str, tuple[Any, ...]]


def _results(p: _Problem, backend: str, upstream: bool = True) -> Results:
    """Outputs and gradients by name, each a tuple of one array, or of one for each layer and direction."""
    if backend == "cuda":
        p = map_floats(p, cuda.as_cupy)
        rest = {n: cuda.as_cupy(a) for n in ("lengths", "reset") if (a := getattr(p, n)) is not None}
        p = dataclasses.replace(p, **rest)
    option, names = p.option, p.cell.states
    dropout = option.recurrent_dropout if "weight_hh" in p.cell.blocks else 0.0
    zoneout_h, zoneout_c = (option.zoneout if state in names else 0.0 for state in "hc")
    shared: dict[str, Any] = {
        "regularization": Regularization(dropout, zoneout_h, zoneout_c, len(p.x)),
        "lengths": p.lengths,
        "reset": p.reset,
        "return_states": option.return_states,
        "scalars": p.scalars,
        "save": option.save,
        "backend": backend,
    }
    if option.layers == 1 and not option.bidirectional:
        first = None if p.state0 is None else tuple(s[0] for s in p.state0)
        out = kernels.forward(p.cell, p.x, p.weights[0], first, reverse=option.reverse, **shared)
    else:
        directions = option.bidirectional
        out = multilayer.forward_multilayer(
            p.cell, p.x, p.weights, p.state0, bidirectional=directions, masks=p.masks, **shared
        )
    found: Results = {"y": (out.y,)}
    found |= {f"{n}T": (s,) for n, s in zip(names, out.stateT, strict=True)}
    found |= {f"{n} states": (s,) for n, s in zip(names, out.states or (), strict=False)}
    if not upstream:
        return _on_host(found)
    if option.layers == 1 and not option.bidirectional:
        dstates = None if p.dstates is None else tuple(s[0] for s in p.dstates)
        g = kernels.backward(out.tape, p.dy, tuple(s[0] for s in p.dstateT), dstates)
        dx, dweights, dstate0, dscalars = g.dx, [g.dweights], g.dstate0, g.dscalars
    else:
        dx, dweights, dstate0, dscalars = multilayer.backward_multilayer(out.tape, p.dy, p.dstateT, p.dstates)
    found["dx"] = (dx,)
    found |= {f"d{name}": (d,) for name, d in dscalars.items()}
    found |= {f"d{name}": tuple(d[name] for d in dweights) for name in p.weights[0]}
    found |= {f"d{n}0": (s,) for n, s in zip(names, dstate0 or (None,) * len(names), strict=True)}
    return _on_host(found)


def _on_host(found: Results) -> Results:
    return {name: tuple(map(cuda.as_numpy, arrays)) for name, arrays in found.items()}


def _error(got: Any, truth: Array, dtype: np.dtype[Any]) -> float:
    """The largest difference, relative to the largest entry; infinite for NaN or a wrong shape or dtype."""
    if not isinstance(got, np.ndarray) or got.shape != truth.shape or got.dtype != dtype:
        return float("inf")
    if not truth.size:
        return 0.0
    difference = float(np.abs(got - truth).max())
    largest = float(np.abs(truth).max())
    if not np.isfinite(difference):
        return float("inf")
    return difference / largest if largest else (float("inf") if difference else 0.0)


def _errors(got: Results, truth: Results, dtype: np.dtype[Any]) -> dict[str, float]:
    return {
        name: max(_error(g, t, dtype) for g, t in zip(got[name], arrays, strict=True))
        for name, arrays in truth.items()
    }


def limit(tensor: str, dtype: str) -> float:
    """The guaranteed accuracy of a tensor of the suite. The names of gradients begin with d."""
    return (GRADIENT if tensor.startswith("d") else FORWARD)[dtype]


def _row(
    cell: str,
    backend: str,
    dtype: str,
    option: str,
    problems: Sequence[_Problem],
    truths: Sequence[Results],
    plain: Sequence[Results],
) -> Row:
    kind = np.dtype(dtype)
    floor = FLOOR * float(np.finfo(kind).eps)
    names = tuple(truths[0])
    limits = {name: limit(name, dtype) for name in names}
    errors, numpys = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    notes: list[str] = []
    isa = ""
    if backend == "cpu":
        from fusedrnn import _core

        isa = _core.info()["isa"]
    start = time.perf_counter()
    seconds = 0.0
    for problem, truth, same in zip(problems, truths, plain, strict=True):
        poisoned = _poisoned(problem)
        start = time.perf_counter()
        try:
            found = _errors(_results(poisoned, backend), truth, kind)
        except Exception as error:  # of any kind: this row has failed, the others still run
            if isinstance(error, Unsupported):
                return Row(cell, backend, isa, dtype, option, {}, {}, {}, None, 0.0, str(error))
            found = dict.fromkeys(names, float("inf"))
            notes.append(f"{type(error).__name__}: {error}")
        seconds += time.perf_counter() - start
        numpy = _errors(same, truth, kind)
        for name in names:
            T, B, I, H = *problem.x.shape, problem.dy.shape[2] // (2 if problem.option.bidirectional else 1)
            if found[name] > limits[name]:
                notes.append(f"{name} {found[name]:.2g} > {limits[name]:.2g} at {Shape(T, B, I, H)}")
            elif found[name] > TIMES_NUMPY * max(numpy[name], floor):
                notes.append(f"{name} {found[name]:.2g}, NumPy {numpy[name]:.2g} at {Shape(T, B, I, H)}")
            errors[name] = max(errors[name], found[name])
            numpys[name] = max(numpys[name], numpy[name])
    return Row(
        cell, backend, isa, dtype, option, errors, numpys, limits, not notes, seconds, "; ".join(notes)
    )


def _prove(cell_name: str, cell: Cell, option: str, size: Shape, seed: int) -> Row:
    """Compare the oracle's gradients with complex steps in a random direction for each tensor.

    With ``v`` of ±1, ``Im L(w + i h v) / h`` is the derivative in direction v, without a subtraction.
    """
    start = time.perf_counter()
    problem = _draw(cell, OPTIONS[option], size, np.dtype(np.float64), seed)
    p = problem.cast(WIDE)
    truth = _results(p, "reference")
    lifted = p.cast(np.clongdouble)
    # the sums below are over valid steps only, as dy in the padding is not read
    valid: Any = True
    if p.lengths is not None:
        valid = (np.arange(p.x.shape[0])[:, np.newaxis] < p.lengths)[..., np.newaxis]
    rng = np.random.default_rng(seed)
    h = WIDE.type(1e-20)
    errors = {}
    for name, gradients in truth.items():
        if not name.startswith("d"):
            continue
        directions = [np.where(rng.random(g.shape) < 0.5, -1, 1).astype(WIDE) for g in gradients]
        steps = [1j * h * v for v in directions]
        if name == "dx":
            moved = dataclasses.replace(lifted, x=lifted.x + steps[0])
        elif (scalar := name[1:]) in p.scalars:
            moved = dataclasses.replace(
                lifted, scalars=lifted.scalars | {scalar: lifted.scalars[scalar] + steps[0]}
            )
        elif name[1:] in p.weights[0]:
            moved = dataclasses.replace(
                lifted,
                weights=tuple(
                    w | {name[1:]: w[name[1:]] + s} for w, s in zip(lifted.weights, steps, strict=True)
                ),
            )
        else:
            starts = zip(p.dstateT, cell.trace.start.values(), strict=True)
            begin = lifted.state0 or tuple(np.full(d.shape, n, np.clongdouble) for d, n in starts)
            k = cell.states.index(name[1:-1])
            begin = tuple(s + steps[0].reshape(s.shape) if k == n else s for n, s in enumerate(begin))
            moved = dataclasses.replace(lifted, state0=begin)
        out = _results(moved, "reference", upstream=False)
        loss = np.where(valid, out["y"][0] * p.dy, 0).sum()
        for n, d in zip(cell.states, p.dstateT, strict=True):
            loss += (out[f"{n}T"][0].reshape(d.shape) * d).sum()
        for n, d in zip(cell.states, p.dstates or (), strict=False):
            loss += np.where(valid, out[f"{n} states"][0].reshape(d.shape) * d, 0).sum()
        along = sum((v * g).sum() for v, g in zip(directions, gradients, strict=True))
        norm = float(np.sqrt(sum((g * g).sum() for g in gradients)))
        if norm == 0:  # of a state that no step reads: then any derivative is an error
            errors[name] = float(abs(loss.imag / h))
            continue
        errors[name] = _error(np.asarray(loss.imag / h), np.asarray(along), WIDE) * float(abs(along)) / norm
    limits = dict.fromkeys(errors, PROOF)
    notes = [f"{name} {error:.2g} > {PROOF:.2g}" for name, error in errors.items() if not error <= PROOF]
    seconds = time.perf_counter() - start
    return Row(
        cell_name, ORACLE, "", "longdouble", option, errors, {}, limits, not notes, seconds, "; ".join(notes)
    )


def _isolated(
    level: str,
    cells: Sequence[str],
    dtypes: Sequence[str],
    options: Sequence[str],
    seed: int,
    sizes: Sequence[Shape],
) -> Iterator[Row]:
    """The rows of the cpu backend with one instruction set, from another process."""
    asked = {"cells": cells, "dtypes": dtypes, "options": options, "seed": seed, "sizes": sizes}
    process = subprocess.Popen(
        [sys.executable, "-c", "from fusedrnn.gradcheck_suite import serve; serve()"],
        env=os.environ | {"FUSEDRNN_ISA": level},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        json.dump(asked, process.stdin)
        process.stdin.close()
        for line in process.stdout:
            row = Row(**json.loads(line))
            if row.isa != level:
                raise RuntimeError(f"levels: expected instruction set {level}, got {row.isa}")
            yield row
        complaint = process.stderr.read().strip()
    if process.returncode:
        raise RuntimeError(f"levels: the process of {level} failed: {complaint[-500:]}")


def serve() -> None:
    """Run the cpu backend with the arguments from standard input, and print each row as a line."""
    asked = json.load(sys.stdin)
    asked["sizes"] = [Shape(*size) for size in asked["sizes"]]

    def progress(done: int, total: int, row: Row) -> None:
        print(json.dumps(dataclasses.asdict(row)), flush=True)

    run_suite(backends=["cpu"], progress=progress, **asked)
