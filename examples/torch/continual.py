"""Predict the next value, then go on learning with new data from a checkpoint (PyTorch).

python examples/torch/continual.py --compare
"""

import tempfile
import time
from pathlib import Path

import side_by_side
import torch
from torch import nn

from fusedrnn.programs.common import at_least

WINDOW, BATCH = 30, 64


class Net(nn.Module):
    def __init__(self, lstm_class):
        super().__init__()
        self.lstm = lstm_class(1, 64, batch_first=True)
        self.fc = nn.Linear(64, 1)

    def forward(self, x):
        return self.fc(self.lstm(x)[0][:, -1])


def build(layers):
    if layers == "torch":
        from torch.nn import LSTM
    else:
        from fusedrnn.torch import LSTM  # all that differs
    return Net(LSTM)


def draw(period, size):
    """Windows of a noisy sine: of training, validation and test, in the order of time."""
    t = torch.arange(size + WINDOW)
    series = (2 * torch.pi * t / period).sin() + 0.1 * torch.randn(len(t))
    x, y = series[:-1].unfold(0, WINDOW, 1)[:, :, None], series[WINDOW:, None]
    a, b = int(0.7 * size), int(0.85 * size)
    return (x[:a], y[:a]), (x[a:b], y[a:b]), (x[b:], y[b:])


@torch.no_grad()
def error(model, x, y):
    return nn.functional.mse_loss(model(x), y).item()


def train(model, optimizer, training, validation, epochs):
    """Returns the loss of every step."""
    x, y = training
    losses = []
    for epoch in range(1, epochs + 1):
        epoch_losses = []
        for rows in torch.randperm(len(x)).split(BATCH):
            loss = nn.functional.mse_loss(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            epoch_losses.append(loss.item())
        losses += epoch_losses
        found, mean = error(model, *validation), sum(epoch_losses) / len(epoch_losses)
        if epoch == 1 or epoch % max(1, epochs // 10) == 0:
            print(f"epoch {epoch:3}  training loss {mean:.5f}  validation loss {found:.5f}")
    return losses


def program(args):
    torch.manual_seed(args.seed)
    old, new = draw(25, args.size), draw(17, args.size)
    model = build(args.layers)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    start = time.perf_counter()
    losses = train(model, optimizer, *old[:2], args.epochs)
    seconds = time.perf_counter() - start

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "continual.pt"
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
        # Later, in another process:
        checkpoint = torch.load(path, weights_only=True)
    model = build(args.layers)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    before = [error(model, *part[2]) for part in (old, new)]

    print("new data, another period: the learning goes on")
    start = time.perf_counter()
    losses += train(model, optimizer, *new[:2], args.epochs // 4)
    seconds += time.perf_counter() - start
    after = [error(model, *part[2]) for part in (old, new)]
    persistence = [nn.functional.mse_loss(part[2][0][:, -1], part[2][1]).item() for part in (old, new)]
    print("test MSE, of which 0.01 is noise   old data   new data")
    for name, (a, b) in (("before", before), ("after", after), ("persistence", persistence)):
        print(f"  {name:30} {a:10.5f} {b:10.5f}")
    scores = {
        f"LSTM, {name}": {"old data": a, "new data": b}
        for name, (a, b) in (("before", before), ("after", after))
    }
    return losses, seconds, scores


def arguments():
    options = side_by_side.parser(__doc__, epochs=100)
    options.add_argument("--size", type=at_least(20), default=1500, help="windows of each series")
    return options


if __name__ == "__main__":
    side_by_side.main(arguments().parse_args(), program)
