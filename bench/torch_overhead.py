"""What a call of fusedrnn.torch takes beside torch.nn's, where the arithmetic is little.

    python bench/torch_overhead.py [--threads N] [--seconds S] [--json FILE]

Minima over many short blocks of calls, the participants taking turns, and the quotient of the two.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

import fusedrnn.torch as ft
from fusedrnn import system
from fusedrnn.threads import set_num_threads


def forward(module, I, H):
    """One step of one row from a given state, without a graph."""
    cell = isinstance(module, torch.nn.RNNCellBase)
    x = torch.randn(1, I) if cell else torch.randn(1, 1, I)
    h = torch.randn(*x.shape[:-1], H)
    hx = (h, h.clone()) if isinstance(module, (torch.nn.LSTM, torch.nn.LSTMCell)) else h

    def run(times):
        with torch.no_grad():
            for _ in range(times):
                module(x, hx)

    return run


def step(module, T, I):
    """Forward and backward of a sequence of one row."""
    x = torch.randn(T, 1, I)

    def run(times):
        for _ in range(times):
            module(x)[0].sum().backward()

    return run


def rows():
    """Name, goal for the quotient or None, ours, PyTorch's."""
    nn = torch.nn
    yield (
        "LSTMCell forward 1,1,64,256",
        0.7,
        forward(ft.LSTMCell(64, 256), 64, 256),
        forward(nn.LSTMCell(64, 256), 64, 256),
    )
    yield (
        "LSTM forward 1,1,64,256",
        0.25,
        forward(ft.LSTM(64, 256), 64, 256),
        forward(nn.LSTM(64, 256), 64, 256),
    )
    yield (
        "GRUCell forward 1,1,64,256",
        None,
        forward(ft.GRUCell(64, 256), 64, 256),
        forward(nn.GRUCell(64, 256), 64, 256),
    )
    for I in (64, 1):
        yield (
            f"LSTM forward + backward 100,1,{I},64",
            0.3,
            step(ft.LSTM(I, 64), 100, I),
            step(nn.LSTM(I, 64), 100, I),
        )


def measure(seconds):
    """Microseconds per call of both, and the quotient."""
    found = []
    for name, goal, ours, theirs in rows():
        best = [float("inf")] * 2
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for i, run in enumerate((ours, theirs)):
                start = time.perf_counter()
                run(20)
                best[i] = min(best[i], (time.perf_counter() - start) / 20 * 1e6)
        found.append(
            {"name": name, "goal": goal, "ours": best[0], "torch": best[1], "ratio": best[0] / best[1]}
        )
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=1, help="1 unless given")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row; 3 unless given")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    set_num_threads(options.threads)
    torch.set_num_threads(options.threads)
    found = measure(options.seconds)
    for row in found:
        goal = "" if row["goal"] is None else f"  goal {row['goal']}"
        times = f"ours {row['ours']:7.1f} us  torch.nn {row['torch']:7.1f} us"
        print(f"{row['name']:36} {times}  {row['ratio']:.2f}{goal}")
    if options.json is not None:
        report = {"environment": system.environment(), "threads": options.threads, "rows": found}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
