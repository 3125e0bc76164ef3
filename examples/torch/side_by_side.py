"""What the examples of this folder share: their options, and the two runs of --compare."""

import argparse

import torch

from fusedrnn.programs.common import at_least, seed


def parser(text, epochs):
    """The options of all of them; ``text`` is the module's docstring."""
    options = argparse.ArgumentParser(description=text.partition("\n")[0])
    options.add_argument("--layers", choices=["torch", "fusedrnn"], default="fusedrnn", help="whose layer")
    options.add_argument("--compare", action="store_true", help="run with both, side by side")
    options.add_argument("--epochs", type=at_least(1), default=epochs, help="default: %(default)s")
    options.add_argument("--seed", type=seed, default=0, help="default: %(default)s")
    return options


def relative_difference(a, b):
    """The largest of two lists of losses, step by step, as far as both go: one may have stopped earlier."""
    return max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=False))


def main(args, program):
    """Run ``program(args)``, which returns the loss of every step, seconds of training and test scores."""
    if not args.compare:
        program(args)
        return
    losses, seconds = {}, {}
    for args.layers in ("torch", "fusedrnn"):
        print(f"--- {args.layers}")
        losses[args.layers], seconds[args.layers], _ = program(args)
    ours, theirs = losses["fusedrnn"], losses["torch"]
    print(f"--- side by side, seed {args.seed}, {torch.get_num_threads()} threads")
    print("step         torch      fusedrnn")
    for step in range(min(5, len(ours))):
        print(f"{step:4} {theirs[step]:13.8f} {ours[step]:13.8f}")
    first, whole = relative_difference(theirs[:20], ours[:20]), relative_difference(theirs, ours)
    print(f"largest relative difference: first 20 steps {first:.1e}, all steps {whole:.1e}")
    a, b = seconds["torch"], seconds["fusedrnn"]
    print(f"training, {len(theirs)} and {len(ours)} steps: torch {a:.2f} s, fusedrnn {b:.2f} s, ", end="")
    print(f"a step {a / len(theirs) * len(ours) / b:.2f} times as fast")
