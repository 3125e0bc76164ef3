"""What it costs to read the weights anew in every call: ours, ours after ``freeze``, and PyTorch's.

    python bench/frozen.py            measure, on a quiet machine; write JSON and docs/speed.md
    python bench/frozen.py --page     only write the page anew
    python bench/frozen.py --check    only see whether it is up to date

One row of LSTM without gradients, I = H: a step of ``LSTMCell``, and 25 steps of ``LSTM``, which ``LSTMCell``
has no call for. Every figure is the smallest of many short blocks, the variants interleaved.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import measured

from fusedrnn import terminal
from fusedrnn.bench.timing import same_threads

SIZES = (64, 256, 1024)
THREADS = (1, None)
HEADER = ["threads", "H", "call", "torch.nn us", "ours", "frozen", "ours / torch.nn", "frozen / torch.nn"]


def variants(H: int, steps: int) -> dict[str, Callable[[], Any]]:
    """A call of each."""
    import torch

    import fusedrnn.torch as ours

    torch.manual_seed(0)
    name = "LSTMCell" if steps == 1 else "LSTM"
    theirs = getattr(torch.nn, name)(H, H).eval()
    own = getattr(ours, name)(H, H).eval()
    own.load_state_dict(theirs.state_dict())
    frozen = ours.freeze(copy.deepcopy(own))
    x = torch.randn(*((1, H) if steps == 1 else (steps, 1, H)))
    state = tuple(torch.randn(*((1, H) if steps == 1 else (1, 1, H))) for _ in range(2))
    found = {"torch": theirs, "ours": own, "frozen": frozen}
    return {key: lambda module=module: module(x, state) for key, module in found.items()}


def measure(H: int, steps: int, seconds: float) -> dict[str, float]:
    """Microseconds a call."""
    import torch

    runs = variants(H, steps)
    best = dict.fromkeys(runs, float("inf"))
    with torch.no_grad():
        start = time.perf_counter()
        runs["torch"]()
        runs["torch"]()
        times = max(3, int(2e-3 / (time.perf_counter() - start)))
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for name, run in runs.items():
                start = time.perf_counter()
                for _ in range(times):
                    run()
                best[name] = min(best[name], 1e6 * (time.perf_counter() - start) / times)
    return best


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A line for each."""
    lines = []
    for row in rows:
        us = row["us"]
        call = "LSTMCell" if row["T"] == 1 else f"LSTM, T = {row['T']}"
        values = [f"{us[name]:.0f}" for name in ("torch", "ours", "frozen")]
        ratios = [f"{us[name] / us['torch']:.2f}" for name in ("ours", "frozen")]
        lines.append([str(row["threads"]), str(row["H"]), call, *values, *ratios])
    return lines


def section(reports: dict[str, dict[str, Any]]) -> str:
    """The table of the page."""
    rows = {family: table(found["rows"]) for family, found in reports.items()}
    return f"{measured.side_by_side(HEADER, rows, left=3)}\n\n{measured.captions(reports)}"


def figures(options: argparse.Namespace) -> dict[str, Any]:
    """What the file holds."""
    rows = []
    for wanted in THREADS:
        with same_threads(wanted) as threads:
            for steps in (1, 25):
                for H in SIZES:
                    us = measure(H, steps, options.seconds)
                    rows.append({"threads": threads, "H": H, "T": steps, "us": us})
    terminal.table("microseconds a call, B = 1, I = H, float32", HEADER, table(rows), left=3)
    return {"rows": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description="What it costs to read weights anew in every call.")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row; 3 unless given")
    return measured.run(__file__, parser, figures, section, "docs/speed.md", "frozen")


if __name__ == "__main__":
    raise SystemExit(main())
