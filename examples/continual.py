"""Predict the next value of a noisy wave, then continue to learn from a checkpoint, with new data.

python examples/continual.py       for the ready-made program: fusedrnn train continual
"""

import numpy as np

import fusedrnn.functions as F
import fusedrnn.layers as L
from fusedrnn import DataLoader, Model, checkpoint, datasets, no_grad, optimizers

EPOCHS, HIDDEN, BATCH, WINDOW, SIZE = 100, 64, 64, 30, 1500


class Net(Model):
    def __init__(self):
        super().__init__()
        self.rnn = L.LSTM(HIDDEN, in_size=1)
        self.fc = L.Linear(1, in_size=HIDDEN)

    def forward(self, x):
        self.reset_state()
        y = self.rnn(np.swapaxes(x, 0, 1))  # (B, T, 1) to (T, B, 1)
        return self.fc(y[-1])  # of the last step


def draw(period):
    """Windows (N, 30, 1) of a noisy sine and the value after each: of training, validation and test."""
    t = np.arange(SIZE + WINDOW)
    series = (np.sin(2 * np.pi * t / period) + 0.1 * np.random.randn(len(t))).astype(np.float32)
    x = np.lib.stride_tricks.sliding_window_view(series[:-1], WINDOW)[:, :, np.newaxis]
    target = series[WINDOW:, np.newaxis]
    a, b = int(0.7 * SIZE), int(0.85 * SIZE)
    return [(x[part], target[part]) for part in (slice(a), slice(a, b), slice(b, None))]


def error(model, x, target):
    with no_grad():
        return float(F.mean_squared_error(model(x), target))


def train(model, optimizer, training, validation, epochs):
    loader = DataLoader(datasets.Series(*training), BATCH)
    for epoch in range(1, epochs + 1):
        total = 0.0
        for x, target in loader:
            loss = F.mean_squared_error(model(x), target)
            model.cleargrads()
            loss.backward()
            optimizer.update()
            total += float(loss)
        if epoch % 10 == 0:
            print(
                f"epoch {epoch}  training {total / loader.max_iter:.4f}  "
                f"validation {error(model, *validation):.4f}"
            )


np.random.seed(0)
parts = {"old data": draw(25), "new data": draw(17)}
model = Net()
optimizer = optimizers.Adam(0.01).setup(model)
train(model, optimizer, *parts["old data"][:2], EPOCHS)
model.reset_state()  # a state that still has its graph cannot be saved
checkpoint.save("continual.ckpt", model, optimizer)
before = {name: error(model, *part[2]) for name, part in parts.items()}

# Later, in another process: nothing is left but the checkpoint.
model = Net()
optimizer = optimizers.Adam(0.01).setup(model)
checkpoint.load("continual.ckpt", model, optimizer)
train(model, optimizer, *parts["new data"][:2], EPOCHS // 4)

print("test MSE, of which 0.01 is noise:   before     after   persistence")
for name, (_, _, (x, target)) in parts.items():
    persistence = np.mean((x[:, -1] - target) ** 2)
    print(f"{name:32} {before[name]:9.4f} {error(model, x, target):9.4f} {persistence:13.4f}")
