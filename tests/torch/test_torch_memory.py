"""What backward needs is made of tensors, which programs move, resize, replace and keep elsewhere."""

from __future__ import annotations

import io
import itertools
from functools import partial

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("fusedrnn._core", reason="the compiled module is not built")
import torch
from torch.autograd import graph
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from fusedrnn import problems
from fusedrnn.bench.peer_torch import FusedLayer, Torch
from fusedrnn.cells import CELLS
from torch_pairs import (
    LAYERS,
    assert_close,
    every_kind,
    every_layer,
    flat,
    ft,
    misaligned,
    module_pair,
    state_of,
)

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.usefixtures("no_fallback"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

I, H, T, B = 5, 7, 6, 3


def input_of(module):
    return torch.randn(*((T, B, I) if isinstance(module, torch.nn.RNNBase) else (B, I)))


def gradients(module, x, hx, between=lambda module, x, hx: None):
    """The gradients of x, the state if they need one, and the parameters, after something was done between
    forward and backward.
    """
    loss = sum(t.square().sum() for t in flat(module(x, hx)))
    between(module, x, hx)
    given = [t for t in (x, *flat(hx)) if t.requires_grad]
    return torch.autograd.grad(loss, [*given, *module.parameters()])


def shared(module, x, hx):
    for t in (x, *flat(hx)):
        t.share_memory_()
    module.share_memory()


def other_memory(module, x, hx):
    for t in (x, *flat(hx), *module.parameters()):
        t.data = t.data.clone()


def resized(module, x, hx):
    """As FSDP does: memory given back and filled again."""
    for t in (x, *flat(hx), *module.parameters()):
        storage, values = t.untyped_storage(), t.detach().clone()
        size = storage.nbytes()
        storage.resize_(0)
        storage.resize_(size)
        t.data.copy_(values)


def overwritten_afterwards(module, x, hx):
    other_memory(module, x, hx)
    kept = [torch.full((10_000,), 7.0) for _ in range(20)]
    del kept


@every_kind
@pytest.mark.parametrize("between", [shared, other_memory, resized, overwritten_afterwards])
def test_memory_moves_between_forward_and_backward(kind, between):
    """Backward once read what had been freed."""
    theirs, ours = module_pair(kind, I, H)
    x = input_of(ours)
    hx = state_of(ours, B, x)
    for t in (x, *flat(hx)):
        t.requires_grad_()
    expected = gradients(theirs, x, hx)
    for got, want in zip(gradients(ours, x, hx, between), expected, strict=True):
        assert_close(got, want)


def on_disk(t):
    file = io.BytesIO()
    torch.save(t, file)
    return file


def from_disk(file):
    file.seek(0)
    return torch.load(file)


class Boxed:
    def __init__(self, t):
        self.t = t


HOOKS = {
    "the same": (lambda t: t, lambda t: t),
    "clones": (torch.clone, torch.clone),
    "on disk": (on_disk, from_disk),
    "in objects": (Boxed, lambda box: box.t),
    "in NumPy": (lambda t: t.detach().numpy().copy(), torch.from_numpy),
}


@every_kind
@pytest.mark.parametrize("hooks", HOOKS.values(), ids=HOOKS)
def test_hooks_on_saved_tensors(kind, hooks):
    theirs, ours = module_pair(kind, I, H)
    x = input_of(ours)
    hx = state_of(ours, B, x)
    with graph.saved_tensors_hooks(*hooks):
        got = gradients(ours, x, hx)
    for g, want in zip(got, gradients(theirs, x, hx), strict=True):
        assert_close(g, want)


@every_kind
def test_saved_on_the_cpu_and_mutation_allowed(kind):
    theirs, ours = module_pair(kind, I, H)
    x = input_of(ours)
    hx = state_of(ours, B, x)
    expected = gradients(theirs, x, hx)
    with graph.save_on_cpu():
        got = gradients(ours, x, hx)
    for g, want in zip(got, expected, strict=True):
        assert_close(g, want)
    with graph.allow_mutation_on_saved_tensors():
        changed = x.clone()
        got = gradients(ours, changed, hx, lambda module, x, hx: x.zero_())
    for g, want in zip(got, expected, strict=True):
        assert_close(g, want)


@every_layer
def test_a_hook_that_rounds_changes_gradients(kind):
    """What hooks give back is what backward reads, the tape too."""
    _, ours = module_pair(kind, I, 64)
    x = torch.randn(T, B, I)
    exact = gradients(ours, x, None)

    def halve(t):
        return t.half() if t.numel() > 1000 and t.is_floating_point() else t

    with graph.saved_tensors_hooks(halve, lambda t: t.float() if t.dtype is torch.half else t):
        rounded = gradients(ours, x, None)
    assert not torch.equal(exact[1], rounded[1])
    for a, b in zip(rounded, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


def test_a_hook_that_leaves_another_dtype_is_told_so():
    _, ours = module_pair("LSTM", I, H)
    with graph.saved_tensors_hooks(lambda t: t.half() if t.is_floating_point() else t, lambda t: t):
        y, _ = ours(torch.randn(T, B, I))
    with pytest.raises(TypeError, match=r"expected float32 .* got float16 \("):
        y.sum().backward()


@every_layer
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_is_saved_is_no_more_than_pytorchs(kind, dtype):
    """As PyTorch counts it."""
    large = [(min(T, 20), min(B, 32), I, H) for T, B, I, H in problems.SPEED if H <= 512]
    small = itertools.product((20,), (8,), (1, 5, 32), (1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 50))
    cell = CELLS[kind.lower()]
    for shape in map(problems.Shape._make, (*large, *small)):
        data = problems.make(problems.Case(cell, shape, api="layer"), dtype, 0)
        theirs, ours = (sum(library(data, 1).saved().values()) for library in (Torch, FusedLayer))
        assert ours <= theirs, (shape, ours, theirs)


@every_kind
def test_storages_stay_resizable(kind):
    _, ours = module_pair(kind, I, H)
    x = input_of(ours)
    hx = state_of(ours, B, x)
    results = flat(ours(x, hx))
    sum(t.sum() for t in results).backward()
    for t in (x, *flat(hx), *ours.parameters(), *results, *(p.grad for p in ours.parameters())):
        assert t.untyped_storage().resizable()
    with torch.no_grad():
        assert all(t.untyped_storage().resizable() for t in flat(ours(x, hx)))


@every_kind
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_any_default_device_and_dtype(kind, device):
    theirs, ours = module_pair(kind, I, H)
    x = input_of(ours)
    before = torch.get_default_dtype()
    with torch.device(device):
        try:
            torch.set_default_dtype(torch.float64)
            found = flat(ours(x))
            sum(t.sum() for t in found).backward()
        finally:
            torch.set_default_dtype(before)
    for a, b in zip(found, flat(theirs(x)), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize(
    "options",
    [{"recurrent_dropout": 0.3}, {"zoneout_h": 0.2}, {"layer_norm": True}, {"recompute": True}],
    ids=str,
)
def test_any_default_device_with_options(options):
    ours = ft.LSTM(I, H, **options)
    x = torch.randn(T, B, I)
    sequences = torch.nn.utils.rnn.pack_sequence([x[:n, 0] for n in (5, 4, 1)])
    with torch.device("meta"):
        given = {"lengths": [T, 2, 0], "reset": [[0] * B] * T, "return_states": True}
        y, _, _ = ours(x, **given)
        packed, _ = ours(sequences)
    (y.sum() + packed.data.sum()).backward()


@every_kind
def test_tracing_below_autograd_sees_the_operator(kind):
    _, ours = module_pair(kind, I, H)
    a, b = input_of(ours), input_of(ours)
    for mode in ("real", "fake", "symbolic"):
        run = make_fx(lambda v: flat(ours(v))[0], tracing_mode=mode, _allow_non_fake_inputs=True)
        traced = run(a)
        assert torch.equal(traced(b), flat(ours(b))[0]), mode
        assert any("fusedrnn" in str(node.target) for node in traced.graph.nodes)


@every_layer
def test_flops_are_counted(kind):
    _, ours = module_pair(kind, I, H)
    x = torch.randn(T, B, I)
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    product = 2 * T * B * gates * H
    with FlopCounterMode(display=False) as counter:
        loss = ours(x)[0].sum()
    assert counter.get_total_flops() == product * (I + H)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert counter.get_total_flops() == product * (I + 2 * H)  # none of the input, which needs no gradient


def test_fx_takes_layers_and_cells_for_leaves():

    class Model(torch.nn.Module):
        def __init__(self, rnn):
            super().__init__()
            self.rnn = rnn

        def forward(self, x):
            return self.rnn(x)

    for kind in (*LAYERS, "LSTMCell", "GRUCell", "RNNCell"):
        _, ours = module_pair(kind, I, H)
        model, x = Model(ours), input_of(ours)
        traced = torch.fx.symbolic_trace(model)
        assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
        assert all(torch.equal(a, b) for a, b in zip(flat(traced(x)), flat(model(x)), strict=True))


def test_fx_passes_keywords_on():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = ft.GRU(I, H)

        def forward(self, x, lengths):
            return self.rnn(x, lengths=lengths, return_states=True)

    model, x, lengths = Model(), torch.randn(T, B, I), torch.tensor([T, 2, 0])
    found = flat(torch.fx.symbolic_trace(model)(x, lengths))
    assert all(torch.equal(a, b) for a, b in zip(found, flat(model(x, lengths)), strict=True))


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of oneDNN's LSTM
def test_batched_gradients(kind, dtype):
    theirs, ours = module_pair(kind, I, H, dtype=dtype)
    x = torch.randn(T, 1, I, dtype=dtype, requires_grad=True)
    upstream = torch.randn(4, T, 1, H, dtype=dtype)
    batched, by_vmap = [], []
    for net in (theirs, ours):
        y, wanted = net(x)[0], [x, *net.parameters()]
        batched.append(torch.autograd.grad(y, wanted, upstream, True, is_grads_batched=True))
        vjp = partial(torch.autograd.grad, y, wanted, retain_graph=True)
        by_vmap.append(torch.func.vmap(lambda d, vjp=vjp: vjp(d))(upstream))
    for want, got in (batched, by_vmap):
        for a, b in zip(got, want, strict=True):
            assert_close(a, b)
    want, got = (
        torch.autograd.functional.jacobian(lambda v, net=net: net(v)[0], x, vectorize=True)
        for net in (theirs, ours)
    )
    assert_close(got, want)


class Named(torch.Tensor):
    """A subclass that computes as a tensor does."""


UPSTREAM = {
    "negated": torch._neg_view,
    "of a complex number": lambda d: torch.complex(d, -d).conj().imag,
    "zero": lambda d: torch._efficientzerotensor(d.shape, dtype=d.dtype),
    "a subclass": lambda d: d.as_subclass(Named),
}


@every_kind
@pytest.mark.parametrize("form", UPSTREAM.values(), ids=UPSTREAM)
@pytest.mark.parametrize("hidden", [1, H])
def test_upstream_gradients_that_are_not_what_their_memory_says(kind, form, hidden):
    found = []
    for module in module_pair(kind, I, hidden):
        torch.manual_seed(1)
        x = input_of(module).requires_grad_()
        results = flat(module(x))
        upstream = [form(torch.randn_like(t)) for t in results]
        found.append(torch.autograd.grad(results, [x, *module.parameters()], upstream))
    for want, got in zip(*found, strict=True):
        assert_close(got, want)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tensors_that_are_not_aligned(kind, dtype):
    theirs, ours = module_pair(kind, I, H, dtype=dtype)
    x = input_of(ours).to(dtype)
    hx = state_of(ours, B, x)
    expected = gradients(theirs, x, hx)
    for p in ours.parameters():
        p.data = misaligned(p.data)
    other = tuple(map(misaligned, hx)) if isinstance(hx, tuple) else misaligned(hx)
    for got, want in zip(gradients(ours, misaligned(x), other), expected, strict=True):
        assert_close(got, want)
    assert ours.last_path == "fused"


@every_kind
def test_upstream_gradients_that_are_not_aligned(kind):
    _, ours = module_pair(kind, I, H)
    x = input_of(ours)
    results = flat(ours(x))
    upstream = [torch.randn_like(t) for t in results]
    expected = torch.autograd.grad(results, [*ours.parameters()], upstream, retain_graph=True)
    found = torch.autograd.grad(results, [*ours.parameters()], [*map(misaligned, upstream)])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@every_kind
def test_backward_is_of_the_backend_that_ran_forward(kind, monkeypatch):
    _, ours = module_pair(kind, I, H)
    results = flat(ours(input_of(ours)))
    expected = torch.autograd.grad(results[0].sum(), [*ours.parameters()], retain_graph=True)
    monkeypatch.setenv("FUSEDRNN_BACKEND", "reference")
    found = torch.autograd.grad(results[0].sum(), [*ours.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_rates_that_a_schedule_changes_are_not_kept():
    ours, x = ft.LSTM(I, H), torch.randn(T, B, I)
    for k in range(5):
        ours.zoneout_h = 0.1 + k / 100
        ours(x)
        if not k:
            before = ft.ops._tape_width.cache_info().currsize
    assert ft.ops._tape_width.cache_info().currsize == before


@every_layer
def test_a_change_of_the_output_in_place_names_the_cure(kind):
    _, ours = module_pair(kind, I, H)
    loss = torch.relu_(ours(torch.randn(T, B, I))[0]).sum()
    with pytest.raises(RuntimeError, match=r"inplace operation[\s\S]*clone it before"):
        loss.backward()
    torch.relu(ours(torch.randn(T, B, I))[0]).sum().backward()


@every_kind
def test_biases_may_be_written_to_before_backward(kind):
    theirs, ours = module_pair(kind, I, H)
    x = input_of(ours)

    def written(module, x, hx):
        for name, p in module.named_parameters():
            if name.startswith("bias"):
                p.detach().add_(1)

    for got, want in zip(gradients(ours, x, None, written), gradients(theirs, x, None), strict=True):
        assert_close(got, want)


@every_layer
def test_lengths_and_resets_may_be_written_to_after_the_call(kind):
    _, ours = module_pair(kind, I, H)
    x = torch.randn(T, B, I)
    lengths, reset = torch.tensor([T, 2, 4]), torch.zeros(T, B, dtype=torch.bool)
    reset[2] = True

    def grads(change):
        given = {"lengths": lengths.clone(), "reset": reset.clone()}
        loss = ours(x, **given)[0].sum()
        if change:
            given["lengths"].fill_(1)
            given["reset"].fill_(True)
        return torch.autograd.grad(loss, list(ours.parameters()))

    for a, b in zip(grads(True), grads(False), strict=True):
        assert torch.equal(a, b)


def test_an_activation_of_the_compiled_module_takes_a_tensor():
    from fusedrnn import _core

    x = torch.linspace(-2, 2, 7)
    for given in (x, x.double()):
        assert_close(torch.from_numpy(_core.testing.activation(1, given)), torch.tanh(given))
