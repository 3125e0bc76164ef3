"""An epoch of ``fusedrnn train sine`` (30 time lines of 34 steps, one update) beside DeZero's.

    pip install dezero
    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python bench/sine_epoch.py [--json FILE]

Ours takes chunks of 30 steps, DeZero single steps, which is all it has. Epochs are interleaved; the
ratio is the median over the pairs.
"""

import argparse
import importlib
import json
import statistics
import time
from pathlib import Path

import numpy as np

from fusedrnn import system
from fusedrnn.programs import sine

setattr(np, "int", int)  # noqa: B010  DeZero is older than NumPy 1.24
dezero = importlib.import_module("dezero")
EPOCHS = 40
LAYERS = {"rnn": dezero.layers.RNN, "lstm": dezero.layers.LSTM}


class Theirs(dezero.Model):
    def __init__(self, layer):
        super().__init__()
        self.rnn = layer(sine.HIDDEN)
        self.fc = dezero.layers.Linear(1)

    def forward(self, x):
        return self.fc(self.rnn(x))


class DeZero:
    def __init__(self, layer):
        self.model = Theirs(layer)
        self.loader = dezero.SeqDataLoader(dezero.datasets.SinCurve(train=True), 30)
        self.optimizer = dezero.optimizers.Adam().setup(self.model)

    def epoch(self):
        self.model.rnn.reset_state()
        loss = 0
        for count, (x, t) in enumerate(self.loader, 1):
            loss += dezero.functions.mean_squared_error(self.model(x), t)
            if count % 30 == 0:
                self.model.cleargrads()
                loss.backward()
                loss.unchain_backward()
                self.optimizer.update()


def milliseconds(call, *arguments, **options):
    start = time.perf_counter()
    call(*arguments, **options)
    return 1e3 * (time.perf_counter() - start)


def measure(cell, layer):
    """Median milliseconds of an epoch of ours and of DeZero's, and the median of the ratios."""
    peer = DeZero(layer)
    model, dataset = sine.start(cell, 42)
    ours, theirs = [], []
    sine.train(model, dataset, epochs=3, chunks=True)
    peer.epoch()
    for _ in range(EPOCHS):
        ours.append(milliseconds(sine.train, model, dataset, epochs=1, chunks=True))
        theirs.append(milliseconds(peer.epoch))
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    return {"ms": {"fusedrnn": statistics.median(ours), "dezero": statistics.median(theirs)}, "ratio": ratio}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    rows = {cell: measure(cell, layer) for cell, layer in LAYERS.items()}
    for cell, row in rows.items():
        each = ", ".join(f"{name} {value:.2f} ms" for name, value in row["ms"].items())
        print(f"{cell}: {each}, ratio {row['ratio']:.1f}")
    if args.json:
        args.json.write_text(json.dumps({"environment": system.environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
