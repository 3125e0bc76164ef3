"""Candidate plans, timed: what ``backends.cuda_plan`` chooses from, beside its cost model."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from fusedrnn.backends import cuda_plan
from fusedrnn.backends.cuda import CudaBackend
from fusedrnn.backends.cuda_plan import Candidate, Plan
from fusedrnn.bench.cuda.timing import Timer, rounds
from fusedrnn.cells import GRU, LSTM, Cell
from fusedrnn.problems import Case, Shape, make


class Size(NamedTuple):
    """The size to plan for; ``precision`` says how float32 is multiplied."""

    cell: Cell
    precision: str
    T: int
    B: int
    H: int


SIZES = tuple(
    Size(cell, precision, 100, B, H)
    for cell, precision in ((LSTM(), "fp16"), (LSTM(), "tf32"), (LSTM(), "ieee"), (GRU(), "tf32"))
    for H in (256, 512, 768, 1024)
    for B in (1, 16, 64)
)
EACH = 2  # candidates of a kernel, those of least cost


class Fixed(CudaBackend):
    """The backend with the plan that it is told."""

    fixed: Plan

    def _plan(self, *_: Any) -> Plan:
        return self.fixed


def best_candidates(backend: CudaBackend, size: Size, backward: bool) -> Iterator[Candidate]:
    """Step by step, and of each other kernel the candidates of least cost."""
    yield Candidate(float("nan"), 0, Plan("steps"))
    for kernel in cuda_plan.KERNELS[1:]:
        found = backend.candidates(kernel, size.cell, size.B, size.H, "float32", backward=backward)
        yield from sorted(found)[:EACH]


def measure(
    size: Size, make_backend: Callable[[type[CudaBackend], str], Any], put: Callable[[Any], Any], timer: Timer
) -> dict[str, Any]:
    """Microseconds a step of every candidate, forward and back, and which one would have been chosen.

    Args:
        size: What is run.
        make_backend: A backend of this class and precision.
        put: A NumPy array's copy in the device's memory.
        timer: How time is taken.
    """
    data = make(Case(size.cell, Shape(size.T, size.B, 1, size.H)), "float32")
    backend = make_backend(Fixed, size.precision)
    found: dict[str, Any] = {"size": f"{size.cell} {size.precision} T={size.T} B={size.B} H={size.H}"}
    x, dy = put(data.x), put(data.dy)
    weights = type(data.weights[0])(*(None if w is None else put(w) for w in data.weights[0]))
    backend.fixed = Plan("steps")
    packed = backend.pack(size.cell, weights)
    tape = backend.forward(size.cell, x, packed).tape

    def forward(plan: Plan) -> None:
        backend.fixed = plan
        backend.forward(size.cell, x, packed)

    def back(plan: Plan) -> None:
        backend.fixed = plan
        backend.backward(tape, dy, need=())

    for direction, run in (("forward", forward), ("back", back)):
        candidates = list(best_candidates(backend, size, direction == "back"))
        runs = {
            str(k): lambda run=run, candidate=candidate: run(candidate.plan)
            for k, candidate in enumerate(candidates)
        }
        samples, failed = rounds(runs, timer, 3, 0.005)
        chosen = make_backend(CudaBackend, size.precision).plan(
            size.cell, size.T, size.B, size.H, "float32", backward=direction == "back"
        )
        found[direction] = {
            "chosen": str(chosen),
            "candidates": [
                {
                    "plan": str(candidate.plan),
                    "cost": candidate.cost,
                    "us_per_step": statistics.median(samples[str(k)]) * 1e6 / size.T
                    if str(k) in samples
                    else None,
                    "failed": failed.get(str(k)),
                }
                for k, candidate in enumerate(candidates)
            ],
        }
    return found
