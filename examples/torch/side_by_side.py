"""What the examples of this folder share: their options, and the two runs of --compare."""

import argparse

import torch


def parser(text, epochs):
    """The options of all of them; ``text`` is the module's docstring."""
    p = argparse.ArgumentParser(description=text.partition("\n")[0])
    p.add_argument("--layers", choices=["torch", "fusedrnn"], default="fusedrnn", help="whose layer is imported")
    p.add_argument("--compare", action="store_true", help="run with both, print losses and times side by side")
    p.add_argument("--epochs", type=int, default=epochs, help="default: %(default)s")
    p.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    return p


def relative_difference(a, b):
    """The largest of two lists of losses, step by step."""
    return max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True))


def main(args, program):
    """Run ``program(args)``, which returns the loss of every step and the seconds of training."""
    if not args.compare:
        program(args)
        return
    losses, seconds = {}, {}
    for args.layers in ("torch", "fusedrnn"):
        print(f"--- {args.layers}")
        losses[args.layers], seconds[args.layers] = program(args)
    ours, theirs = losses["fusedrnn"], losses["torch"]
    print(f"--- side by side, seed {args.seed}, {torch.get_num_threads()} threads")
    print("step         torch      fusedrnn")
    for step in range(min(5, len(ours))):
        print(f"{step:4} {theirs[step]:13.8f} {ours[step]:13.8f}")
    print(f"largest relative difference: first 20 steps {relative_difference(theirs[:20], ours[:20]):.1e}, ", end="")
    print(f"all {len(ours)} steps {relative_difference(theirs, ours):.1e}")
    ratio = seconds["torch"] / seconds["fusedrnn"]
    print(f"training: torch {seconds['torch']:.2f} s, fusedrnn {seconds['fusedrnn']:.2f} s, ratio {ratio:.2f}")
