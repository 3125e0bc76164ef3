"""Failures that users of other libraries met, each as a test of the PyTorch API where it can show there.

The number is that of the list the project keeps; the docstring names the source. Rows without a test here:

- R12 to R18, R23 to R28 and R36 concern kernels and processes: tests/cpu/test_regressions.py, or CUDA alone.
- R20's and R21's kernels are tested with wrong arguments of every kind in tests/core/test_bad_input.py too.
- The CUDA, MPS and cuDNN parts of R1 to R4, R7, R8, R19, R22, R29 and R34: what remains on a CPU is here.
"""

from __future__ import annotations

import gc
import warnings

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("fusedrnn._core", reason="the compiled module is not built")
import torch
from torch.nn.utils import rnn

from torch_pairs import (
    assert_close,
    assert_same,
    every_cell,
    every_layer,
    flat,
    ft,
    gradients,
    module_pair,
    state_of,
)

pytestmark = pytest.mark.usefixtures("no_fallback")

T, B, I, H = 5, 3, 2, 7


def given(kind, *sizes, x=(T, B, I), dtype=torch.float64, **options):
    theirs, ours = module_pair(kind, *(sizes or (I, H)), **options, dtype=dtype)
    x = torch.randn(x, dtype=dtype)
    hx = state_of(ours, x.size(0 if ours.batch_first else 1), x)
    for t in (x, *flat(hx)):
        t.requires_grad_()
    return theirs, ours, x, hx


@every_layer
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("batch_first", [False, True])
def test_regression_R01_batch_first_layers_and_a_state_that_is_not_zero(kind, layers, batch_first):
    """pytorch PR 95137, issues 91694 and 92615."""
    assert_same(*given(kind, num_layers=layers, batch_first=batch_first))


@every_layer
def test_regression_R02_backward_uses_the_masks_of_dropout(kind):
    """pytorch 190056."""
    theirs, ours, x, hx = given(kind, num_layers=3, dropout=0.5)
    found = []
    for layer in (theirs, ours):
        torch.manual_seed(1)
        found.append(gradients(layer, layer(x, hx), (x, hx)))
    for name, g in found[0].items():
        assert_close(found[1][name], g, name)


@every_layer
@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("layers", [1, 2])
def test_regression_R03_two_directions_and_several_rows(kind, batch, layers):
    """pytorch 94754 and 90421."""
    assert_same(*given(kind, x=(T, batch, I), bidirectional=True, num_layers=layers))


@every_layer
@pytest.mark.parametrize("used", [{0}, {1}, {2}, {1, 2}, {0, 2}])
def test_regression_R04_a_part_of_the_outputs_receives_a_gradient(kind, used):
    """pytorch 96416."""
    if kind == "LSTM" or 2 not in used:
        assert_same(*given(kind), used=used)


@every_layer
def test_regression_R05_backward_writes_to_nothing_and_middle_layers_are_right(kind):
    """mxnet 17898 and PR 18203."""
    theirs, ours, x, hx = given(kind, num_layers=4, bidirectional=True)
    y, _ = ours(x, hx)
    upstream = torch.randn_like(y)
    held = [y, upstream, x, *flat(hx), *ours.parameters()]
    before = [t.detach().clone() for t in held]
    y.backward(upstream)
    assert all(map(torch.equal, held, before))
    assert_same(theirs, ours, x, hx)


@every_layer
def test_regression_R06_input_size_differs_from_hidden_size(kind):
    """mxnet 17479: primes."""
    for features, hidden in ((11, 3), (3, 11), (1, 13)):
        assert_same(*given(kind, features, hidden, x=(7, 5, features), num_layers=3))


@every_layer
def test_regression_R07_two_gradient_calls_on_one_forward(kind):
    """tensorflow 26331."""
    _, ours, x, hx = given(kind, num_layers=2)
    loss = ours(x, hx)[0].square().sum()
    wanted = [x, *flat(hx), *ours.parameters()]
    first, second = (torch.autograd.grad(loss, wanted, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@every_layer
@pytest.mark.parametrize("times", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_regression_R08_masked_runs_are_the_same(kind, times):
    """tensorflow 60192."""
    _, ours, x, hx = given(kind, num_layers=2, bidirectional=True)
    lengths = torch.tensor([5, 0, 3])
    first = None
    for _ in range(times):
        result = ours(x, hx, lengths=lengths)
        found = [*flat(result), *gradients(ours, result, (x, hx)).values()]
        first = found if first is None else first
        assert all(map(torch.equal, found, first))


@every_layer
def test_regression_R09_a_fully_masked_row(kind):
    """tensorflow 36139, 43103 and 33148."""
    _, ours, x, hx = given(kind, bidirectional=True)
    y, final = ours(x, hx, lengths=[0, 5, 0])
    for a, b in zip(flat(final), flat(hx), strict=True):
        assert torch.equal(a[:, [0, 2]], b[:, [0, 2]])
    dx, *dstate = torch.autograd.grad(
        [y, *flat(final)], [x, *flat(hx)], [torch.ones_like(t) for t in (y, *flat(final))]
    )
    assert not y[:, [0, 2]].any()
    assert not dx[:, [0, 2]].any()
    assert all(torch.equal(d[:, [0, 2]], torch.ones_like(d[:, [0, 2]])) for d in dstate)


@every_layer
def test_regression_R10_no_steps_no_rows_no_length(kind):
    """pytorch 50192, 4582 and 20529."""
    theirs, ours, x, _ = given(kind)
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
        ours(x[:0])
    assert_same(theirs, ours, x[:, :0])
    y, _ = ours(x, lengths=torch.zeros(B, dtype=torch.int64))
    assert not y.any()


@every_layer
def test_regression_R11_ragged_lengths_and_nothing_out_of_the_padding(kind):
    """jax 15183."""
    _, ours, x, hx = given(kind, num_layers=2, bidirectional=True)
    lengths = torch.tensor([2, 5, 3])
    clean = ours(x, hx, lengths=lengths)
    dirty = (
        x.detach().masked_fill((torch.arange(T)[:, None] >= lengths)[:, :, None], torch.nan).requires_grad_()
    )
    found = ours(dirty, hx, lengths=lengths)
    packed = ours(rnn.pack_padded_sequence(x, lengths, enforce_sorted=False), hx)
    assert all(map(torch.equal, flat(found), flat(clean)))
    assert torch.equal(rnn.pad_packed_sequence(packed[0])[0], clean[0])
    a, b = gradients(ours, clean, (x, hx)), gradients(ours, found, (dirty, hx))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("hidden", [*range(1, 34)])
def test_regression_R19_sliced_outputs_of_any_hidden_size(hidden):
    """pytorch 54307: the gradient of a slice has strides."""
    theirs, ours, x, _ = given("GRU", I, hidden, batch_first=True)
    found = []
    for layer in (theirs, ours):
        y = layer(x)[0][:, 1::2].transpose(1, 2)
        found.append(torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]))
    for a, b in zip(*found, strict=True):
        assert_close(b, a)


@every_cell
def test_regression_R20_hidden_states_of_wrong_rank(kind):
    """pytorch 106769."""
    _, ours = module_pair(kind, I, H)
    for shape in ((), (H,), (1, H), (B, H - 1), (B, H + 1), (B, 1), (1, B, H), (B, H, 1), (0,), (0, H)):
        h = torch.zeros(shape)
        with pytest.raises((RuntimeError, IndexError, ValueError)):
            ours(torch.zeros(B, I), (h, h) if kind == "LSTMCell" else h)


@every_layer
def test_regression_R21_upstream_gradients_of_wrong_shape(kind):
    """pytorch 194049: the entry points of backward."""
    _, ours, x, hx = given(kind)
    y, _ = ours(x, hx)
    for wrong in (torch.zeros(T, B, H - 1), torch.zeros(T, H), torch.zeros(T - 1, B, H), torch.zeros(())):
        with pytest.raises(RuntimeError, match="Mismatch in shape"):
            torch.autograd.grad([y], [x], [wrong.double()])


@every_layer
def test_regression_R22_batch_sizes_that_are_wrong(kind):
    """pytorch 172066, 173944 and 26107."""
    _, ours, x, _ = given(kind)
    for sizes in ([3, 3, 3], [3, 4], [5, 5, 6], [0, 15], [3, -1, 2, 11], []):
        wrong = rnn.PackedSequence(x.detach().reshape(-1, I), torch.tensor(sizes, dtype=torch.int64))
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            ours(wrong)


@every_layer
@pytest.mark.parametrize("times", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_regression_R29_training_is_deterministic(kind, times):
    """pytorch 18110, 35661 and 39849."""
    _, ours, x, hx = given(kind, 5, 33, x=(6, 17, 5), num_layers=2, dtype=torch.float32)
    first = None
    for _ in range(times):
        found = [*gradients(ours, ours(x, hx), (x, hx)).values()]
        first = found if first is None else first
        assert all(map(torch.equal, found, first))


@every_layer
def test_regression_R30_the_number_of_threads_changes_nothing(kind, threads):
    """pytorch 2201 and 88718."""
    _, ours, x, hx = given(kind, 9, 65, x=(7, 33, 9), dtype=torch.float32)
    first = None
    for n in (1, 2, 3, 4, 8):
        threads(n)
        result = ours(x, hx)
        found = [*flat(result), *gradients(ours, result, (x, hx)).values()]
        first = found if first is None else first
        assert all(map(torch.equal, found, first))


@every_layer
def test_regression_R31_results_do_not_depend_on_the_batch(kind):
    """tensorflow 30430 and 19270."""
    _, ours, x, _ = given(kind, 9, 33, x=(7, 19, 9), dtype=torch.float32)
    y, _ = ours(x)
    for rows in (slice(0, 1), slice(3, 5), slice(2, 19)):
        assert torch.equal(ours(x[:, rows])[0], y[:, rows])
    assert torch.equal(ours(x[:, 4])[0], y[:, 4])


@every_layer
def test_regression_R32_large_values_and_the_reverse_direction(kind):
    """onnx 2881, onnxscript 2852, pytorch 189225 and onnxruntime 4628."""
    theirs, ours, x, hx = given(kind, bidirectional=True)
    assert_same(theirs, ours, (100 * x.detach()).requires_grad_(), hx)
    backward = getattr(ft, kind)(I, H, dtype=torch.float64)
    backward.load_state_dict(
        {n.removesuffix("_reverse"): p for n, p in ours.state_dict().items() if "_reverse" in n}
    )
    assert torch.equal(backward(x.flip(0))[0].flip(0), ours(x)[0][:, :, H:])


@every_layer
def test_regression_R33_a_state_overwritten_before_backward(kind):
    """keras 20875 and 23462."""
    _, ours, x, _ = given(kind)
    kept = state_of(ours, B, x.detach())
    y, final = ours(x, kept)
    for s, new in zip(flat(kept), flat(final), strict=True):
        s.copy_(new.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@every_layer
def test_regression_R34_backward_in_eval_mode(kind):
    """pytorch 5878 and 15788."""
    theirs, ours, x, hx = given(kind, num_layers=2, dropout=0.5)
    assert_same(theirs.eval(), ours.eval(), x, hx)


@every_layer
def test_regression_R35_weights_that_are_not_one_chunk(kind):
    """pytorch/examples 248 and many: warnings and memory after weights were edited."""
    theirs, ours, x, hx = given(kind, num_layers=2)
    expected = ours(x, hx)[0]
    with warnings.catch_warnings(action="error"):
        for p in ours.parameters():
            p.data = p.detach().t().contiguous().t()
        assert torch.equal(ours(x, hx)[0], expected)
        ours.flatten_parameters()
        assert_same(theirs, ours, x, hx)
    gc.collect()


@pytest.mark.parametrize("weights", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "data", [torch.float32, torch.float64, torch.float16, torch.int64, torch.complex64], ids=str
)
@every_layer
def test_regression_R37_combinations_of_dtypes(kind, weights, data):
    """pytorch 88136, 116925 and others: each works, or is refused before anything runs."""
    _, ours = module_pair(kind, I, H, dtype=weights)
    x = torch.ones(T, B, I, dtype=data)
    if weights is data:
        assert ours(x)[0].dtype is data
        assert ours.last_path == "fused"
    else:
        with pytest.raises(
            (ValueError, RuntimeError), match=r"does not match weight dtype|must have the type"
        ):
            ours(x)


@every_layer
def test_regression_R38_no_fallback_goes_unseen(kind, warned):
    """keras PR 22279."""
    _, ours = module_pair(kind, I, H, dtype=torch.float16)
    assert ours.last_path is None
    with pytest.warns(ft.FallbackWarning, match="float16"):
        ours(torch.ones(T, B, I, dtype=torch.float16))
    assert ours.last_path == "fallback: the dtype is torch.float16"
    ft.set_fallback_errors(True)
    with pytest.raises(RuntimeError, match="float16"):
        ours(torch.ones(T, B, I, dtype=torch.float16))


@every_layer
def test_regression_R38_an_error_of_the_kernels_is_not_hidden(kind, monkeypatch):
    """keras PR 22279."""
    from fusedrnn.backends.cpu import CpuBackend

    def broken(*args, **options):
        raise MemoryError("no memory")

    _, ours = module_pair(kind, I, H)
    monkeypatch.setattr(CpuBackend, "run_forward", broken)
    with pytest.raises(MemoryError, match="no memory"):
        ours(torch.ones(T, B, I))
