"""The PyTorch API with tensors on a GPU: the way from tensors to the CUDA backend and back.

No GPU is needed: a tensor that says it is not on the CPU, and the emulated device, whose memory is NumPy's.
What this cannot show is CuPy's part, ``fusedrnn.torch.gpu``, which has never run.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from emulated import EmulatedDevice  # noqa: E402
from fusedrnn import torch as fused  # noqa: E402
from fusedrnn.backends.cuda import CudaBackend, cupy_device  # noqa: E402
from fusedrnn.torch import gpu, ops, paths  # noqa: E402
from torch_pairs import CELLS, LAYERS, flat  # noqa: E402

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


class Elsewhere(torch.Tensor):
    """A tensor on the CPU that says it is not; whatever is computed of it is another one."""

    is_cpu = property(lambda self: False)


@pytest.fixture
def device(monkeypatch):
    """Tensors that are ``Elsewhere`` go to the emulated GPU; returns it."""
    emulated = EmulatedDevice()
    backend = CudaBackend(emulated)

    def unsupported(dtype, where, tensors, names, key=""):
        assert not any(t is not None and t.is_cpu for t in tensors)

    monkeypatch.setattr(paths, "unsupported", unsupported)
    monkeypatch.setattr(gpu, "backend", lambda: backend)
    monkeypatch.setattr(gpu, "on", lambda device: contextlib.nullcontext())
    cupy = SimpleNamespace(from_dlpack=lambda t: t.as_subclass(torch.Tensor).numpy(), ndarray=Elsewhere)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(cupy_device, "unavailable", lambda: "this is no CuPy")
    monkeypatch.setattr(gpu, "from_dlpack", lambda a: torch.from_numpy(a).as_subclass(Elsewhere))
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


def pair(kind, *sizes, **options):
    """PyTorch's, and ours elsewhere with the same weights."""
    theirs, ours = (getattr(library, kind)(*sizes, **options) for library in (torch.nn, fused))
    ours.load_state_dict(theirs.state_dict())
    return theirs, moved(ours)


def results(layer, x, *state, rounded=None, within=None, **given):
    """A call's outputs, the gradient of x, those of the parameters. That of y is ``rounded``, where it is."""
    x = x.clone().requires_grad_()
    with within or contextlib.nullcontext():
        out = flat(layer(x, *state, **given))
    y, generator = out[0], torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(rounded or y.dtype)
    y.backward(dy.to(y.dtype).as_subclass(type(y)))
    return out, [x.grad], [p.grad for p in layer.parameters()]


def elsewhere(*shape, dtype=None):
    return torch.randn(*shape, dtype=dtype).as_subclass(Elsewhere)


def here(t):
    return t.detach().as_subclass(torch.Tensor)


def largest(t):
    return float(here(t).abs().max())


def assert_close(got, want, *tolerances):
    """One tolerance for each group of ``results``."""
    for group, expected, tolerance in zip(got, want, tolerances, strict=True):
        for a, b in zip(group, expected, strict=True):
            assert a.shape == b.shape
            assert largest(here(a) - here(b)) <= tolerance


OPTIONS = {
    "plain": {},
    "two layers, both directions": {"num_layers": 2, "bidirectional": True},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
}
layers_and_cells = pytest.mark.parametrize("kind", [*LAYERS, *CELLS])


def sizes_of_x(kind):
    return (4, 3) if "Cell" in kind else (5, 4, 3)


@pytest.mark.parametrize(
    ("kind", "options"), [*((k, o) for k in LAYERS for o in OPTIONS), *((k, "plain") for k in CELLS)]
)
def test_beside_pytorchs(kind, options, device):
    theirs, ours = pair(kind, 3, 7, dtype=torch.float64, **OPTIONS[options])
    x = torch.randn(*sizes_of_x(kind), dtype=torch.float64)
    want, got = results(theirs, x), results(ours, x.as_subclass(Elsewhere))
    assert ours.last_path == "fused"
    assert device.launches
    assert_close(got, want, 1e-13, 1e-13, 1e-12)


def test_a_packed_sequence(device):
    theirs, ours = pair("GRU", 3, 7, dtype=torch.float64)
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(n, 3, dtype=torch.float64) for n in (5, 4, 1)])
    want, got = theirs(packed), ours(packed._replace(data=packed.data.as_subclass(Elsewhere)))
    assert ours.last_path == "fused"
    assert_close([flat(got)], [flat(want)], 1e-13)


GIVEN = {"lengths": torch.tensor([4, 2, 0, 3]), "reset": torch.arange(20).view(5, 4) % 3 == 1}
OWN = [
    ({}, {**GIVEN, "return_states": True}),
    ({"num_layers": 2, "recurrent_dropout": 0.3, "zoneout_h": 0.2}, {}),
    ({"num_layers": 2, "layer_norm": True}, {}),
]


@pytest.mark.parametrize(("options", "given"), OWN, ids=["given", "masks", "norm"])
@pytest.mark.parametrize("kind", LAYERS)
def test_options_of_our_own(kind, options, given, request):
    """As on the CPU, masks included."""
    cpu, there = (getattr(fused, kind)(3, 7, dtype=torch.float64, **options) for _ in range(2))
    there.load_state_dict(cpu.state_dict())
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    torch.manual_seed(5)
    want = results(cpu, x, **given)
    device = request.getfixturevalue("device")
    torch.manual_seed(5)
    got = results(moved(there), x.as_subclass(Elsewhere), **given)
    assert there.last_path == "fused"
    assert ("step_forward" in device.launches) == (options != {})
    assert_close(got, want, 1e-13, 1e-12, 1e-12)


@pytest.mark.parametrize("dtype", gpu.HALVES)
@layers_and_cells
def test_16_bits(kind, dtype, device):
    """Beside PyTorch's own in float32, on the same numbers."""
    theirs, ours = pair(kind, 3, 7, dtype=dtype)
    x = torch.randn(*sizes_of_x(kind)).to(dtype)
    got = results(ours, x.as_subclass(Elsewhere))
    assert ours.last_path == "fused"
    want = results(theirs.float(), x.float(), rounded=dtype)
    tolerance = 4 * torch.finfo(dtype).eps
    assert largest(here(got[0][0]).float() - want[0][0]) <= tolerance
    for a, b in zip(got[1] + got[2], want[1] + want[2], strict=True):
        assert a.dtype is dtype
        assert largest(here(a).float() - b) <= tolerance * largest(b)


@pytest.mark.parametrize("dtype", gpu.HALVES)
@layers_and_cells
def test_autocast(kind, dtype, device):
    """As on the rounded numbers; gradients come back in the parameters' dtype."""
    layer, rounded = getattr(fused, kind)(3, 7), getattr(fused, kind)(3, 7).to(dtype)
    rounded.load_state_dict(layer.state_dict())
    x, h = elsewhere(*sizes_of_x(kind)), elsewhere(*(() if "Cell" in kind else (1,)), 4, 7)
    state, low = ((h, 2 * h) if "LSTM" in kind else h, (h.to(dtype), (2 * h).to(dtype)))
    # These tensors say that they are on the CPU's device.
    out, dx, gradients = results(moved(layer), x, state, within=torch.autocast("cpu", dtype))
    assert layer.last_path == "fused"
    want, _, expected = results(moved(rounded), x.to(dtype), low if "LSTM" in kind else low[0])
    assert {t.dtype for t in (out[0], want[0])} == {dtype}
    assert torch.equal(here(out[0]), here(want[0]))
    assert {g.dtype for g in dx + gradients} == {torch.float32}
    for a, b in zip(gradients, expected, strict=True):
        assert torch.equal(here(a), here(b).float())


def test_autocast_of_a_packed_sequence_and_of_float64(device):
    layer, double = moved(fused.LSTM(3, 7)), moved(fused.LSTM(3, 7, dtype=torch.float64))
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(n, 3) for n in (5, 4, 1)])
    with torch.autocast("cpu", torch.bfloat16):
        z, _ = layer(packed._replace(data=packed.data.as_subclass(Elsewhere)))
        w, _ = double(elsewhere(5, 4, 3, dtype=torch.float64))
    assert layer.last_path == "fused"
    assert (z.data.dtype, w.dtype) == (torch.bfloat16, torch.float64)


def test_weights_that_changed_are_packed_anew(device):
    ours = moved(fused.LSTM(3, 7))
    x = elsewhere(2, 3, 3)
    with torch.no_grad():
        first, again = here(ours(x)[0]), here(ours(x)[0])
        ours.weight_hh_l0.mul_(2)
        after = here(ours(x)[0])
    assert torch.equal(first, again)
    assert not torch.equal(first, after)


def test_cupy_works_on_pytorchs_stream(monkeypatch):
    """As CuPy has it, without a warning that something is deprecated."""
    cupy, seen, nothing = pytest.importorskip("cupy"), [], lambda *_: contextlib.nullcontext()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=4711))
    monkeypatch.setattr(torch.cuda, "device", nothing)
    monkeypatch.setattr(cupy.cuda, "Device", nothing)
    monkeypatch.setattr(cupy.cuda, "using_allocator", nothing)
    monkeypatch.setattr(cupy.cuda.Stream, "__enter__", lambda stream: seen.append(stream.ptr))
    monkeypatch.setattr(cupy.cuda.Stream, "__exit__", lambda *_: None)
    with gpu.on(torch.device("cuda", 0)):
        assert seen == [4711]
    with gpu.on(torch.device("cpu")):
        assert seen == [4711]


def test_without_cuda_the_reason_is_told():
    reason = gpu.backend().unavailable()
    if reason is None:
        pytest.skip("there is a GPU")
    assert paths.unsupported(torch.float32, torch.device("cuda"), (), ()) == f"the device is cuda: {reason}"
