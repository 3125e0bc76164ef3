"""``fusedrnn.torch`` in several Python threads at the same moment: the bits of one thread."""

from __future__ import annotations

import contextlib
import copy
import threading
from functools import partial

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("fusedrnn._core", reason="the compiled module is not built")

import fusedrnn.torch as ft  # noqa: E402
from at_once import at_once  # noqa: E402
from fusedrnn.cells.zoo import mgu  # noqa: E402
from fusedrnn.torch import keys  # noqa: E402
from published import everything, gru_d  # noqa: E402
from test_python_threads import often, unused  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_fallback", "openmp_pool")

I = 5
LAYERS = [
    lambda: ft.LSTM(I, 17, num_layers=2),
    lambda: ft.GRU(I, 9, bidirectional=True),
    lambda: ft.RNN(I, 33, recompute=True),
    lambda: ft.LSTM(I, 12, proj_size=4),
    lambda: ft.Recurrent(unused(mgu), I, 16),
    lambda: ft.Recurrent(unused(everything), I, 7),
    lambda: ft.Recurrent(unused(gru_d), I, 8),
    lambda: ft.Recurrent(unused(everything), I, 7, zoneout_h=0.2, recurrent_dropout=0.1).eval(),
]


def drawn():
    """A layer of each kind that no call has reached, its optimizer and an input."""
    torch.manual_seed(0)
    found = []
    for k, make in enumerate(LAYERS):
        layer, x = make(), torch.randn(4 + k, 3, I)
        scalars = {name: torch.rand(x.shape[:2]) for name in getattr(layer.cell, "scalars", ())}
        optimizer = (torch.optim.Adam if k % 2 else torch.optim.SGD)(layer.parameters(), 0.01)
        found.append((layer, optimizer, x, scalars))
    return found


def train(layer, optimizer, x, scalars):
    """Train, then freeze; return outputs and parameters."""
    for _ in range(4):
        optimizer.zero_grad()
        layer(x, **scalars)[0].square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        before = layer.eval()(x, **scalars)[0]
        after = ft.freeze(layer)(x, **scalars)[0]
    assert torch.equal(before, after)
    assert layer.last_path == "fused"
    return [before, *layer.parameters()]


@often
def test_each_thread_trains_and_freezes_a_layer(rounds):
    want = [train(*each) for each in drawn()]
    for _ in range(rounds):
        found = at_once([partial(train, *each) for each in drawn()])
        for got, w in zip(found, want, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, w, strict=True))


@pytest.mark.quick
def test_each_new_cell_gets_a_key_of_its_own(monkeypatch):
    both = threading.Barrier(2)

    class Slow(dict):
        def __len__(self):
            n = super().__len__()
            with contextlib.suppress(threading.BrokenBarrierError):  # one thread at a time is right
                both.wait(0.2)
            return n

    monkeypatch.setattr(keys, "_keys", Slow(keys._keys))
    cells = [unused(mgu), unused(mgu)]  # no module has them, so that they are numbered
    found = at_once([partial(keys.key_of, c) for c in cells])
    assert [keys.cell_of(key) for key in found] == cells


@often
def test_optimizers_while_other_threads_freeze(rounds):
    layer = ft.LSTM(2, 3).eval()
    kept = [ft.freeze(copy.deepcopy(layer)) for _ in range(30)]

    def freeze():
        for _ in range(20 * rounds):
            several = [ft.freeze(copy.deepcopy(layer)) for _ in range(3)]
            ft.unfreeze(several[0])  # the others are freed

    def step():
        p = torch.nn.Parameter(torch.zeros(1))
        p.grad = torch.ones(1)
        optimizer = torch.optim.SGD([p], 1.0)
        for _ in range(50 * rounds):
            optimizer.step()
        return p.item()

    assert at_once([freeze, step, freeze, step])[1::2] == [-50 * rounds] * 2
    kept[0].weight_ih_l0.grad = torch.ones(12, 2)
    with pytest.raises(RuntimeError, match="weight_ih_l0: the layer is frozen"):
        torch.optim.SGD(kept[0].parameters(), 1.0).step()
