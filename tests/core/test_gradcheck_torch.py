"""The gradient check of PyTorch's functions and modules: what is right passes, and nothing wrong does."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fusedrnn.gradcheck import GradcheckError, gradcheck

BOTH = pytest.mark.parametrize("fast_mode", [False, True], ids=["full", "fast"])


@pytest.fixture
def torch():
    module = pytest.importorskip("torch", reason="needs PyTorch")
    threads = module.get_num_threads()
    module.set_num_threads(1)
    module.manual_seed(0)
    yield module
    module.set_num_threads(threads)


def test_torch_is_not_imported_for_others():
    code = (
        "import sys, numpy; from fusedrnn.gradcheck import gradcheck; from fusedrnn.functions import tanh;"
        "gradcheck(tanh, numpy.ones(3)); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@BOTH
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_torch_modules(torch, name, fast_mode):
    module = getattr(torch.nn, name)(2, 3, num_layers=2, dropout=0.4, dtype=torch.float64)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    state = [torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    generator = torch.get_rng_state()
    assert gradcheck(module, (x, tuple(state) if name == "LSTM" else state[0]), fast_mode=fast_mode)
    assert torch.equal(generator, torch.get_rng_state())
    for n, p in module.named_parameters():
        assert torch.equal(p, before[n])


def test_torch_float32_packed_sequences_and_cells(torch):
    lstm = torch.nn.LSTM(2, 3, bidirectional=True)
    x = torch.randn(4, 2, 2, requires_grad=True)
    assert gradcheck(lstm, x, fast_mode=True)
    gru = torch.nn.GRU(2, 3, dtype=torch.float64)
    padded = torch.randn(2, 4, 2, dtype=torch.float64).transpose(0, 1).requires_grad_()

    def packed(x):
        return gru(torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 2])))

    assert gradcheck(packed, padded)
    cell = torch.nn.LSTMCell(2, 3, dtype=torch.float64)
    assert gradcheck(cell, torch.randn(2, 2, dtype=torch.float64, requires_grad=True))


@BOTH
@pytest.mark.parametrize("wrong", ["factor", "one element", "nan", "missing", "stale mask", "shape"])
def test_wrong_torch_functions_fail(torch, wrong, fast_mode):
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.mask = (torch.rand(x.shape) < 0.5).to(x)
            return 2 * x * ctx.mask

        @staticmethod
        def backward(ctx, dy):
            dx = 2 * dy * ctx.mask
            if wrong == "factor":
                dx = dx * 1.001
            if wrong == "one element":
                dx[0, 1] += 1e-3 * dy.abs().sum()
            if wrong == "nan":
                dx[1, 1] = float("nan")
            if wrong == "missing":
                return None
            if wrong == "stale mask":
                return 2 * dy * (torch.rand(dy.shape) < 0.5).to(dy)
            return dx[1:] if wrong == "shape" else dx

    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    with pytest.raises(GradcheckError):
        gradcheck(Double.apply, x, fast_mode=fast_mode)


def test_torch_bad_arguments(torch):
    with pytest.raises(TypeError, match="float32 or float64"):
        gradcheck(torch.tanh, torch.randn(3, dtype=torch.float16, requires_grad=True))
    with pytest.raises(ValueError, match="requires a gradient"):
        gradcheck(torch.tanh, torch.randn(3))
