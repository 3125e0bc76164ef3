"""What is timed on a GPU: every case in every precision, forward and with backward, and its bound.

Each result is compared with PyTorch in float64 before it is timed. Times are those of CUDA events, the
libraries interleaved.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from fusedrnn import problems, system
from fusedrnn.backends.cuda import PRECISION
from fusedrnn.bench import registry
from fusedrnn.bench.libraries import Results, check, not_installed
from fusedrnn.bench.peer_torch import FusedLayer, FusedModule, Place
from fusedrnn.bench.runner import FULL, OURS, Progress, torch_variants
from fusedrnn.bench.timing import ratio, spread
from fusedrnn.cells import rnn
from fusedrnn.problems import Case, Data, Shape

PEERS: dict[str, Any] = {name: registry.PEERS[name] for name in torch_variants(registry.PEERS)}

Run = Callable[[], Any]
Row = dict[str, Any]


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


def by_events(run: Run, count: int) -> float:
    """Seconds that so many calls take on PyTorch's current stream, waits for the CPU among them."""
    import torch

    event: Any = torch.cuda.Event
    begin, end = event(enable_timing=True), event(enable_timing=True)
    begin.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


class Bench(NamedTuple):
    """Where and how long. In the tests a CPU and its clock are in place of a GPU and events."""

    place: Place = Place("cuda")
    timer: Callable[[Run, int], float] = by_events
    rounds: int = 9
    seconds: float = 0.05  # of a library in a round


def rounds(runs: Mapping[str, Run], bench: Bench) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds a call of each in every round, and why there are none of those that failed.

    Each begins a round in turn. Two rounds of two calls come first and do not count: compilation, memory,
    choices that libraries make; the second says how many calls are a library's share of a round.
    """
    failed: dict[str, str] = {}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(-2, bench.rounds):
        names = list(samples)
        turn = number % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            count = 2 if number < 0 else max(1, round(bench.seconds / max(samples[name][1], 1e-9)))
            try:
                samples[name].append(bench.timer(runs[name], count) / count)
            except Exception as error:  # of many libraries; the others go on
                failed[name] = reason(error)
                del samples[name]
    return {name: values[2:] for name, values in samples.items()}, failed


def reason(error: BaseException) -> str:
    """An error in one line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


class Rates(NamedTuple):
    """What this GPU does in a second; 0 where it could not be measured."""

    operations: dict[str, float]  # in a large product by cuBLAS, by the mode's name
    bytes: float  # read and written, in a copy
    steps: float  # one after the other, of an RNN of ours with next to no arithmetic


def measure(bench: Bench, size: int = 8192, megabytes: int = 1024, steps: int = 4000) -> Rates:
    """The rates that bounds are made of."""
    import torch

    def rate(amount: float, run: Run) -> float:
        samples, _ = rounds({"it": run}, bench)
        return amount / statistics.median(samples["it"]) if samples else 0.0

    device, operations = bench.place.device, {}
    for name, mode in MODES.items():
        with use(mode):
            a = torch.randn(size, size, device=device, dtype=getattr(torch, mode.dtype))
            operations[name] = rate(2.0 * size**3, lambda a=a: a @ a)  # type: ignore[misc]
    a = torch.ones(megabytes << 18, device=device)
    b = torch.empty_like(a)
    copied = rate(2.0 * a.nbytes, lambda: b.copy_(a))
    with use(MODES["fp32"]):
        case = Case(rnn, Shape(steps, 1, 1, 8), "forward")
        return Rates(
            operations, copied, rate(steps, FusedLayer(problems.make(case, "float32"), 1, bench.place))
        )


def moved_bytes(case: Case, itemsize: int) -> float:
    """Bytes that have to move: x, the weights and y once forward, and thrice with backward.

    Going back reads them and dy, and writes dx and the weights' gradients.
    """
    T, B, I, H = case.shape
    D, L, G = case.directions, case.layers, case.cell.blocks["weight_ih"]
    inputs = I + (L - 1) * D * H  # of all layers together
    arrays = T * B * problems.valid(case) * (inputs + L * D * H)
    weights = D * G * H * (inputs + L * H + L)
    return itemsize * (arrays + weights) * (3 if case.kind == "training" else 1)


def bound(case: Case, name: str, rates: Rates) -> dict[str, Any]:
    """Seconds that operations, bytes and dependent steps take, the largest of them, and which it is.

    Layers follow each other, directions do not; from one step to the next there are one fewer than steps.
    """
    steps = case.shape.T * case.layers * (2 if case.kind == "training" else 1)
    work = {
        "operations": (problems.flops(case), rates.operations[name]),
        "bytes": (moved_bytes(case, MODES[name].itemsize), rates.bytes),
        "steps": (steps - 1, rates.steps),
    }
    parts = {what: amount / rate for what, (amount, rate) in work.items() if rate}
    by = max(parts, key=lambda what: parts[what])
    return {"parts": parts, "by": by, "seconds": parts[by]}


def passes(case: Case, forward: bool) -> list[Case]:
    """What is timed of a case: forward, and with backward where it is training."""
    return [replace(case, kind="forward"), case][: 2 - forward] if case.kind == "training" else [case]


def expected(cases: Sequence[Case], modes: Sequence[str], forward: bool = False) -> list[Row]:
    """What says of each row of a run which one it is."""
    parts = [part for case in cases for part in passes(case, forward)]
    return [problems.describe(part) | {"mode": mode} for part in parts for mode in modes]


def peers(case: Case) -> list[str]:
    """PyTorch's variants that can take part; a loop of cells only for a single step."""
    taken = [name for name, peer in PEERS.items() if peer.refuses(case, "float32") is None]
    return [name for name in taken if name != "torch-cell" or case.shape.T == 1]


def plans_of(library: FusedModule, backend: Any) -> list[str]:
    """How ours runs forward, and back where there is that. A RuntimeError where PyTorch's own runs."""
    found = []
    for run in (library.outputs, library)[: 1 + library.training]:
        run()
        if library.path != "fused":
            raise RuntimeError(library.path)
        found.append(str(backend.last_plan))
    return found


def run_row(
    data: Data, full: Data | None, name: str, bench: Bench, rates: Rates, exact: dict[Case, Results]
) -> Row:
    """A case in one precision; who fails has a line in ``failed`` that says why.

    ``full`` is the same without lengths and resets, where it has some. ``exact`` keeps the results of PyTorch
    in float64 for the other precisions.
    """
    from fusedrnn.torch import gpu

    case, mode, place = data.case, MODES[name], bench.place._replace(dtype=MODES[name].dtype)
    ours: Any = registry.APIS[case.api or "layer"]
    wanted = {OURS: (ours, data)} | {peer: (PEERS[peer], data) for peer in peers(case)}
    wanted |= {} if full is None else {FULL: (ours, full)}
    ready: dict[str, Run] = {}
    found: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    with use(mode), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fallback is told as a failure
        for who, (kind, given) in wanted.items():
            try:
                if given.case not in exact:
                    wide = PEERS[peers(given.case)[0]](given, 1, place._replace(dtype="float64"))
                    exact[given.case] = wide.results()
                library = kind(given, 1, place)
                found[who] = {"error": check(who, library.results(), exact[given.case], mode.tolerance)}
                if kind is ours:
                    found[who]["plans"] = plans_of(library, gpu.backend())
                ready[who] = library
            except Exception as error:  # of many libraries; the others go on
                failed[who] = reason(error)
        samples, broken = rounds(ready, bench)
    least = bound(case, name, rates)
    for who, values in samples.items():
        median = statistics.median(values)
        found[who] |= {"ms": median * 1e3, "us_per_step": median * 1e6 / case.shape.T}
        found[who] |= {"spread": spread(values), "of_bound": least["seconds"] / median}
        if who != OURS and OURS in samples:
            found[who]["ratio"] = ratio(values, samples[OURS])
    row = problems.describe(case) | {"mode": name, "valid": problems.valid(case), "bound": least}
    return row | {"libraries": {who: found[who] for who in samples}, "failed": failed | broken}


def missing() -> str | None:
    """Why nothing can be measured here, in one line, or None."""
    if (why := not_installed("PyTorch", "torch", extra="torch")) is not None:
        return why
    import torch

    from fusedrnn.torch import gpu

    return gpu.unavailable() if torch.cuda.is_available() else f"PyTorch {torch.__version__} finds no GPU"


def run(
    cases: Sequence[Case],
    *,
    suite: str | None = None,
    modes: Sequence[str] = tuple(MODES),
    forward: bool = False,
    quick: bool = False,
    limit: float | None = None,
    bench: Bench | None = None,
    progress: Progress = lambda what, number, total: None,
    each: Callable[[Row], None] = lambda row: None,
) -> dict[str, Any]:
    """Run the benchmark; what it returns is what ``--json`` writes.

    Args:
        cases: What is timed, one after the other.
        suite: The name under which the report goes.
        modes: Precisions, out of ``MODES``.
        forward: Without backward.
        quick: Few repetitions.
        limit: Seconds after which no row begins any more; what is left out is named.
        bench: Where and how; None: the current GPU.
        progress, each: Called with what begins, its number and that of all; and with each row that is there.

    Raises:
        RuntimeError: There is no GPU, or something is missing.
    """
    end = time.monotonic() + (float("inf") if limit is None else limit)
    gpu: dict[str, Any] = {"name": "no GPU"}
    if bench is None:
        if (why := missing()) is not None:
            raise RuntimeError(f"--device cuda: {why}")
        import torch

        gpu = {"name": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability()}
        cudnn: Any = torch.backends.cudnn
        gpu |= {"CUDA": torch.version.cuda, "cuDNN": cudnn.version()}
        bench = Bench(rounds=5, seconds=0.02) if quick else Bench()
    progress("the bounds", 1, len(cases) + 1)
    rates = measure(bench)
    rows: list[Row] = []
    skipped: list[str] = []
    for number, case in enumerate(cases, start=2):
        progress(str(case), number, len(cases) + 1)
        for part in passes(case, forward):
            if time.monotonic() > end:
                skipped.append(f"{part}: no time left")
                continue
            data, plain = problems.make(part, "float32"), replace(part, ragged=False, resets=0.0)
            full = problems.make(plain, "float32") if plain != part else None
            exact: dict[Case, Results] = {}
            for name in modes:
                rows.append(run_row(data, full, name, bench, rates, exact))
                each(rows[-1])
    found = {"suite": suite, "device": "cuda", "modes": list(modes), "quick": quick, "gpu": gpu}
    found |= {"environment": system.environment(), "rates": rates._asdict()}
    return found | {"skipped": skipped, "rows": rows}
