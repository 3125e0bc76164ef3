"""A user's program: ``mypy --strict`` (``nox -s types``) takes it as it is, and it runs."""

import tempfile
from pathlib import Path
from typing import Any, assert_type

import numpy as np
import torch

import fusedrnn.functions as F
import fusedrnn.layers as L
from fusedrnn import (
    DataLoader,
    Dataset,
    Model,
    Parameter,
    Variable,
    checkpoint,
    get_num_threads,
    gradcheck,
    kernels,
    no_grad,
    optimizers,
)
from fusedrnn.cells import Cell, cell, sigmoid, tanh
from fusedrnn.torch import GRU, LSTM, LSTMCell, Recurrent, convert, to_torch


@cell
def mgu(p: Any, x: Any, h: Any) -> Any:
    f = sigmoid(p.dense("f", x, h))
    return h + f * (tanh(p.dense("n", x, f * h)) - h)


class Forecaster(Model):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.rnn = L.LSTM(hidden)
        self.out = L.Linear(1)

    def forward(self, x: Any) -> Variable:
        y: Variable = self.out(self.rnn(x))
        return y


class Windows(Dataset):
    def __init__(self) -> None:
        self.series = np.sin(np.arange(40, dtype=np.float32)).reshape(-1, 1)

    def __len__(self) -> int:
        return len(self.series) - 1

    def __getitem__(self, index: Any) -> Any:
        return self.series[index], self.series[index + 1]


def native(path: Path) -> float:
    net = Forecaster(8)
    optimizer = optimizers.Adam(0.01).setup(net)
    assert_type(optimizer, optimizers.Adam)
    loss: Variable = Variable(np.zeros(()))
    for x, t in DataLoader(Windows(), batch_size=8):
        net.reset_state()
        loss = F.mean_squared_error(net(x), t)
        net.cleargrads()
        loss.backward()
        optimizer.update()
    net.reset_state()
    with no_grad():
        assert_type(F.tanh(net(np.zeros((3, 1), np.float32))), Variable)
    for name, p in net.named_params():
        assert_type(name, str)
        assert_type(p, Parameter)
    checkpoint.save(path, net, optimizer, epoch=1)
    assert_type(checkpoint.load(path, net, optimizer), dict[str, Any])
    return float(loss)


def arrays() -> None:
    assert_type(mgu, Cell)
    x = np.ones((5, 2, 3), np.float32)
    weights = {"weight_ih": np.ones((16, 3), np.float32), "weight_hh": np.ones((16, 4), np.float32)}
    out = kernels.forward(kernels.lstm, x, weights, lengths=[5, 3], return_states=True)
    assert_type(out, kernels.Forward)
    y, (hT, cT), states, tape = out
    assert states is not None
    assert y.shape == (5, 2, 4)
    assert hT.shape == cT.shape
    gradients = kernels.backward(tape, dy=np.ones_like(y))
    assert_type(gradients, kernels.Gradients)
    assert gradients.dx is not None
    assert gradients.dx.shape == x.shape
    assert_type(get_num_threads(), int)
    assert_type(gradcheck(lambda a: F.sum(a * a), (np.ones(3),)), bool)


def in_pytorch() -> None:
    layer = LSTM(3, 8, num_layers=2, batch_first=True)
    assert_type(layer.hidden_size, int)
    y, (h, c) = layer(torch.ones(2, 5, 3), lengths=torch.tensor([5, 3]))
    y.square().mean().backward()
    h, c = LSTMCell(3, 8)(torch.ones(2, 3), (h[0], c[0]))
    assert h.shape == c.shape
    model = torch.nn.GRU(3, 8)
    converted = convert(model)
    assert_type(converted.converted, dict[str, str])
    assert isinstance(converted.model, GRU)
    to_torch(model)
    own = Recurrent(mgu, 3, 8)
    assert_type(own.cell, Cell)
    own(torch.ones(5, 2, 3))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        native(Path(folder, "model.npz"))
    arrays()
    in_pytorch()
