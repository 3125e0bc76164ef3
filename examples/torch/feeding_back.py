"""Forecast by feeding back: each day's prediction is the next day's input (PyTorch).

    python examples/torch/feeding_back.py data/wordle_reported_2022.csv --compare

The file: columns date and reported, 359 days of 2022 from 7 January on, the daily number of reported Wordle
results (COMAP, Mathematical Contest in Modeling 2023, problem C; the faulty value of 30 November mended).

Training is on 500 sequences of 0 to 99 days. Three ways to hold them (--ragged): padded at the end, as a
PackedSequence, or padded with ``lengths=``, which our layer has. Over the valid days the loss is the same.
"""

import math
import sys
import time

import side_by_side
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fusedrnn.programs import feeding_back as native

N, AHEAD, LONGEST = 250, 60, 100  # training days; days beyond the data; sequences are shorter than this


class Net(nn.Module):
    def __init__(self, lstm_class):
        super().__init__()
        self.lstm = lstm_class(1, 10)
        self.head = nn.Sequential(nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 1))

    def forward(self, x, state=None, **options):
        y, state = self.lstm(x, state, **options)
        return self.head(y), state


def build(layers):
    if layers == "torch":
        from torch.nn import LSTM
    else:
        from fusedrnn.torch import LSTM  # all that differs
    return Net(LSTM)


def read(path):
    """The series, standardised."""
    try:
        values = torch.tensor(native.read(path), dtype=torch.float32)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    return (values - values.mean()) / values.std(), values.mean(), values.std()


def draw_sequences(z):
    """500 sequences: input z[t], target z[t + 1]. x, y (99, 500, 1), lengths and first days (500,)."""
    ends = torch.randint(LONGEST, N, (5,)).repeat_interleave(LONGEST)
    lengths = torch.arange(LONGEST).repeat(5)  # length 0 is among them
    begins = ends - lengths
    days = begins + torch.arange(LONGEST - 1)[:, None]
    valid = torch.arange(LONGEST - 1)[:, None] < lengths
    x, y = (torch.where(valid, z[day], 0.0)[:, :, None] for day in (days, days + 1))
    return x, y, lengths, begins


def forgetting(curve, begins):
    """The weight of each step: step t of a sequence that begins on day s counts w[s + t]."""
    day = (begins + torch.arange(LONGEST - 1)[:, None])[:, :, None] / N
    if curve == "none":
        return torch.ones_like(day)
    if curve == "e":
        return torch.tanh(math.e * day)
    return torch.tanh(float(curve) * (day - 1)) + 1


def outputs(model, x, lengths, ragged):
    """The model's output at every step; what it says at padding is of no meaning."""
    if ragged == "lengths":
        return model(x, lengths=lengths)[0]
    if ragged == "packed":
        some = lengths > 0  # PyTorch packs no empty sequence
        packed = pack_padded_sequence(x[:, some], lengths[some], enforce_sorted=False)
        y, _ = pad_packed_sequence(model.lstm(packed)[0], total_length=len(x))
        return model.head(y.new_zeros(*x.shape[:2], 10).index_copy(1, some.nonzero()[:, 0], y))
    return model(x)[0]


def train(args, z, curve):
    """Returns the model, the loss of every step, and the seconds."""
    torch.manual_seed(args.seed)
    x, y, lengths, begins = draw_sequences(z)
    weight = forgetting(curve, begins)
    if args.over == "valid":
        weight = weight * (torch.arange(len(x))[:, None] < lengths)[:, :, None]
    terms = x.numel() if args.over == "all" else int(lengths.sum())
    model = build(args.layers)
    print(f"{model}\nparameters: {sum(p.numel() for p in model.parameters())}")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses, start = [], time.perf_counter()
    for epoch in range(args.epochs):
        error = outputs(model, x, lengths, args.ragged) - y
        loss = (weight * error.square()).sum() / terms
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if epoch % max(1, args.epochs // 16) == 0:
            print(f"epoch {epoch:3}  loss {losses[-1]:.5f}")
    return model, losses, time.perf_counter() - start


@torch.no_grad()
def feed_back(model, known, steps):
    """Read what is known, then feed each prediction back. The state is carried: each day is computed once."""
    y, state = model(known.view(-1, 1, 1))
    predictions = [y[-1:]]
    while len(predictions) < steps:
        y, state = model(predictions[-1], state)
        predictions.append(y)
    return torch.cat(predictions).flatten()


@torch.no_grad()
def feed_back_recomputing(model, known, steps):
    """The same without the state: all days again for every prediction."""
    days = known.view(-1, 1, 1)
    for _ in range(steps):
        days = torch.cat([days, model(days)[0][-1:]])
    return days[len(known) :].flatten()


def test_error(model, z):
    """From day 250 on the model sees only its own predictions."""
    prediction = feed_back(model, z[:N], len(z) - N)
    return nn.functional.mse_loss(prediction, z[N:]).item(), prediction


def program(args):
    z, mean, std = read(args.data)
    losses, seconds = [], 0.0
    found = {}
    for curve in args.forgetting:
        print(f"forgetting: {curve}")
        model, some, took = train(args, z, curve)
        losses, seconds = losses + some, seconds + took
        found[curve], prediction = test_error(model, z)
    print(f"test: mean squared error (standardised) of {len(z) - N} days fed back")
    for curve, error in found.items():
        print(f"  forgetting {curve:5}    {error:.4f}")
    hold = nn.functional.mse_loss(z[N - 1].expand(len(z) - N), z[N:])
    print(f"  last day held       {hold:.4f}")
    print("Mean and deviation are those of the whole series: they look into the test part.")
    if args.over == "all":
        print(
            "Half of the loss's terms are padding with target 0: not comparable with a loss over valid days."
        )

    start = time.perf_counter()
    carried = feed_back(model, z[:N], len(z) - N)
    between = time.perf_counter()
    recomputed = feed_back_recomputing(model, z[:N], len(z) - N)
    ratio = (time.perf_counter() - between) / (between - start)
    difference = (carried - recomputed).abs().max()
    print(f"carried state against recomputing: difference {difference:.1e}, {ratio:.1f} times as fast")
    print(f"last prediction {prediction[-1]:.3f}, truth {z[-1]:.3f}")
    further = feed_back(model, z, AHEAD)
    beyond = further * std + mean
    print(f"{AHEAD} days beyond the data: the last is {beyond[-1]:.0f}")
    for days, known in ((prediction, z[:N]), (further, z)):
        if said := native.far_off(days.numpy(), known.numpy()):
            print(said)
    if args.plot:
        plot(args.plot, z, prediction)
    scores = {
        "MSE": found[curve],
        "last day": prediction[-1].item(),
        f"{AHEAD} days beyond": beyond[-1].item(),
    }
    return losses, seconds, {"LSTM": scores}


def plot(path, z, prediction):
    from fusedrnn.plot import GREY, forecast

    axes = forecast(z, {"fed back": prediction}, test=N)
    for curve in ("e", "2", "5", "7", "10"):  # the weights of days
        axes.plot(forgetting(curve, torch.arange(N))[0].flatten(), color=GREY, lw=0.8, ls=":")
    axes.set(xlabel="day", ylabel="reported results, standardised")
    axes.figure.savefig(path)


def arguments():
    options = side_by_side.parser(__doc__, epochs=800)
    options.add_argument("data", help="wordle_reported_2022.csv")
    options.add_argument("--ragged", choices=["padded", "packed", "lengths"], default="padded")
    options.add_argument("--over", choices=["all", "valid"], default="all", help="steps in the loss")
    options.add_argument(
        "--forgetting", nargs="*", default=["none"], metavar="CURVE",
        help="weights of days: none, e for tanh(e t/N), an alpha, as 2, for tanh(alpha (t/N - 1)) + 1",
    )  # fmt: skip
    options.add_argument("--plot", metavar="PNG", help="draw the forecast and the forgetting curves")
    return options


if __name__ == "__main__":
    chosen = arguments().parse_args()
    if chosen.over == "all" and chosen.ragged != "padded":
        sys.exit("--over all: only --ragged padded computes the steps of padding; say --over valid")
    side_by_side.main(chosen, program)
