"""One run: every case checked, then timed, ours and its peers interleaved."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np

from fusedrnn import backends, problems, system
from fusedrnn.bench import memory, registry
from fusedrnn.bench.libraries import TOLERANCE, Library, Native, Results, check, version
from fusedrnn.bench.peer_torch import BFLOAT16, FUSED, Medium, Torch
from fusedrnn.bench.timing import Gemm, Others, ratio, same_threads, speedup, spread, time_blocks, transfer
from fusedrnn.problems import Case

OURS = "fusedrnn"
FULL = "fusedrnn full"  # the same case of ours without lengths and resets
LONGEST = 5.0  # seconds a call; what is estimated to take longer is left out
WRONG = "wrong in bfloat16"  # why a faster setting of PyTorch's does not count
GAIN = 1.03  # from which a setting of PyTorch's counts as faster
EXPECTED = 0.6  # of the rate of the matrix product, for that estimate
# What time_blocks takes: blocks, the seconds of each, and the most for all of a library.
QUICK, USUAL = (3, 0.02, 1.0), (9, 0.1, 5.0)

Progress = Callable[[str, int, int], None]


def truth(case: Case, dtype: str, threads: int) -> Results:
    """What all are compared with: the same numbers in float64, by the reference."""
    data = problems.astype(problems.make(case, dtype), np.float64)
    if case.kind == "update":  # of which there is none without PyTorch
        peers = (registry.PEERS[name] for name in torch_variants(registry.PEERS))
        return next(peer for peer in peers if peer.refuses(case, dtype) is None)(data, threads).results()
    return Native(data, "reference").results()


def run_case(
    case: Case,
    dtype: str,
    backend: str,
    peers: Sequence[str],
    threads: int,
    timing: tuple[int, float, float] = USUAL,
) -> dict[str, Any]:
    """Check and time one case; a row for the table and the JSON file."""

    data = problems.make(case, dtype)
    libraries: dict[str, Any] = {OURS: registry.ours(data, backend, threads, dtype)}
    for name in peers:
        if registry.refuses(name, case, dtype) is None:
            libraries[name] = registry.peer(name, data, threads, dtype)
    exact = truth(case, dtype, threads)
    errors = {name: check(name, each.results(), exact, TOLERANCE[dtype]) for name, each in libraries.items()}
    wrong = {}  # faster in bfloat16, but off by more than that
    for name in torch_variants(libraries) if dtype == "float32" else ():
        if faster_in_bfloat16(libraries[name]):
            rounded = Medium(cast(Torch, registry.PEERS[name](data, threads)))
            try:
                got = rounded.results()
                errors[name] = check(name, got, {key: exact[key] for key in got}, BFLOAT16)
                libraries[name] = rounded
            except RuntimeError as error:
                wrong[name] = str(error)
    if case.ragged or case.resets:
        plain = replace(case, ragged=False, resets=0.0)
        libraries[FULL] = registry.ours(problems.make(plain, dtype), backend, threads, dtype)
        errors[FULL] = check(FULL, libraries[FULL].results(), truth(plain, dtype, threads), TOLERANCE[dtype])
    del exact
    others, before = Others(), transfer(threads)
    samples = time_blocks(libraries, *timing)
    busy, after = others.share(), transfer(threads)

    row = row_of(case, samples, errors) | {"others": busy, "transfers": [before, after]}
    for name, entry in row["libraries"].items():
        entry["path"] = libraries[name].path
        if isinstance(libraries[name], Medium):
            entry |= {"precision": "bfloat16", "tolerance": BFLOAT16}
        if name in wrong:
            entry[WRONG] = wrong[name]
        if case.kind == "training" and hasattr(libraries[name], "saved"):
            entry["saved"] = libraries[name].saved()
    return row


def row_of(case: Case, samples: dict[str, list[float]], errors: dict[str, float]) -> dict[str, Any]:
    """What was measured of a case."""
    work, plain = problems.flops(case), replace(case, ragged=False, resets=0.0)
    row: dict[str, Any] = problems.describe(case) | {"valid": problems.valid(case), "flops": work}
    row |= {"libraries": {}, "best": None}
    for name, values in samples.items():
        median = statistics.median(values)
        entry = {
            "ms": median * 1e3,
            "spread": spread(values),
            "gflops": (problems.flops(plain) if name == FULL else work) / median / 1e9,
            "blocks": len(values),
            "error": errors[name],
        }
        if name != OURS:
            entry["ratio"] = ratio(values, samples[OURS])
        row["libraries"][name] = entry
    outside = [name for name in samples if name in registry.PEERS and name not in registry.OWN]
    if outside:
        best = min(outside, key=lambda name: row["libraries"][name]["ratio"])
        row["best"] = {"peer": best, "ratio": row["libraries"][best]["ratio"]}
    return row


def faster_in_bfloat16(library: Library) -> bool:
    """Whether a variant of PyTorch's is faster with ``set_float32_matmul_precision("medium")``.

    oneDNN's fused layer never is: it does not heed it.
    """
    if not isinstance(library, Torch) or library.path == FUSED:
        return False
    return speedup(library, Medium(library)) > GAIN


def torch_variants(names: Iterable[str]) -> list[str]:
    """PyTorch's variants among the names."""
    return [name for name in names if name.startswith("torch")]


def add_peaks(row: dict[str, Any], case: Case, dtype: str, threads: int, backend: str) -> None:
    """Measure the peak memory of ours and of the first PyTorch variant, each in processes of its own."""
    for name in (OURS, *torch_variants(row["libraries"])[:1]):
        peer = None if name == OURS else name
        row["libraries"][name]["peak"] = memory.peak(case, dtype, threads, backend, peer)


def means(rows: Sequence[dict[str, Any]], peers: Sequence[str]) -> dict[str, Any]:
    """Geometric means of the ratios: of each peer over the cases in which it took part, of the best of
    PyTorch's variants, and of the best of all.
    """

    def mean(ratios: list[float]) -> float | None:
        return statistics.geometric_mean(ratios) if ratios else None

    def ratios(names: Sequence[str]) -> list[list[float]]:
        each = [[row["libraries"][n]["ratio"] for n in names if n in row["libraries"]] for row in rows]
        return [found for found in each if found]

    return {
        "geometric_mean": {name: mean([r[0] for r in ratios([name])]) for name in peers},
        "best_of_torch": mean([min(r) for r in ratios(torch_variants(peers))]),
        "best_of_all": mean([row["best"]["ratio"] for row in rows if row["best"]]),
    }


def run(
    cases: Sequence[Case],
    *,
    suite: str | None = None,
    dtype: str = "float32",
    peers: Sequence[str] | None = None,
    backend: str | None = None,
    threads: int | None = None,
    quick: bool = False,
    peaks: bool = False,
    progress: Progress = lambda what, number, total: None,
) -> dict[str, Any]:
    """Run the benchmark; what it returns is what ``--json`` writes.

    Args:
        cases: What is timed, one after the other.
        suite: The name under which the report goes, slow cases left out; None for cases of one's own.
        dtype: ``float32``, ``float64`` or, for our PyTorch modules beside PyTorch's, ``bfloat16``.
        peers: Names out of ``registry.PEERS``; None for all that are installed, without our own backends.
        backend: Ours; None for the fastest.
        threads: For everybody; None for as many as we take by ourselves.
        quick: Few repetitions.
        peaks: Also measure peak memory, in processes of their own.
        progress: Called with what begins, its number from 1 on, and how many parts there are; before that
            with a summary and the number 0.

    Raises:
        RuntimeError: A library's results are wrong, or a peer that was asked for cannot run here.
        ValueError: A peer that was asked for takes part in no case, or is the backend that is measured.
    """
    chosen = backends.usable(backend).name
    if dtype == registry.LOW or any(case.api for case in cases):
        missing = registry.APIS["layer"].missing()
        if missing is not None:
            raise RuntimeError(f"our PyTorch modules: {missing}")
        if chosen != backends.usable(None).name:
            raise ValueError(f"backend: our PyTorch modules take the fastest, got {chosen}")
    taken, left_out = registry.choose(peers, cases, dtype, chosen)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    total = len(cases) + 1
    with same_threads(threads) as used:
        names = ", ".join([f"{OURS} ({chosen})", *taken])
        progress(f"cases: {len(cases)}, in {dtype}; libraries: {names}; threads: {used}", 0, total)
        gemm = Gemm(dtype, used, (2048,) if quick else (2048, 4096))
        for number, case in enumerate(cases, start=1):
            progress(str(case), number, total)
            gemm.measure()
            estimate = problems.flops(case) / 1e9 / (EXPECTED * gemm.rate) if gemm.rate else 0.0
            if suite is not None and estimate > LONGEST:
                skipped.append(f"{case}: about {estimate:.0f} s a call")
                continue
            row = run_case(case, dtype, chosen, taken, used, QUICK if quick else USUAL)
            if peaks:
                add_peaks(row, case, dtype, used, chosen)
            rows.append(row)
        progress("matrix product", total, total)
        gemm.measure()
    for row in rows:
        for entry in row["libraries"].values():
            entry["of_gemm"] = entry["gflops"] / gemm.rate if gemm.rate else None
    found = system.environment() | {"load before": load}
    found |= {name: version(name) for name in ("onnxruntime", "jax", "dezero") if name in taken}
    return {
        "suite": suite,
        "cell": ", ".join(dict.fromkeys(case.cell.name for case in cases)),
        "dtype": dtype,
        "backend": chosen,
        "threads": used,
        "quick": quick,
        "environment": found,
        "gemm": {"gflops": gemm.rate, "each": gemm.best},
        "left_out": left_out,
        "skipped": skipped,
        "peers": taken,
        "rows": rows,
        **means(rows, taken),
    }
