"""Measures how time grows with T, B, I and H, and what the model of more cores needs; writes docs/scaling.md.

    python bench/scaling.py            measure (on a quiet machine, some minutes), write JSON, and page and
                                       plot on the machine that they are about
    python bench/scaling.py --page     only choose the splits anew and write page and plot from the JSON
    python bench/scaling.py --check    only see whether the page is up to date
    python bench/scaling.py --quick --json FILE    a few small problems, to see that it works

LSTM, float32, forward + backward with every gradient, allocation included, as ``fusedrnn bench`` times it.
With ``--json`` the figures go to that file, and page and plot stay as they are. Needs threadpoolctl and
matplotlib; ``--check`` needs NumPy alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import scaling_model as model
from measured import RESULTS, ROOT, caption, family, folder, table, update
from scaling_model import Split

FILE = RESULTS / "amd-zen5" / "scaling.json"  # the machine that the page is about
PLOT = ROOT / "docs" / "scaling.png"
PAGE = "docs/scaling.md"
BASE = (64, 32, 64, 128)  # T, B, I, H, of which one at a time varies
RANGES = {"T": (4, 4096), "B": (1, 2048), "I": (1, 4096), "H": (16, 2048)}
CORES = (8, 32, 64)  # that are predicted
BETTER = 1.2  # times faster than what the rule takes: from here on it is told
GRID = {"B": (1, 4, 16, 64, 256), "H": (32, 64, 128, 256, 512, 1024)}  # for the table of splits
KIB, MIB = 1 << 10, 1 << 20

# --- measuring --------------------------------------------------------------------------------------------


def shapes(which: str, quick: bool) -> Iterator[tuple[int, tuple[int, int, int, int]]]:
    """The values of one size, powers of two, and the shapes they make."""
    first, last = RANGES[which]
    place = "TBIH".index(which)
    value = first
    while value <= (min(last, 4 * first) if quick else last):
        yield value, tuple(value if k == place else n for k, n in enumerate(BASE))
        value *= 2


def call_of(shape: Sequence[int]) -> Callable[[], Any]:
    """Forward + backward of one problem, the one that ``fusedrnn bench`` times."""
    from fusedrnn import problems
    from fusedrnn.bench.libraries import Native
    from fusedrnn.cells import lstm

    case = problems.Case(lstm, problems.Shape(*shape))
    return Native(problems.make(case, "float32"), "cpu")


def time_shape(shape: Sequence[int], threads: Sequence[int], quick: bool) -> dict[str, dict[str, float]]:
    """Milliseconds and spread with each number of threads, which take turns."""
    from fusedrnn.bench.timing import spread, time_blocks
    from fusedrnn.threads import set_num_threads

    call = call_of(shape)

    def on(count: int) -> Callable[[], Any]:
        def run() -> Any:
            set_num_threads(count)
            return call()

        return run

    blocks, length, limit = (3, 0.01, 0.3) if quick else (7, 0.04, 3.0)
    samples = time_blocks({str(n): on(n) for n in threads}, blocks, length, limit)
    return {
        n: {"ms": 1e3 * statistics.median(values), "spread": spread(values)} for n, values in samples.items()
    }


def size_of(text: str) -> float:
    """``1024K`` in bytes."""
    return float(text[:-1]) * {"K": KIB, "M": MIB, "G": 1 << 30}[text[-1]]


def repeat(measure: Callable[[], float], times: int) -> list[float]:
    """The first calls start threads and fetch pages; they do not count."""
    return [measure() for _ in range(2 + times)][2:]


def product_rate(quick: bool) -> float:
    """Operations a second of one core in the best matrix product at hand."""
    from fusedrnn.bench.timing import Gemm, same_threads

    with same_threads(1) as one:
        gemm = Gemm("float32", one, (512,) if quick else (2048,))
        for _ in range(1 if quick else 3):
            gemm.measure()
    if gemm.rate is None:
        raise RuntimeError("no matrix product could be measured on one thread: pip install threadpoolctl")
    return 1e9 * gemm.rate


def read_rate(threads: int, size: int, quick: bool) -> float:
    """Bytes a second, of all threads together; ``size`` is that of all their parts."""
    from fusedrnn._core import testing

    passes = max(2, (16 * MIB if quick else 512 * MIB) // size)
    return size / min(repeat(lambda: testing.time_reads(threads, size, passes), 3 if quick else 7))


def measure_machine(threads: int, caches: dict[str, str], quick: bool) -> dict[str, float]:
    """What ``model.Machine`` holds; the small costs of the kernels from problems with hardly any products."""
    from fusedrnn import kernels, problems
    from fusedrnn._core import testing
    from fusedrnn.cells import lstm
    from fusedrnn.threads import set_num_threads

    repeats = 5 if quick else 21
    count = 1000 if quick else 20_000
    l1, l2, l3 = (
        size_of(caches.get(name, default))
        for name, default in (("L1 data", "32K"), ("L2 unified", "1024K"), ("L3 unified", "16384K"))
    )
    far = int(4 * l3 if quick else max(8 * l3, 256 * MIB))
    found = {"rate": product_rate(quick), "l1": l1, "l2": l2, "l3": l3, "cores": threads}
    found["l2_read"] = read_rate(1, int(l2 / 2), quick)
    found["l3_read_one"] = read_rate(1, 8 * MIB, quick)
    found["l3_read"] = read_rate(threads, 8 * MIB, quick) / threads
    found["memory_read"] = read_rate(1, far, quick)
    found["memory_read_all"] = read_rate(threads, far, quick)
    # The least: whatever takes a core away in between only adds.
    found["barrier"] = min(repeat(lambda: testing.time_barriers(2, count), repeats))
    found["transfer"] = min(repeat(lambda: testing.time_transfers(count), repeats))
    found["region"] = statistics.median(repeat(lambda: testing.time_region(2), 10 * repeats))
    found["wake"] = statistics.median(repeat(lambda: testing.time_region(2, 2e-3), 10 * repeats))

    set_num_threads(1)

    def seconds(*shape: int) -> float:
        return time_shape(shape, (1,), quick)["1"]["ms"] / 1e3

    def rest(shape: Sequence[int]) -> float:
        """What the model does not explain yet."""
        explained = model.seconds(model.machine_of(found), shape, chosen_split(shape, 1), 1)
        return max(0.0, seconds(*shape) - explained)

    found |= dict.fromkeys(("call", "step", "unit", "weight"), 0.0)
    found["call"] = seconds(1, 1, 1, 16)
    steps, cells = (1024, 1, 1, 16), (32, 256, 1, 32)
    found["step"] = rest(steps) / steps[0]
    found["unit"] = rest(cells) / math.prod((cells[0], cells[1], cells[3]))
    weights = problems.make(problems.Case(lstm, problems.Shape(1, 1, 512, 512)), "float32").weights[0]

    def pack() -> float:
        start = time.perf_counter()
        kernels.pack(lstm, weights, backend="cpu")
        return time.perf_counter() - start

    found["weight"] = statistics.median(repeat(pack, repeats)) / (model.GATES * 512 * 1024)
    return found


def measure(quick: bool) -> dict[str, Any]:
    """Everything that the JSON file holds."""
    from fusedrnn import problems, system
    from fusedrnn.bench.timing import Others
    from fusedrnn.threads import get_num_threads, set_num_threads

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    most = get_num_threads()
    threads = (1, most) if most > 1 else (1,)
    suite = problems.quick(problems.SUITES["core"]) if quick else problems.SUITES["core"]
    points = [(which, *each) for which in RANGES for each in shapes(which, quick)]
    total, done, others = len(points) + len(suite) + 1, 0, Others()

    def progress(what: object) -> None:
        nonlocal done
        done += 1
        print(f"\r\x1b[K{done} of {total}: {what}", end="", file=sys.stderr, flush=True)

    environment = system.environment() | {"load before": load}
    if environment["machine"]["cores"] < 2:
        raise RuntimeError("two threads are measured against each other: this needs two cores")
    try:
        progress("what threads and memory cost")
        machine = measure_machine(max(2, most), environment["machine"].get("caches", {}), quick)
        growth: dict[str, list[dict[str, Any]]] = {which: [] for which in RANGES}
        for which, value, shape in points:
            progress(f"{which} = {value}")
            growth[which].append({"value": value, "threads": time_shape(shape, threads, quick)})
        rows = []
        for case in suite:
            progress(case)
            rows.append({"shape": list(case.shape), "threads": time_shape(case.shape, threads, quick)})
    finally:
        set_num_threads(most)
        print(file=sys.stderr)
    found = {
        "environment": environment | {"others": others.share()},
        "quick": quick,
        "threads": list(threads),
        "base": list(BASE),
        "machine": machine,
        "growth": growth,
        "suite": rows,
    }
    return found | choose(found)


def chosen_split(shape: Sequence[int], threads: int) -> Split:
    """What the kernels do with so many threads, by their own rule."""
    from fusedrnn import _core
    from fusedrnn.backends.cpu import compiled
    from fusedrnn.cells import lstm

    return Split(*_core.testing.split(compiled(lstm), *shape, threads))


def choose(found: dict[str, Any]) -> dict[str, Any]:
    """The splits of all shapes and counts of cores that the page shows."""
    from fusedrnn import _core

    def splits(shape: Sequence[int], counts: Sequence[int]) -> dict[str, list[Any]]:
        return {str(n): list(chosen_split(shape, n)) for n in counts}

    T, _, I, _ = found["base"]
    return {
        "rule": dict(_core.testing.SPLIT_RULE),
        "splits": [splits(row["shape"], (*found["threads"], *CORES)) for row in found["suite"]],
        "grid": [
            {"H": H, "B": B, "splits": splits((T, B, I, H), CORES)} for H in GRID["H"] for B in GRID["B"]
        ],
    }


# --- the page ---------------------------------------------------------------------------------------------


def threads_text(count: int | str) -> str:
    return f"{count} thread" + ("" if int(count) == 1 else "s")


def shape_text(shape: Sequence[int]) -> str:
    return ", ".join(map(str, shape))


def source(found: dict[str, Any]) -> str:
    """Where and when it was measured."""
    each = found["environment"]
    others = [] if each["others"] is None else [f"{each['others']:.0%} of the cores used by other processes"]
    quick = ["**a quick run: figures to be replaced**"] if found["quick"] else []
    return f"{family(each['machine'])}: {', '.join([caption(found), *others, *quick])}"


def curves(found: dict[str, Any], which: str, count: int) -> tuple[list[int], list[float]]:
    """The values of one size, and the milliseconds with so many threads."""
    rows = found["growth"][which]
    return [row["value"] for row in rows], [row["threads"][str(count)]["ms"] for row in rows]


def growth_section(found: dict[str, Any]) -> str:
    counts = found["threads"]
    header = ["", "from", "to", "ms, 1 thread"]
    header += [f"exponent, {threads_text(n)}" for n in counts]
    header += [f"upper half, {threads_text(n)}" for n in counts]
    header += ["largest deviation from the upper fit"]
    rows, spreads = [], []
    for which in found["growth"]:
        values, ms = curves(found, which, 1)
        upper = model.upper_half(values)
        pairs = [curves(found, which, n) for n in counts]
        halves = [model.fit(x[upper], y[upper]) for x, y in pairs]
        rows.append(
            [
                which,
                str(values[0]),
                str(values[-1]),
                f"{ms[0]:.3g} to {ms[-1]:.3g}",
                *(f"{model.fit(*pair).exponent:.2f}" for pair in pairs),
                *(f"{half.exponent:.2f}" for half in halves),
                f"{max(half.worst for half in halves):.0%}",
            ]
        )
        spreads += [each["spread"] for row in found["growth"][which] for each in row["threads"].values()]
    base = ", ".join(f"{name} = {n}" for name, n in zip("TBIH", found["base"], strict=True))
    return "\n".join(
        [
            "![Time against each of T, B, I and H, both axes logarithmic](scaling.png)",
            "",
            f"One size varies, the others are {base}. {source(found)}. Half the interquartile range of the "
            f"times of a point is {statistics.median(spreads):.1%} in the median and at most "
            f"{max(spreads):.0%}.",
            "",
            table(header, rows),
        ]
    )


def machine_section(found: dict[str, Any]) -> str:
    each = found["machine"]
    cores = int(each["cores"])
    rows = [
        ["large matrix product, one core", f"{each['rate'] / 1e9:.0f} GFLOP/s"],
        ["reading from L2, one core", f"{each['l2_read'] / 1e9:.0f} GB/s"],
        ["reading from L3, 8 MiB, one core", f"{each['l3_read_one'] / 1e9:.0f} GB/s"],
        [f"reading from L3, 8 MiB, each of {cores} cores at once", f"{each['l3_read'] / 1e9:.0f} GB/s"],
        ["reading from memory, one core", f"{each['memory_read'] / 1e9:.1f} GB/s"],
        [f"reading from memory, {cores} cores together", f"{each['memory_read_all'] / 1e9:.1f} GB/s"],
        ["moving a cache line from one core to another", f"{1e9 * each['transfer']:.0f} ns"],
        ["a barrier of 2 threads", f"{1e9 * each['barrier']:.0f} ns"],
        ["starting 2 threads, the second awake", f"{1e6 * each['region']:.2f} µs"],
        ["starting 2 threads, the second asleep", f"{1e6 * each['wake']:.0f} µs"],
        ["a call with almost no arithmetic", f"{1e6 * each['call']:.0f} µs"],
        ["each further step of that call", f"{1e9 * each['step']:.0f} ns"],
        ["one unit of one row and step, without the products", f"{1e9 * each['unit']:.2f} ns"],
        ["packing a weight", f"{1e9 * each['weight']:.2f} ns"],
    ]
    further = 2e9 * each["transfer"]
    return "\n".join(
        [
            table(["measured", ""], rows),
            "",
            "So the model assumes that a barrier of P threads takes "
            f"{1e9 * each['barrier']:.0f} + {further:.0f} (P - 2) ns: "
            + ", ".join(f"{1e6 * model.machine_of(each).barrier_of(n):.1f} µs for {n}" for n in CORES)
            + ".",
        ]
    )


def split_of(found: dict[str, Any], number: int, count: int) -> Split:
    """That of a shape of the suite."""
    return Split(*found["splits"][number][str(count)])


def check_section(found: dict[str, Any]) -> str:
    """The model against what was measured."""
    machine = model.machine_of(found["machine"])
    counts = found["threads"]
    header = ["T, B, I, H", *(f"ms, {threads_text(n)}" for n in counts)]
    header += [f"predicted / measured, {n}" for n in counts]
    header += ["speed-up", "predicted speed-up"] if len(counts) > 1 else []
    rows: list[list[str]] = []
    errors: dict[int, list[float]] = {n: [] for n in counts}
    for k, row in enumerate(found["suite"]):
        measured = [row["threads"][str(n)]["ms"] / 1e3 for n in counts]
        predicted = [model.seconds(machine, row["shape"], split_of(found, k, n), n) for n in counts]
        ratios = [p / m for p, m in zip(predicted, measured, strict=True)]
        for n, ratio in zip(counts, ratios, strict=True):
            errors[n].append(ratio)
        cells = [shape_text(row["shape"]), *(f"{1e3 * m:.3g}" for m in measured)]
        cells += [f"{ratio:.2f}" for ratio in ratios]
        if len(counts) > 1:
            cells += [f"{measured[0] / measured[-1]:.2f}", f"{predicted[0] / predicted[-1]:.2f}"]
        rows.append(cells)
    lines = [table(header, rows), ""]
    for n, ratios in errors.items():
        worst = max(ratios, key=lambda ratio: abs(math.log(ratio)))
        lines.append(
            f"{threads_text(n)}: predicted / measured is {statistics.median(ratios):.2f} in the median and "
            f"{worst:.2f} at worst, with a range of {min(ratios):.2f} to {max(ratios):.2f}."
        )
    return "\n".join(lines)


LIMITS = {
    "products": "rows or blocks do not divide evenly",
    "cells": "rows or blocks do not divide evenly",
    "weights": "reading weights in every step",
    "memory": "memory bandwidth",
    "exchange": "reading h and da from other cores",
    "barriers": "barriers",
    "fixed": "fixed costs",
}


def limit_of(machine: model.Machine, shape: Sequence[int], split: Split, cores: int) -> str:
    """What keeps it from being as many times faster as there are cores: the part most above its share."""
    if split.threads == 1:
        return "runs on one thread"
    alone = model.parts(machine, shape, Split(1, True, split.chunks), 1)
    shared = model.parts(machine, shape, split, cores)
    over = {name: shared[name] - alone[name] / cores for name in shared}
    worst = max(over, key=lambda name: over[name])
    if worst in ("products", "cells") and split.threads < cores:
        return f"only {split.threads} threads have work"
    return LIMITS[worst]


def interval(low: float, high: float, form: str) -> str:
    """One number where both are written alike."""
    texts = [format(low, form), format(high, form)]
    return texts[0] if texts[0] == texts[1] else f"{texts[0]} to {texts[1]}"


def prediction_section(found: dict[str, Any]) -> str:
    """Speed-up and efficiency on more cores than were measured."""
    machine = model.machine_of(found["machine"])
    header = ["T, B, I, H"]
    for n in CORES:
        header += [f"{n} cores", "speed-up"]
    header.append(f"limit at {CORES[-1]} cores")
    rows, missed = [], []
    for k, row in enumerate(found["suite"]):
        shape = row["shape"]
        cells = [shape_text(shape)]
        alone = model.seconds(machine, shape, split_of(found, k, 1), 1)
        for n in CORES:
            split = split_of(found, k, n)
            low, high = (
                alone / model.seconds(machine, shape, split, n, grows=grows) for grows in (False, True)
            )
            share = interval(low / n, high / n, ".0%")
            cells += [str(split), f"{interval(low, high, '.1f')} ({share})"]
            missed += better(machine, shape, split, n)
        rows.append([*cells, limit_of(machine, shape, split_of(found, k, CORES[-1]), CORES[-1])])
    lines = [table(header, rows), ""]
    if missed:
        lines += [
            "Cases where the model finds a much faster split, with sleeping threads before the call:",
            "",
        ]
        lines.append(table(["T, B, I, H", "cores", "rule", "model", "speed-up"], missed))
    else:
        lines.append("The model finds no split that is much faster.")
    return "\n".join(lines)


def better(machine: model.Machine, shape: Sequence[int], split: Split, cores: int) -> list[list[str]]:
    """A row for the table of better splits, if there is one; in the case that the rule is careful about."""
    careful = {"grows": True, "asleep": True}
    other = model.best(machine, shape, cores, split.chunks, **careful)
    gain = model.seconds(machine, shape, split, cores, **careful)
    gain /= model.seconds(machine, shape, other, cores, **careful)
    return [[shape_text(shape), str(cores), str(split), str(other), f"{gain:.1f}"]] if gain > BETTER else []


def rule_section(found: dict[str, Any]) -> str:
    """The thresholds, and the table of splits."""
    rule = found["rule"]
    T, _, I, _ = found["base"]
    grid = {(each["H"], each["B"]): each["splits"] for each in found["grid"]}

    def short(split: Split) -> str:
        return "1" if split.threads == 1 else f"{split.threads}{'r' if split.by_rows else 'u'}"

    sizes = {key: list(dict.fromkeys(each[key] for each in found["grid"])) for key in ("H", "B")}
    rows = [
        [str(H), *(", ".join(short(Split(*grid[H, B][str(n)])) for n in CORES) for B in sizes["B"])]
        for H in sizes["H"]
    ]
    cores = ", ".join(map(str, CORES))
    return "\n".join(
        [
            f"- A split by rows needs, for each thread, {rule['call']:,.0f} multiply-adds of forward in the "
            "call and at least one row.",
            f"- A split by units needs, for each thread, {rule['step']:,.0f} multiply-adds of forward in "
            f"each step and at least one block of {model.BLOCK} units.",
            "- If a split by rows can use all threads: by rows if the weights are at most "
            f"{rule['core_cache'] / MIB:.0f} MiB or each thread has at least {rule['rows']} rows, "
            "otherwise by units.",
            "- If not: the split that uses more threads, and by rows if both use the same number.",
            "",
            f"LSTM, float32, T = {T}, I = {I}. Each cell of the table shows the number of threads used on "
            f"{cores} cores; r is by rows, u is by units:",
            "",
            table(["H", *(f"B = {B}" for B in sizes["B"])], rows),
        ]
    )


SECTIONS = {
    "growth": growth_section,
    "machine": machine_section,
    "check": check_section,
    "predictions": prediction_section,
    "splits": rule_section,
}


def write_page(found: dict[str, Any], check: bool) -> int:
    return max([update(PAGE, "scaling.py", of(found), check, part) for part, of in SECTIONS.items()])


def draw(found: dict[str, Any], path: Path) -> None:
    """Four panels: points, and the line through the upper half of them with its exponent."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    from fusedrnn.plot import COLOURS, MARKERS

    figure = Figure(figsize=(7.5, 6.4), dpi=110)
    for axes, which in zip(figure.subplots(2, 2).flat, found["growth"], strict=True):
        for count, colour, marker in zip(found["threads"], COLOURS, MARKERS, strict=False):
            values, ms = curves(found, which, count)
            upper = model.upper_half(values)
            line = model.fit(values[upper], ms[upper])
            label = f"{threads_text(count)}: {which}$^{{{line.exponent:.2f}}}$"
            axes.scatter(values, ms, 24, color=colour, marker=marker, zorder=3)
            axes.plot(values, line.at(values), color=colour, linewidth=0.8, linestyle=":")
            axes.plot(values[upper], line.at(values[upper]), color=colour, linewidth=1.6, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(values[::2], [str(value) for value in values[::2]])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
        axes.minorticks_off()
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.2)  # room for the legend
        others = [f"{name} = {n}" for name, n in zip("TBIH", found["base"], strict=True) if name != which]
        axes.set_xlabel(f"{which}   ({', '.join(others)})", fontsize=9)
        axes.set_ylabel("ms", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=9, loc="upper left")
    machine = found["environment"]["machine"]
    figure.suptitle(
        "LSTM float32, forward + backward: time, and the line through the upper half of the points\n"
        f"{machine.get('model name', machine['architecture'])}, {found['environment']['isa']}, "
        f"{found['environment']['date'][:10]}",
        fontsize=10,
    )
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="How the time grows, and a model of more cores.")
    parser.add_argument("--quick", action="store_true", help="a few small problems")
    parser.add_argument("--json", type=Path, help="write the figures here, and no page")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page anew")
    parser.add_argument("--check", action="store_true", help="only see whether the page is up to date")
    options = parser.parse_args(arguments)
    if options.check:
        if not PLOT.exists():
            print("docs/scaling.png is missing: run python bench/scaling.py --page")
        return int(write_page(json.loads(FILE.read_text()), True) or not PLOT.exists())
    if options.page:
        found = json.loads(FILE.read_text())
        found |= choose(found)
    else:
        start = time.perf_counter()
        found = measure(options.quick)
        print(f"measured in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    measured = FILE if options.page else folder(found["environment"]["machine"]) / FILE.name
    file = options.json or measured
    file.write_text(json.dumps(found, indent=1) + "\n")
    if file == FILE:
        from fusedrnn.plot import style

        with style():
            draw(found, PLOT)
        return write_page(found, False)
    for part, section in SECTIONS.items():
        print(f"\n{part}\n\n{section(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
