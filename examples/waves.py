"""An Elman network predicts the next value of combined waves from the fifty values before it.

python examples/waves.py           the plot is waves.png; for the ready-made program: fusedrnn train waves
"""

import numpy as np

import fusedrnn.functions as F
import fusedrnn.layers as L
from fusedrnn import DataLoader, Model, datasets, no_grad, optimizers, plot

EPOCHS, HIDDEN, BATCH, WINDOW = 100, 32, 32, 50


class Net(Model):
    def __init__(self):
        super().__init__()
        self.rnn = L.RNN(HIDDEN, in_size=1)
        self.fc = L.Linear(1, in_size=HIDDEN)
        for p, bound in ((self.rnn.weight_ih, 0.177), (self.rnn.weight_hh, 0.177), (self.fc.W, 1.0)):
            p.data = np.random.uniform(-bound, bound, p.shape).astype(np.float32)

    def forward(self, x):
        self.reset_state()
        y = self.rnn(np.swapaxes(x, 0, 1))  # (B, T, 1) to (T, B, 1)
        return self.fc(y[-1])  # of the last step


np.random.seed(0)
t = np.linspace(0, 100, 1000)
series = (np.sin(t) + np.cos(t) + np.sign(np.sin(t))).astype(np.float32)
x = np.lib.stride_tricks.sliding_window_view(series[:-1], WINDOW)[:, :, np.newaxis]  # (950, 50, 1)
target = series[WINDOW:, np.newaxis]
n = int(0.8 * len(x))

model = Net()
optimizer = optimizers.Adam(0.01).setup(model)
loader = DataLoader(datasets.Series(x[:n], target[:n]), BATCH)
for epoch in range(1, EPOCHS + 1):
    total = 0.0
    for window, following in loader:
        loss = F.mean_squared_error(model(window), following)
        model.cleargrads()
        loss.backward()
        optimizer.update()
        total += float(loss)
    if epoch % 10 == 0:
        print(f"epoch {epoch}  loss {total / loader.max_iter:.5f}")

with no_grad():
    forecasts = {"RNN": model(x[n:]).data, "persistence: the last value again": x[n:, -1]}
for name, forecast in forecasts.items():
    print(f"{name:34} MSE {np.mean((forecast - target[n:]) ** 2):.5f}")

try:
    ax = plot.forecast(target[n : n + 100], {"RNN": forecasts["RNN"][:100]})
except ImportError as error:
    print("no plot:", error)
else:
    ax.figure.savefig("waves.png")
