"""The operators that stand for our kernels in PyTorch's graphs, as PyTorch checks them."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs PyTorch")
import torch

from fusedrnn import backends
from fusedrnn.torch.keys import CELLS, NORMED
from fusedrnn.torch.ops import Call
from fusedrnn.torch.recurrence import recurrence

# What PyTorch itself warns of while it compiles is no concern of these tests.
pytestmark = [
    pytest.mark.kernel,
    pytest.mark.usefixtures("compiles_anew"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning"),  # on Python 3.13.0
]

MODES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
T, B, I, H = 5, 3, 2, 4


def inputs(
    mode,
    dtype=torch.float64,
    *,
    bias=True,
    state=True,
    lengths=False,
    reset=False,
    normed=False,
    regularized=False,
    grad=True,
):
    """x, the state, the weights, no scalars, lengths, reset and the seed, as the operators take them."""
    G = MODES[mode]

    def draw(*size):
        return torch.randn(*size, dtype=dtype).mul_(0.5).requires_grad_(grad)

    state0 = [draw(B, H) for _ in CELLS[mode].states] if state else []
    biases = (draw(G * H), draw(G * H)) if bias else (None, None)
    gains = (draw(G * H), draw(G * H)) if normed else ()
    of_c = (draw(H), draw(H)) if normed and mode == "LSTM" else ()
    rows = torch.tensor([T, 2, 0]) if lengths else None
    cuts = torch.rand(T, B) < 0.3 if reset else None
    seed = torch.tensor(2**40 + 3) if regularized else None
    weights = [draw(G * H, I), draw(G * H, H), *biases, *gains, *of_c]
    return draw(T, B, I), state0, weights, [], rows, cuts, seed


def there(call):
    """The tensors of a call that may have a gradient."""
    return [t for t in call.learned() if t is not None]


def filled(call, tensors):
    """The call with others in their place."""
    rest = iter(tensors)
    return call.with_learned([None if t is None else next(rest) for t in call.learned()])


def cell_of(mode, options):
    """The name of the cell."""
    return mode + NORMED if options.get("normed") else mode


def call_of(
    mode, dtype=torch.float64, *, reverse=False, detach_every=None, grad=True, recompute=False, **options
):
    """What both operators begin with."""
    args = inputs(mode, dtype, grad=grad, **options)
    rates = ([0.25, 0.2, 0.1 if mode == "LSTM" else 0.0], 3) if options.get("regularized") else ([], 0)
    return Call(*args, cell_of(mode, options), reverse, recompute, detach_every, *rates)


def forward(call, return_states=False, save=True):
    """The results, and the tape in a list, or none."""
    found = torch.ops.fusedrnn.recurrence(*call, return_states, call.tape_rows() if save else None)
    n = call.results(return_states)
    assert len(found) == n + save
    return found[:n], found[n:]


# --- the operators ------------------------------------------------------------------------------------------

OPTIONS = {
    "all": {},
    "bare": {"bias": False, "state": False},
    "ragged": {"lengths": True, "reset": True},
    "normed": {"normed": True},
    "regularized": {"regularized": True, "lengths": True},
}
options_of = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def cases():
    """Every cell with every option, in both dtypes and directions; all products of these are slow, and so is
    relu, the same layer as tanh.
    """
    for i, mode in enumerate(MODES):
        for j, name in enumerate(OPTIONS):
            for k, dtype in enumerate((torch.float32, torch.float64)):
                for reverse in (False, True):
                    chosen = (i + j + k) % 2 == 0 and reverse == (j % 2 == 0) and mode != "RNN_RELU"
                    marks = () if chosen else pytest.mark.slow
                    label = f"{mode}-{name}-{str(dtype)[6:]}-{'reverse' if reverse else 'forward'}"
                    yield pytest.param(mode, OPTIONS[name], dtype, reverse, id=label, marks=marks)


@pytest.mark.parametrize(("mode", "options", "dtype", "reverse"), list(cases()))
def test_opcheck_of_forward(mode, options, dtype, reverse):
    call = call_of(mode, dtype, reverse=reverse, grad=False, **options)
    forward = torch.ops.fusedrnn.recurrence.default
    torch.library.opcheck(forward, (*call, True, call.tape_rows()))
    for rows in (None, T * B):  # fewer results: of the shapes alone, the graph takes longest
        torch.library.opcheck(forward, (*call, False, rows), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(("mode", "options", "dtype", "reverse"), list(cases()))
def test_opcheck_of_backward(mode, options, dtype, reverse):
    call = call_of(mode, dtype, reverse=reverse, grad=False, **options)
    learned, first = call.learned(), 1 + len(call.state0)
    for save in (True, False):
        results, tape = forward(call, True, save)
        grads = [torch.randn_like(t) for t in results]
        need = [t is not None for t in learned]
        if not save:
            grads[1:] = [None] * (len(grads) - 1)
            need = [k == first for k in range(len(learned))]
        arguments = (*call, results[0], tape, grads, need)
        torch.library.opcheck(torch.ops.fusedrnn.recurrence_backward.default, arguments)


def test_opcheck_of_detach_every():
    call = call_of("LSTM", detach_every=2, grad=False)
    torch.library.opcheck(torch.ops.fusedrnn.recurrence.default, (*call, True, T * B))
    (y, *_), tape = forward(call)
    arguments = (*call, y, tape, [y, None, None], [True] * 7)
    torch.library.opcheck(torch.ops.fusedrnn.recurrence_backward.default, arguments)


@pytest.mark.parametrize("recompute", [False, True], ids=["tape", "again"])
@options_of
@pytest.mark.parametrize("mode", MODES)
def test_gradcheck_of_the_node(mode, options, recompute):
    call = call_of(mode, reverse=True, recompute=recompute, **options)

    def run(*given):
        found = recurrence(filled(call, given), True)
        if call.lengths is not None:  # the kernels take no gradient of held states
            valid = (torch.arange(T)[:, None] < call.lengths)[:, :, None]
            found = [t * valid if t.dim() == 3 else t for t in found]
        return tuple(found)

    assert torch.autograd.gradcheck(run, there(call), fast_mode=True, check_batched_grad=True)


def test_gradcheck_of_one_step():
    step = call_of("LSTM", bias=False)._replace(x=torch.randn(B, I, dtype=torch.float64).requires_grad_())

    def run(*given):
        return tuple(recurrence(filled(step, given)))

    assert torch.autograd.gradcheck(run, there(step), check_batched_grad=True)


@options_of
@pytest.mark.parametrize("mode", MODES)
def test_the_tape_in_an_array_gives_the_same_bits(mode, options, poison):
    """As the kernels' own tape; the array may lie anywhere, and have more rows than it needs."""
    call = call_of(mode, torch.float32, grad=False, **options)
    (y, *_), (tape,) = forward(call)
    rows = T * B if call.lengths is None else int(call.lengths.sum())
    assert tape.shape == (rows, call.tape_width())
    backend = backends.usable(None)
    moved = torch.empty(tape.numel() + 1, dtype=tape.dtype)[1:].view_as(tape).copy_(tape)
    larger = torch.cat([tape, torch.full_like(tape, torch.nan)])
    need, cell = [t is not None for t in call.learned()], CELLS[call.cell]
    lengths, reset = call.rows()
    out = backend.forward(
        cell,
        call.x.numpy(),
        {name: w.numpy() for name, w in call.by_name().items()},
        tuple(s.numpy() for s in call.state0) or None,
        lengths=lengths,
        reset=reset,
        regularization=call.regularization(),
    )
    dx, dweights, dstate0, _ = backend.backward(out.tape, out.y)
    expected = (dx, *(dstate0 if call.state0 else ()), *map(dweights.get, cell.blocks))
    upstream = [y, *[None] * len(cell.states)]
    for kept in (tape, moved, larger):
        found = torch.ops.fusedrnn.recurrence_backward(*call, y, [kept], upstream, need)
        for ours_, own, needed in zip(found, expected, need, strict=True):
            assert np.array_equal(ours_.numpy(), own) if needed else ours_.numel() == 0


def test_a_tape_that_is_none_of_the_calls_is_refused():
    call = call_of("LSTM", grad=False)
    (y, *_), (tape,) = forward(call)
    run = torch.ops.fusedrnn.recurrence_backward
    for bad in (tape[:-1], tape[:, 1:], tape.double()[:0], tape.float(), tape[None]):
        with pytest.raises((ValueError, TypeError), match="tape"):
            run(*call, y, [bad], [y, None, None], [True] * 7)


def test_another_backend_runs_forward_again(monkeypatch):
    monkeypatch.setenv("FUSEDRNN_BACKEND", "reference")
    call = call_of("LSTM", lengths=True)
    recurrence(call)[0].sum().backward()
    leaves = there(call)
    found = [t.grad.clone() for t in leaves]
    monkeypatch.delenv("FUSEDRNN_BACKEND")
    for t in leaves:
        t.grad = None
    recurrence(call)[0].sum().backward()
    for a, t in zip(found, leaves, strict=True):
        torch.testing.assert_close(a, t.grad)


@pytest.mark.parametrize(
    ("mode", "options", "more"),
    [
        pytest.param(
            mode, OPTIONS[o], more, id=f"{mode}-{o}-{len(more)}", marks=pytest.mark.slow if odd else []
        )
        for i, mode in enumerate(MODES)
        for j, o in enumerate(OPTIONS)
        for k, more in enumerate(({}, {"reverse": True, "recompute": True}))
        for odd in [(i + j + k) % 2]
    ],
)
def test_second_derivatives(mode, options, more):
    """Of every tensor that the operator takes, through all that it returns."""
    call = call_of(mode, **options, **more)

    def results(*given):
        return tuple(recurrence(filled(call, given), return_states=True))

    assert torch.autograd.gradgradcheck(results, there(call), fast_mode=True)


@pytest.mark.parametrize("mode", MODES)
def test_second_derivatives_with_truncation(mode):
    """No gradient passes from one part of the sequence to the one before, of whatever order."""
    call, found = call_of(mode, detach_every=4, state=False), []
    T = len(call.x)
    wanted = there(call)
    for whole in (True, False):
        if whole:
            y = recurrence(call)[0]
        else:
            first, *state = recurrence(call._replace(x=call.x[:4], detach_every=None))
            rest = call._replace(x=call.x[4:], state0=[s.detach() for s in state], detach_every=None)
            y = torch.cat([first, recurrence(rest)[0]])
            assert len(y) == T > 4
        grads = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
        found.append([*grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), wanted)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
