"""Measures the programs, natively and in PyTorch, and writes docs/programs.md's tables from bench/results.

    export FUSEDRNN_DATA=FOLDER OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
    python bench/programs_page.py --measure            all programs, seed 0, one thread
    python bench/programs_page.py --measure --seeds 1 2 3 4
    python bench/programs_page.py --measure --curves --seeds 0 1 2    forgetting curves alone
    python bench/programs_page.py                      write the tables
    python bench/programs_page.py --check              only see whether they are up to date

The times shown are those of seed 0. What is measured again takes the place of what was there.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measured import RESULTS, ROOT, Report, by_family, captions, folder, side_by_side, table, update

KINDS = {"native": "native", "fusedrnn": "our layer in PyTorch", "torch": "PyTorch"}
# Run: program and arguments; the example in PyTorch and its arguments, or None.
RUNS: dict[str, tuple[list[str], list[str] | None]] = {
    "sine": (["sine"], None),
    "passenger-flow": (["passenger-flow"], ["passenger_flow"]),
    "feeding-back": (["feeding-back"], ["feeding_back", "DATA"]),
    "waves": (["waves"], ["waves"]),
    "waves, sine": (["waves", "--wave", "sine"], ["waves", "--wave", "sine"]),
    "classify": (["classify"], ["classify"]),
    "continual": (["continual"], ["continual"]),
    "runoff": (["runoff", "--trees"], None),
}
CURVES = ("none", "e", "2", "5", "7", "10")
CURVE_RUNS: dict[str, tuple[list[str], list[str] | None]] = {
    f"{over} {curve}": (["feeding-back", "--over", over, "--forgetting", curve], None)
    for over in ("all", "valid")
    for curve in CURVES
    if (over, curve) != ("all", "none")  # that is feeding-back itself
}
LSTM = "LSTM, this library"
# Run, what was tested, figure, what was reported for it, and the trivial answer beside it.
ROWS = (
    ("sine", "LSTM", "MSE", 0.00065249, None),
    ("passenger-flow", "LSTM, scaled to [0, 1]", "MSE", None, "seasonal naive: as a year ago"),
    ("passenger-flow", "LSTM on the change of growth", "MSE", None, "growth as last month"),
    ("feeding-back", "LSTM", "MSE", 0.00727, "holding the last known day"),
    ("feeding-back", "LSTM", "last day", -0.647, "holding the last known day"),
    ("feeding-back", "LSTM", "60 days beyond", 33352, "holding the last known day"),
    ("waves", "RNN", "MSE", 0.0234, "persistence: the last value again"),
    ("waves, sine", "RNN", "MSE", None, "persistence: the last value again"),
    ("classify", "LSTM", "accuracy", None, "always process 1"),
    ("classify", "LSTM", "F1", None, "always process 1"),
    ("continual", "LSTM, before", "old data", None, "persistence: the last value again"),
    ("continual", "LSTM, after", "new data", None, "persistence: the last value again"),
    ("continual", "LSTM, after", "old data", None, "persistence: the last value again"),
    ("runoff", LSTM, "median", None, "gradient-boosted trees on lags"),
)


def native(arguments: list[str], seed: int) -> dict[str, Any]:
    from fusedrnn import programs
    from fusedrnn.terminal import Report

    parser = argparse.ArgumentParser()
    module = programs.PROGRAMS[arguments[0]]
    module.add_arguments(parser)
    with tempfile.TemporaryDirectory() as out:
        given = parser.parse_args([*arguments[1:], "--no-plot", "--out", out, "--seed", str(seed)])
        start = time.perf_counter()
        found = module.run(given, Report())
    if arguments[0] == "sine":
        return {"seconds": time.perf_counter() - start, "scores": {"LSTM": found.scores}}
    return {"seconds": found.seconds, "scores": found.scores}


def pytorch(arguments: list[str], seed: int, layers: str) -> dict[str, Any]:
    sys.path.insert(0, str(ROOT / "examples" / "torch"))
    data = Path(os.environ["FUSEDRNN_DATA"]) / "wordle_reported_2022.csv"
    module = importlib.import_module(arguments[0])
    given = [str(data) if a == "DATA" else a for a in arguments[1:]]
    parsed = module.arguments().parse_args([*given, "--seed", str(seed), "--layers", layers])
    _, seconds, scores = module.program(parsed)
    return {"seconds": seconds, "scores": scores}


def measure(runs: dict[str, tuple[list[str], list[str] | None]], seeds: list[int]) -> None:
    """Run all with one thread, and keep each as soon as it is done."""
    import torch  # noqa: F401  loaded for all alike, and its version is noted

    from fusedrnn import system
    from fusedrnn.bench.timing import same_threads

    if "FUSEDRNN_DATA" not in os.environ:
        sys.exit("FUSEDRNN_DATA is not set: the folder with wordle_reported_2022.csv")
    file = folder(system.machine()) / "programs.json"
    report = json.loads(file.read_text()) if file.exists() else {"runs": {}}
    if 0 in seeds and runs is RUNS:
        report["environment"] = system.environment() | {"load before": os.getloadavg()[0]}
    with same_threads(1):
        for seed in seeds:
            for name, (own, example) in runs.items():
                if name == "sine" and seed:
                    continue  # its published figure belongs to one seed
                given = 42 if name == "sine" else seed
                for kind in KINDS if example else ("native",):
                    with contextlib.redirect_stdout(io.StringIO()):
                        found = (
                            native(own, given) if kind == "native" else pytorch(example or [], given, kind)
                        )
                    report["runs"].setdefault(name, {}).setdefault(kind, {})[str(seed)] = found
                    file.write_text(json.dumps(report, indent=1) + "\n")
                    print(f"{name}, {kind}, seed {seed}: {found['seconds']:.2f} s", flush=True)


def values(report: dict[str, Any], run: str, kind: str, row: str, figure: str) -> list[float]:
    """Of every seed that has it."""
    seeds = report["runs"].get(run, {}).get(kind, {})
    found = [seeds[seed]["scores"].get(row, {}) for seed in sorted(seeds, key=int)]
    return [scores[figure] for scores in found if figure in scores]


def shown(found: list[float]) -> str:
    """Median, least and most."""
    if not found:
        return ""
    middle = f"{statistics.median(found):.3g}" if max(found) < 1000 else f"{statistics.median(found):.0f}"
    if len(found) == 1 or min(found) == max(found):
        return middle
    low, high = (f"{v:.3g}" if max(found) < 1000 else f"{v:.0f}" for v in (min(found), max(found)))
    return f"{middle} ({low} to {high})"


def fullest(reports: dict[str, Report]) -> Report:
    """Of the family with the most seeds: what is learnt hardly depends on the processor."""
    return max(reports.values(), key=lambda report: len(report["runs"]["waves"]["native"]))


def scores(reports: dict[str, Report]) -> list[str]:
    report = fullest(reports)
    rows, reached = [], []
    for run, row, figure, reported, trivial in ROWS:
        of_kind = {kind: values(report, run, kind, row, figure) for kind in KINDS}
        without = values(report, run, "native", trivial, figure) if trivial else []
        cells = ["" if reported is None else f"{reported:.5g}", *map(shown, of_kind.values()), shown(without)]
        rows.append([run, f"{row}: {figure}", *cells])
        if reported is not None and figure == "MSE" and run != "sine":
            counts = (f"{sum(v <= reported for v in found)} of {len(found)}" for found in of_kind.values())
            reached.append([run, *counts])
    found = json.loads((RESULTS / "pollution.json").read_text())
    k = [row["epochs"] for row in found["seeds"][0]["after"]].index(found["reported"]["epochs"])
    errors = [seed["after"][k]["MSE"] for seed in found["seeds"]]
    rows.insert(
        1, ["pollution", "LSTM: MSE", f"{found['reported']['MSE']:.5g}", shown(errors), "", "", "0 (copying)"]
    )
    header = ["program", "score", "reported", *KINDS.values(), "simple forecast"]
    seeds = len(report["runs"]["waves"]["native"])
    return [
        table(header, rows, left=2),
        "",
        f"Each cell is the median of up to {seeds} seeds (3 for `pollution`), with the lowest and the "
        "highest value in brackets. A cell without brackets has one seed, for `sine` the published one.",
        "",
        table(["seeds with at most the reported MSE", *KINDS.values()], reached),
    ]


def times(reports: dict[str, Report]) -> list[str]:
    rows: dict[str, list[list[str]]] = {}
    for family, report in reports.items():
        rows[family] = []
        for run, (_, example) in RUNS.items():
            of_run = {k: report["runs"][run][k]["0"] for k in (KINDS if example else ("native",))}
            seconds = {k: found["seconds"] for k, found in of_run.items() if "seconds" in found}
            cells = [f"{seconds[kind]:.2f}" if kind in seconds else "" for kind in KINDS]
            ratio = f"{seconds['torch'] / seconds['native']:.1f}" if example else ""
            rows[family].append([run, *cells, ratio])
    return [
        side_by_side(["training, s", *KINDS.values(), "PyTorch / native"], rows),
        "",
        "One thread, float32, seed 0, one run each.",
        "",
        captions(reports),
    ]


def runoff(reports: dict[str, Report]) -> list[str]:
    """Of every forecast, best first."""
    report = max(reports.values(), key=lambda report: len(report["runs"].get("runoff", {}).get("native", {})))
    seeds = report["runs"]["runoff"]["native"]
    figures = ("median", "worst tenth", "never seen: median")
    found = {
        name: [values(report, "runoff", "native", name, figure) for figure in figures]
        for name in next(iter(seeds.values()))["scores"]
    }
    rows = [[name, *map(shown, each)] for name, each in found.items()]
    rows.sort(key=lambda row: -statistics.median(found[row[0]][0]))
    best = [max(run["scores"], key=lambda name: run["scores"][name]["median"]) for run in seeds.values()]
    return [
        table(["efficiency", *figures], rows),
        "",
        f"Each cell is the median of {len(seeds)} seeds, with the lowest and the highest value in brackets. "
        f"The LSTM is the best with {best.count(LSTM)} of them.",
    ]


def curves(reports: dict[str, Report]) -> list[str]:
    """Of every seed that all curves were run with."""
    report, rows = fullest(reports), []
    for over in ("all", "valid"):
        for kind, label in KINDS.items():
            runs = ["feeding-back" if (over, c) == ("all", "none") else f"{over} {c}" for c in CURVES]
            of_curves = [report["runs"].get(run, {}).get(kind, {}) for run in runs]
            for seed in sorted(set.intersection(*map(set, of_curves)), key=int):
                errors = [seeds[seed]["scores"]["LSTM"]["MSE"] for seeds in of_curves]
                rows.append([over, label, seed, *(f"{error:.4f}" for error in errors)])
    names = ["none", "tanh(e t/N)", *(f"alpha {curve}" for curve in CURVES[2:])]
    return [table(["loss over", "with", "seed", *names], rows, left=2)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--measure", action="store_true", help="run the programs first")
    parser.add_argument("--curves", action="store_true", help="measure the forgetting curves alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args()
    if args.measure:
        measure(CURVE_RUNS if args.curves else RUNS, args.seeds)
    reports = by_family("programs")
    parts = {"scores": scores, "runoff": runoff, "times": times, "curves": curves}
    page, script = "docs/programs.md", "programs_page.py"
    return max(
        update(page, script, "\n".join(part(reports)), args.check, name) for name, part in parts.items()
    )


if __name__ == "__main__":
    sys.exit(main())
