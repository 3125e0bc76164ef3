"""A whole PyTorch training step with our LSTM on one pool of threads or another, beside ``nn.LSTM``.

PyTorch's own threads run between our calls, as in real training. The step is that of ``fusedrnn bench --suite
pytorch``, where ours runs on PyTorch's OpenMP threads.

    python bench/torch_step.py              all threads
    python bench/torch_step.py --threads 1
    python bench/torch_step.py --json FILE

Ours is timed three times: on our own pool of threads, on PyTorch's OpenMP threads, and on the caller's alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch

from fusedrnn import problems, system
from fusedrnn.bench.libraries import TOLERANCE, check
from fusedrnn.bench.peer_torch import FusedLayer, Torch
from fusedrnn.bench.report import BUSY
from fusedrnn.bench.runner import truth
from fusedrnn.bench.timing import Others, ratio, same_threads, spread, time_blocks
from fusedrnn.cells import lstm
from fusedrnn.threads import set_num_threads, set_thread_pool

SHAPES = ((64, 16, 128, 128), (30, 30, 1, 100))  # T, B, I, H


class Ours(FusedLayer):
    """Our layer, with so many threads of a pool for our kernels."""

    def __init__(self, data, threads, pool="own"):
        super().__init__(data, threads)
        self.threads, self.pool = threads, pool

    def __call__(self):
        set_num_threads(self.threads)
        set_thread_pool(self.pool)
        return super().__call__()


def measure(shape, threads, blocks=9, seconds=0.1):
    """Check that all learn the same, then time them, interleaved."""
    case = problems.Case(lstm, problems.Shape(*shape), "update", api="layer")
    data = problems.make(case, "float32")
    runs = {
        "nn.LSTM": Torch(data, threads),
        "ours, own pool": Ours(data, threads),
        "ours, OpenMP threads": Ours(data, threads, "openmp"),
        "ours, one thread": Ours(data, 1),
    }
    exact = truth(case, "float32", threads)
    for name, run in runs.items():
        check(name, run.results(), exact, TOLERANCE["float32"])
    samples = time_blocks(runs, blocks, seconds, limit=5.0)
    return {
        name: {
            "ms": 1e3 * statistics.median(values),
            "spread": spread(values),
            "ratio": ratio(samples["nn.LSTM"], values),
        }
        for name, values in samples.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, help="for PyTorch and for our pool (default: all)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    rows = []
    with same_threads(args.threads) as threads:
        for shape in SHAPES:
            others = Others()
            found = measure(shape, threads)
            rows.append({"shape": shape, "libraries": found, "others": others.share()})
            for name, each in rows[-1]["libraries"].items():
                print(
                    f"{','.join(map(str, shape)):14}  {name:17}{each['ms']:8.3f} ms ±{each['spread']:.0%}  "
                    f"nn.LSTM / this {each['ratio']:.2f}"
                )
    print(f"{threads} thread(s), PyTorch {torch.__version__}")
    busy = max(row["others"] or 0.0 for row in rows)
    if busy > BUSY:
        print(f"other processes took up to {busy:.0%} of the cores: the times may be too long")
    if args.json:
        report = {"threads": threads, "environment": system.environment(), "rows": rows}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
