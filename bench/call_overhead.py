"""What one step costs beyond its arithmetic, in microseconds per call.

    python bench/call_overhead.py [--threads N] [--json FILE]

- arithmetic: the kernels' own call repeated inside C++ (``_core.testing.repeat_forward``): no Python, no
  check, no new NumPy array. What the call itself takes is in it: its scratch memory, and the tape where there
  is one. Two sets of outputs take turns, and a tape lives until the next call has returned: so it is with a
  caller that carries a state.
- backend: ``CpuBackend().forward(cell, x, packed, state0)``.
- kernels: ``fusedrnn.kernels.forward`` with packed weights.
- layer: one step of ``layers.LSTM`` or ``layers.GRU`` from a given state, its node in the graph included;
  where there is no tape, within ``no_grad()``.

The last three are given as the time beyond the arithmetic. Backward rows are the gradients of everything from
dy. Every figure is a minimum over many short blocks of calls, the levels interleaved; with several
threads and on a busy machine the differences of long calls are noise.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fusedrnn import _core, autograd, kernels, layers, system, terminal
from fusedrnn.backends.cpu import CpuBackend
from fusedrnn.cells import Cell, gru, lstm

CELLS: tuple[Cell, ...] = (lstm, gru)
SIZES = ((1, 1, 8), (1, 64, 256), (8, 64, 256), (64, 64, 256))  # B, I, H; the first is hardly any arithmetic
GOALS = {"backend": 5.0, "kernels": 5.0, "layer": 10.0}  # microseconds beyond the arithmetic, forward

Block = Callable[[int], Any]  # runs a level so many times


class Row(NamedTuple):
    """One call: microseconds of each level."""

    cell: str
    B: int
    I: int
    H: int
    call: str
    times: dict[str, float]


def repeated(call: Callable[[], Any]) -> Block:
    """Calls, each result kept until the next one is there."""

    def block(times: int) -> None:
        kept = None
        for _ in range(times):
            kept = call()
        del kept

    return block


def without_graph(block: Block) -> Block:
    """The same within ``no_grad()``."""

    def inside(times: int) -> None:
        with autograd.no_grad():
            block(times)

    return inside


def minima(blocks: dict[str, Block], seconds: float) -> dict[str, float]:
    """The best time per call of each, in microseconds; blocks of about a millisecond, interleaved."""
    start = time.perf_counter()
    blocks["arithmetic"](20)
    times = max(3, int(20e-3 / (time.perf_counter() - start)))
    best = dict.fromkeys(blocks, float("inf"))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, block in blocks.items():
            start = time.perf_counter()
            block(times)
            best[name] = min(best[name], 1e6 * (time.perf_counter() - start) / times)
    return best


def levels(cell: Cell, B: int, I: int, H: int) -> dict[str, dict[str, Block]]:
    """The levels of each kind of call, after a check that they agree."""
    draw = np.random.default_rng(0).standard_normal
    layer = {"lstm": layers.LSTM, "gru": layers.GRU}[cell.name](H, I)
    weights = {name: p._data for name, p in layer.named_params()}
    x = draw((1, B, I)).astype(np.float32)
    dy = draw((1, B, H)).astype(np.float32)
    state = tuple([draw((B, H)).astype(np.float32) for _ in cell.states])
    backend = CpuBackend()
    packed, kernels_packed = backend.pack(cell, weights), kernels.pack(cell, weights, "cpu")
    carried = tuple([autograd.Variable(s) for s in state])
    step = x[0]

    def forward(save: str | None) -> dict[str, Block]:
        core = packed.core
        return {
            "arithmetic": lambda n: _core.testing.repeat_forward(n, core, x, state, save is not None),
            "backend": repeated(lambda: backend.forward(cell, x, packed, state, save=save)),
            "kernels": repeated(lambda: kernels.forward(cell, x, kernels_packed, state, save=save)),
            "layer": repeated(lambda: layer(step, carried)),
        }

    tape = backend.forward(cell, x, packed, state).tape
    outside = kernels.forward(cell, x, kernels_packed, state)
    assert np.array_equal(layer(step, carried).data, outside.y[0])
    assert layer._packed is not None
    without = forward(None)
    return {
        "forward": forward("all"),
        "forward, no tape": without | {"layer": without_graph(without["layer"])},
        "backward": {
            "arithmetic": lambda n: _core.testing.repeat_backward(n, tape.core, dy),
            "backend": repeated(lambda: backend.backward(tape, dy)),
            "kernels": repeated(lambda: kernels.backward(outside.tape, dy)),
        },
    }


def measure(seconds: float) -> list[Row]:
    """Every cell, size and kind of call, each for so long."""
    return [
        Row(cell.name, *size, call, minima(blocks, seconds))
        for cell in CELLS
        for size in SIZES
        for call, blocks in levels(cell, *size).items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="What one step costs beyond its arithmetic.")
    parser.add_argument("--threads", type=int, default=1, help="1 unless given")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row; 1 unless given")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    _core.set_num_threads(options.threads)
    rows = measure(options.seconds)
    lines = []
    for row in rows:
        times = dict(row.times)
        arithmetic = times.pop("arithmetic")
        beyond = [f"{times[name] - arithmetic:+.1f}" if name in times else "" for name in GOALS]
        lines.append([row.cell, row.call, f"{row.B} {row.I} {row.H}", f"{arithmetic:.1f}", *beyond])
    goals = ", ".join(f"{name} {goal:g}" for name, goal in GOALS.items())
    title = f"microseconds per step, float32, threads: {options.threads}; goals of forward: {goals}"
    terminal.table(title, ["cell", "call", "B I H", "arithmetic", *GOALS], lines, left=3)
    if options.json is not None:
        found = {"environment": system.environment(), "threads": options.threads, "goals": GOALS}
        found["rows"] = [row._asdict() for row in rows]
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
