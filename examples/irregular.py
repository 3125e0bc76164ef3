"""Irregularly sampled series: a cell that knows the time between observations, beside others.

python examples/irregular.py --plot irregular.png      what it shows: docs/irregular.md
"""

import irregular_series
import numpy as np
from irregular_series import BATCH, HIDDEN, LAST, RATE

import fusedrnn.functions as F
import fusedrnn.layers as L
from fusedrnn import Model, no_grad, optimizers
from fusedrnn.plot import COLOURS, DASHES, GREY, style


class Net(Model):
    def __init__(self, cell, in_size):
        super().__init__()
        self.rnn = L.Recurrent(cell, HIDDEN, in_size)
        self.fc = L.Linear(1, in_size=HIDDEN)

    def forward(self, x, gaps):
        self.rnn.reset_state()
        h = self.rnn(x, dt=gaps) if self.rnn.cell.scalars else self.rnn(x)
        return self.fc(h)


def loss_of(model, x, gaps, target):
    return F.mean_squared_error(model(x, gaps), target) / len(x)  # the sum over steps, as a mean


def train(cell, gap_is_input, training, test, seed, epochs):
    """Returns the number of parameters, the mean loss of each epoch, and the predictions of ``test``."""
    np.random.seed(seed)
    x, gaps, target = irregular_series.inputs(*training, gap_is_input)
    model = Net(cell, x.shape[2])
    optimizer = optimizers.Adam(RATE, max_norm=1.0).setup(model)
    losses = []
    for _ in range(epochs):
        total, order = 0.0, np.random.permutation(x.shape[1])
        for rows in np.split(order, range(BATCH, len(order), BATCH)):
            loss = loss_of(model, x[:, rows], gaps[:, rows], target[:, rows])
            model.cleargrads()
            loss.backward()
            optimizer.update()
            total += float(loss) * len(rows)
        losses.append(total / len(order))
    x, gaps, _ = irregular_series.inputs(*test, gap_is_input)
    with no_grad():
        predictions = model(x, gaps).data[:, :, 0]
    return sum(p.data.size for p in model.params()), losses, predictions


def best(found):
    """The names of the two networks with the least mean RMSE."""
    scores = {name: np.mean([r["rmse"] for r in n["runs"]]) for name, n in found["networks"].items()}
    return sorted(scores, key=scores.get)[:2]


@style()
def plot(path, found, values, gaps, predictions):
    """One held-out series with the predictions of the two best networks, and the losses of all."""
    from matplotlib.figure import Figure

    colours = dict(zip(found["networks"], COLOURS, strict=True))
    dashes = dict(zip(found["networks"], DASHES, strict=True))
    figure = Figure(figsize=(7, 6.4), dpi=110)
    above, below = figure.subplots(2, 1)
    some = slice(LAST, LAST + 30)  # the observations at 1 + some are those that were predicted
    time = gaps[:, 0].cumsum()[some]
    above.plot(time, values[1:, 0][some], "o", color=GREY, mfc="none", ms=7, label="observed", zorder=3)
    for name, marker in zip(best(found), "xD", strict=True):
        style = {"color": colours[name], "ms": 5 + 2 * (marker == "x"), "mew": 1.6, "lw": 0.8}
        above.plot(time, predictions[name][some, 0], marker + "-", label=name, **style)
    above.set(xlabel="time", ylabel="value", title="a held-out series, predicted one observation ahead")
    for name, network in found["networks"].items():
        losses = np.array([run["losses"] for run in network["runs"]])
        epochs = np.arange(1, losses.shape[1] + 1)
        below.plot(epochs, losses.mean(axis=0), dashes[name], color=colours[name], label=name)
        below.fill_between(epochs, losses.min(axis=0), losses.max(axis=0), color=colours[name], alpha=0.25)
    below.set(
        xlabel="epoch",
        ylabel="MSE",
        ylim=(0.35, 0.8),
        title=f"training loss, mean and range of {len(losses)} seeds",
    )
    below.xaxis.get_major_locator().set_params(integer=True)
    for axes in (above, below):
        axes.legend(fontsize=8)
    figure.savefig(path)


def main(given=None):
    options = irregular_series.arguments(__doc__)
    options.add_argument("--plot", metavar="PNG", help="draw a series, its predictions and the losses")
    args = options.parse_args(given)
    found, test = irregular_series.compare(train, args)
    if args.plot:
        plot(args.plot, found, *test)


if __name__ == "__main__":
    main()
