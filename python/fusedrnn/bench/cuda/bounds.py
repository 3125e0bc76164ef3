"""What no implementation of a case undercuts, by what this machine does: operations, bytes, dependent steps.

Each of the three is a bound by itself, so the largest is the bound of the case. All are low: operations at
the rate of one large product, every array moved once, and between two steps no more than a barrier.
"""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

from fusedrnn import problems
from fusedrnn.backends.cuda import KERNEL
from fusedrnn.bench.cuda.modes import MODES, Mode, environment, use
from fusedrnn.bench.cuda.timing import Timer, reason, rounds
from fusedrnn.bench.peer_torch import FusedLayer, Place
from fusedrnn.cells import RNN
from fusedrnn.problems import Case, Shape

STEPS = 4000  # of the case that measures the time between two steps
WIDTHS = (8, 132, 1056)  # its hidden sizes: few blocks, and as many as there are


class Rates(NamedTuple):
    """What was measured; None where it could not be."""

    operations: dict[str, float | None]  # a second, of cuBLAS, by the mode's name
    bytes: float | None  # a second, read and written
    step: float | None  # seconds: the shortest of ``steps``
    steps: dict[str, Any]  # by kernel and hidden size: seconds and plan, or why there are none


def measure(
    place: Place, timer: Timer, backend: Any, *, size: int = 8192, megabytes: int = 1024, steps: int = STEPS
) -> Rates:
    """All of them, on this machine."""
    import torch

    def seconds(run: Any) -> float | None:
        samples, _ = rounds({"it": run}, timer, 5, 0.05)
        return statistics.median(samples["it"]) if samples else None

    def per_second(amount: float, run: Any) -> float | None:
        taken = seconds(run)
        return amount / taken if taken else None

    operations = {}
    for name, mode in MODES.items():
        with use(mode):
            a = torch.randn(size, size, device=place.device, dtype=getattr(torch, mode.dtype))
            operations[name] = per_second(2.0 * size**3, lambda a=a: a @ a)
    a = torch.ones(megabytes << 18, device=place.device)
    b = torch.empty_like(a)
    moved = per_second(2.0 * a.numel() * 4, lambda: b.copy_(a))
    found = {
        f"{kernel}, H = {H}": between_steps(place, timer, backend, kernel, H, steps)
        for kernel in ("cluster", "cluster_registers", "grid", "grid_registers")
        for H in WIDTHS
    }
    known = [each["seconds"] for each in found.values() if "seconds" in each]
    return Rates(operations, moved, min(known, default=None), found)


def between_steps(
    place: Place, timer: Timer, backend: Any, kernel: str, H: int, steps: int
) -> dict[str, Any]:
    """An Elman RNN of one row and one input, almost no arithmetic: a step is a barrier and what it costs to
    see what others wrote."""
    case = Case(RNN(), Shape(steps, 1, 1, H), "forward")
    try:
        with use(MODES["fp32"]), environment(KERNEL, kernel):
            run = FusedLayer(problems.make(case, "float32"), 1, place)
            run()
            if run.path != "fused":
                return {"failed": run.path}
            samples, failed = rounds({"it": run}, timer, 5, 0.02)
        if failed:
            return {"failed": failed["it"]}
        return {"seconds": statistics.median(samples["it"]) / steps, "plan": str(backend.last_plan)}
    except Exception as error:  # of many libraries
        return {"failed": reason(error)}


def moved_bytes(case: Case, itemsize: int) -> float:
    """Bytes that have to move: x, the weights and y once forward, and thrice with backward.

    Thrice, because going back reads x, y, dy and the weights and writes dx and the weights' gradients: each
    array of forward has two more of its size. What an implementation saves or keeps in between is its own
    affair and does not count.
    """
    T, B, I, H = case.shape
    D, L, G = case.directions, case.layers, case.cell.gates
    inputs = I + (L - 1) * D * H  # of all layers together
    arrays = T * B * problems.valid(case) * (inputs + L * D * H)
    weights = D * G * H * (inputs + L * H + L)
    return itemsize * (arrays + weights) * (3 if case.kind == "training" else 1)


def dependent_steps(case: Case) -> int:
    """Steps that wait for the one before: layers follow each other, directions do not."""
    return case.shape.T * case.layers * (2 if case.kind == "training" else 1)


def bound(case: Case, name: str, mode: Mode, rates: Rates) -> dict[str, Any]:
    """The parts of the bound in seconds, as far as they are known, the largest of them, and which it is."""
    rate = rates.operations.get(name)
    parts = {
        "operations": problems.flops(case) / rate if rate else None,
        "bytes": moved_bytes(case, mode.itemsize) / rates.bytes if rates.bytes else None,
        # From one step to the next there are one fewer than there are steps.
        "steps": (dependent_steps(case) - 1) * rates.step if rates.step else None,
    }
    known = {part: value for part, value in parts.items() if value is not None}
    by = max(known, key=lambda part: known[part]) if known else None
    return {"parts": parts, "by": by, "seconds": known[by] if by else None}
