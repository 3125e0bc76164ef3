"""Forecast by feeding back: each day's prediction is the next day's input.

    python examples/feeding_back.py wordle_reported_2022.csv

The file: columns date and reported, 359 days of 2022 from 7 January on, the daily number of reported Wordle
results (COMAP, Mathematical Contest in Modeling 2023, problem C; the faulty value of 30 November mended). The
plot is feeding-back.png. For the ready-made program: fusedrnn train feeding-back
"""

import sys
import time
from pathlib import Path

import numpy as np

import fusedrnn.functions as F
import fusedrnn.layers as L
from fusedrnn import Model, no_grad, optimizers, plot
from fusedrnn.datasets import read_csv

EPOCHS, HIDDEN, N, AHEAD = 800, 10, 250, 60  # N training days; AHEAD days beyond the data
ALPHA = None  # 2, 5, 7 or 10: the loss weights day k by tanh(ALPHA (k/N - 1)) + 1, a forgetting curve

if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
    sys.exit(__doc__)


class Net(Model):
    def __init__(self):
        super().__init__()
        self.lstm = L.LSTM(HIDDEN, in_size=1)
        self.hidden = L.Linear(10, in_size=HIDDEN)
        self.out = L.Linear(1, in_size=10)

    def forward(self, x, lengths=None):
        y = self.lstm(x) if lengths is None else self.lstm(x, lengths=lengths)
        return self.out(F.tanh(self.hidden(y)))


values = read_csv(sys.argv[1], ["reported"], hours=24)[:, 0]
mean, deviation = values.mean(), values.std(ddof=1)  # of the whole series: they look into the test part
z = (values - mean) / deviation

# 500 sequences of 0 to 99 days, padded with zeros: (99, 500, 1). The target of z[day] is z[day + 1].
np.random.seed(0)
model = Net()
print(model.summary())
lengths = np.tile(np.arange(100), 5)
days = np.repeat(np.random.randint(100, N, size=5), 100) - lengths + np.arange(99)[:, np.newaxis]
valid = np.arange(99)[:, np.newaxis] < lengths
x, target = (np.where(valid, z[days + k], 0)[:, :, np.newaxis].astype(np.float32) for k in (0, 1))
weight = valid if ALPHA is None else valid * (np.tanh(ALPHA * (days / N - 1)) + 1)
weight = weight[:, :, np.newaxis].astype(np.float32)

optimizer = optimizers.Adam(0.01).setup(model)
for epoch in range(EPOCHS):
    model.reset_state()
    y = model(x, lengths)  # model(x) computes the padding too: the same on the valid days
    loss = (weight * (y - target) ** 2).sum() / int(lengths.sum())
    model.cleargrads()
    loss.backward()
    optimizer.update()
    if epoch % 50 == 0:
        print(f"epoch {epoch}  loss {float(loss):.5f}")


def feed_back(known, steps):
    """Read what is known, then carry the state: each day is computed once."""
    model.reset_state()
    predictions = [model(known.reshape(-1, 1, 1)).data[-1]]  # (1, 1): a call with two axes is one step
    while len(predictions) < steps:
        predictions.append(model(predictions[-1]).data)
    return np.ravel(predictions)


def feed_back_recomputing(known, steps):
    """The same from the first day on, again for every prediction."""
    for _ in range(steps):
        model.reset_state()
        known = np.append(known, model(known.reshape(-1, 1, 1)).data[-1])
    return known[-steps:]


times = [time.perf_counter()]
with no_grad():
    carried = feed_back(z[:N], len(z) - N)
    times.append(time.perf_counter())
    again = feed_back_recomputing(z[:N], len(z) - N)
    times.append(time.perf_counter())
    beyond = feed_back(z, AHEAD) * deviation + mean
ratio = (times[2] - times[1]) / (times[1] - times[0])
print(f"carried or recomputed: difference {np.abs(carried - again).max():.1e}, {ratio:.1f} times as fast")
for name, forecast in (("LSTM", carried), ("holding the last known day", z[N - 1])):
    print(f"{name:27} MSE {np.mean((forecast - z[N:]) ** 2):.5f}")
print(f"{AHEAD} days beyond the data: {beyond[-1]:.0f}")

try:
    ax = plot.forecast(z, {"fed back": carried}, test=N)
except ImportError as error:
    print("no plot:", error)
else:
    ax.figure.savefig("feeding-back.png")
