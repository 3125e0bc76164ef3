"""Frames per second of sb3-contrib's RecurrentPPO: torch.nn, our layers, and ours without its time loop.

    python bench/recurrent_ppo.py            measure, on a quiet machine; write JSON and docs/third_party.md
    python bench/recurrent_ppo.py --page     only write the page anew
    python bench/recurrent_ppo.py --check    only see whether it is up to date

CartPole without velocities, 8 environments, sb3-contrib's defaults: rollouts of 128 steps, 10 epochs of
batches of 128 frames, two LSTMs of 256 units. The variants are interleaved. In a round all have the
same seed, so that they play the same episodes until rounding parts them. Needs ``pip install
sb3-contrib``, except for the page.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import numpy as np
from measured import ROOT, captions, run, side_by_side


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


def train(example, variant, seed, frames):
    """Train from nothing: frames per second, where the time went, mean length of the last 100 episodes."""
    model = example.build(variant, seed)
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


def measure(example, frames, rounds):
    """Rounds of all variants, interleaved, each beginning with another."""
    runs = {variant: [] for variant in example.VARIANTS}
    for variant in example.VARIANTS:
        train(example, variant, 0, 1024)  # warm
    for r in range(rounds):
        for variant in example.VARIANTS[r % 3 :] + example.VARIANTS[: r % 3]:
            runs[variant].append(train(example, variant, r, frames))
    plain = runs["torch.nn"]
    return {
        variant: {
            "fps": statistics.median(run["fps"] for run in each),
            "ratio": statistics.median(a["fps"] / b["fps"] for a, b in zip(each, plain, strict=True)),
            "runs": each,
        }
        for variant, each in runs.items()
    }


def figures(options):
    """What the file holds."""
    sys.path.insert(0, str(ROOT / "examples" / "torch"))
    import recurrent_ppo as example
    import sb3_contrib
    import torch

    from fusedrnn.bench.timing import Others

    rows = []
    for threads in options.threads or sorted({torch.get_num_threads(), 1}, reverse=True):
        torch.set_num_threads(threads)
        others = Others()
        found = measure(example, options.frames, options.rounds)
        rows.append({"threads": threads, "others": others.share(), "variants": found})
        for variant, each in found.items():
            ratio = f"{each['ratio']:.2f} times torch.nn"
            print(f"{threads} thread(s)  {variant:16}{each['fps']:7.0f} frames/s, {ratio}", flush=True)
    asked = {"frames": options.frames, "rounds": options.rounds}
    return asked | {"sb3-contrib": sb3_contrib.__version__, "rows": rows}


def section(reports):
    """The page's table."""
    first = next(iter(reports.values()))
    rows = {
        family: [
            [str(row["threads"])]
            + [f"{each['fps']:.0f} ({each['ratio']:.2f})" for each in row["variants"].values()]
            for row in found["rows"]
        ]
        for family, found in reports.items()
    }
    return (
        f"{side_by_side(['threads', *first['rows'][0]['variants']], rows)}\n\n"
        f"Frames per second of the whole training, environment included, and in brackets the ratio to "
        f"torch.nn; medians of {first['rounds']} rounds of {first['frames']:,} frames, "
        f"interleaved.\n\n{captions(reports)}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=4096, help="of each run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="*", help="default: all, then one")
    return run(__file__, parser, figures, section, "docs/third_party.md", "recurrent_ppo")


if __name__ == "__main__":
    sys.exit(main())
