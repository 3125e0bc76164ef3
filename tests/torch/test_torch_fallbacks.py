"""Calls of the layers of ``fusedrnn.torch`` that our kernels do not run: fallbacks and wrong use."""

from __future__ import annotations

import copy
import re
import warnings

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("fusedrnn._core", reason="the compiled module is not built")
import torch
from torch.nn.utils import rnn

from torch_pairs import (
    B,
    H,
    I,
    T,
    assert_close,
    assert_same,
    every_layer,
    flat,
    ft,
    inputs,
    module_pair,
)

pytestmark = pytest.mark.usefixtures("no_fallback")


# --- fallbacks ------------------------------------------------------------------------------------------


@every_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_falls_back(kind, dtype, warned, monkeypatch):
    monkeypatch.setattr(ft.paths, "has_bfloat16", lambda key: False)  # as where the processor has none
    theirs, ours = module_pair(kind, I, H, dtype=dtype)
    x, hx = inputs(ours, dtype)
    with pytest.warns(
        ft.FallbackWarning, match=f"{kind} runs PyTorch's own implementation: the dtype is {dtype}"
    ) as found:
        got = ours(x, hx)
    assert found[0].filename == __file__
    assert ours.last_path == f"fallback: the dtype is {dtype}"
    for a, b in zip(flat(got), flat(theirs(x, hx)), strict=True):
        assert torch.equal(a, b)
    ours(x)  # no second warning
    ft.set_fallback_errors(True)
    with pytest.raises(RuntimeError, match="runs PyTorch's own implementation"):
        ours(x)
    with ft.fallback():  # asked for
        ours(x)
    ours.float()(x.float())
    assert ours.last_path == "fused"


class Sub(torch.Tensor):
    """A subclass of a tensor."""


def test_subclasses_negative_views_and_empty_inputs_fall_back(warned):
    x = torch.randn(B, I)
    negative = torch.complex(torch.zeros_like(x), -x).conj().imag  # equal to x
    for given, size, reason in (
        (x.as_subclass(Sub), I, "a tensor is a Sub, a subclass of torch.Tensor"),
        (negative, I, "a tensor's memory is not plainly strided"),
        (x[:, :0], 0, f"the input is of shape ({B}, 0)"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns of weights without elements
            theirs, ours = module_pair("LSTMCell", size, H)
        with pytest.warns(ft.FallbackWarning, match=re.escape(reason)):
            got = ours(given)
        for a, b in zip(got, theirs(given), strict=True):
            assert torch.equal(a, b)


@every_layer
def test_the_meta_device_falls_back(kind, warned):
    ours = getattr(ft, kind)(I, H, device="meta")
    with pytest.warns(ft.FallbackWarning, match="the device is meta"):
        y, _ = ours(torch.zeros(T, B, I, device="meta"))
    assert y.shape == (T, B, H)
    assert y.is_meta
    ours.to_empty(device="cpu")
    torch.nn.init.ones_(ours.weight_hh_l0)
    ours(torch.zeros(T, B, I))
    assert ours.last_path == "fused"


@pytest.mark.quick
@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_autocast(kind, dtype, warned):
    wide = torch.promote_types(dtype, torch.float32)
    theirs, ours = module_pair(kind, I, H, num_layers=2, bidirectional=True, dtype=wide)
    x = torch.randn(T, B, I, dtype=dtype)
    fused = dtype is torch.float64 or kind == "GRU" or ft.paths.has_bfloat16(ours._key)
    with torch.autocast("cpu", dtype=torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("ignore", ft.FallbackWarning)
        try:
            expected = theirs(x)
        except RuntimeError as error:  # oneDNN has no bfloat16 LSTM for processors without AVX-512
            with pytest.raises(RuntimeError, match=re.escape(str(error))):
                ours(x)
            return
        got = ours(x)
    assert (ours.last_path == "fused") == fused
    for a, b in zip(flat(got), flat(expected), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.03, atol=0.03)  # bfloat16 has 8 bits
    if fused:
        lowered = got[0].dtype is not wide and kind != "GRU"  # which computes in float32
        same = copy.deepcopy(ours).bfloat16() if lowered else ours
        assert torch.equal(got[0], same(x.to(torch.bfloat16 if lowered else wide))[0].to(got[0].dtype))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("state", [None, torch.float32, torch.bfloat16], ids=str)
def test_dtypes_of_a_projection_in_autocast(state, ragged, warned):
    x = torch.randn(T, B, I)
    given = rnn.pack_padded_sequence(x, torch.tensor([T, 3, 1])) if ragged else x
    found = []
    for layer in module_pair("LSTM", I, H, proj_size=2):
        hx = None if state is None else tuple(torch.randn(1, B, n).to(state) for n in (2, H))
        with torch.autocast("cpu", dtype=torch.bfloat16), warnings.catch_warnings(action="ignore"):
            found.append([t.dtype for t in flat(layer(given, hx))])
    assert found[0] == found[1]


@every_layer
@pytest.mark.parametrize("form", ["ragged", "of one length", "without rows", "from float16", "to float16"])
def test_dtypes_in_autocast(kind, form, warned):
    x, lengths = torch.randn(T, B, I), torch.tensor([T, T, T] if form == "of one length" else [T, 3, 1])
    given = rnn.pack_padded_sequence(x, lengths) if form in ("ragged", "of one length") else x
    given = {"without rows": x[:, :0], "from float16": x.half()}.get(form, given)
    found = []
    for layer in module_pair(kind, I, H):
        dtype = torch.float16 if form == "to float16" else torch.bfloat16
        with torch.autocast("cpu", dtype=dtype), warnings.catch_warnings():
            warnings.simplefilter("ignore", ft.FallbackWarning)
            try:
                found.append([t.dtype for t in flat(layer(given))])
            except RuntimeError as error:  # oneDNN has not every dtype on every processor
                found.append(str(error))
    assert found[0] == found[1]
    if (kind, form) == ("LSTM", "ragged"):
        assert found[1][0] is torch.float32
        assert layer.last_path == "fused"


@every_layer
def test_tracing_falls_back(kind, warned):
    _, ours = module_pair(kind, I, H)
    x = torch.randn(T, B, I)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(ours, x, check_trace=False)
    assert ours.last_path == "fallback: torch.jit traces"
    assert_close(traced(x + 1)[0], ours(x + 1)[0])


@every_layer
def test_transforms_fall_back(kind, warned):
    theirs, ours = module_pair(kind, I, H, dtype=torch.float64)
    x, v = torch.randn(2, T, B, I, dtype=torch.float64), torch.randn(T, B, I, dtype=torch.float64)

    def f(layer):
        return lambda x: layer(x)[0].square().sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for use in (
            lambda layer: torch.func.grad(f(layer))(x[0]),
            lambda layer: torch.func.jvp(f(layer), (x[0],), (v,))[1],
        ):
            with ft.fallback():
                expected = use(ours)
            assert_close(use(theirs), expected)
            assert_close(use(ours), expected)
        with pytest.raises(RuntimeError, match="Batching rule not implemented"):
            torch.func.vmap(f(theirs))(x)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x[0], v)
            pairs = [torch.autograd.forward_ad.unpack_dual(layer(dual)[0]) for layer in (theirs, ours)]
            assert_close(pairs[1].tangent, pairs[0].tangent)
    assert ours.last_path.startswith("fallback: forward-mode")


# --- wrong use ------------------------------------------------------------------------------------------


@pytest.fixture(params=[torch.enable_grad, torch.no_grad])
def with_and_without_a_graph(request):
    with request.param():
        yield


def fails_alike(theirs, ours, *args):
    with pytest.raises(Exception) as expected:  # noqa: PT011
        theirs(*args)
    with pytest.raises(type(expected.value)) as got:
        ours(*args)
    assert str(got.value) == str(expected.value)


@pytest.mark.quick
@every_layer
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.usefixtures("with_and_without_a_graph")
def test_wrong_calls_fail_as_pytorchs(kind, packed):
    theirs, ours = module_pair(kind, I, H, num_layers=2)
    x = torch.randn(T, B, I)

    def state(*shape, dtype=torch.float32):
        h = torch.zeros(shape, dtype=dtype)
        return (h, h) if kind == "LSTM" else h

    def given(x):
        return rnn.pack_padded_sequence(x, torch.tensor([5, 4, 2])) if packed else x

    for wrong in (torch.randn(T, B, I + 1), x.double(), x.long()):
        fails_alike(theirs, ours, given(wrong))
    for wrong in (
        state(2, B + 1, H), state(1, B, H), state(2, B, H + 1), state(2, H), state(2, B, H, 1), "state", 5,
    ):  # fmt: skip
        if packed and not isinstance(wrong, (str, int)):  # some crash PyTorch's
            with pytest.raises(RuntimeError, match=r"Expected hidden size \(2, 3, 7\), got "):
                ours(given(x), wrong)
        else:
            fails_alike(theirs, ours, given(x), wrong)
    fails_alike(theirs, ours, given(x), torch.zeros(2, B, H) if kind == "LSTM" else (torch.zeros(2, B, H),))
    if kind == "LSTM":
        h = torch.zeros(2, B, H)
        for wrong in ((h,), (h, h, h), (h, None), (h, h.double())):
            fails_alike(theirs, ours, given(x), wrong)
        with pytest.raises(RuntimeError, match="Expected hidden"):
            ours(given(x), (h, h[:1]))
    if packed:
        return
    for wrong in (torch.zeros(I), torch.zeros(1, T, B, I), torch.zeros(0, B, I), "x", None, x.numpy(), [x]):
        fails_alike(theirs, ours, wrong)
    fails_alike(theirs, ours, x[:, 0], state(2, B, H))
    fails_alike(theirs, ours, x.to("meta"))


@every_layer
def test_wrong_constructions_fail_as_pytorchs(kind):
    for args, options in (
        ((I,), {}), ((I, 0), {}), ((I, 2.0), {}), ((I, H), {"num_layers": 0}), ((I, H), {"dropout": 2}),
        ((I, H), {"dropout": True, "num_layers": 2}), ((I, H), {"proj_size": H}), ((I, H), {"units": 3}),
    ):  # fmt: skip
        messages = []
        for module in (torch.nn, ft):
            with pytest.raises((TypeError, ValueError)) as error:
                getattr(module, kind)(*args, **options)
            messages.append((type(error.value), str(error.value)))
        assert messages[0] == messages[1]


@every_layer
@pytest.mark.usefixtures("with_and_without_a_graph")
def test_weights_of_another_size_fail(kind):
    x = torch.randn(T, B, I)
    for name, shape in (("weight_ih_l0", (3, I)), ("weight_hh_l0", (3, 3)), ("bias_ih_l0", (2,))):
        ours = getattr(ft, kind)(I, H)
        setattr(ours, name, torch.nn.Parameter(torch.zeros(shape)))
        with pytest.raises(RuntimeError, match=f"{name[:-3]}: expected shape"):
            ours(x)


@every_layer
@pytest.mark.parametrize("batch_first", [False, True])
def test_an_empty_batch(kind, batch_first):
    theirs, ours = module_pair(kind, I, H, num_layers=2, bidirectional=True, batch_first=batch_first)
    x = torch.zeros((0, T, I) if batch_first else (T, 0, I), requires_grad=True)
    assert_same(theirs, ours, x)
    y, _, states = ours(x, lengths=[], reset=torch.zeros(x.shape[:2]), return_states=True)
    assert y.shape == (*x.shape[:2], 2 * H)
    assert flat(states)[0].shape == (4, *x.shape[:2], H)


def test_lengths_of_another_type_are_named():
    with pytest.raises(TypeError, match=r"^lengths: expected a tensor, an array or a list, got str$"):
        ft.LSTM(2, 3)(torch.randn(4, 1, 2), lengths="abc")
