"""The layers of ``fusedrnn.torch`` in the graphs of autograd, and from several threads."""

from __future__ import annotations

import threading
import warnings

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("fusedrnn._core", reason="the compiled module is not built")
import torch

from torch_pairs import (
    B,
    H,
    I,
    T,
    assert_close,
    assert_same,
    every_layer,
    flat,
    gradients,
    inputs,
    module_pair,
    state_of,
)

pytestmark = pytest.mark.usefixtures("no_fallback")


# --- autograd -------------------------------------------------------------------------------------------


@every_layer
def test_backward_twice(kind):
    _, ours = module_pair(kind, I, H)
    x, hx = inputs(ours)
    result = ours(x, hx)
    loss = sum(o.square().sum() for o in flat(result))
    first = torch.autograd.grad(loss, [x, *ours.parameters()], retain_graph=True)
    second = torch.autograd.grad(loss, [x, *ours.parameters()])
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@every_layer
def test_the_tape_goes_with_the_graph(kind):
    """What backward needs is freed by backward, though the results live on."""
    import gc
    import weakref

    _, ours = module_pair(kind, I, H)
    y, _ = ours(torch.randn(T, B, I))
    tape = weakref.ref(y.grad_fn.saved_tensors[0])
    y.sum().backward()
    gc.collect()
    assert tape() is None
    assert y.grad_fn is not None


@every_layer
@pytest.mark.parametrize("what", ["x", "hx", "weight", "y"])
def test_a_change_in_place_before_backward_is_noticed(kind, what):
    _, ours = module_pair(kind, I, H)
    x, hx = torch.randn(T, B, I), state_of(ours, B, torch.ones(()))
    y, _ = ours(x, hx)
    {"x": x, "hx": flat(hx)[0], "weight": ours.weight_hh_l0.detach(), "y": y.detach()}[what].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@every_layer
def test_second_derivatives(kind):
    theirs, ours = module_pair(kind, I, H, dtype=torch.float64)
    x, hx = inputs(ours, torch.float64)
    found = []
    for layer in (ours, theirs):
        wanted = [x, *flat(hx), *layer.parameters()]
        first = torch.autograd.grad(layer(x, hx)[0].square().sum(), wanted, create_graph=True)
        second = torch.autograd.grad(sum(d.square().sum() for d in first), wanted, create_graph=True)
        found.append([*first, *second, *torch.autograd.grad(sum(d.sum() for d in second), wanted)])
    assert ours.last_path == "fused"
    for a, b in zip(*found, strict=True):
        assert_close(a, b)


@every_layer
def test_second_derivatives_of_a_batch_of_gradients(kind):
    """As ``hessian(vectorize=True)`` and ``is_grads_batched`` ask for them."""
    found = []
    for layer in module_pair(kind, I, H, dtype=torch.float64):
        x = torch.linspace(-1, 1, T * B * I, dtype=torch.float64).reshape(T, B, I)
        wanted = [p for p in layer.parameters() if p.requires_grad]
        for vectorize in (False, True):
            rows = torch.autograd.functional.jacobian(
                lambda x, layer=layer: layer(x)[0].sin().sum(-1), x, create_graph=True, vectorize=vectorize
            )
            found.append(torch.autograd.grad(rows.square().sum(), wanted))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert_close(a, b)


@every_layer
def test_a_bias_changed_before_second_derivatives_is_noticed(kind):
    """First derivatives do not need it."""
    _, ours = module_pair(kind, I, H)
    x = torch.randn(T, B, I, requires_grad=True)
    y = ours(x)[0].square().sum()
    with torch.no_grad():
        ours.bias_ih_l0.add_(1)
    torch.autograd.grad(y, x, retain_graph=True)
    with pytest.raises(RuntimeError, match="a bias has been modified by an inplace operation"):
        torch.autograd.grad(y, x, create_graph=True)


@every_layer
@pytest.mark.parametrize("recompute", [False, True])
def test_hooks_on_saved_tensors(kind, recompute):
    theirs, ours = module_pair(kind, I, H, num_layers=2, dtype=torch.float64)
    ours.recompute = recompute
    x, hx = inputs(ours, torch.float64)
    with torch.autograd.graph.save_on_cpu():
        assert_same(theirs, ours, x, hx)
    kept = []

    def pack(t):
        kept.append(t)
        return len(kept) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: kept[i].clone()):
        result = ours(x, hx)
    found, wanted = gradients(ours, result, (x, hx)), gradients(theirs, theirs(x, hx), (x, hx))
    for name, g in wanted.items():
        assert_close(found[name], g, name)


@pytest.mark.quick
@every_layer
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(kind, use_reentrant):
    from torch.utils.checkpoint import checkpoint

    theirs, ours = module_pair(kind, I, H, num_layers=2, dropout=0.5, dtype=torch.float64)
    x, _ = inputs(ours, torch.float64)
    found = []
    for layer in (theirs, ours):
        torch.manual_seed(2)
        y = checkpoint(lambda x, layer=layer: layer(x)[0].tanh(), x, use_reentrant=use_reentrant)
        found.append(
            (y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]))
            if not use_reentrant
            else (y,)
        )
        if use_reentrant:
            y.square().sum().backward()
            found[-1] += (x.grad, *(p.grad for p in layer.parameters()))
            x.grad = None
    for a, b in zip(*found, strict=True):
        assert_close(b, a)
    assert ours.last_path == "fused"


@every_layer
def test_anomaly_mode(kind):
    theirs, ours = module_pair(kind, I, H)
    with warnings.catch_warnings(action="ignore"), torch.autograd.detect_anomaly():
        assert_same(theirs, ours, *inputs(ours))
        x = torch.full((T, B, I), torch.nan, requires_grad=True)
        with pytest.raises(RuntimeError, match="returned nan values"):
            ours(x)[0].sum().backward()


@every_layer
def test_module_hooks(kind):
    found = []
    for layer in module_pair(kind, I, H):
        seen = []
        layer.register_forward_pre_hook(lambda m, args, s=seen: s.append("before"))
        layer.register_forward_hook(lambda m, args, out, s=seen: s.append("after"))
        layer.register_full_backward_hook(lambda m, gi, go, s=seen: s.append((*gi, *go)))
        layer.weight_hh_l0.register_hook(lambda g: 2 * g)
        torch.manual_seed(1)
        y, _ = layer(torch.randn(T, B, I, requires_grad=True))
        y.square().sum().backward()
        found.append((seen, layer.weight_hh_l0.grad))
    (seen, g), (our_seen, our_g) = found
    assert_close(our_g, g)
    assert seen[:2] == our_seen[:2] == ["before", "after"]
    assert len(seen) == len(our_seen) == 3
    for a, b in zip(our_seen[2], seen[2], strict=True):
        assert_close(a, b)


@every_layer
def test_several_threads_in_one_layer(kind):
    theirs, ours = module_pair(kind, I, 33, num_layers=2)
    xs = [torch.randn(T, B, I, requires_grad=True) for _ in range(6)]
    expected = [theirs(x)[0].detach() for x in xs]
    wrong = []

    def work(x, y):
        try:
            for _ in range(30):
                got = ours(x)[0]
                assert_close(got.detach(), y)
                torch.autograd.grad(got.sum(), x)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(xs, expected, strict=True)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
