"""What the tests of fusedrnn.torch share: layers with the same weights, and how two results compare."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence

import fusedrnn.torch as ft

LAYERS = ("LSTM", "GRU", "RNN")
CELLS = ("LSTMCell", "GRUCell", "RNNCell")
DTYPES = (torch.float32, torch.float64)
every_layer = pytest.mark.parametrize("kind", LAYERS)
every_cell = pytest.mark.parametrize("kind", CELLS)
every_kind = pytest.mark.parametrize("kind", LAYERS + CELLS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=("float32", "float64"))
T, B, I, H = 5, 3, 4, 7  # sizes that do for most tests


def module_pair(kind: str, *sizes: int, **options: Any) -> tuple[Any, Any]:
    """PyTorch's layer and ours with the same weights, which are large enough for the gates to saturate."""
    theirs = getattr(torch.nn, kind)(*sizes, **options)
    ours = getattr(ft, kind)(*sizes, **options)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) / max(1, theirs.hidden_size) ** 0.5)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def state_of(layer: Any, batch: int | None, like: torch.Tensor) -> Any:
    """A random state as the layer takes it."""
    rows = () if batch is None else (batch,)
    if isinstance(layer, torch.nn.RNNBase):
        rows = (layer.num_layers * (1 + layer.bidirectional), *rows)
    widths = (getattr(layer, "proj_size", 0) or layer.hidden_size, layer.hidden_size)
    h, c = (like.new_empty(*rows, width).normal_() for width in widths)
    return (h, c) if isinstance(layer, (torch.nn.LSTM, torch.nn.LSTMCell)) else h


def grads(tensors: Any, on: bool = True) -> Any:
    """The tensors, which now want a gradient."""
    for t in flat(tensors):
        t.requires_grad_(on)
    return tensors


def inputs(layer: Any, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (T, B, I)) -> Any:
    """x and a state that want a gradient."""
    x = torch.randn(shape, dtype=dtype)
    batch = None if x.dim() == 2 else x.size(0 if layer.batch_first else 1)
    return grads(x), grads(state_of(layer, batch, x))


def misaligned(t: torch.Tensor) -> torch.Tensor:
    """The numbers at an odd address, as in a file or a message that was mapped into memory."""
    memory = bytearray(t.numel() * t.element_size() + 1)
    return torch.frombuffer(memory, dtype=t.dtype, offset=1).view(t.shape).copy_(t)


def flat(result: Any) -> list[torch.Tensor]:
    """The tensors of any nest of tuples; of a PackedSequence its data."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [] if result is None else [t for part in result for t in flat(part)]


def assert_close(got: torch.Tensor | None, expected: torch.Tensor | None, what: str = "") -> None:
    """Equal but for rounding: 512 eps of the largest element, about 100 steps of error that adds up."""
    if expected is None or got is None:  # of what had no part in it
        assert all(g is None or not g.any() for g in (got, expected)), what
        return
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape), what
    assert not torch.isnan(got).any(), what
    got, expected = got.detach(), expected.detach()
    if expected.numel():
        scale = max(1.0, float(expected.abs().max()))
        error = float((got - expected).abs().max()) / scale
        assert error <= 512 * torch.finfo(expected.dtype).eps, f"{what}: {error}"


def gradients(layer: Any, result: Any, inputs: Any, used: Any = None, seed: int = 1) -> dict[str, Any]:
    """The gradient of a random combination of the outputs, of those whose number is in ``used``."""
    generator = torch.Generator().manual_seed(seed)
    outputs = flat(result)
    upstream = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in outputs]
    used = range(len(outputs)) if used is None else used
    chosen = [(o, g) for i, (o, g) in enumerate(zip(outputs, upstream, strict=True)) if i in used]
    wanted = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    wanted |= {f"input {i}": t for i, t in enumerate(flat(inputs)) if t.requires_grad}
    if not wanted:
        assert not any(o.requires_grad for o in outputs)
        return {}
    outputs, upstream = [o for o, _ in chosen], [g for _, g in chosen]
    found = torch.autograd.grad(outputs, list(wanted.values()), upstream, True, allow_unused=True)
    return dict(zip(wanted, found, strict=True))


def assert_same(theirs: Any, ours: Any, x: Any, hx: Any = None, used: Any = None, **more: Any) -> Any:
    """The same outputs, states and gradients; what ours returned."""
    expected = theirs(x, hx)
    got = ours(x, hx, **more)
    assert ours.last_path == "fused"
    for i, (a, b) in enumerate(zip(flat(got), flat(expected), strict=True)):
        assert_close(a, b, f"output {i}")
        assert a.requires_grad == b.requires_grad
    if torch.is_grad_enabled():
        expected_gradients = gradients(theirs, expected, (x, hx), used)
        got_gradients = gradients(ours, got, (x, hx), used)
        assert got_gradients.keys() == expected_gradients.keys()
        for name, g in expected_gradients.items():
            assert_close(got_gradients[name], g, name)
    return got
