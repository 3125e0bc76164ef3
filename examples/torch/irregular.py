"""Irregularly sampled series: a cell that knows the time between observations, beside others (PyTorch).

python examples/torch/irregular.py      what it shows: docs/irregular.md
"""

import sys
from pathlib import Path

import torch
from torch import nn

from fusedrnn.torch import Recurrent

sys.path.append(str(Path(__file__).resolve().parents[1]))
import irregular_series
from irregular_series import BATCH, HIDDEN, RATE


class Net(nn.Module):
    def __init__(self, cell, in_size):
        super().__init__()
        self.rnn = Recurrent(cell, in_size, HIDDEN)
        self.fc = nn.Linear(HIDDEN, 1)

    def forward(self, x, gaps):
        h, _ = self.rnn(x, dt=gaps) if self.rnn.cell.scalars else self.rnn(x)
        return self.fc(h)


def loss_of(model, x, gaps, target):
    return nn.functional.mse_loss(model(x, gaps), target)


def inputs(series, gap_is_input):
    return [torch.from_numpy(a) for a in irregular_series.inputs(*series, gap_is_input)]


def train(cell, gap_is_input, training, test, seed, epochs):
    """Returns the number of parameters, the mean loss of each epoch, and the predictions of ``test``."""
    torch.manual_seed(seed)
    x, gaps, target = inputs(training, gap_is_input)
    model = Net(cell, x.shape[2])
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    losses = []
    for _ in range(epochs):
        total = 0.0
        for rows in torch.randperm(x.shape[1]).split(BATCH):
            loss = loss_of(model, x[:, rows], gaps[:, rows], target[:, rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.item() * len(rows)
        losses.append(total / x.shape[1])
    x, gaps, _ = inputs(test, gap_is_input)
    with torch.no_grad():
        predictions = model(x, gaps)[:, :, 0].numpy()
    return sum(p.numel() for p in model.parameters()), losses, predictions


if __name__ == "__main__":
    torch.set_num_threads(1)  # at this size more of them wait for each other most of the time
    irregular_series.compare(train, irregular_series.arguments(__doc__).parse_args())
