"""The PyTorch API with tensors on a GPU: the way from tensors to the CUDA backend and back.

No GPU is needed: a tensor that says it is not on the CPU, and the emulated device, whose memory is NumPy's.
What this cannot show is CuPy's part, ``fusedrnn.torch.gpu``, which has never run.
"""

from __future__ import annotations

import contextlib
import shutil

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from emulated import EmulatedDevice  # noqa: E402
from fusedrnn import torch as fused  # noqa: E402
from fusedrnn.backends.cuda import CudaBackend  # noqa: E402
from fusedrnn.torch import gpu, ops, paths  # noqa: E402

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


class Elsewhere(torch.Tensor):
    """A tensor on the CPU that says it is not; whatever is computed of it is another one."""

    is_cpu = property(lambda self: False)


@pytest.fixture
def device(monkeypatch):
    """Tensors that are ``Elsewhere`` go to the emulated GPU; returns it."""
    emulated = EmulatedDevice()
    backend = CudaBackend(emulated)

    def unsupported(dtype, where, tensors):
        for t in tensors:
            assert t is None or not t.is_cpu
        return

    monkeypatch.setattr(paths, "unsupported", unsupported)
    monkeypatch.setattr(gpu, "backend", lambda: backend)
    monkeypatch.setattr(gpu, "on", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(gpu, "_array", lambda t: t.as_subclass(torch.Tensor).numpy())
    monkeypatch.setattr(gpu, "_tensor", lambda a: torch.from_numpy(a).as_subclass(Elsewhere))
    monkeypatch.setattr(ops, "tensor", gpu.tensor)
    # What autograd saved has lost its subclass.
    monkeypatch.setattr(ops, "array", lambda t: None if t is None else gpu.array(t.detach()))
    torch.manual_seed(0)
    return emulated


def moved(module):
    """The module with its parameters elsewhere."""
    for name, p in list(module.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        there = p.detach().clone().as_subclass(Elsewhere)
        setattr(module.get_submodule(owner), attribute, torch.nn.Parameter(there))
    return module


def here(t):
    return t.detach().as_subclass(torch.Tensor)


OPTIONS = {
    "plain": {},
    "two layers, both directions": {"num_layers": 2, "bidirectional": True},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_layers_beside_pytorchs(name, options, device):
    theirs = getattr(torch.nn, name)(3, 7, dtype=torch.float64, **options)
    ours = getattr(fused, name)(3, 7, dtype=torch.float64, **options)
    ours.load_state_dict(theirs.state_dict())
    moved(ours)
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    a, b = x.clone().requires_grad_(), x.clone().as_subclass(Elsewhere).requires_grad_()
    y, _ = theirs(a)
    z, _ = ours(b)
    assert ours.last_path == "fused"
    assert device.launches
    dy = torch.randn_like(y)
    y.backward(dy)
    z.backward(dy.as_subclass(Elsewhere))
    assert torch.allclose(here(z), y, rtol=0, atol=1e-13)
    assert torch.allclose(here(b.grad), a.grad, rtol=0, atol=1e-13)
    for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert torch.allclose(here(q.grad), p.grad, rtol=0, atol=1e-12)


def test_lengths_resets_and_states(device):
    plain = fused.LSTM(3, 7, dtype=torch.float64)
    ours = fused.LSTM(3, 7, dtype=torch.float64)
    ours.load_state_dict(plain.state_dict())
    moved(ours)
    x = torch.randn(6, 4, 3, dtype=torch.float64)
    lengths, reset = torch.tensor([6, 2, 0, 5]), torch.rand(6, 4) < 0.3
    given = {"lengths": lengths, "reset": reset, "return_states": True}
    with torch.no_grad():
        z, _, (h, c) = ours(x.as_subclass(Elsewhere), **given)
    assert ours.last_path == "fused"
    expected, _, states = reference(plain, x, given)
    assert torch.allclose(here(z), expected, rtol=0, atol=1e-13)
    for got, want in zip((h, c), states, strict=True):
        assert torch.allclose(here(got), want, rtol=0, atol=1e-13)


def reference(layer, x, given):
    """The layer's results by the reference backend."""
    from fusedrnn.backends.protocol import Weights
    from fusedrnn.cells import LSTM
    from fusedrnn.kernels import forward

    weights = Weights(*(p.detach().numpy() for p in layer.parameters()))
    out = forward(
        LSTM(), x.numpy(), weights, lengths=given["lengths"].numpy(), reset=given["reset"].numpy(),
        return_states=True, backend="reference",
    )  # fmt: skip
    return torch.from_numpy(out.y), out.stateT, [torch.from_numpy(s[None]) for s in out.states]


def test_a_packed_sequence(device):
    theirs = torch.nn.GRU(3, 7, dtype=torch.float64)
    ours = fused.GRU(3, 7, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    moved(ours)
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(n, 3, dtype=torch.float64) for n in (5, 4, 1)])
    y, h = theirs(packed)
    elsewhere = packed._replace(data=packed.data.as_subclass(Elsewhere))
    z, g = ours(elsewhere)
    assert ours.last_path == "fused"
    assert torch.allclose(here(z.data), y.data, rtol=0, atol=1e-13)
    assert torch.allclose(here(g), h, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells(name, device):
    theirs = getattr(torch.nn, name)(3, 7, dtype=torch.float64)
    ours = getattr(fused, name)(3, 7, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    moved(ours)
    x = torch.randn(4, 3, dtype=torch.float64)
    y, z = theirs(x), ours(x.as_subclass(Elsewhere))
    assert ours.last_path == "fused"
    for want, got in zip(*[r if isinstance(r, tuple) else (r,) for r in (y, z)], strict=True):
        assert torch.allclose(here(got), want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", gpu.HALVES)
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_16_bits(name, dtype, device):
    """Beside PyTorch's own in float32, on the same numbers."""
    theirs = getattr(torch.nn, name)(3, 7).to(dtype)
    ours = getattr(fused, name)(3, 7).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    moved(ours)
    theirs.float()
    x = torch.randn(*((4, 3) if "Cell" in name else (5, 4, 3))).to(dtype)
    a, b = x.float().requires_grad_(), x.clone().as_subclass(Elsewhere).requires_grad_()
    y, z = first_of(theirs(a)), first_of(ours(b))
    assert ours.last_path == "fused"
    assert z.dtype is dtype
    dy = torch.randn_like(y).to(dtype)
    y.backward(dy.float())
    z.backward(dy.as_subclass(Elsewhere))
    tolerance = 4 * torch.finfo(dtype).eps
    assert largest(here(z).float() - y) <= tolerance
    assert b.grad.dtype is dtype
    for want, got in [(a, b), *zip(theirs.parameters(), ours.parameters(), strict=True)]:
        assert largest(here(got.grad).float() - want.grad) <= tolerance * largest(want.grad)


@pytest.mark.parametrize("dtype", gpu.HALVES)
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_autocast(name, dtype, device):
    """As on the rounded numbers; gradients come back in the parameters' dtype."""
    layer = getattr(fused, name)(3, 7)
    rounded = getattr(fused, name)(3, 7).to(dtype)
    rounded.load_state_dict(layer.state_dict())
    moved(layer), moved(rounded)
    x = torch.randn(*((4, 3) if "Cell" in name else (5, 4, 3))).as_subclass(Elsewhere).requires_grad_()
    h = torch.randn(4, 7).as_subclass(Elsewhere)
    h = h if "Cell" in name else h[None]
    state = (h, 2 * h) if "LSTM" in name else h
    with torch.autocast("cpu", dtype):  # these tensors say that they are on the CPU's device
        z = first_of(layer(x, state))
        assert layer.last_path == "fused"
    low = (h.to(dtype), (2 * h).to(dtype)) if "LSTM" in name else h.to(dtype)
    w = first_of(rounded(x.detach().to(dtype), low))
    assert z.dtype is w.dtype is dtype
    assert torch.equal(here(z), here(w))
    dz = torch.randn_like(z)
    z.backward(dz), w.backward(dz)
    assert x.grad.dtype is torch.float32
    for p, q in zip(layer.parameters(), rounded.parameters(), strict=True):
        assert p.grad.dtype is torch.float32
        assert torch.equal(here(p.grad), here(q.grad).float())


def test_autocast_of_a_packed_sequence(device):
    layer = moved(fused.LSTM(3, 7))
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(n, 3) for n in (5, 4, 1)])
    elsewhere = packed._replace(data=packed.data.as_subclass(Elsewhere))
    with torch.autocast("cpu", torch.bfloat16):
        z, _ = layer(elsewhere)
    assert layer.last_path == "fused"
    assert z.data.dtype is torch.bfloat16


def test_autocast_leaves_float64(device):
    layer = moved(fused.LSTM(3, 7, dtype=torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        z, _ = layer(torch.randn(5, 4, 3, dtype=torch.float64).as_subclass(Elsewhere))
    assert z.dtype is torch.float64


def first_of(result):
    return result[0] if isinstance(result, tuple) else result


def largest(t):
    return float(t.detach().as_subclass(torch.Tensor).abs().max())


@pytest.mark.parametrize("options", [{"recurrent_dropout": 0.3, "zoneout_h": 0.2}, {"layer_norm": True}])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_options_of_our_own(name, options, request):
    """As on the CPU, masks included."""
    cpu = getattr(fused, name)(3, 7, num_layers=2, dtype=torch.float64, **options)
    there = getattr(fused, name)(3, 7, num_layers=2, dtype=torch.float64, **options)
    there.load_state_dict(cpu.state_dict())
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    torch.manual_seed(5)
    y, _ = cpu(x)
    y.square().sum().backward()
    device = request.getfixturevalue("device")
    moved(there)
    torch.manual_seed(5)
    z, _ = there(x.as_subclass(Elsewhere))
    z.square().sum().backward()
    assert there.last_path == "fused"
    assert "step_forward" in device.launches
    assert largest(here(z) - y) <= 1e-13
    for p, q in zip(cpu.parameters(), there.parameters(), strict=True):
        assert largest(here(q.grad) - p.grad) <= 1e-12


def test_weights_that_changed_are_packed_anew(device):
    ours = moved(fused.LSTM(3, 7))
    x = torch.randn(2, 3, 3).as_subclass(Elsewhere)
    with torch.no_grad():
        first, again = here(ours(x)[0]), here(ours(x)[0])
        ours.weight_hh_l0.mul_(2)
        after = here(ours(x)[0])
    assert torch.equal(first, again)
    assert not torch.equal(first, after)


def test_without_cuda_the_reason_is_told():
    reason = gpu.unavailable()
    if reason is None:
        pytest.skip("there is a GPU")
    assert paths.unsupported(torch.float32, torch.device("cuda"), ()) == f"the device is cuda: {reason}"
