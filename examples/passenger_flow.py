"""A two-layer LSTM on windows of five values: a common recipe that fails on a growing series.

python examples/passenger_flow.py         the plot is passenger-flow.png; fusedrnn train passenger-flow

The recipe scales the series to [0, 1] with the largest value of the whole series, so it looks into the test
part. The second network forecasts how the yearly growth changes. That is about as good as "growth as last
month".
"""

import numpy as np

import fusedrnn.functions as F
import fusedrnn.layers as L
from fusedrnn import models, no_grad, optimizers, plot
from fusedrnn.programs.airline import passengers

EPOCHS, HIDDEN, WINDOW, COPIES, YEAR = 200, 45, 5, 32, 12


def windows(series):
    """Five values, which are the features of a step, (N, 1, 5); and the one after them (N, 1, 1)."""
    x = np.lib.stride_tricks.sliding_window_view(series[:-1], WINDOW)
    return x[:, np.newaxis], series[WINDOW:, np.newaxis, np.newaxis]


def train(x, t, epochs, rate, noise):
    np.random.seed(0)
    model = models.Sequential(L.LSTM(HIDDEN, in_size=WINDOW, num_layers=2), L.Linear(1, in_size=HIDDEN))
    optimizer = optimizers.Adam(rate).setup(model)
    for epoch in range(epochs):
        model.reset_state()
        noisy = x + noise * np.random.standard_normal(x.shape) if noise else x
        loss = F.mean_squared_error(model(noisy), t) / len(x)
        model.cleargrads()
        loss.backward()
        optimizer.update()
        if epoch % 10 == 0:
            print(f"epoch {epoch}  loss {float(loss):.4f}")
    return model


def predict(model, x):
    model.reset_state()
    with no_grad():
        return model(x).data[:, 0, 0]


months, values = passengers()
low, high = values.min(), values.max()
scaled = (values - low) / (high - low)
x, t = windows(scaled)
n = int(0.7 * len(x))
first = n + WINDOW  # the first month of the test part
recipe = predict(train(x[:n], t[:n], EPOCHS, 1e-2, noise=0), x[n:])

log = np.log(values)
growth = log[YEAR:] - log[:-YEAR]  # since a year ago
change = np.diff(growth)  # change[k] belongs to month k + 13
known = first - YEAR - 1  # so many of them are of the training part
scale = change[:known].std(ddof=1)
x, t = windows(change / scale)
m = known - WINDOW
copies = [np.repeat(a[:m], COPIES, axis=1) for a in (x, t)]  # with noise, against overfitting
model = train(*copies, EPOCHS // 4, 3e-3, noise=1)
growing = growth[known:-1] + scale * predict(model, x)[m:]

forecasts = {
    "LSTM, scaled to [0, 1]": recipe * (high - low) + low,
    "naive: as last month": values[first - 1 : -1],
    "seasonal naive: as a year ago": values[first - YEAR : -YEAR],
    "growth as last month": np.exp(log[first - YEAR : -YEAR] + growth[known:-1]),
    "LSTM on the change of growth": np.exp(log[first - YEAR : -YEAR] + growing),
}
print(f"test: {len(values) - first} months from {months[first]}, mean squared error of the scaled values")
for name, forecast in forecasts.items():
    print(f"{name:30} {np.mean(((forecast - values[first:]) / (high - low)) ** 2):.5f}")

try:
    ax = plot.forecast(values, {k: v for k, v in forecasts.items() if "LSTM" in k}, test=first)
except ImportError as error:
    print("no plot:", error)
else:
    ax.figure.savefig("passenger-flow.png")
