"""An Elman network on combined waves: fifty values, predict the next (PyTorch).

python examples/torch/waves.py --compare
"""

import tempfile
import time
from pathlib import Path

import side_by_side
import torch
from torch import nn

WINDOW, HIDDEN, BATCH = 50, 32, 32


class Net(nn.Module):
    def __init__(self, rnn_class):
        super().__init__()
        self.rnn = rnn_class(1, HIDDEN, batch_first=True)  # its start is uniform within 1 / sqrt(32) = 0.177
        self.fc = nn.Linear(HIDDEN, 1)
        nn.init.uniform_(self.fc.weight, -1, 1)
        nn.init.zeros_(self.fc.bias)
        nn.init.zeros_(self.rnn.bias_ih_l0)
        nn.init.zeros_(self.rnn.bias_hh_l0)
        self.rnn.bias_hh_l0.requires_grad_(False)  # stays zero: PyTorch has two biases, and one is wanted

    def forward(self, x):
        return self.fc(self.rnn(x)[0][:, -1])


def build(layers):
    if layers == "torch":
        from torch.nn import RNN
    else:
        from fusedrnn.torch import RNN  # all that differs
    return Net(RNN)


def windows(wave, n):
    """x (B, T, 1) and the value after each window."""
    t = torch.linspace(0, 0.1 * n, n)
    series = t.sin() if wave == "sine" else t.sin() + t.cos() + t.sin().sign()
    return series[:-1].unfold(0, WINDOW, 1)[:, :, None], series[WINDOW:, None]


def train(args, x, y):
    """Returns the model, the loss of every step, and the seconds."""
    torch.manual_seed(args.seed)
    model = build(args.layers)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses, start = [], time.perf_counter()
    for epoch in range(1, args.epochs + 1):
        epoch_losses = []
        for rows in torch.randperm(len(x)).split(BATCH):
            loss = nn.functional.mse_loss(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            epoch_losses.append(loss.item())
        losses += epoch_losses
        if epoch == 1 or epoch % 10 == 0:
            mean = sum(epoch_losses) / len(epoch_losses)
            print(f"epoch {epoch:3}  loss {mean:.6f}  {(time.perf_counter() - start) / epoch:.3f} s an epoch")
    return model, losses, time.perf_counter() - start


def program(args):
    x, y = windows(args.wave, 1000)
    n = int(0.8 * len(x))
    model, losses, seconds = train(args, x[:n], y[:n])

    with tempfile.TemporaryDirectory() as folder:  # the file is the same with both layers
        path = args.save or Path(folder) / "waves.pt"
        torch.save(model.state_dict(), path)
        model = build(args.layers)
        model.load_state_dict(torch.load(path, weights_only=True))
    with torch.no_grad():
        error = nn.functional.mse_loss(model(x[n:]), y[n:]).item()
    persistence = nn.functional.mse_loss(x[n:, -1], y[n:])
    print(f"test: MSE {error:.3g}; persistence (the last value again) {persistence:.3g}")
    if args.plot:
        plot(args.plot, model, args.wave)
    return losses, seconds, {"RNN": {"MSE": error}}


def plot(path, model, wave):
    """The first 100 predictions of the test part of a longer wave."""
    from fusedrnn.plot import forecast

    x, y = windows(wave, 2560)
    n = int(0.8 * len(x))
    with torch.no_grad():
        prediction = model(x[n : n + 100])
    forecast(y[n : n + 100], {"RNN": prediction}).figure.savefig(path)


def arguments():
    options = side_by_side.parser(__doc__, epochs=100)
    options.add_argument("--wave", choices=["combined", "sine"], default="combined")
    options.add_argument("--save", metavar="FILE", help="where the trained weights go")
    options.add_argument("--plot", metavar="PNG", help="draw 100 predictions and the truth")
    return options


if __name__ == "__main__":
    side_by_side.main(arguments().parse_args(), program)
