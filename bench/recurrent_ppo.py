"""Frames per second of sb3-contrib's RecurrentPPO: torch.nn, our layers, and ours without its time loop.

    python bench/recurrent_ppo.py               5 rounds of 4,096 frames, on all threads and on one
    python bench/recurrent_ppo.py --json FILE   also write the figures to this file

CartPole without velocities, 8 environments, sb3-contrib's defaults: rollouts of 128 steps, 10 epochs of
batches of 128 frames, two LSTMs of 256 units. The ways take turns; in a round all have the same seed, so that
they play the same episodes until rounding parts them. Needs ``pip install sb3-contrib``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "torch"))

import numpy as np
import recurrent_ppo as example
import sb3_contrib
import torch

from fusedrnn import system
from fusedrnn.bench.report import BUSY
from fusedrnn.bench.timing import Others


def timed(model, method, seconds):
    """Make the model add the time of one of its methods to ``seconds``."""
    run = getattr(model, method)

    def call(*args, **options):
        begin = time.perf_counter()
        try:
            return run(*args, **options)
        finally:
            seconds[method] = seconds.get(method, 0.0) + time.perf_counter() - begin

    setattr(model, method, call)


def train(way, seed, frames):
    """Train from nothing: frames per second, where the time went, mean length of the last 100 episodes."""
    model = example.build(way, seed)
    seconds = {}
    for method in ("collect_rollouts", "train"):
        timed(model, method, seconds)
    model.learn(frames)
    return {
        "fps": model.num_timesteps / sum(seconds.values()),
        "rollouts s": seconds["collect_rollouts"],
        "updates s": seconds["train"],
        "episode length": float(np.mean([e["l"] for e in model.ep_info_buffer])),
    }


def measure(frames, rounds):
    """Rounds in which the ways take turns, each beginning with another."""
    runs = {way: [] for way in example.WAYS}
    for way in example.WAYS:
        train(way, 0, 1024)  # warm
    for r in range(rounds):
        for way in example.WAYS[r % 3 :] + example.WAYS[: r % 3]:
            runs[way].append(train(way, r, frames))
    plain = runs["torch.nn"]
    return {
        way: {
            "fps": statistics.median(run["fps"] for run in each),
            "ratio": statistics.median(a["fps"] / b["fps"] for a, b in zip(each, plain, strict=True)),
            "runs": each,
        }
        for way, each in runs.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=4096, help="of each run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="*", help="default: all, then one")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    rows = []
    for threads in options.threads or sorted({torch.get_num_threads(), 1}, reverse=True):
        torch.set_num_threads(threads)
        others = Others()
        found = measure(options.frames, options.rounds)
        rows.append({"threads": threads, "others": others.share(), "ways": found})
        for way, each in found.items():
            ratio = f"{each['ratio']:.2f} times torch.nn"
            print(f"{threads} thread(s)  {way:16}{each['fps']:7.0f} frames/s, {ratio}", flush=True)
    busy = max(row["others"] or 0.0 for row in rows)
    if busy > BUSY:
        print(f"other processes took up to {busy:.0%} of the cores: measure again for figures")
    if options.json:
        report = {
            "frames": options.frames,
            "rounds": options.rounds,
            "sb3-contrib": sb3_contrib.__version__,
            "environment": system.environment(),
            "rows": rows,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
