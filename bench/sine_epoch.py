"""An epoch of ``fusedrnn train sine`` (30 time lines of 34 steps, one update) beside the public framework's.

    pip install dezero
    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python bench/sine_epoch.py

Ours takes chunks of 30 steps, the framework single steps, which is all it has. Epochs are run in turn; the
ratio is the median over the pairs.
"""

import importlib
import statistics
import time

import numpy as np

from fusedrnn.programs import sine

setattr(np, "int", int)  # noqa: B010  the framework is older than NumPy 1.24
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


class Framework:
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


for cell, layer in LAYERS.items():
    framework = Framework(layer)
    model, dataset = sine.start(cell, 42)
    ours, theirs = [], []
    sine.train(model, dataset, epochs=3, chunks=True)
    framework.epoch()
    for _ in range(EPOCHS):
        ours.append(milliseconds(sine.train, model, dataset, epochs=1, chunks=True))
        theirs.append(milliseconds(framework.epoch))
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    ms = [statistics.median(times) for times in (ours, theirs)]
    print(f"{cell:4}  ours {ms[0]:.2f} ms  framework {ms[1]:.2f} ms  ratio {ratio:.1f}")
