"""Passenger flow one month ahead: an LSTM on windows of five values (PyTorch).

    python examples/torch/passenger_flow.py --compare

The common recipe first: scale the series to [0, 1], windows of five values are the features of a step, the
whole training part is one sequence. On a growing series it loses to forecasts that need no network, and the
output says so. Then the same network on changes of the yearly growth, which wins.
"""

import time

import side_by_side
import torch
from torch import nn

from fusedrnn.programs.airline import passengers

WINDOW, YEAR = 5, 12


class Net(nn.Module):
    def __init__(self, lstm_class):
        super().__init__()
        self.lstm = lstm_class(WINDOW, 45, num_layers=2)
        self.fc = nn.Linear(45, 1)

    def forward(self, x):
        return self.fc(self.lstm(x)[0])


def build(layers):
    if layers == "torch":
        from torch.nn import LSTM
    else:
        from fusedrnn.torch import LSTM  # all that differs
    return Net(LSTM)


def windows(series):
    """Five values, and the one after them: x (N, 1, 5), y (N, 1, 1)."""
    x = series[:-1].unfold(0, WINDOW, 1)
    return x[:, None], series[WINDOW:, None, None]


def train(args, x, y, epochs, lr, noise=0.0):
    """Adam, all in one batch. Returns the model, the loss of every step, and the seconds."""
    torch.manual_seed(args.seed)
    model = build(args.layers)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    losses, start = [], time.perf_counter()
    for _ in range(epochs):
        loss = nn.functional.mse_loss(model(x + noise * torch.randn(x.shape)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses, time.perf_counter() - start


def program(args):
    months, values = passengers()
    series = torch.tensor(values, dtype=torch.float32)
    low, high = series.min(), series.max()
    scaled = (series - low) / (high - low)
    x, y = windows(scaled)
    n = int(0.7 * len(x))

    model, losses, seconds = train(args, x[:n], y[:n], args.epochs, lr=1e-2)
    for epoch in range(0, len(losses), max(1, args.epochs // 10)):
        print(f"epoch {epoch:3}  loss {losses[epoch]:.4f}")
    with torch.no_grad():
        prediction = model(x[n:])[:, 0, 0]
    truth, first = y[n:, 0, 0], n + WINDOW  # of the test part, a month's index in the series

    # The same network on w, the change of the yearly growth, scaled by the training part alone.
    log = series.log()
    growth = log[YEAR:] - log[:-YEAR]
    w = growth.diff()  # w[j] belongs to month j + YEAR + 1
    known = first - YEAR - 1  # so many w belong to the training part
    scale = w[:known].std()
    wx, wy = windows(w / scale)
    m = known - WINDOW
    # So few months are soon learnt by heart; so 32 copies with noise, as `fusedrnn train airline` does it.
    copies = wx[:m].expand(m, 32, WINDOW), wy[:m].expand(m, 32, 1)
    grown, _, _ = train(args, *copies, args.epochs // 4, lr=3e-3, noise=1.0)
    with torch.no_grad():
        change = scale * grown(wx)[m:, 0, 0]  # reads the training part first, then goes on from its state
    before = log[first - YEAR : -YEAR] + growth[first - YEAR - 1 : -1]
    forecasts = {
        "LSTM, scaled to [0, 1]": prediction,
        "naive: as last month": scaled[first - 1 : -1],
        "seasonal naive: as a year ago": scaled[first - YEAR : -YEAR],
        "growth as last month": (before.exp() - low) / (high - low),
        "LSTM on the change of growth": ((before + change).exp() - low) / (high - low),
    }
    print(f"test: {len(truth)} months from {months[first]}, mean squared error of the scaled values")
    scores = {
        name: {"MSE": nn.functional.mse_loss(forecast, truth).item()} for name, forecast in forecasts.items()
    }
    for name, found in scores.items():
        print(f"  {name:30} {found['MSE']:.5f}")
    print("The first row's scaling uses the largest value of the whole series: it looks into the test part.")
    if args.plot:
        networks = {name: v * (high - low) + low for name, v in forecasts.items() if "LSTM" in name}
        plot(args.plot, values, first, networks)
    return losses, seconds, scores


def plot(path, values, first, forecasts):
    from fusedrnn.plot import forecast

    axes = forecast(values, forecasts, test=first)
    axes.set(xlabel="month", ylabel="passengers a month, thousands")
    axes.figure.savefig(path)


def arguments():
    options = side_by_side.parser(__doc__, epochs=200)
    options.add_argument("--plot", metavar="PNG", help="draw forecasts and truth")
    return options


if __name__ == "__main__":
    side_by_side.main(arguments().parse_args(), program)
