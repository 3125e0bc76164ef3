"""What is timed on a GPU: every case in every precision, and the lower bound of its time.

Each result is compared with PyTorch in float64 before it is timed.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from fusedrnn import backends, problems, system
from fusedrnn.backends.cuda import PRECISION
from fusedrnn.bench import registry
from fusedrnn.bench.libraries import Results, check
from fusedrnn.bench.peer_torch import FusedLayer, Place, Torch
from fusedrnn.bench.runner import FULL, OURS, QUICK, USUAL, Progress, row_of
from fusedrnn.bench.timing import time_blocks
from fusedrnn.cells import rnn
from fusedrnn.problems import Case, Data, Shape

PEERS = {name: kind for name, kind in registry.PEERS.items() if issubclass(kind, Torch)}
DEVICE = "cuda"

Row = dict[str, Any]
Timed = Callable[[dict[str, Any]], dict[str, list[float]]]


class Mode(NamedTuple):
    """A precision: the dtype of all arrays, and how factors of float32 products are rounded."""

    dtype: str
    itemsize: int
    tf32: bool  # for the matrix units, as PyTorch does by default
    tolerance: float  # of every library, relative to a tensor's largest entry; rounding adds up over T


MODES = {
    "fp32": Mode("float32", 4, False, 1e-4),
    "tf32": Mode("float32", 4, True, 2e-2),
    "bf16": Mode("bfloat16", 2, False, 1e-1),
    "fp16": Mode("float16", 2, False, 2e-2),
}


@contextlib.contextmanager
def use(mode: Mode) -> Iterator[None]:
    """Within the block PyTorch and our backend multiply as the mode says."""
    import torch

    # Not by torch.backends.cudnn.allow_tf32, which refuses once somebody has called disable_global_flags().
    products: Any = torch.backends.cuda.matmul
    before = torch.backends.cudnn.allow_tf32, products.allow_tf32, os.environ.get(PRECISION)
    os.environ[PRECISION] = "tf32" if mode.tf32 else "ieee"
    try:
        torch._C._set_cudnn_allow_tf32(mode.tf32)
        products.allow_tf32 = mode.tf32
        yield
    finally:
        torch._C._set_cudnn_allow_tf32(before[0])
        products.allow_tf32 = before[1]
        del os.environ[PRECISION]
        if before[2] is not None:
            os.environ[PRECISION] = before[2]


def clock() -> float:
    """The time at which the GPU has done all that it was asked for."""
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def measure(timed: Timed, size: int = 8192, megabytes: int = 1024, steps: int = 4000) -> dict[str, float]:
    """What the GPU does in a second, of which bounds are made: by a mode's name the operations of a large
    product by cuBLAS; ``bytes`` read and written by a copy; dependent ``steps`` of our RNN with almost no
    arithmetic.
    """
    import torch

    def product(mode: Mode) -> Any:
        with use(mode):
            return torch.mm(factors[mode.dtype], factors[mode.dtype])

    drawn = torch.randn(size, size, device=DEVICE)
    factors = {mode.dtype: drawn.to(getattr(torch, mode.dtype)) for mode in MODES.values()}
    a, b = torch.ones(2, megabytes << 18, device=DEVICE)
    runs: dict[str, Any] = {name: functools.partial(product, mode) for name, mode in MODES.items()}
    amounts = dict.fromkeys(MODES, 2.0 * size**3) | {"bytes": 2.0 * a.nbytes, "steps": float(steps)}
    rnns = FusedLayer(problems.make(Case(rnn, Shape(steps, 1, 1, 8), "forward"), "float32"), 1, Place(DEVICE))
    with contextlib.suppress(Exception):  # of many libraries; bounds do without
        rnns()
        runs["steps"] = rnns
    samples = timed(runs | {"bytes": functools.partial(a.copy_, b)})
    return {name: amounts[name] / statistics.median(values) for name, values in samples.items()}


def bound(data: Data, name: str, rates: dict[str, float]) -> dict[str, Any]:
    """Seconds that operations, bytes and dependent steps take in a mode, and which of them take longest.

    x, the weights and y move once forward, and three times with backward, which reads them and dy, and writes
    dx and the weights' gradients. Layers follow each other, directions do not; from one step to the next
    there are one fewer than steps.
    """
    case, passes = data.case, 1 if data.case.kind in ("forward", "step") else 2
    numbers = problems.valid(case) * (data.x.size + data.dy.size)
    numbers += sum(w.size for weights in data.weights for w in weights.values())
    parts = {
        "operations": problems.flops(case) / rates[name],
        "bytes": MODES[name].itemsize * numbers * (2 * passes - 1) / rates["bytes"],
        "steps": (case.shape.T * case.layers * passes - 1) / rates.get("steps", float("inf")),
    }
    by = max(parts, key=parts.__getitem__)
    return {"parts": parts, "by": by, "seconds": parts[by]}


def peers(case: Case) -> dict[str, type[Torch]]:
    """PyTorch's variants that can take part; a loop of cells only for a single step."""
    taken = {name: kind for name, kind in PEERS.items() if kind.refuses(case, "float32") is None}
    return {name: kind for name, kind in taken.items() if name != "torch-cell" or case.shape.T == 1}


@functools.lru_cache(2)
def drawn(case: Case) -> tuple[Data, Results]:
    """The numbers of a case, the same in all precisions, and PyTorch's results in float64."""
    data = problems.make(case, "float32")
    return data, next(iter(peers(case).values()))(data, 1, Place(DEVICE, "float64")).results()


def run_row(case: Case, name: str, timed: Timed, rates: dict[str, float]) -> Row:
    """A case in one precision. What fails has a line in ``failed``; without ours nothing is timed."""
    from fusedrnn.torch import gpu

    backend: Any = gpu.backend()
    ours: Any = registry.APIS[case.api or "layer"]
    wanted = {OURS: (ours, case)} | {peer: (kind, case) for peer, kind in peers(case).items()}
    if case.ragged or case.resets:
        wanted[FULL] = ours, replace(case, ragged=False, resets=0.0)
    ready, errors, failed, plan = {}, {}, {}, ""
    with use(MODES[name]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fallback is told as a failure
        for who, (kind, given) in wanted.items():
            try:
                data, exact = drawn(given)
                library = kind(data, 1, Place(DEVICE, MODES[name].dtype))
                errors[who] = check(who, library.results(), exact, MODES[name].tolerance)
                if kind is ours and library.path != "fused":
                    raise RuntimeError(library.path)
                plan = plan or str(backend.last_plan)  # ours is the first
                ready[who] = library
            except Exception as error:  # of many libraries; the others go on
                failed[who] = " ".join(repr(error).split())[:300]
        row = row_of(case, timed(ready) if OURS in ready else {}, errors)
    row |= {"failed": failed, "plan": plan, "bound": bound(drawn(case)[0], name, rates)}
    for entry in row["libraries"].values():
        entry["us_per_step"] = 1e3 * entry["ms"] / case.shape.T
        entry["of_bound"] = 1e3 * row["bound"]["seconds"] / entry["ms"]
        entry["of_gemm"] = 1e9 * entry["gflops"] / rates[name]
    return row


def missing() -> str | None:
    """Why nothing can be measured on a GPU here, in one line, or None."""
    if (why := FusedLayer.missing()) is not None:
        return why
    import torch

    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} finds no GPU"
    return backends.get("cuda").unavailable()


def run(
    cases: Sequence[Case],
    *,
    suite: str | None = None,
    modes: Sequence[str] = tuple(MODES),
    quick: bool = False,
    progress: Progress = lambda what, number, total: None,
    go_on: Callable[[dict[str, Any]], bool] = lambda report: True,
) -> dict[str, Any]:
    """Run the benchmark; what it returns is what ``--json`` writes.

    Args:
        cases: What is timed, one after the other.
        suite: The name under which the report goes.
        modes: Precisions, out of ``MODES``.
        quick: Few repetitions.
        progress: Called with what begins, its number and that of all.
        go_on: Called with the report so far before each row; where it says no, the rest has no libraries.

    Raises:
        RuntimeError: There is no GPU, or something is missing.
    """
    if (why := missing()) is not None:
        raise RuntimeError(f"--device cuda: {why}")

    def timed(libraries: dict[str, Any]) -> dict[str, list[float]]:
        return time_blocks(libraries, *(QUICK if quick else USUAL), clock, settle=0.0)

    rows = [
        row_of(case, {}, {}) | {"case": f"{case} {mode}", "mode": mode, "failed": {}}
        for case, mode in itertools.product(cases, modes)
    ]
    progress("the bounds", 1, len(rows) + 1)
    report: dict[str, Any] = {"suite": suite, "dtype": ", ".join(modes), "backend": "cuda", "threads": 1}
    report |= {"quick": quick, "modes": [*modes], "rates": (rates := measure(timed)), "rows": rows}
    report |= {"peers": [*PEERS], "environment": system.environment()}
    for number, row in enumerate(rows, start=2):
        if not go_on(report):
            break
        progress(row["case"], number, len(rows) + 1)
        try:
            row |= run_row(problems.described(row), row["mode"], timed, rates) | {"case": row["case"]}
        except Exception as error:  # of many libraries; the other rows go on
            row["failed"] = {OURS: " ".join(repr(error).split())[:300]}
    go_on(report)
    return report
