"""Training steps with SpeechBrain's LiGRU: its loop, its loop in TorchScript, and our layer of the same cell.

    python bench/speechbrain_ligru.py            measure; write JSON and docs/third_party.md
    python bench/speechbrain_ligru.py --page     only write the page anew
    python bench/speechbrain_ligru.py --check    only see whether it is up to date

A classifier of frames: 40 features, two bidirectional LiGRU layers with layer norm, 48 classes, cross entropy
and AdamW. The data are made up. All variants begin with the same weights and get the same batches.
Needs ``pip install speechbrain torchaudio``, except for the page.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time

from measured import captions, run, side_by_side

FEATURES, CLASSES, LAYERS = 40, 48, 2
SIZES = ((100, 8, 128), (200, 8, 256), (200, 16, 512))  # T, B, H


def our_layers(theirs, hidden):
    """Layers of the same cell with the same parameters, which both directions share."""
    import torch

    import fusedrnn.torch as ft
    from fusedrnn.cells import cell, relu, sigmoid

    @cell
    def li_gru(p, x, h):
        """Ravanelli et al. 2018, with layer norm over what x gives to both gates, as in SpeechBrain."""
        a, z = p.layer_norm("w", *p.dense("a z", x, bias=False))
        u, v = p.dense("a z", h, bias=False)
        z = sigmoid(z + v)
        return z * h + (1 - z) * relu(a + u)

    layers = torch.nn.ModuleList()
    for layer in theirs.rnn:
        ours = ft.Recurrent(li_gru, layer.w.in_features, hidden, batch_first=True, bidirectional=True)
        given = {"weight_ih": layer.w.weight, "weight_hh": layer.u.weight}
        given |= {"gain_w": layer.norm.weight, "bias_w": layer.norm.bias}
        for name, parameter in given.items():
            own = getattr(ours, f"{name}_l0")
            own.data.copy_(parameter.data)
            setattr(ours, f"{name}_l0_reverse", own)
        layers.append(ours)
    return layers


def models(T, B, H):
    """The variants by name, with the same weights."""
    import torch
    from speechbrain.nnet.RNN import LiGRU

    class Model(torch.nn.Module):
        def __init__(self, layers, head):
            super().__init__()
            self.layers, self.head = layers, head

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)[0]
            return self.head(x)

    theirs = LiGRU(H, (B, T, FEATURES), "relu", "layernorm", LAYERS, bidirectional=True)
    head = torch.nn.Linear(2 * H, CLASSES)
    layers = {
        "SpeechBrain": torch.nn.ModuleList([copy.deepcopy(theirs)]),
        "SpeechBrain, TorchScript": torch.nn.ModuleList([torch.jit.script(copy.deepcopy(theirs))]),
        "fusedrnn": our_layers(theirs, H),
    }
    return {name: Model(each, copy.deepcopy(head)) for name, each in layers.items()}


def measure(T, B, H, steps):
    """Seconds of every training step and its loss, by variant."""
    import torch

    torch.manual_seed(0)
    variants = models(T, B, H)
    optimizers = {name: torch.optim.AdamW(m.parameters(), 1e-3) for name, m in variants.items()}
    # Each class has features of its own, blurred over time.
    centres = torch.randn(CLASSES, FEATURES)
    found = {name: {"seconds": [], "loss": []} for name in variants}
    for _ in range(steps):
        labels = torch.randint(CLASSES, (B, T // 5)).repeat_interleave(5, 1)
        x = centres[labels] + 2 * torch.randn(B, T, FEATURES)
        for name, model in variants.items():
            begin = time.perf_counter()
            optimizers[name].zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), labels.flatten())
            loss.backward()
            optimizers[name].step()
            found[name]["seconds"].append(time.perf_counter() - begin)
            found[name]["loss"].append(float(loss.detach()))
    return found


def summary(found, warm):
    """Medians after the first steps, in which TorchScript compiles."""
    seconds = {name: statistics.median(each["seconds"][warm:]) for name, each in found.items()}
    ours, best = seconds["fusedrnn"], min(s for name, s in seconds.items() if name != "fusedrnn")
    losses = [each["loss"] for each in found.values()]
    apart = [max(abs(each[k] - losses[0][k]) / losses[0][k] for each in losses) for k in (0, 9)]
    return {"seconds": seconds, "ratio": best / ours, "losses apart": apart, "runs": found}


def figures(options):
    """What the file holds."""
    import speechbrain
    import torch

    from fusedrnn.bench.timing import Others

    rows = []
    for T, B, H in SIZES:
        others = Others()
        row = summary(measure(T, B, H, options.steps), options.steps // 4)
        rows.append({"T": T, "B": B, "H": H, "others": others.share()} | row)
        times = ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in row["seconds"].items())
        print(f"T={T} B={B} H={H}: {times}, losses apart {row['losses apart']}", flush=True)
    found = {"steps": options.steps, "threads": torch.get_num_threads()}
    return found | {"speechbrain": speechbrain.__version__, "rows": rows}


def section(reports):
    """The page's table."""
    each = list(reports.values())
    header = ["T, B, H", *each[0]["rows"][0]["seconds"], "speed-up over the faster of SpeechBrain's"]
    rows = {
        family: [
            [f"{row['T']}, {row['B']}, {row['H']}"]
            + [f"{1e3 * s:.1f}" for s in row["seconds"].values()]
            + [f"{row['ratio']:.2f}"]
            for row in found["rows"]
        ]
        for family, found in reports.items()
    }
    first, tenth = (max(row["losses apart"][k] for found in each for row in found["rows"]) for k in (0, 1))
    first = max(first, 2.0**-23)  # they are float32
    return (
        f"{side_by_side(header, rows)}\n\n"
        f"Milliseconds of a training step, medians of {each[0]['steps'] - each[0]['steps'] // 4} steps, "
        f"interleaved. The losses of the first step agree within {first:.0e}, those of the tenth, "
        f"which differ by rounding, within {tenth:.0e}.\n\n{captions(reports)}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    return run(__file__, parser, figures, section, "docs/third_party.md", "speechbrain_ligru")


if __name__ == "__main__":
    sys.exit(main())
