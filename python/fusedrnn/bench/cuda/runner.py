"""One run on a GPU: every case in every precision, checked and timed, interleaved with PyTorch's."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fusedrnn import problems, system
from fusedrnn.bench.cuda import bounds, cudnn, timing
from fusedrnn.bench.cuda.bounds import Rates
from fusedrnn.bench.cuda.modes import MODES, Mode, use
from fusedrnn.bench.cuda.timing import Timer
from fusedrnn.bench.libraries import Results, check, not_installed
from fusedrnn.bench.peer_torch import (
    FusedCell,
    FusedLayer,
    Place,
    Torch,
    TorchCell,
    TorchMasked,
    TorchPacked,
)
from fusedrnn.bench.runner import FULL, OURS
from fusedrnn.bench.timing import ratio, spread
from fusedrnn.problems import Case, Data

FLOAT32 = "fusedrnn, float32 arrays"  # ours in the precision of 16 bits for products alone
TORCH_VARIANTS: dict[str, type[Torch]] = {
    "torch": Torch,
    "torch-cell": TorchCell,
    "torch-packed": TorchPacked,
    "torch-masked": TorchMasked,
}

Progress = Callable[[str, int, int], None]
Row = dict[str, Any]


@dataclass
class Bench:
    """What all rows of a run share. In the tests a CPU and its clock are in place of a GPU and events."""

    place: Place = field(default_factory=lambda: Place("cuda"))
    timer: Timer = timing.by_events
    rounds: int = 9
    seconds: float = 0.05  # of a library in a round
    capability: tuple[int, int] = (9, 0)
    multiprocessors: int = 132

    @property
    def backend(self) -> Any:
        """Whose ``last_plan`` says how ours ran."""
        from fusedrnn.torch import gpu

        return gpu.backend()


def missing() -> str | None:
    """Why nothing can be measured here, in one line, or None."""
    if (why := not_installed("PyTorch", "torch", extra="torch")) is not None:
        return why
    import torch

    from fusedrnn.torch import gpu

    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    return gpu.unavailable()


def on_this_gpu(quick: bool) -> Bench:
    """The current GPU."""
    import torch

    facts = torch.cuda.get_device_properties()
    bench = Bench(capability=(facts.major, facts.minor), multiprocessors=facts.multi_processor_count)
    return replace(bench, rounds=5, seconds=0.02) if quick else bench


def gpu_facts() -> dict[str, Any]:
    """The GPU and the versions that matter."""
    import torch

    facts = torch.cuda.get_device_properties()
    library: Any = torch.backends.cudnn
    return {
        "name": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "multiprocessors": facts.multi_processor_count,
        "memory": facts.total_memory,
        "cuda of PyTorch": torch.version.cuda,
        "cudnn": library.version(),
    }


def passes(case: Case, forward: bool = False) -> list[Case]:
    """What is timed of a case: forward, and with backward where it is training."""
    if case.kind != "training":
        return [case]
    alone = replace(case, kind="forward")
    return [alone] if forward else [alone, case]


def expected(cases: Sequence[Case], modes: Sequence[str], forward: bool = False) -> list[Row]:
    """What says of each row of a run which one it is."""
    parts = [part for case in cases for part in passes(case, forward)]
    return [problems.describe(part) | {"mode": mode} for part in parts for mode in modes]


def torch_variants(case: Case) -> list[str]:
    """The PyTorch variants: the layer, where it can; a loop of cells only for a single step."""
    return [
        name
        for name, variant in TORCH_VARIANTS.items()
        if variant.refuses(case, "float32") is None and (name != "torch-cell" or case.shape.T == 1)
    ]


def ours(case: Case) -> type[Torch]:
    """Our module in their place."""
    return FusedCell if case.api == "cell" else FusedLayer


class Truths:
    """The results of PyTorch in float64, by case; those of one shape are kept."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.known: dict[Case, Results] = {}

    def of(self, data: Data) -> Results:
        if data.case not in self.known:
            variant = TORCH_VARIANTS[torch_variants(data.case)[0]]
            self.known[data.case] = variant(data, 1, self.place._replace(dtype="float64")).results()
        return self.known[data.case]


def run_row(
    data: Data, full: Data | None, name: str, mode: Mode, bench: Bench, rates: Rates, truths: Truths
) -> Row:
    """A case in one precision; who fails has a line in ``failed`` that says why.

    ``full`` is the same without lengths and resets, where it has some.
    """
    case = data.case
    place = bench.place._replace(dtype=mode.dtype)
    float32 = bench.place._replace(dtype="float32")
    wanted = {OURS: (ours(case), data, place)}
    wanted |= {variant: (TORCH_VARIANTS[variant], data, place) for variant in torch_variants(case)}
    if mode.itemsize == 2:
        wanted[FLOAT32] = (ours(case), data, float32)
    if full is not None:
        wanted[FULL] = (ours(case), full, place)
    ready: dict[str, Torch] = {}
    errors: dict[str, float] = {}
    plans: dict[str, list[str]] = {}
    failed: dict[str, str] = {}
    with use(mode), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fallback is told as a failure
        for who, (kind, given, at) in wanted.items():
            try:
                library = kind(given, 1, at)
                errors[who] = check(who, library.results(), truths.of(given), mode.tolerance)
                if isinstance(library, FusedLayer | FusedCell):
                    plans[who] = plans_of(library, bench.backend)
                ready[who] = library
            except Exception as error:  # of many libraries; the others go on
                failed[who] = timing.reason(error)
        samples, broken = timing.rounds(ready, bench.timer, bench.rounds, bench.seconds)
    least = bounds.bound(case, name, mode, rates)
    row: Row = problems.describe(case) | {
        "mode": name,
        "dtype": mode.dtype,
        "valid": problems.valid(case),
        "flops": problems.flops(case),
        "bound": least,
        "cudnn": asked_for(case, mode, bench),
        "libraries": {},
        "failed": failed | broken,
    }
    for who, values in samples.items():
        median = statistics.median(values)
        entry = {
            "ms": median * 1e3,
            "us_per_step": median * 1e6 / case.shape.T,
            "spread": spread(values),
            "of_bound": least["seconds"] / median if least["seconds"] is not None else None,
            "error": errors[who],
            "plans": plans.get(who),
        }
        if who != OURS and OURS in samples:
            entry["ratio"] = ratio(values, samples[OURS])
        row["libraries"][who] = entry
    return row


def plans_of(library: Torch, backend: Any) -> list[str]:
    """How ours runs forward, and back where there is that. A RuntimeError where PyTorch's own runs."""
    library.outputs()
    path = library.module.last_path
    if path != "fused":
        raise RuntimeError(path)
    found = [str(backend.last_plan)]
    if library.training:
        library()
        found.append(str(backend.last_plan))
    return found


def asked_for(case: Case, mode: Mode, bench: Bench) -> list[str]:
    """The algorithms that PyTorch asks cuDNN for, forward and back."""
    if case.api == "cell":
        return []
    back = (False, True) if case.kind == "training" else (False,)
    return [
        cudnn.algorithm(
            case,
            mode.dtype,
            backward=backward,
            capability=bench.capability,
            multiprocessors=bench.multiprocessors,
        )
        for backward in back
    ]


def run(
    cases: Sequence[Case],
    *,
    suite: str | None = None,
    modes: Sequence[str] = tuple(MODES),
    forward: bool = False,
    quick: bool = False,
    limit: float | None = None,
    bench: Bench | None = None,
    rates: Rates | None = None,
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
        rates: What bounds are made of; None: they are measured first.
        progress: Called with what begins, its number from 1 on, and how many parts there are.
        each: Called with each row as soon as it is there.

    Raises:
        RuntimeError: There is no GPU, or something is missing.
    """
    end = None if limit is None else time.monotonic() + limit
    facts: dict[str, Any] = {"name": "none"}
    if bench is None:
        if (why := missing()) is not None:
            raise RuntimeError(f"--device cuda: {why}")
        bench, facts = on_this_gpu(quick), gpu_facts()
    total = len(cases) + 1
    progress("the bounds", 1, total)
    rates = rates or bounds.measure(bench.place, bench.timer, bench.backend)
    rows: list[Row] = []
    skipped: list[str] = []
    for number, case in enumerate(cases, start=2):
        progress(str(case), number, total)
        for part in passes(case, forward):
            if end is not None and time.monotonic() > end:
                skipped.append(f"{part}: no time left")
                continue
            data, full, truths = problems.make(part, "float32"), None, Truths(bench.place)
            if part.ragged or part.resets:
                full = problems.make(replace(part, ragged=False, resets=0.0), "float32")
            for name in modes:
                rows.append(run_row(data, full, name, MODES[name], bench, rates, truths))
                each(rows[-1])
    return {
        "suite": suite,
        "device": "cuda",
        "modes": list(modes),
        "quick": quick,
        "gpu": facts,
        "environment": system.environment(),
        "rates": rates._asdict(),
        "skipped": skipped,
        "rows": rows,
    }
