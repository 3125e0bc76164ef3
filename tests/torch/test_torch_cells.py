"""``fusedrnn.torch.LSTMCell``, ``GRUCell`` and ``RNNCell`` against ``torch.nn``'s."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("fusedrnn._core", reason="the compiled module is not built")
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_pairs import (
    CELLS,
    DTYPES,
    assert_close,
    assert_same,
    every_cell,
    every_dtype,
    flat,
    ft,
    module_pair,
    state_of,
)

pytestmark = pytest.mark.usefixtures("no_fallback")

B, I, H = 3, 4, 7


def inputs(cell, dtype=torch.float32, shape=(B, I)):
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    hx = state_of(cell, None if x.dim() == 1 else B, x.detach())
    for s in flat(hx):
        s.requires_grad_()
    return x, hx


@every_dtype
@every_cell
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(B, I), (I,)], ids=["batched", "unbatched"])
def test_a_step(kind, dtype, bias, shape):
    theirs, ours = module_pair(kind, I, H, bias=bias, dtype=dtype)
    x, hx = inputs(ours, dtype, shape)
    for state in (hx, None):
        assert_same(theirs, ours, x, state)
        assert_same(theirs, ours, x.detach(), state)
    if kind == "LSTMCell":
        for used in ({0}, {1}):
            assert_same(theirs, ours, x, hx, used)
    with torch.no_grad():
        assert_same(theirs, ours, x, hx)
    with torch.inference_mode():
        y = assert_same(theirs, ours, x, hx)
        assert flat(y)[0].is_inference()


@given(
    st.sampled_from(CELLS),
    st.sampled_from(DTYPES),
    st.tuples(st.integers(0, 5), st.integers(1, 9), st.integers(1, 19)),
    st.sampled_from(["contiguous", "sliced", "features sliced", "expanded"]),
    st.integers(0, 255),
    st.integers(0, 2**31),
)
@settings(max_examples=200)
def test_random_configurations(kind, dtype, sizes, layout, flags, seed):
    torch.manual_seed(seed)
    batch, features, hidden = sizes
    options = {"nonlinearity": "relu"} if kind == "RNNCell" and flags & 64 else {}
    theirs, ours = module_pair(kind, features, hidden, bias=bool(flags & 1), dtype=dtype, **options)
    for i, (p, q) in enumerate(zip(theirs.parameters(), ours.parameters(), strict=True)):
        p.requires_grad_(not flags >> 1 + i % 2 & 1)
        q.requires_grad_(p.requires_grad)

    def drawn(n):
        x = torch.randn(batch, n, dtype=dtype)
        if layout == "sliced":
            return torch.stack([x, x], 1)[:, 0]
        if layout == "features sliced":
            return torch.stack([x, x], -1)[..., 0]
        return x[:1].expand(x.shape) if layout == "expanded" and batch else x

    x = drawn(features).requires_grad_(bool(flags & 8))
    pair = [drawn(hidden).requires_grad_(bool(flags & 16)) for _ in range(1 + (kind == "LSTMCell"))]
    hx = (tuple(pair) if len(pair) == 2 else pair[0]) if flags & 32 else None
    assert_same(theirs, ours, x, hx)


@every_cell
def test_relu_and_a_long_walk(kind):
    """Backpropagation through many steps, the state carried by the caller."""
    options = {"nonlinearity": "relu"} if kind == "RNNCell" else {}
    found = []
    for cell in module_pair(kind, I, H, dtype=torch.float64, **options):
        torch.manual_seed(1)
        x = torch.randn(20, B, I, dtype=torch.float64, requires_grad=True)
        hx, seen = None, []
        for step in x:
            hx = cell(step, hx)
            seen.append(flat(hx)[0])
        found.append(torch.autograd.grad(torch.stack(seen).square().sum(), [x, *cell.parameters()]))
    for a, b in zip(*found, strict=True):
        assert_close(b, a)


@every_cell
def test_gradcheck(kind):
    _, ours = module_pair(kind, 2, 3, dtype=torch.float64)
    x, hx = inputs(ours, torch.float64, (B, 2))
    names, weights = zip(*ours.named_parameters(), strict=True)
    n = len(flat(hx))

    def f(x, *rest):
        state = rest[:n] if n == 2 else rest[0]
        return torch.func.functional_call(ours, dict(zip(names, rest[n:], strict=True)), (x, state))

    assert torch.autograd.gradcheck(f, (x, *flat(hx), *weights), atol=1e-9)


@every_cell
def test_copies_and_packed_weights(kind):
    theirs, ours = module_pair(kind, I, 40)
    x, hx = inputs(ours)
    ours(x, hx)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert_same(theirs, other, x, hx)
    for change in (
        lambda p: p.data.mul_(0.5),
        lambda p: p.detach().add_(1),
        lambda p: setattr(p, "data", p.data * 2),
    ):
        for cell in (theirs, ours):
            for p in cell.parameters():
                change(p)
        assert_same(theirs, ours, x, hx)


@every_cell
def test_fallbacks(kind, warned, monkeypatch):
    monkeypatch.setattr(ft.paths, "has_bfloat16", lambda key: False)  # as where the processor has none
    theirs, ours = module_pair(kind, I, H)
    x, hx = inputs(ours)
    with torch.autocast("cpu", dtype=torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("ignore", ft.FallbackWarning)
        got, expected = ours(x, hx), theirs(x, hx)
    assert (ours.last_path == "fused") == (kind != "RNNCell")
    for a, b in zip(flat(got), flat(expected), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.03, atol=0.03)
    for cell in (theirs, ours):
        cell.bfloat16()
    with pytest.warns(ft.FallbackWarning, match=f"{kind} runs PyTorch's own implementation: the dtype is"):
        got = ours(x.bfloat16())
    assert torch.equal(flat(got)[0], flat(theirs(x.bfloat16()))[0])
    ours.float()
    theirs.float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        grads = [torch.func.grad(lambda x, c=c: flat(c(x))[0].sum())(x.detach()) for c in (theirs, ours)]
        assert_close(grads[1], grads[0])
        if kind == "LSTMCell":  # PyTorch's own has no batching rule
            with pytest.raises(RuntimeError, match="Batching rule not implemented"):
                torch.func.vmap(ours)(torch.ones(2, 3, I))
            return
        vmapped = [torch.func.vmap(cell)(torch.ones(2, 3, I)) for cell in (theirs, ours)]
    for a, b in zip(*map(flat, vmapped), strict=True):
        assert_close(b, a)


@every_cell
def test_second_derivatives(kind):
    found = []
    for cell in module_pair(kind, I, H, dtype=torch.float64):
        torch.manual_seed(0)
        x, hx = inputs(cell, torch.float64)
        wanted = [x, *flat(hx), *cell.parameters()]
        first = torch.autograd.grad(flat(cell(x, hx))[0].square().sum(), wanted, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(d.square().sum() for d in first), wanted)])
    for a, b in zip(*found, strict=True):
        assert_close(a, b)


@every_cell
def test_no_units_and_no_rows(kind, warned):
    theirs, ours = module_pair(kind, I, 0)
    with pytest.warns(ft.FallbackWarning, match="there are no units"):
        assert flat(ours(torch.zeros(B, I)))[0].shape == (B, 0)
    theirs, ours = module_pair(kind, I, H)
    assert_same(theirs, ours, torch.zeros(0, I, requires_grad=True))


@pytest.mark.parametrize("grad", [True, False])
@every_cell
def test_wrong_calls_fail_as_pytorchs(kind, grad):
    theirs, ours = module_pair(kind, I, H)
    x = torch.randn(B, I)

    def state(*shape):
        h = torch.zeros(shape)
        return (h, h) if kind == "LSTMCell" else h

    wrong = [(x[:, :-1],), (x[None],), (torch.zeros(()),), (x.double(),), (x.long(),), ("x",), (None,)]
    wrong += [
        (x, state(B + 1, H)),
        (x, state(B, H + 1)),
        (x, state(H)),
        (x, state(1, B, H)),
        (x[0], state(B, H)),
    ]
    wrong += [(x, "state"), (x, 5), (x, torch.zeros(B, H) if kind == "LSTMCell" else (torch.zeros(B, H),))]
    if kind == "LSTMCell":
        h = torch.zeros(B, H)
        wrong += [(x, (h,)), (x, (h, h[:1])), (x, (h, None)), (x, (h, h[..., :-1]))]
    wrong += [(x, (h, h.numpy()) if kind == "LSTMCell" else state(B, H).numpy()), (x.to("meta"),)]
    for args in wrong:
        with torch.set_grad_enabled(grad):
            with pytest.raises(Exception) as expected:  # noqa: PT011
                theirs(*args)
            with pytest.raises(type(expected.value)) as got:
                ours(*args)
        assert str(got.value) == str(expected.value)


def test_an_unknown_nonlinearity_fails_as_pytorchs():
    for module in (torch.nn, ft):
        cell = module.RNNCell(I, H, nonlinearity="sigmoid")
        with pytest.raises(RuntimeError, match=r"^Unknown nonlinearity: sigmoid$"):
            cell(torch.zeros(B, I))
